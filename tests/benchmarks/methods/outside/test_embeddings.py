"""Methods on embeddings: LEACE, MirrorCLIP, Orth-Cali, RoboShot, erase."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.datasets import Example
from defense.benchmarks.methods import NotApplicableError, concepts
from defense.benchmarks.methods import erase as erase_module
from defense.benchmarks.methods import leace as leace_module
from defense.benchmarks.methods.erase import erased
from defense.benchmarks.methods.leace import erasure_of
from defense.benchmarks.methods.mirror_clip import visual_part
from defense.benchmarks.methods.orth_cali import calibrated_projection
from defense.benchmarks.methods.roboshot import steered
from defense.classify.classifier import RobustClassifier
from defense.data.labels import Prompts
from defense.hosts.clip import EMBEDDED, load_clip

from .task_material import Held, groups, method, pictures

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


def test_erase_takes_out_what_an_embedding_holds_of_a_text_and_adds_nothing_to_one_that_points_away():
    x = np.array([[1.0, 2.0, 3.0], [-1.0, 2.0, 3.0]])
    np.testing.assert_allclose(erased(x, np.eye(3)[:1]), [[0, 2, 3], [-1, 2, 3]])
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(3, 8))
    texts /= np.linalg.norm(texts, axis=1, keepdims=True)
    found = erased(rng.normal(size=(50, 8)), texts)
    assert (found @ texts[-1]).max() < 1e-12, "the last one is gone, where it was there"
    np.testing.assert_allclose(erased(found, texts[-1:]), found, atol=1e-12)


def test_erase_makes_a_label_that_it_is_told_the_least_likely(clip, typographic, monkeypatch):
    """With the texts of the class that pictures show, in place of what says that something is written."""
    prompts = Prompts(("dog", "cat", "fish"), ("{}",))
    monkeypatch.setattr(erase_module, "WRITING", ("dog",))
    made = method("erase")
    made.fit(clip, typographic)
    assert made.settings()["texts"] == ["dog"]
    texts = clip.text_embeds(prompts)
    with made.apply(clip) as encoder:
        embeds = encoder.image_embeds(pictures())
    assert (embeds @ texts[0]).max() < 1e-5
    toward = texts[:1] + 0.1 * texts[1:2]
    assert (toward @ texts.T).argmax() == 0
    assert (erased(toward, made._directions) @ texts.T).argmax() == 1


def test_erase_takes_the_words_for_each_value_of_the_attribute_and_leaves_out_those_that_are_unknown(clip, grouped):
    made = method("erase")
    made.fit(clip, grouped)
    pairs = concepts.concepts_of(grouped, "x").spurious
    assert made.settings()["texts"] == [text for pair in pairs for text in pair]
    with torch.no_grad():
        clip.model.token_embedding.weight[clip.tokenizer(["water"])[0, 1]] = 0
    made.fit(clip, grouped)
    assert made.settings()["texts"] == [text for pair in pairs for text in pair if "water" not in text]


def test_erase_is_not_applicable_where_the_clip_knows_none_of_the_words(clip, typographic):
    with torch.no_grad():
        clip.model.token_embedding.weight.zero_()
    with pytest.raises(NotApplicableError, match="knows none of: text, some text"):
        method("erase").fit(clip, typographic)


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
    clip = load_clip(EMBEDDED)
    assert concepts.known(texts.spurious, clip) == texts.spurious
    assert concepts.known(texts.crossed, clip) == texts.crossed
