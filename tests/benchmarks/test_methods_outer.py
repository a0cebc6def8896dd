"""Methods that compare with ours and leave its SAE alone: what their formulas say, on cases with a known answer."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.datasets import Dataset, Example, Task
from defense.benchmarks.methods import FACTORIES, NotApplicableError, concepts, make_methods
from defense.benchmarks.methods import defense_prefix as dp
from defense.benchmarks.methods import leace as leace_module
from defense.benchmarks.methods import ocr_blur as ocr
from defense.benchmarks.methods import sampling_tar as tar
from defense.benchmarks.methods.embeddings import EditedImages, EditedTexts, unit
from defense.benchmarks.methods.heads import all_heads, attention_of, cls_attention, vision_with_heads
from defense.benchmarks.methods.leace import erasure_of
from defense.benchmarks.methods.mirror_clip import visual_part
from defense.benchmarks.methods.orth_cali import calibrated_projection
from defense.benchmarks.methods.roboshot import steered
from defense.benchmarks.named_clip import weights_sha256
from defense.classify.classifier import RobustClassifier
from defense.data.labels import Prompts
from defense.errors import BackendError, ConfigError
from defense.hosts.clip import load_clip
from defense.world.scenes import load_font

TYPOGRAPHIC = ("leace", "sampling-tar", "defense-prefix", "mirror-clip", "ocr-blur")
GROUPED = ("leace", "orth-cali", "roboshot", "mirror-clip")
NAMES = ("dog", "cat", "fish")

needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")


@dataclass(frozen=True)
class Held:
    """A picture in memory: noise of a seed, with a bright bar across its lower part where something is written."""

    seed: int
    has_word: bool

    def digest(self) -> str:
        return f"{self.seed}{self.has_word}"

    def load(self) -> Image.Image:
        pixels = np.random.default_rng(self.seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if self.has_word:
            pixels[24:] = [255, 255, 0]
        return Image.fromarray(pixels)


def twins(n: int) -> tuple[Dataset, Dataset]:
    """Pictures with and without a word."""
    attacked = tuple(Example(f"{i}", Held(i, True), i % 3, (i + 1) % 3) for i in range(n))
    clean = tuple(Example(f"{i}", Held(i, False), i % 3) for i in range(n))
    return Dataset("mini", "attacked", attacked, NAMES), Dataset("mini", "clean", clean, NAMES)


def groups(n: int) -> Dataset:
    """Pictures of four groups; the attribute is the bar."""
    examples = tuple(Example(f"{i}", Held(i, i % 2 == 1), (i // 2) % 2, attribute=i % 2) for i in range(n))
    return Dataset("birds", "test", examples, ("landbird", "waterbird"), group_names=("a", "b", "c", "d"))


@pytest.fixture
def clip(tiny_folder):
    return load_clip(f"local-dir:{tiny_folder}")


@pytest.fixture
def typographic():
    attacked, clean = twins(24)
    return Task("mini", "written words", (clean, attacked), train=attacked, train_clean=clean)


@pytest.fixture
def grouped():
    return Task("birds", "birds", (groups(12),), train=groups(24))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(dp, "STEPS", 5)


def method(name: str):
    (made,) = make_methods([name], None)
    return made


def pictures() -> list[Image.Image]:
    return [Held(seed, seed % 2 == 0).load() for seed in range(100, 104)]


def n_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


# --- all of them ------------------------------------------------------------------------------------------------------

CASES = [pytest.param(name, "typographic", id=name) for name in TYPOGRAPHIC if name != "ocr-blur"]
CASES += [pytest.param(name, "grouped", id=f"{name}-groups") for name in GROUPED]
CASES.append(pytest.param("ocr-blur", "typographic", id="ocr-blur", marks=needs_tesseract))


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_host_is_restored_bit_for_bit(name, task, clip, request):
    before, sha256 = RobustClassifier(clip).transform(pictures()), weights_sha256(clip.model)
    texts = clip.model.encode_text(torch.from_numpy(clip.tokenizer(["a photo of a * dog."])))
    made = method(name)
    made.fit(clip, request.getfixturevalue(task))
    encoded = []

    def fail_after_use() -> None:
        with made.apply(clip) as encoder:
            encoded.append(encoder.image_embeds(pictures()))
            encoded.append(encoder.text_embeds(Prompts(NAMES, ("a photo of a {}.",))))
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_use()
    embeds, text_embeds = encoded
    assert embeds.dtype == text_embeds.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text_embeds, axis=1), 1, rtol=1e-5)
    assert n_hooks(clip.model) == 0
    assert weights_sha256(clip.model) == sha256
    np.testing.assert_array_equal(RobustClassifier(clip).transform(pictures()), before)
    assert torch.equal(clip.model.encode_text(torch.from_numpy(clip.tokenizer(["a photo of a * dog."]))), texts)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_two_fits_learn_the_same_and_settings_are_json(name, task, clip, request):
    first, second = method(name), method(name)
    first.fit(clip, request.getfixturevalue(task))
    second.fit(clip, request.getfixturevalue(task))
    assert json.loads(json.dumps(first.settings())) == second.settings()


@pytest.mark.parametrize("name", ["leace", "sampling-tar", "defense-prefix"])
def test_settings_tell_what_was_learned_apart(name, clip, typographic, monkeypatch):
    made, other = method(name), method(name)
    made.fit(clip, typographic)
    if name == "sampling-tar":
        other.heads = ((0, 0),)
    else:
        fewer = replace(typographic, train=twins(6)[0], train_clean=twins(6)[1])
        other.fit(clip, fewer)
    assert made.settings() != other.settings()


@pytest.mark.parametrize("name", ["leace", "sampling-tar", "defense-prefix"])
@pytest.mark.parametrize("missing", [{"train": None, "train_clean": None}, {"train_clean": None}])
def test_a_task_without_training_twins_is_not_applicable(name, missing, clip, typographic):
    with pytest.raises(NotApplicableError, match=f"{name} needs"):
        method(name).fit(clip, replace(typographic, **missing))


@pytest.mark.parametrize("name", ["sampling-tar", "defense-prefix", "ocr-blur"])
def test_methods_against_words_refuse_tasks_without(name, clip, grouped):
    with pytest.raises(NotApplicableError, match=f"{name} needs"):
        method(name).fit(clip, grouped)


@pytest.mark.parametrize("name", ["orth-cali", "roboshot"])
def test_methods_that_know_the_attribute_from_texts_refuse_other_tasks(name, clip, typographic):
    with pytest.raises(NotApplicableError, match=f"{name} needs texts"):
        method(name).fit(clip, typographic)


@pytest.mark.parametrize("name", [*TYPOGRAPHIC, "orth-cali", "roboshot"])
def test_a_strength_is_refused(name):
    with pytest.raises(ConfigError, match="no strength"):
        FACTORIES[name](f"{name}@0.5", None, 0.5)


def test_a_row_of_zeros_stays_one():
    np.testing.assert_array_equal(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), np.float32([[0.6, 0.8], [0, 0]]))


def test_edits_reach_the_embeddings_they_name_and_no_others(clip):
    prompts = Prompts(NAMES, ("{}",))
    stock_images = RobustClassifier(clip).transform(pictures())
    images, texts = EditedImages(clip, np.negative), EditedTexts(clip, np.negative)
    np.testing.assert_allclose(images.image_embeds(pictures()), -stock_images, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(texts.image_embeds(pictures()), stock_images)
    np.testing.assert_allclose(texts.text_embeds(prompts), -images.text_embeds(prompts), rtol=1e-6, atol=1e-7)
    assert texts.edits_text
    assert not images.edits_text


# --- LEACE ------------------------------------------------------------------------------------------------------------


def correlated(n: int = 400, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Skewed rows and a binary concept that shows in several columns."""
    rng = np.random.default_rng(seed)
    z = rng.integers(0, 2, n)
    x = rng.normal(size=(n, 6)) @ rng.normal(size=(6, 6)) + np.outer(z, [2.0, -1, 0, 0, 1, 0])
    return x, z[:, None].astype(float)


