"""What a latent does and is called: each column against a plain computation, names that were planted."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.latents import LatentSet
from defense.data.labels import Prompts
from defense.errors import ConfigError
from defense.explain.catalogue import BIN_EDGES
from defense.explain.naming import mean_jacobians, sparse_words, wording, wording_beside_random, wording_line
from defense.explain.steering import Steering, steerability
from defense.hosts.attach import wrap
from defense.hosts.clip import Clip
from defense.hosts.families import tower_of
from defense.train.quality import measure

from ..conftest import D_SAE, clip_of, random_defense, random_sae
from .described import POINT, WORDS, N, acts_and_embeds, described, sparse_sae


@pytest.fixture
def clip(tiny_clip) -> Clip:
    return clip_of(tiny_clip)


def test_monosemanticity_is_the_mean_over_all_pairs_of_pictures(clip, pictures) -> None:
    acts, embeds = acts_and_embeds(clip, pictures)
    largest = acts.max(1)
    got = described(clip, pictures).columns["monosemanticity"]
    for latent in range(D_SAE):
        a = largest[:, latent] - largest[:, latent].min()
        a = a / a.max() if a.any() else a
        pairs = [(a[n] * a[m], embeds[n] @ embeds[m]) for n in range(N) for m in range(n)]
        weight = sum(w for w, _ in pairs)
        if weight == 0:
            assert np.isnan(got[latent])
        else:
            assert got[latent] == pytest.approx(sum(w * cosine for w, cosine in pairs) / weight, abs=1e-5)
    assert np.isnan(got).any()
    assert not np.isnan(got).all()


def test_counts_are_those_of_the_activations(clip, pictures) -> None:
    acts, _ = acts_and_embeds(clip, pictures)
    found = described(clip, pictures)
    fires = acts > 0
    np.testing.assert_allclose(found.columns["frequency"], fires.mean((0, 1)), rtol=1e-6)
    with np.errstate(invalid="ignore"):
        mean = acts.sum((0, 1)) / fires.sum((0, 1))
    np.testing.assert_allclose(found.columns["mean_activation"], mean, rtol=1e-5)
    np.testing.assert_array_equal(found.histogram.sum(1), fires.sum((0, 1)))
    for latent in np.flatnonzero(fires.any((0, 1)))[:20]:
        values = acts[..., latent][fires[..., latent]]
        want = np.histogram(np.clip(values, BIN_EDGES[0], BIN_EDGES[-1] * 0.999), BIN_EDGES)[0]
        np.testing.assert_array_equal(found.histogram[latent], want)


def test_the_top_pictures_are_those_with_the_largest_activations(clip, pictures) -> None:
    largest = acts_and_embeds(clip, pictures)[0].max(1)  # [n, d_sae]
    found = described(clip, pictures)
    for latent in range(D_SAE):
        order = np.argsort(-largest[:, latent], kind="stable")[:4]
        want = [f"{n}.png" for n in order if largest[n, latent] > 0]
        assert [found.pictures[i] for i in found.top[latent] if i >= 0] == want
        np.testing.assert_allclose(found.top_activation[latent, : len(want)], largest[order[: len(want)], latent], 1e-5)
        assert not found.top_activation[latent, len(want) :].any()


def test_class_statistics_leave_out_pictures_without_a_class(clip, pictures) -> None:
    largest = acts_and_embeds(clip, pictures)[0].max(1)
    found = described(clip, pictures)
    by_class = np.stack([largest[first::3].sum(0) for first in (0, 1)])
    total = by_class.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        share = by_class / total
        entropy = -np.where(share > 0, share * np.log(share), 0).sum(0)
    np.testing.assert_allclose(found.columns["class_entropy"], np.where(total > 0, entropy, np.nan), atol=1e-5)
    np.testing.assert_array_equal(found.columns["n_classes"], (by_class > 0).sum(0))
    bare = described(clip, [picture._replace(label=None) for picture in pictures])
    assert not {"class_entropy", "n_classes"} & bare.columns.keys()


def test_batches_give_what_the_whole_gives(clip, pictures) -> None:
    whole, cut = described(clip, pictures), described(clip, pictures, batch=5)
    assert whole.columns.keys() == cut.columns.keys()
    for name, column in whole.columns.items():
        np.testing.assert_allclose(cut.columns[name], column, rtol=1e-4, atol=1e-6, err_msg=name)
    np.testing.assert_array_equal(cut.top, whole.top)
    np.testing.assert_array_equal(cut.histogram, whole.histogram)
    np.testing.assert_allclose(cut.directions, whole.directions, atol=2e-3)


def test_tokens_are_coded_as_the_sae_does_by_kind(clip, pictures) -> None:
    pixels = torch.from_numpy(np.stack([picture.pixel_values for picture in pictures]))
    with torch.inference_mode():
        resid = clip.tower.resid(pixels, POINT)
    found = described(clip, pictures, batch=5).provenance["tokens"]
    assert list(found) == ["CLS", "patch"]
    for kind, tokens in (("CLS", slice(0, 1)), ("patch", slice(1, None))):
        want = measure(sparse_sae(), resid[:, tokens].flatten(0, 1))
        assert found[kind]["explained_variance"] == pytest.approx(want.explained_variance, abs=1e-5)
        assert found[kind]["l0"] == pytest.approx(want.l0)
        assert found[kind]["alive"] == pytest.approx(want.alive)


def test_a_tower_that_makes_one_patch_long_is_found_out(clip, pictures) -> None:
    def with_a_store(resid: torch.Tensor) -> torch.Tensor:
        resid = resid.clone()
        resid[:, 4] *= 20
        return resid

    assert described(clip, pictures).provenance["high_norm"]["share"] == 0
    with clip.tower.changed(POINT, with_a_store):
        found = described(clip, pictures).provenance["high_norm"]
    assert found["share"] == pytest.approx(1 / 16)
    assert found["share_of_pictures"] == 1
    assert 10 < found["largest"] < 40


def test_a_defense_on_the_host_is_bypassed(clip, pictures) -> None:
    plain = described(clip, pictures)
    wrap(clip.model, random_defense(clip.model, (0, random_sae(), LatentSet("a", tuple(range(60))))))
    defended = described(clip, pictures)
    for name, column in plain.columns.items():
        np.testing.assert_array_equal(defended.columns[name], column, err_msg=name)


def test_a_latent_that_never_fires_has_no_names_and_no_numbers(clip, pictures) -> None:
    found = described(clip, pictures)
    dead = found.columns["frequency"] == 0
    assert dead.any()
    assert not dead.all()
    for name in ("mean_activation", "monosemanticity", "steerability"):
        assert np.isnan(found.columns[name][dead]).all()
    assert not np.isnan(found.columns["steerability"][~dead]).any()
    assert all(not found.names[latent] for latent in np.flatnonzero(dead))
    assert not found.directions[dead].any()
    np.testing.assert_allclose(np.linalg.norm(found.directions[~dead].astype(float), axis=1), 1, atol=2e-3)


def test_further_columns_stand_beside_the_measured_ones(clip, pictures) -> None:
    contrast = np.arange(D_SAE, dtype=np.float64)
    np.testing.assert_array_equal(
        described(clip, pictures, columns={"contrast": contrast}).columns["contrast"], contrast
    )


def test_words_that_were_made_alike_are_consistent_and_a_shared_word_is_counted() -> None:
    words = unit_rows(50, 64, 1)
    for first in (0, 5):  # two families of five words; the other forty have nothing to do with each other
        words[first : first + 5] = words[first] + 0.2 * words[first : first + 5]
    words /= np.linalg.norm(words, axis=1, keepdims=True)
    directions = np.stack([words[0], words[0], words[7], np.zeros(64, np.float32)])
    columns, summary = wording_beside_random(directions, words, 0)
    for row, of in ((0, slice(0, 5)), (1, slice(0, 5)), (2, slice(5, 10))):
        pairs = (words[of] @ words[of].T)[np.triu_indices(5, 1)]
        assert columns["consistency"][row] == pytest.approx(pairs.mean(), abs=1e-5)
    np.testing.assert_array_equal(columns["n_same_word"][:3], [1, 1, 0])
    assert np.isnan(columns["consistency"][3])
    assert np.isnan(columns["n_same_word"][3])
    assert summary["latents"]["consistency"]["median"] > summary["random"]["consistency"]["median"] + 0.1
    assert summary["latents"]["share_alone"] == pytest.approx(1 / 3, abs=1e-3)
    every = (words @ words.T)[np.triu_indices(50, 1)].mean()
    assert summary["all_pairs"] == pytest.approx(every, abs=1e-3)
    assert "all pairs" in wording_line(summary)
    few = wording(words[:3], words[:1])
    assert np.isnan(few["consistency"]).all()
    assert (few["n_same_word"] == 2).all()


def test_longer_names_are_nearer_to_the_direction_that_is_kept(clip, pictures) -> None:
    found = described(clip, pictures, phrases=("a red {}", "{} on a tree"))
    searched = found.provenance["phrases"]
    assert searched["templates"] == ["a red {}", "{} on a tree"]
    fires = np.flatnonzero(found.columns["frequency"] > 0)
    assert list(searched["names"]) == fires.tolist()
    words = clip.text_embeds(Prompts(WORDS, ("a photo of a {}.",)))
    shared = words.mean(0) / np.linalg.norm(words.mean(0))
    for latent in fires[:5]:
        name, cosine = searched["names"][latent][0]
        embed = clip.text_embeds(Prompts((name,), ("a photo of a {}.",)))[0]
        apart = embed - (embed @ shared) * shared
        want = float(found.directions[latent].astype(np.float32) @ apart / np.linalg.norm(apart))
        assert cosine == pytest.approx(want, abs=2e-3)
    for kind in ("latents", "random"):
        assert searched[kind]["phrase"] >= searched[kind]["word"]
    assert "phrases" not in described(clip, pictures).provenance


@pytest.mark.parametrize(("options", "said"), [({"n_steered": 1}, "n_steered=1"), ({"n_top": 0}, "n_top=0")])
def test_numbers_that_mean_nothing_are_refused(clip, pictures, options, said) -> None:
    with pytest.raises(ConfigError, match=said):
        described(clip, pictures, **options)


def test_one_picture_is_too_few(clip, pictures) -> None:
    with pytest.raises(ConfigError, match="1 pictures can be read"):
        described(clip, pictures[:1])


# --- what a latent does -----------------------------------------------------------------------------------------------


class LinearClip:
    """A CLIP whose image embedding is the sum of the first d_embed entries of the tokens' residuals."""

    logit_scale = 1.0

    @property
    def tower(self) -> LinearClip:
        return self

    def positions(self, _hook_point: str, scope: str) -> slice:
        assert scope == "all"
        return slice(None)

    def embeds_from(self, resid: torch.Tensor, _hook_point: str) -> torch.Tensor:
        return resid[..., :5].sum(1)


