"""Training an SAE and choosing S: properties on a tiny CLIP and on planted dictionaries."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.errors import ConfigError, ShapeError
from defense.fit import FitConfig, Pairs, Ranking, Tail, TextFit
from defense.suppress import Suppressor
from defense.train import TrainConfig, geometric_median, measure, train_topk

from .conftest import random_defense, random_sae

CONFIG = TrainConfig(d_sae=64, k=4, steps=40, batch=256, lr=3e-3)


DIRECTIONS = np.random.default_rng(7).normal(size=(32, 24)) / 24**0.5


def planted(n: int, seed: int = 0) -> torch.Tensor:
    """Residuals that are sparse sums of 32 directions, around an offset."""
    rng = np.random.default_rng(seed)
    codes = rng.uniform(0.5, 1.5, (n, 32)) * (rng.random((n, 32)) < 0.08)
    return torch.from_numpy(codes @ DIRECTIONS * 10 + 3).float()


def test_training_recovers_a_planted_dictionary():
    sae = train_topk(planted(20_000), TrainConfig(d_sae=64, k=6, steps=800, batch=128, lr=5e-3))
    quality = measure(sae, planted(2_000, seed=1))
    assert quality.explained_variance > 0.95
    assert 0 < quality.l0 <= 6
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    truth = torch.nn.functional.normalize(torch.from_numpy(DIRECTIONS).float(), dim=1)
    assert ((truth @ sae.W_dec.T).max(1).values > 0.9).sum() >= 28


def test_training_is_reproducible():
    first, second = (train_topk(planted(2_000), CONFIG) for _ in range(2))
    assert torch.equal(first.W_enc, second.W_enc)


def test_quality_of_an_sae_that_explains_nothing_is_not_positive():
    sae = random_sae(d_model=24, d_sae=64, act="topk", k=4)
    assert measure(sae, planted(2_000)).explained_variance < 0.5


def test_bad_material_for_training_is_refused():
    with pytest.raises(ShapeError, match=r"\[n, d_model\]"):
        train_topk(torch.zeros(2, 3, 4), CONFIG)
    with pytest.raises(ConfigError, match="100 tokens, batch=256"):
        train_topk(torch.zeros(100, 4), CONFIG)


def test_geometric_median_ignores_an_outlier():
    points = torch.cat([torch.randn(99, 3, generator=torch.Generator().manual_seed(0)), torch.full((1, 3), 1e4)])
    assert geometric_median(points).norm() < 0.5
    assert points.mean(0).norm() > 50


def images(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def fit(tiny_clip):
    text_embeds = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)), dim=1)
    with torch.inference_mode():
        clean = torch.nn.functional.normalize(tiny_clip.encode_image(images(30, 0)), dim=1) @ text_embeds.T
    label = clean.argmax(1).clone()
    pairs = Pairs(images(30, 0), images(30, 1), images(30, 2), label, (label + 1) % 5)
    return TextFit(tiny_clip, "blocks.1.hook_resid_post", random_sae(act="topk", k=8), pairs, text_embeds)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_the_tail_of_the_residual_is_the_whole_network(tiny_clip, block):
    tail = Tail(tiny_clip, f"blocks.{block}.hook_resid_post", batch=4)
    with torch.inference_mode():
        want = torch.nn.functional.normalize(tiny_clip.encode_image(images(6, 0)), dim=1)
        got = tail.embeds(tail.resid(images(6, 0)))
        again = torch.nn.functional.normalize(tiny_clip.encode_image(images(6, 0)), dim=1)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert torch.equal(again, want), "the blocks must be back in place"


def test_the_tail_keeps_a_defense_at_another_block(tiny_clip):
    from defense.attach import wrap
    from defense.latents import LatentSet

    wrap(tiny_clip, random_defense(tiny_clip, (0, random_sae(), LatentSet("a", tuple(range(60))))))
    tail = Tail(tiny_clip, "blocks.1.hook_resid_post")
    with torch.inference_mode():
        want = torch.nn.functional.normalize(tiny_clip.encode_image(images(6, 0)), dim=1)
        torch.testing.assert_close(tail.embeds(tail.resid(images(6, 0))), want, atol=1e-6, rtol=0)


def test_effect_is_the_slope_of_the_margin_along_a_latent(fit):
    ranking = fit.rank()
    latent = int(np.abs(ranking.effect).argmax())
    step = 1e-2
    suppressor = Suppressor(fit.sae, fit_set(latent))
    rows = torch.arange(30)

    def margin(resid: torch.Tensor) -> float:
        with torch.inference_mode():
            logits = fit.logits(resid)
        return float((logits[rows, fit.pairs.word] - logits[rows, fit.pairs.label]).mean())

    resid = fit.resid["attacked"]
    slope = (margin(resid) - margin(resid - step * suppressor.removed(resid))) / step
    assert slope == pytest.approx(ranking.effect[latent], rel=0.05)


def fit_set(*latents: int):
    from defense.latents import LatentSet

    return LatentSet("probe", latents)


def test_contrast_counts_what_fires_more_on_the_word(fit):
    ranking = fit.rank()
    acts = {name: fit.sae.encode(fit.resid[name]).sum((0, 1)) / 30 for name in ("attacked", "neutral")}
    want = (acts["attacked"] - acts["neutral"]).numpy()
    np.testing.assert_allclose(ranking.contrast, want, atol=1e-4)
    assert (np.abs(ranking.specificity) <= 1 + 1e-9).all()


@pytest.mark.parametrize("edit", ["scale", "project"])
def test_greedy_lowers_the_attacked_loss_within_the_clean_budget(fit, edit):
    config = FitConfig(n_candidates=60, chunk=4, clean_budget=0.1, min_gain=0.0, edit=edit)
    selection = fit.choose(np.arange(60), config)
    assert selection.latents
    assert len(set(selection.latents)) == len(selection.latents)
    assert selection.loss == sorted(selection.loss, reverse=True)
    assert min(selection.clean) >= selection.clean[0] - 0.1
    latent_set = fit.latent_set(selection, fit.rank(), config)
    with torch.inference_mode():
        resid = fit.resid["attacked"]
        logits = fit.logits(Suppressor(fit.sae, latent_set)(resid))
        loss = torch.nn.functional.cross_entropy(logits, fit.pairs.label)
    assert float(loss) == pytest.approx(selection.loss[-1], abs=1e-4)


def test_no_budget_means_no_clean_picture_may_change_its_mind(fit):
    selection = fit.choose(np.arange(60), FitConfig(n_candidates=60, clean_budget=0.0))
    assert min(selection.clean) >= selection.clean[0]


def test_the_order_leaves_out_latents_that_do_not_read_or_that_see():
    columns = {"contrast": [1, 1, -1, 1, 1.0], "specificity": [1, 0.5, 1, 1, 1.0], "effect": [1, 3, 9, -1, 5.0]}
    ranking = Ranking(**{key: np.array(value) for key, value in columns.items()}, harm=np.array([0, 0, 0, 0, 6.0]))
    assert ranking.order().tolist() == [1, 0]


def test_fitting_on_nothing_is_refused(tiny_clip):
    empty = torch.zeros(0, 3, 32, 32)
    none = torch.zeros(0, dtype=torch.int64)
    with pytest.raises(ConfigError, match="at least one picture"):
        TextFit(tiny_clip, "blocks.1.hook_resid_post", random_sae(), Pairs(empty, empty, empty, none, none), empty)