def explained(x: np.ndarray, z: np.ndarray) -> float:
    """Share of a concept that the best linear probe explains."""
    design = np.column_stack([x, np.ones(len(x))])
    residual = z - design @ np.linalg.lstsq(design, z, rcond=1e-10)[0]
    return 1 - float(np.square(residual).sum() / np.square(z - z.mean()).sum())


def test_leace_leaves_nothing_to_a_linear_probe():
    x, z = correlated()
    assert explained(x, z) > 0.3
    erased = erasure_of(x, z)(x)
    assert explained(erased, z) == pytest.approx(0, abs=1e-9)
    guesses = (
        np.column_stack([erased, np.ones(len(x))])
        @ np.linalg.lstsq(np.column_stack([erased, np.ones(len(x))]), z, rcond=1e-10)[0]
    )
    chance = max(z.mean(), 1 - z.mean())
    assert ((guesses > 0.5) == z).mean() <= chance + 1e-9


def test_leace_is_idempotent_and_keeps_the_mean():
    x, z = correlated()
    erasure = erasure_of(x, z)
    once = erasure(x)
    np.testing.assert_allclose(erasure(once), once, atol=1e-10)
    np.testing.assert_allclose(once.mean(0), x.mean(0), atol=1e-10)


def test_leace_changes_less_than_an_orthogonal_projection():
    x, z = correlated()
    direction = (x - x.mean(0)).T @ (z - z.mean())
    direction /= np.linalg.norm(direction)
    projected = x - (x - x.mean(0)) @ direction @ direction.T
    assert explained(projected, z) == pytest.approx(0, abs=1e-9)  # it erases too
    inverse = np.linalg.inv(np.cov(x.T))
    moved, least = x - projected, x - erasure_of(x, z)(x)
    assert np.einsum("ni,ij,nj->", least, inverse, least) < np.einsum("ni,ij,nj->", moved, inverse, moved)


