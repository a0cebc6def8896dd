"""Faults of section 3.2 and 3.3 through every way of calling either classifier."""

from __future__ import annotations

import asyncio
import copy
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxruntime")

import torch

from defense.classify import zeroshot
from defense.cli.common import chosen_labels
from defense.errors import ConfigError, InvalidImageError, NonFiniteError
from defense.export.runtime import OnnxClassifier
from defense.hosts.controls import Controls

SIDE = 32


@pytest.fixture(scope="module", params=["torch", "onnx"])
def clf(request, tiny_classifier, tiny_bundle):
    """Either classifier, of the same CLIP; not to be changed."""
    return tiny_classifier if request.param == "torch" else OnnxClassifier(tiny_bundle)


@pytest.fixture
def pixels() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 3, SIDE, SIDE)).astype(np.float32)


# --- fault 37: tensors ------------------------------------------------------------------------------------------------


class OnAnotherDevice:
    """What of a CUDA tensor matters here: numpy cannot take it before it was brought over."""

    def __init__(self, tensor: torch.Tensor, is_here: bool = False) -> None:
        self.tensor, self.is_here = tensor, is_here

    def detach(self):
        return self

    def cpu(self):
        return self.tensor

    def __array__(self, *_arguments, **_options):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")


TENSORS = {
    "plain": lambda tensor: tensor,
    "bfloat16": lambda tensor: tensor.bfloat16(),
    "float16": lambda tensor: tensor.half(),
    "float64": lambda tensor: tensor.double(),
    "with-gradient": lambda tensor: tensor.requires_grad_(),
    "transposed": lambda tensor: tensor.permute(0, 1, 3, 2).contiguous().permute(0, 1, 3, 2),
    "on-another-device": OnAnotherDevice,
}


@pytest.mark.parametrize("kind", TENSORS)
def test_fault_37_tensors_of_any_device_and_dtype_are_taken(clf, pixels, kind):
    atol = 0.05 if "float16" in kind else 1e-6  # of the pixels' own rounding
    got = clf.encode_pixels(TENSORS[kind](torch.from_numpy(pixels.copy())))
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, clf.encode_pixels(pixels), atol=atol)


# --- fault 39: numbers that are none ----------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [0, 2])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("kind", ["array", "tensor"])
def test_fault_39_numbers_that_float32_does_not_have_are_refused_in_any_row(clf, pixels, row, value, kind):
    broken = pixels.astype(np.float64)
    broken[row, 1, 5, 7] = value
    with pytest.raises(NonFiniteError, match="input"):
        clf.encode_pixels(broken if kind == "array" else torch.from_numpy(broken))
    assert np.isfinite(clf.encode_pixels(pixels)).all()  # nothing of it stays


def test_fault_39_a_picture_with_such_numbers_leaves_the_others_as_they_are(clf, seven_pictures):
    alone = clf(seven_pictures[0])
    broken = np.full((20, 20, 3), np.nan)
    answers = clf([seven_pictures[0], broken, seven_pictures[1]], on_error="return")
    assert isinstance(answers[1], InvalidImageError)
    assert [row["label"] for row in answers[0]] == [row["label"] for row in alone]
    np.testing.assert_allclose([row["score"] for row in answers[0]], [row["score"] for row in alone], atol=1e-5)


# --- fault 40: nothing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on_error", ["raise", "skip", "return"])
def test_fault_40_no_pictures_give_no_answers_in_every_form(clf, on_error):
    n_labels, d_embed = clf.text_embeds().shape
    assert clf([], on_error=on_error) == []
    assert clf((), on_error=on_error) == []
    assert list(clf(iter(()), on_error=on_error)) == []
    assert list(clf.stream(iter(()), on_error=on_error, top_k=1)) == []
    for none in ([], (), iter(())):
        embeds = clf.transform(none)
        assert (embeds.shape, embeds.dtype) == ((0, d_embed), np.float32)
    assert (clf.predict_proba([]).shape, clf.predict_proba([]).dtype) == ((0, n_labels), np.float32)
    assert clf.predict([]).shape == (0,)
    embeds = clf.encode_pixels(np.empty((0, 3, SIDE, SIDE), np.float32))
    assert (embeds.shape, embeds.dtype) == ((0, d_embed), np.float32)


def test_fault_40_a_batch_of_nothing_but_broken_pictures_gives_their_errors(clf):
    broken = [b"<html>"] * (clf.batch_size + 1)
    assert [error.code for error in clf(broken, on_error="return")] == ["not_an_image"] * len(broken)
    assert clf(broken, on_error="skip") == []


# --- fault 43: streams without end ------------------------------------------------------------------------------------


class Counted(np.ndarray):
    """A picture that is counted while anybody holds it."""


def stream_of(n: int, alive: list[int], most: list[int]):
    """Yield n pictures, of four kinds, each hundredth of them broken; count those that live."""

    def gone() -> None:
        alive[0] -= 1

    kinds = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), dtype=np.uint8)
    for i in range(n):
        if i % 100 == 99:
            yield b"<html>"
            continue
        picture = kinds[i % 4].copy().view(Counted)
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(picture, gone)
        yield picture


def check_stream(clf, n: int) -> None:
    want = [clf(np.asarray(picture)) for picture in stream_of(4, [0], [0])]
    alive, most = [0], [0]
    n_answers = 0
    for i, answer in enumerate(clf.stream(stream_of(n, alive, most), on_error="return")):
        n_answers += 1
        if i % 100 == 99:
            assert answer.code == "not_an_image"
        else:
            assert answer[0]["label"] == want[i % 4][0]["label"]
            assert answer[0]["score"] == pytest.approx(want[i % 4][0]["score"], abs=1e-5)
    assert n_answers == n
    assert most[0] <= 4 * clf.batch_size
    assert alive[0] <= 4 * clf.batch_size