def test_steerability_of_a_network_that_can_be_computed_by_hand() -> None:
    sae = random_sae(act="relu")
    resid = torch.randn(3, 4, sae.config.d_model, generator=torch.Generator().manual_seed(1))
    text_embeds, which = torch.eye(5), torch.zeros(D_SAE, dtype=torch.bool)
    which[[3, 50]] = True
    got = steerability(Steering(LinearClip(), POINT, resid, text_embeds, sae.config.norm), sae, which, steer=0.5)
    target = 0.5 * resid.norm(dim=-1).mean()
    for latent in (3, 50):
        moved = []
        for picture in resid:
            acts = sae.encode(picture)
            acts[:, latent] = target
            error = picture - sae.decode(sae.encode(picture), picture)
            steered = sae.decode(acts, picture) + error
            moved.append(steered[:, :5].sum(0).softmax(0) - picture[:, :5].sum(0).softmax(0))
        want = np.mean([float(a @ b) for i, a in enumerate(moved) for j, b in enumerate(moved) if i != j])
        assert got[latent] == pytest.approx(want, rel=1e-4)
    assert np.isnan(np.delete(got, [3, 50])).all()


def test_steering_that_does_the_same_to_all_pictures_has_the_published_value() -> None:
    sae = random_sae(act="relu")
    resid = torch.randn(1, 4, sae.config.d_model, generator=torch.Generator().manual_seed(1)).expand(4, -1, -1)
    which = torch.zeros(D_SAE, dtype=torch.bool)
    which[7] = True
    two, four = (Steering(LinearClip(), POINT, some, torch.eye(5), sae.config.norm) for some in (resid[:2], resid))
    one_pair = steerability(two, sae, which, steer=2.0)[7]
    assert 0 < one_pair <= 2
    assert steerability(four, sae, which, steer=2.0)[7] == pytest.approx(one_pair, rel=1e-4)