def test_leace_bears_embeddings_that_do_not_fill_their_space():
    x, z = correlated(n=40)
    flat = np.column_stack([x, x[:, 0] + x[:, 1], np.zeros(len(x))])
    erased = erasure_of(flat, z)(flat)
    assert np.isfinite(erased).all()
    centered = flat - flat.mean(0)
    np.testing.assert_allclose((erased - flat.mean(0)).T @ (z - z.mean()), 0, atol=1e-8 * np.abs(centered).sum())


def test_leace_spares_a_label_that_goes_with_the_attribute(clip, grouped, monkeypatch):
    rng = np.random.default_rng(0)
    sizes = {(0, 0): 90, (0, 1): 10, (1, 0): 10, (1, 1): 90}
    y, a = np.array([key for key, count in sizes.items() for _ in range(count)]).T
    x = np.column_stack([y, a, rng.normal(size=len(y))]) + 0.1 * rng.normal(size=(len(y), 3))
    examples = tuple(Example(f"{i}", Held(i, False), int(y[i]), attribute=int(a[i])) for i in range(len(y)))
    monkeypatch.setattr(leace_module, "image_embeds_of", lambda _host, shown: x[[int(e.key) for e in shown]])
    made = method("leace")
    made.fit(clip, replace(grouped, train=replace(groups(8), examples=examples)))
    by_label = [made._erasure(x[y == value])[:, 0].mean() for value in (0, 1)]
    by_attribute = [made._erasure(x[(y == 0) & (a == value)])[:, 1].mean() for value in (0, 1)]
    assert by_label[1] - by_label[0] > 0.9
    assert by_attribute[1] - by_attribute[0] == pytest.approx(0, abs=0.1)


# --- MirrorCLIP -------------------------------------------------------------------------------------------------------


def test_mirror_keeps_the_dimensions_that_agree_in_sign():
    embeds, mirrored = np.array([[0.6, 0.8, 0.0]]), np.array([[0.6, -0.6, 0.5]])
    np.testing.assert_allclose(visual_part(embeds, mirrored), [[1, 0, 0]])


def test_mirror_gives_a_picture_and_its_mirror_image_the_same(clip, typographic):
    made = method("mirror-clip")
    made.fit(clip, typographic)
    with made.apply(clip) as encoder:
        straight = encoder.image_embeds(pictures())
        turned = encoder.image_embeds([each.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for each in pictures()])
    np.testing.assert_allclose(straight, turned, atol=1e-5)
    assert np.abs(straight - RobustClassifier(clip).transform(pictures())).max() > 1e-3


# --- Orth-Cali and RoboShot -------------------------------------------------------------------------------------------


