"""What callers hand over: pictures in many forms, prepared pixels, counts, devices, labels that are one."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
import torch

from defense import wrap
from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.data.labels import TEMPLATES
from defense.errors import BackendError, ConfigError, InvalidImageError, NonFiniteError, ShapeError
from defense.hosts.clip import load_clip, resolve_device

from ..conftest import clip_of, random_defense, random_sae

LABELS = ["dog", "cat", "fish"]


@pytest.fixture
def clf(tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(act="topk", k=8), LatentSet("text", tuple(range(60)))))
    return RobustClassifier(clip_of(tiny_clip), defense, batch_size=4).set_labels(LABELS)


@pytest.fixture
def paths(seven_pictures, tmp_path):
    files = [tmp_path / f"{n}.png" for n in range(7)]
    for file, pixels in zip(files, seven_pictures, strict=True):
        Image.fromarray(pixels).save(file)
    return list(map(str, files))


class Rows:
    """A data set of the map style: it has a length, and does not end with IndexError."""

    def __init__(self, rows):
        self.rows = rows

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index % len(self.rows)]


class Stream(torch.utils.data.IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


def same(got, want) -> bool:
    """Whether answers are the same but for the order of additions in batches of other sizes."""
    pairs = [(a, b) for x, y in zip(got, want, strict=True) for a, b in zip(x, y, strict=True)]
    return all(a["label"] == b["label"] and abs(a["score"] - b["score"]) < 1e-5 for a, b in pairs)


# --- one, many, a stream ----------------------------------------------------------------------------------------------


def test_the_pipelines_names_mean_the_same(clf, paths):
    want = clf(paths)
    assert same(clf(image=paths, batch_size=3), want)
    assert same([clf(image=paths[0], candidate_labels=LABELS)], want[:1])
    for call in (lambda: clf(), lambda: clf(paths, image=paths)):
        with pytest.raises(ConfigError, match="give pictures once"):
            call()


def test_a_batch_size_holds_for_one_call(clf, paths, monkeypatch):
    sizes = []
    encode = clf._encode_image
    monkeypatch.setattr(clf, "_encode_image", lambda pixels, **how: sizes.append(len(pixels)) or encode(pixels, **how))
    clf(paths, batch_size=5)
    clf(paths)
    assert sizes == [5, 2, 4, 3]


@pytest.mark.parametrize(
    "column",
    [
        pytest.param(np.array, id="array of str"),
        pytest.param(lambda paths: np.array(paths, dtype=object), id="array of objects"),
        pytest.param(lambda paths: pytest.importorskip("pandas").Series(paths), id="pandas"),
        pytest.param(lambda paths: np.stack([np.asarray(Image.open(path)) for path in paths]), id="array of pictures"),
    ],
)
def test_fault_columns_of_pictures_are_many(clf, paths, column):
    assert clf(column(paths)) == clf(paths)
    np.testing.assert_array_equal(clf.predict(column(paths)), clf.predict(paths))


@pytest.mark.parametrize(
    "dataset",
    [
        pytest.param(Rows, id="rows are pictures"),
        pytest.param(lambda paths: Rows([{"image": path, "label": 3} for path in paths]), id="rows have an image"),
        pytest.param(Stream, id="iterable"),
        pytest.param(lambda paths: Stream([{"image": path} for path in paths]), id="iterable with images"),
    ],
)
def test_data_sets_are_streamed(clf, paths, dataset):
    answers = clf(dataset(paths))
    assert same([next(answers)], clf(paths)[:1])
    assert same(answers, clf(paths)[1:])
    np.testing.assert_array_equal(clf.predict(dataset(paths)), clf.predict(paths))


@pytest.mark.parametrize("given", [7, 1.5, {"image": "x.png"}, object(), torch.zeros(3), np.zeros(3)], ids=repr)
def test_what_is_no_picture_and_holds_none_is_one_error(clf, given):
    with pytest.raises(InvalidImageError):
        clf(given)


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", ["8", 8.0, 0, -1, True, None, np.float32(3)], ids=repr)
def test_fault_a_count_that_is_none_is_refused(tiny_clip, clf, count):
    with pytest.raises(ConfigError, match="batch_size"):
        RobustClassifier(clip_of(tiny_clip), clf.defense, batch_size=count)
    with pytest.raises(ConfigError, match="batch_size"):
        clf.batch_size = count
    for name in ("batch_size", "top_k"):
        if count is not None:
            with pytest.raises(ConfigError, match=name):
                clf([], **{name: count})


def test_a_count_of_numpy_is_one(clf, paths):
    assert len(clf(paths[0], top_k=np.int64(2), batch_size=np.int32(1))) == 2


@pytest.mark.parametrize("plain", [False, True])
def test_fault_no_pixels_give_no_embeddings(clf, plain):
    embeds = clf.encode_pixels(np.zeros((0, 3, 32, 32), np.float32), plain=plain)
    assert (embeds.shape, embeds.dtype) == ((0, 32), np.float32)


@pytest.mark.parametrize(
    "shape",
    [(3, 32, 32), (1, 3, 32, 31), (1, 1, 32, 32), (1, 32, 32, 3), (), (0,), (2, 3, 0, 0), (0, 4, 32, 32)],
    ids=str,
)
def test_fault_pixels_of_another_shape_are_refused(clf, shape):
    with pytest.raises(ShapeError, match=r"want \[batch, 3, 32, 32\]"):
        clf.encode_pixels(np.zeros(shape, np.float32))


@pytest.mark.parametrize("kind", ["uint8", "int64", "bool", "U3", "complex64"])
def test_pixels_that_are_no_floats_are_refused(clf, kind):
    with pytest.raises(ConfigError, match="want floats"):
        clf.encode_pixels(np.zeros((1, 3, 32, 32), kind))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str)
def test_tensors_are_pixels_too(clf, dtype):
    pixels = torch.linspace(-1, 1, 2 * 3 * 32 * 32).reshape(2, 3, 32, 32).to(dtype).requires_grad_()
    np.testing.assert_array_equal(clf.encode_pixels(pixels), clf.encode_pixels(pixels.detach().float().numpy()))


@pytest.mark.parametrize(
    ("value", "dtype"), [(1e300, "float64"), (np.nan, "float32"), (-np.inf, "float16"), (3e38, "float32")]
)
def test_fault_numbers_that_are_not_finite_after_the_cast_or_in_the_answer_are_refused(clf, value, dtype):
    pixels = np.zeros((2, 3, 32, 32), dtype)
    pixels[1] = value
    with pytest.raises(NonFiniteError):
        clf.encode_pixels(pixels)


@pytest.mark.parametrize("on_error", ["raise", "skip", "return"])
def test_fault_a_picture_that_the_model_makes_nan_of_is_an_error_of_its_own(clf, paths, monkeypatch, caplog, on_error):
    want, encode = clf(paths), clf._encode_image

    def broken(pixels, **how):
        embeds = encode(pixels, **how).copy()
        embeds[1] = np.nan
        return embeds

    monkeypatch.setattr(clf, "_encode_image", broken)
    with caplog.at_level(logging.WARNING):
        if on_error == "raise":
            with pytest.raises(NonFiniteError, match="image_embeds"):
                clf(paths, on_error=on_error)
            return
        got = clf(paths, on_error=on_error)  # four in a batch: the second and the sixth
    kept = [answer for answer in got if not isinstance(answer, NonFiniteError)]
    for answer, other in zip(kept, [want[n] for n in (0, 2, 3, 4, 6)], strict=True):
        assert [row["label"] for row in answer] == [row["label"] for row in other]
    assert [n for n, answer in enumerate(got) if isinstance(answer, NonFiniteError)] == [1, 5] * (on_error == "return")
    assert caplog.text.count("skipped a picture") == 2 * (on_error == "skip")
    for call in (clf.transform, clf.predict, clf.predict_proba):
        with pytest.raises(NonFiniteError):
            call(paths)


def test_fault_a_factor_between_cosines_and_logits_that_is_not_finite_gives_no_scores(clf, paths):
    with torch.no_grad():
        clf.clip.model.logit_scale.fill_(1e4)
    for call in (lambda: clf(paths), lambda: clf.predict_proba(paths), lambda: clf.explain(paths[0])):
        with pytest.raises(NonFiniteError, match="scores"):
            call()


# --- labels that are one ----------------------------------------------------------------------------------------------

TWINS = {
    "case": ("apple", "Apple"),
    "inner spaces": ("red  fish", "red fish"),
    "entity": ("fish & chips", "fish &amp; chips"),
    "quotes": ("dog\u2019s", "dog's"),
    "composed": ("caf\u00e9", "cafe\u0301"),
    "cut": ("a " * 40 + "dog", "a " * 40 + "cat"),
}


@pytest.mark.parametrize("twins", TWINS.values(), ids=TWINS)
@pytest.mark.parametrize("templates", ["simple", "openai", "{}"])
def test_fault_labels_that_are_one_to_the_text_tower_are_refused_and_both_are_named(clf, twins, templates):
    first, second = twins
    for call in (
        lambda: clf.set_labels(["tree", first, "house", second], templates),
        lambda: clf(np.zeros((40, 40, 3), np.uint8), candidate_labels=["tree", first, "house", second]),
    ):
        with pytest.raises(ConfigError) as caught:
            call()
        assert repr(first)[:80] in str(caught.value)
        assert repr(second)[:80] in str(caught.value)
    assert clf.prompts.labels == tuple(LABELS)


def test_labels_that_only_one_template_cuts_are_two(clf):
    long = "a photo of something that stands there all the while and is said to be a {}."
    clf.set_labels(["dog", "cat"], [long, "{}"])
    with pytest.raises(ConfigError, match="same text"):
        clf.set_labels(["dog", "cat"], [long])


def test_many_labels_and_templates_are_told_apart(clf):
    clf.set_labels([f"thing {n}" for n in range(2000)], TEMPLATES["openai"][:3])


# --- models and devices -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu"), "auto"], ids=repr)
def test_fault_devices_of_every_kind_are_taken(tiny_folder, device):
    want = "cuda" if device == "auto" and torch.cuda.is_available() else "cpu"
    assert load_clip(f"local-dir:{tiny_folder}", device=device).device.type == want


@pytest.mark.parametrize("device", ["gpu", "", "cpu:x", None, 1.5, True, -1, [], "meta"], ids=repr)
def test_fault_what_is_no_device_is_refused(device):
    with pytest.raises(ConfigError, match="device="):
        resolve_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
@pytest.mark.parametrize("device", [0, "cuda:7", torch.device("cuda"), "xpu", "hpu"], ids=repr)
def test_fault_68_a_device_that_is_not_there_is_refused(device):
    with pytest.raises(BackendError, match="device="):
        resolve_device(device)


class OpenAIVisual(torch.nn.Module):
    """The layout of OpenAI's own package: no grid_size, no image_size, tokens before the batch."""

    def __init__(self):
        super().__init__()
        self.input_resolution, self.output_dim = 32, 16
        self.transformer = torch.nn.Module()
        self.transformer.width, self.transformer.layers = 64, 1
        self.transformer.resblocks = torch.nn.Sequential(torch.nn.Linear(64, 64))


class OpenAIModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.visual = OpenAIVisual()


@pytest.mark.parametrize(
    "make",
    [
        OpenAIModel,
        lambda: "ViT-B-32",
        lambda: None,
        dict,
        lambda: torch.nn.Linear(2, 2),
        lambda: torch.nn.Linear,
    ],
    ids=["OpenAI's clip", "a name", "None", "a dict", "a layer", "a class"],
)
def test_fault_what_is_no_model_of_open_clip_is_refused(clf, make):
    with pytest.raises(ConfigError, match=r"open_clip\.create_model"):
        wrap(make(), clf.defense)
    with pytest.raises(ConfigError, match="want a Clip"):
        RobustClassifier(make(), clf.defense)


def test_fault_a_bare_model_of_timm_is_refused(clf):
    model = pytest.importorskip("timm").create_model("vit_tiny_patch16_224", pretrained=False, depth=1)
    for call in (lambda: wrap(model, clf.defense), lambda: RobustClassifier(model, clf.defense)):
        with pytest.raises(ConfigError):
            call()


@pytest.mark.parametrize("defense", ["embedded", None, 3])
def test_fault_what_is_no_defense_is_refused(tiny_clip, defense):
    with pytest.raises(ConfigError, match="want a Defense"):
        wrap(tiny_clip, defense)
    if defense is not None:
        with pytest.raises(ConfigError, match="want a Defense"):
            RobustClassifier(clip_of(tiny_clip), defense)


def test_a_model_in_a_box_is_named(clf):
    clip = clf.clip
    with pytest.raises(ConfigError, match=r"\.module"):
        wrap(torch.nn.DataParallel(clip.model), clf.defense)


def test_the_preprocessing_of_another_size_is_refused_by_shape(clf):
    other = replace(clf.clip.preprocess, size=(16, 16))
    with pytest.raises(ShapeError):
        clf.encode_pixels(np.zeros((1, 3, *other.size), np.float32))