def test_the_jacobians_are_the_slopes_of_the_embedding(tiny_clip) -> None:
    tower = tower_of(tiny_clip)
    pixels = torch.from_numpy(np.random.default_rng(3).normal(size=(5, 3, 32, 32)).astype(np.float32))
    resid = tower.resid(pixels, POINT)
    to_cls, to_patch = mean_jacobians(tower, POINT, resid, batch=2)
    push = torch.randn(resid.shape[-1], generator=torch.Generator().manual_seed(2))
    for tokens, slope in ((slice(0, 1), to_cls @ push), (slice(1, None), to_patch @ push)):
        step = torch.zeros_like(resid)
        step[:, tokens] = 1e-2 * push
        with torch.no_grad():
            there, back = (tower.embeds_from(resid + sign * step, POINT) for sign in (1, -1))
            moved = (there - back).mean(0) / 2e-2
        n_tokens = len(range(resid.shape[1])[tokens])
        torch.testing.assert_close(slope * n_tokens, moved, rtol=0.02, atol=1e-4)


# --- names ------------------------------------------------------------------------------------------------------------


def unit_rows(n: int, width: int, seed: int) -> np.ndarray:
    rows = np.random.default_rng(seed).normal(size=(n, width)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def test_planted_words_are_recovered_with_their_weights() -> None:
    words = unit_rows(200, 64, 0)
    rng = np.random.default_rng(1)
    planted = [rng.choice(200, 3, replace=False) for _ in range(40)]
    weights = np.sort(rng.uniform(0.5, 1.5, (40, 3)).astype(np.float32), axis=1)[:, ::-1]
    targets = np.stack([weight @ words[chosen] for chosen, weight in zip(planted, weights, strict=True)])
    index, weight = sparse_words(targets, words, 3)
    exact = [set(row) == set(chosen) for row, chosen in zip(index.tolist(), planted, strict=True)]
    assert np.mean(exact) > 0.9
    np.testing.assert_allclose(weight[exact], weights[exact], atol=1e-4)


def test_weights_are_positive_and_fall_and_nothing_has_no_words() -> None:
    words = unit_rows(50, 16, 0)
    targets = np.concatenate([unit_rows(30, 16, 5), np.zeros((1, 16), np.float32)])
    index, weight = sparse_words(targets, words, 4)
    assert ((weight > 0) == (index >= 0)).all()
    assert (np.diff(weight, axis=1) <= 0).all()
    assert (index[-1] == -1).all()
    assert (index[:-1, 0] >= 0).all()
    assert all(len(set(row[row >= 0])) == (row >= 0).sum() for row in index)


def test_one_word_is_named_by_itself() -> None:
    words = unit_rows(50, 16, 0)
    index, weight = sparse_words(2 * words[[7]], words, 3)
    assert index.tolist() == [[7, -1, -1]]
    assert weight[0, 0] == pytest.approx(2, abs=1e-4)