def test_orth_cali_is_the_orthogonal_projection_where_nothing_is_calibrated():
    rng = np.random.default_rng(0)
    spurious = rng.normal(size=(3, 8))
    projection = calibrated_projection(spurious, rng.normal(size=(2, 2, 8)), lam=0)
    np.testing.assert_allclose(projection @ spurious.T, 0, atol=1e-10)
    np.testing.assert_allclose(projection, projection.T, atol=1e-10)
    np.testing.assert_allclose(projection @ projection, projection, atol=1e-10)
    assert np.linalg.matrix_rank(projection) == 5


def test_orth_cali_minimizes_its_objective():
    """|P - P_0|^2 + lambda mean |P (z_i - z_j)|^2, whose gradient is P - P_0 + lambda P M."""
    rng = np.random.default_rng(1)
    spurious, pairs, lam = rng.normal(size=(2, 8)), rng.normal(size=(3, 2, 8)), 50.0
    plain, projection = calibrated_projection(spurious, pairs, 0), calibrated_projection(spurious, pairs, lam)
    differences = pairs[:, 0] - pairs[:, 1]
    M = differences.T @ differences / len(differences)
    np.testing.assert_allclose(projection - plain + lam * projection @ M, 0, atol=1e-9)
    assert np.linalg.norm(projection @ differences.T) < 0.1 * np.linalg.norm(plain @ differences.T)


def test_orth_cali_edits_texts_alone(clip, grouped):
    made = method("orth-cali")
    made.fit(clip, grouped)
    stock = RobustClassifier(clip).transform(pictures())
    with made.apply(clip) as encoder:
        np.testing.assert_array_equal(encoder.image_embeds(pictures()), stock)
        assert encoder.edits_text
        found = encoder.text_embeds(Prompts(("a photo of land.", "dog"), ("{}",)))
    assert np.linalg.norm(made._projection @ found[1]) > 0.01


def test_roboshot_takes_harmful_directions_out_and_doubles_helpful_ones():
    x = np.array([[1.0, 2.0, 3.0, 4.0]])
    harmful, helpful = np.array([[0.0, 0.0, 5.0, 0.0], [0.0, 0.0, 1.0, 1.0]]), np.array([[0.0, 7.0, 0.0, 0.0]])
    np.testing.assert_allclose(steered(x, harmful, helpful), [[1, 4, 0, 0]], atol=1e-12)


def test_roboshot_without_insights_is_the_identity():
    x, none = np.random.default_rng(0).normal(size=(3, 4)), np.zeros((0, 4))
    np.testing.assert_array_equal(steered(x, none, none), x)


def test_insights_with_unknown_words_are_left_out(clip, grouped):
    row = clip.tokenizer(["beak"])[0, 1]
    with torch.no_grad():
        clip.model.token_embedding.weight[row] = 0
    made = method("roboshot")
    made.fit(clip, grouped)
    kept = made.settings()["helpful"]
    assert 0 < len(kept) < len(concepts.concepts_of(grouped, "x").helpful)
    assert not any("beak" in text for pair in kept for text in pair)


@pytest.mark.parametrize("texts", list(concepts._BY_CLASSES.values()), ids=["birds", "hair", "gender"])
def test_the_embedded_model_knows_the_words_for_what_is_spurious(texts):
    clip = load_clip()
    assert concepts.known(texts.spurious, clip) == texts.spurious
    assert concepts.known(texts.crossed, clip) == texts.crossed


# --- Defense-Prefix ---------------------------------------------------------------------------------------------------


def test_the_prefix_stands_before_the_class_name(clip, typographic):
    """With the embedding of a real word, it is that word."""
    made = method("defense-prefix")
    made.fit(clip, typographic)
    made.token = clip.model.token_embedding.weight[clip.tokenizer(["red"])[0, 1]].clone().numpy()
    with made.apply(clip) as encoder:
        prefixed = encoder.text_embeds(Prompts(NAMES, ("a photo of a {}.",)))
    plain = EditedImages(clip, np.negative).text_embeds(Prompts(NAMES, ("a photo of a red {}.",)))
    np.testing.assert_allclose(prefixed, plain, rtol=1e-5, atol=1e-6)