def test_fault_43_a_stream_is_aligned_and_holds_a_few_batches_at_most(clf):
    check_stream(clf, 1_000)


@pytest.mark.slow
def test_fault_43_so_is_one_of_ten_thousand(clf):
    check_stream(clf, 10_000)


# --- fault 46: labels that are more than text, at every entrance ------------------------------------------------------

NOT_TEXT = ["<|endoftext|>", "dog\u202egod", "a\0b", "line\nbreak", "&lt;|startoftext|&gt;"]


@pytest.mark.parametrize("label", NOT_TEXT)
def test_fault_46_no_way_of_naming_labels_lets_more_than_text_through(clf, seven_pictures, label):
    before = list(clf.classes_)
    entrances = [
        lambda: clf.set_labels([label, "cat"]),
        lambda: clf.set_labels(["dog", "cat"], f"a {label} of {{}}"),
        lambda: clf(seven_pictures[0], candidate_labels=["cat", label]),
        lambda: clf(seven_pictures[:2], candidate_labels=["cat", label], on_error="return"),
        lambda: clf(seven_pictures[0], ["dog", "cat"], hypothesis_template=f"{label} {{}}"),
    ]
    if isinstance(clf, OnnxClassifier):
        entrances.append(lambda: clf.set_label_embeds([label, "cat"], clf.text_embeds()[:2]))
    for enter in entrances:
        with pytest.raises(ConfigError, match="holds"):
            enter()
    assert list(clf.classes_) == before


@pytest.mark.parametrize("label", NOT_TEXT[:3])
def test_fault_46_nor_do_files_of_labels(clf, tmp_path, label):
    (tmp_path / "labels.txt").write_text(f"cat\n{label}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="holds"):
        chosen_labels(None, tmp_path / "labels.txt", False)


# --- fault 49: very many labels ---------------------------------------------------------------------------------------


def test_fault_49_of_a_hundred_thousand_scores_only_the_best_become_an_answer():
    n = 100_000
    names = [f"label {i}" for i in range(n)]
    scores = np.random.default_rng(0).permutation(n).astype(np.float32)
    tracemalloc.start()
    try:
        answer = zeroshot.prediction_of(names, scores, 5)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [row["score"] for row in answer] == [n - 1, n - 2, n - 3, n - 4, n - 5]
    assert [row["label"] for row in answer] == [f"label {i}" for i in np.argsort(-scores)[:5]]
    assert peak < 5_000_000  # a dictionary for each would take four times as much


@pytest.mark.parametrize("top_k", [1, 3])
def test_fault_49_labels_are_encoded_once_in_chunks(clf, seven_pictures, monkeypatch, top_k):
    rows = []
    encode_text = type(clf).encode_text

    def counted(self, input_ids):
        rows.append(len(input_ids))
        return encode_text(self, input_ids)

    monkeypatch.setattr(type(clf), "encode_text", counted)
    clip = getattr(clf, "clip", None)
    if clip is not None:
        of_clip = type(clip).encode_text
        monkeypatch.setattr(type(clip), "encode_text", lambda self, ids: (rows.append(len(ids)), of_clip(self, ids))[1])
    many = [f"thing {top_k} {i}" for i in range(1_500)]
    answers = [clf(picture, candidate_labels=many, top_k=top_k) for picture in seven_pictures[:3]]
    assert [len(answer) for answer in answers] == [top_k] * 3
    assert max(rows) <= 1_024
    assert sum(rows) in (1_500, 3_000)  # the second where the classifier asks its CLIP, which is counted too


# --- fault 73: many callers at once -----------------------------------------------------------------------------------


def test_fault_73_threads_with_labels_of_their_own_get_the_answers_of_one_caller(clf, seven_pictures):
    vocabularies = [["stone", "tree"], ["car", "boat", "house"], ["dog", "cat"]]
    want = [clf(seven_pictures, candidate_labels=names) for names in vocabularies]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(clf, seven_pictures, vocabularies[i % 3]) for i in range(24)]
        for i, future in enumerate(asked):
            assert future.result() == want[i % 3]


def test_fault_73_tasks_of_one_event_loop_get_the_answers_of_one_caller(clf, seven_pictures):
    vocabularies = [["stone", "tree"], ["car", "boat", "house"], ["dog", "cat"]]
    want = [clf(seven_pictures[:3], candidate_labels=names) for names in vocabularies]

    async def ask(i: int):
        return await asyncio.to_thread(clf, seven_pictures[:3], vocabularies[i % 3])

    async def all_of_them():
        return await asyncio.gather(*(ask(i) for i in range(12)))

    assert asyncio.run(all_of_them()) == [want[i % 3] for i in range(12)]


# --- fault 132: compiled models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["model", "visual"])
def test_fault_132_what_a_compiled_model_cannot_do_for_one_call_is_refused(tiny_classifier, part):
    clf = copy.deepcopy(tiny_classifier)
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    model = clf.clip.model
    (model if part == "model" else model.visual).compile(backend="eager")  # compiles nothing before it is called
    pixel_values = np.zeros((1, 3, SIDE, SIDE), np.float32)
    for call in (
        lambda: clf.explain(picture),
        lambda: clf.encode_pixels(pixel_values, plain=True),
        lambda: clf.classify_with(picture, Controls(strength=0.5)),
        lambda: clf.probe(picture).scores(Controls()),
    ):
        with pytest.raises(ConfigError, match=r"compiled with the defense inside.*set_strength\(0\)"):
            call()