def test_the_prefix_lowers_its_loss(clip, typographic, monkeypatch):
    def attack_loss(steps: int) -> float:
        monkeypatch.setattr(dp, "STEPS", steps)
        made = method("defense-prefix")
        made.fit(clip, typographic)
        examples = typographic.train.examples
        with made.apply(clip) as encoder:
            embeds = encoder.image_embeds([example.picture.load() for example in examples])
            text_embeds = encoder.text_embeds(Prompts(NAMES, typographic.train.templates))
        logits = torch.from_numpy(clip.model.logit_scale.exp().item() * embeds @ text_embeds.T)
        label = torch.tensor([example.label for example in examples])
        return float(torch.nn.functional.cross_entropy(logits, label))

    monkeypatch.setattr(dp, "GAMMA", 0.0)
    assert attack_loss(30) < attack_loss(0) - 1e-3


def test_the_prefix_leaves_pictures_alone(clip, typographic):
    made = method("defense-prefix")
    made.fit(clip, typographic)
    with made.apply(clip) as encoder:
        np.testing.assert_array_equal(encoder.image_embeds(pictures()), RobustClassifier(clip).transform(pictures()))
        assert encoder.edits_text


def test_the_placeholder_is_refused_in_labels():
    with pytest.raises(ConfigError, match="marks the learned token"):
        dp.with_placeholder(Prompts(("M*A*S*H",), ("{}",)))


# --- SamplingTAR ------------------------------------------------------------------------------------------------------


def test_contributions_add_up_to_what_heads_write(clip):
    tower = vision_with_heads(clip.model, "this")
    attention = attention_of(tower, 1)
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    basis = torch.eye(attention.head_dim).expand(attention.num_heads, -1, -1)
    mixed = tar.contributions(attention, x, basis).sum(2)
    W_O = attention.out_proj.weight.view(64, attention.num_heads, attention.head_dim)
    writes = torch.einsum("bhe,dhe->bhd", mixed, W_O)
    torch.testing.assert_close(writes, cls_attention(attention, x).writes, rtol=1e-4, atol=1e-5)


def test_text_share_is_corrected_for_area():
    is_written = torch.tensor([[True, False, False, False]])

    def share(*added: float) -> float:
        return float(tar.text_share(torch.tensor(added)[None, None, :, None], is_written))

    assert share(1, 1, 1, 1) == 0.5
    assert share(1, 0, 0, 0) == 1
    assert share(0, 1, 1, 1) == 0
    assert share(3, 1, 1, 1) == 0.75
    assert share(3, 1, 1, -9) == pytest.approx(3 / (3 + 2 / 3))
    assert share(0, 0, 0, 0) == 0.5
    nothing_written = torch.zeros(1, 4, dtype=torch.bool)
    assert float(tar.text_share(torch.ones(1, 1, 4, 1), nothing_written)) == 0.5


def test_a_head_is_judged_on_the_pictures_where_its_directions_are_active(monkeypatch):
    monkeypatch.setattr(tar, "_N_ACTIVE", 1)
    activity = torch.tensor([[[5.0, 0.0]], [[0.0, 5.0]]])
    on_text = torch.tensor([[[0.9, 0.1]], [[0.2, 0.7]]])
    np.testing.assert_allclose(tar.head_scores(activity, on_text), [0.8], rtol=1e-6)


def test_heads_stand_out_in_their_own_block():
    scores = {4: np.array([0.9, 0.2, 0.2]), 5: np.array([0.5, 0.5, 0.5]), 6: np.array([0.1, 0.2, 0.3])}
    assert tar.standing_out(scores, 1.0) == ((4, 0), (6, 2))
    assert tar.standing_out(scores, 2.0) == ()


def test_redirected_heads_are_blind_to_patches(clip):
    tower = vision_with_heads(clip.model, "this")
    last = len(tower.blocks) - 1
    hook_point = f"blocks.{last - 1}.hook_resid_post"
    resid = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    resid[1, 0] = resid[0, 0]  # the same CLS token, other patches
    with torch.inference_mode():
        plain = tower.embeds_from(resid, hook_point)
        with tar.redirected(tower, all_heads(tower, last)):
            blind = tower.embeds_from(resid, hook_point)
        with tar.redirected(tower, ()):
            torch.testing.assert_close(tower.embeds_from(resid, hook_point), plain, rtol=0, atol=0)
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(blind[0], blind[1], rtol=1e-5, atol=1e-6)


def test_sampling_tar_finds_a_planted_head(clip, typographic):
    """In the last block one head attends to the bright bar, the other to all tokens alike."""
    tower = vision_with_heads(clip.model, "sampling-tar")
    seen: list[torch.Tensor] = []
    attention = attention_of(tower, 2)
    handle = attention.register_forward_hook(lambda _m, inputs, _o: seen.append(tower.to_batch_first(inputs[0])))
    clf = RobustClassifier(clip)
    clf.transform([Held(seed, True).load() for seed in range(24)])
    handle.remove()
    x = seen[0]
    is_bar = torch.zeros(x.shape[:2])
    is_bar[:, 13:] = 1  # the last of four rows of patches
    bar = torch.linalg.lstsq(x.flatten(0, 1), is_bar.flatten()[:, None]).solution[:, 0]
    d_head = attention.head_dim
    W_Q, W_K, _ = attention.in_proj_weight.chunk(3)
    with torch.no_grad():
        W_Q[:], W_K[:] = 0, 0
        attention.in_proj_bias.zero_()
        attention.in_proj_bias[d_head] = 300.0  # a constant query in head 1
        W_K[d_head] = bar  # which the bar's patches answer
    rows = typographic.train.examples, typographic.train_clean.examples
    scores, _ = tar._read(clip, "blocks.1.hook_resid_post", *rows)
    assert set(scores) == {2}
    # A direction that nothing fires along counts 0.5, and the bar, much the same on all pictures, fires along half.
    assert scores[2][1] > 0.6 > scores[2][0], scores
    assert tar.standing_out(scores, 0.5) == ((2, 1),)


# --- OCR and blur -----------------------------------------------------------------------------------------------------


def with_word(size: int = 320) -> Image.Image:
    """A gray picture with a large word in its lower half."""
    picture = Image.new("RGB", (size, size), (200, 200, 200))
    font = load_font("dejavu-sans-bold", size // 6)
    ImageDraw.Draw(picture).text((size / 2, 0.75 * size), "banana", (20, 20, 20), font, anchor="mm")
    return picture


@needs_tesseract
@pytest.mark.parametrize("size", [80, 320, 1600])
def test_a_large_word_is_found_and_blurred(size):
    picture = with_word(size)
    ((box,),) = ocr.find_words([picture])
    left, top, right, bottom = box
    assert left < size / 2 < right
    assert 0.6 * size < top < 0.75 * size < bottom < 0.9 * size
    blurred = ocr.blurred(picture, [box])
    assert ocr.find_words([blurred]) == [[]]
    above = (0, 0, size, size // 2)
    assert blurred.crop(above).tobytes() == picture.crop(above).tobytes()


@needs_tesseract
def test_each_picture_keeps_its_own_words(clip):
    blank = Image.new("RGB", (100, 90), (90, 120, 90))
    found = ocr.find_words([blank, with_word(), blank, with_word(160)])
    assert [len(boxes) for boxes in found] == [0, 1, 0, 1]
    assert max(found[3][0]) <= 160
    encoder = ocr._Blurred(clip)
    shown = [blank, with_word(), blank]
    stock = RobustClassifier(clip).transform(shown)
    embeds = encoder.image_embeds(shown)
    np.testing.assert_allclose(embeds[[0, 2]], stock[[0, 2]], atol=1e-6)
    assert np.abs(embeds[1] - stock[1]).max() > 1e-3


def test_nothing_to_blur_leaves_the_picture():
    picture = with_word(64)
    assert ocr.blurred(picture, []).tobytes() == picture.tobytes()


def test_a_box_at_the_edge_is_blurred_within_the_picture():
    picture = with_word(64)
    assert ocr.blurred(picture, [(-3, 40, 70, 64)]).size == (64, 64)


def test_a_missing_tesseract_is_said_with_the_remedy(clip, typographic, monkeypatch):
    monkeypatch.setattr(ocr.shutil, "which", lambda _name: None)
    ocr.tesseract.cache_clear()
    with pytest.raises(NotApplicableError, match="apt install tesseract-ocr"):
        method("ocr-blur").fit(clip, typographic)


def test_a_tesseract_that_reads_too_few_pictures_is_an_error(monkeypatch):
    monkeypatch.setattr(ocr, "tesseract", lambda: (shutil.which("true"), "0"))
    with pytest.raises(BackendError, match="could not read 1 pictures"):
        ocr.find_words([with_word(64)])
