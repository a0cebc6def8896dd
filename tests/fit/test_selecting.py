"""Training an SAE and choosing S: properties on a tiny CLIP and on planted dictionaries."""

from __future__ import annotations

import numpy as np
import pytest

from ..conftest import clip_of

pytest.importorskip("open_clip")
import torch

from defense.core.suppress import Suppressor
from defense.errors import ConfigError, ShapeError
from defense.fit.config import FitConfig
from defense.fit.material import Groups, Pairs
from defense.fit.seen import Seen
from defense.fit.selecting import GroupFit, Ranking, Selection, TextFit, Trial, Tried
from defense.hosts.families import tower_of
from defense.train.quality import measure
from defense.train.runs import train_in_memory
from defense.train.trainer import TrainConfig, geometric_median

from ..conftest import random_defense, random_sae

POINT = "blocks.1.hook_resid_post"
CONFIG = TrainConfig(d_sae=64, k=4, steps=40, batch=256, lr=3e-3)


DIRECTIONS = np.random.default_rng(7).normal(size=(32, 24)) / 24**0.5


def planted(n: int, seed: int = 0) -> torch.Tensor:
    """Residuals that are sparse sums of 32 directions, around an offset."""
    rng = np.random.default_rng(seed)
    codes = rng.uniform(0.5, 1.5, (n, 32)) * (rng.random((n, 32)) < 0.08)
    return torch.from_numpy(codes @ DIRECTIONS * 10 + 3).float()


def test_training_recovers_a_planted_dictionary():
    sae = train_in_memory(planted(20_000), TrainConfig(d_sae=64, k=6, steps=800, batch=128, lr=5e-3))
    quality = measure(sae, planted(2_000, seed=1))
    assert quality.explained_variance > 0.95
    assert 0 < quality.l0 <= 6
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(64))
    truth = torch.nn.functional.normalize(torch.from_numpy(DIRECTIONS).float(), dim=1)
    assert ((truth @ sae.W_dec.T).max(1).values > 0.9).sum() >= 28


def test_training_is_reproducible():
    first, second = (train_in_memory(planted(2_000), CONFIG) for _ in range(2))
    assert torch.equal(first.W_enc, second.W_enc)


def test_quality_of_an_sae_that_explains_nothing_is_not_positive():
    sae = random_sae(d_model=24, d_sae=64, act="topk", k=4)
    assert measure(sae, planted(2_000)).explained_variance <= 0


def test_bad_material_for_training_is_refused():
    with pytest.raises(ShapeError, match=r"\[n, d_model\]"):
        train_in_memory(torch.zeros(2, 3, 4), CONFIG)
    with pytest.raises(ConfigError, match="100 tokens, batch=256"):
        train_in_memory(torch.zeros(100, 4), CONFIG)


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
    return TextFit(clip_of(tiny_clip), "blocks.1.hook_resid_post", random_sae(act="topk", k=8), pairs, text_embeds)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_residual_and_the_rest_are_the_whole_network(tiny_clip, block):
    tower, hook_point = tower_of(tiny_clip), f"blocks.{block}.hook_resid_post"
    with torch.inference_mode():
        want = torch.nn.functional.normalize(tiny_clip.encode_image(images(6, 0)), dim=1)
        got = tower.embeds_from(tower.resid(images(6, 0), hook_point), hook_point, batch=4)
        again = torch.nn.functional.normalize(tiny_clip.encode_image(images(6, 0)), dim=1)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=0)
    assert torch.equal(again, want), "the blocks must be back in place"


def test_the_rest_keeps_a_defense_at_another_block(tiny_clip):
    from defense.core.latents import LatentSet
    from defense.hosts.attach import wrap

    wrap(tiny_clip, random_defense(tiny_clip, (0, random_sae(), LatentSet("a", tuple(range(60))))))
    tower, hook_point = tower_of(tiny_clip), "blocks.1.hook_resid_post"
    with torch.inference_mode():
        want = torch.nn.functional.normalize(tiny_clip.encode_image(images(6, 0)), dim=1)
        got = tower.embeds_from(tower.resid(images(6, 0), hook_point), hook_point)
        torch.testing.assert_close(got, want, atol=1e-6, rtol=0)


def test_effect_is_the_slope_of_the_margin_along_a_latent(fit):
    ranking = fit.rank()
    latent = int(np.abs(ranking.effect).argmax())
    step = 1e-2
    suppressor = Suppressor(fit.sae, fit_set(latent))
    rows = torch.arange(30)

    def margin(resid: torch.Tensor) -> float:
        with torch.inference_mode():
            logits = fit.logits(resid)
        return float((logits[rows, fit.groups["attacked"].rival] - logits[rows, fit.groups["attacked"].answer]).mean())

    resid = fit.groups["attacked"].resid
    slope = (margin(resid) - margin(resid - step * suppressor.removed(resid))) / step
    assert slope == pytest.approx(ranking.effect[latent], rel=0.05)


def fit_set(*latents: int):
    from defense.core.latents import LatentSet

    return LatentSet("probe", latents)


def test_contrast_counts_what_fires_more_on_the_word(fit):
    ranking = fit.rank()
    acts = {name: fit.sae.encode(fit.groups[name].resid).sum((0, 1)) / 30 for name in ("attacked", "neutral")}
    want = (acts["attacked"] - acts["neutral"]).numpy()
    np.testing.assert_allclose(ranking.contrast, want, atol=1e-4)


def test_what_is_chosen_lowers_the_attacked_loss_within_the_clean_budget(fit):
    config = FitConfig(n_candidates=60, steps=60, clean_budget=0.1)
    selection = fit.choose(np.arange(60), config)
    assert selection.latents
    assert len(set(selection.latents)) == len(selection.latents)
    assert selection.after.n == len(selection.latents)
    assert selection.after.fooled_loss < selection.before.fooled_loss
    assert selection.after.kept_accuracy >= selection.before.kept_accuracy - 0.1
    assert list(selection.gains) == sorted(selection.gains), "most removed first"


@pytest.mark.parametrize("edit", ["scale", "project"])
def test_what_is_measured_is_what_will_be_shipped(fit, edit):
    config = FitConfig(edit=edit)
    trial = Trial(fit, np.arange(60), config)
    columns, removal = np.arange(5, 25), np.linspace(0.2, 1, 60)
    tried = trial.measure(columns, removal)
    selection = Selection(tuple(range(5, 25)), tuple(1 - removal[columns]), (tried,))
    suppressor = Suppressor(fit.sae, fit.latent_set(selection, fit.rank(), config, "text"))
    with torch.inference_mode():
        attacked, clean = (fit.logits(suppressor(fit.groups[name].resid)) for name in ("attacked", "clean"))
    loss = torch.nn.functional.cross_entropy(attacked, fit.groups["attacked"].answer)
    assert float(loss) == pytest.approx(tried.fooled_loss, abs=1e-4)
    assert float((clean.argmax(1) == fit.groups["clean"].answer).float().mean()) == pytest.approx(tried.kept_accuracy)
    assert tried.fooled_loss != pytest.approx(trial.measure(columns[:0], removal).fooled_loss, abs=1e-3)


@pytest.mark.parametrize("fields", [{"act": "topk", "k": 8}, {"act": "relu"}], ids=["topk", "relu"])
@pytest.mark.parametrize("edit", ["scale", "project"])
def test_a_fit_that_spares_patches_of_high_norm_measures_what_will_be_shipped_and_counts_nothing_there(
    tiny_clip, fit, edit, fields
):
    clip, sae, store = clip_of(tiny_clip), random_sae(**fields), 5
    resid = {name: group.resid.clone() for name, group in fit.groups.items()}
    for each in resid.values():
        each[:, store] *= 20
    pairs = Pairs(images(30, 0), images(30, 1), images(30, 2), fit.groups["clean"].answer, fit.groups["clean"].rival)
    seen = Seen(clip, POINT, sae, fit.seen.text_embeds, pairs, resid, spares_high_norm=True)
    sparing = TextFit(clip, POINT, sae, pairs, fit.seen.text_embeds, seen=(seen, torch.arange(30)))
    config = FitConfig(edit=edit, spares_high_norm=True)
    trial, columns, removal = Trial(sparing, np.arange(60), config), np.arange(5, 25), np.linspace(0.2, 1, 60)
    tried = trial.measure(columns, removal)
    ranking = sparing.rank()
    latent_set = sparing.latent_set(
        Selection(tuple(range(5, 25)), tuple(1 - removal[columns]), (tried,)), ranking, config, "text"
    )
    assert latent_set.spares_high_norm
    with torch.inference_mode():
        attacked = sparing.logits(Suppressor(sae, latent_set)(resid["attacked"]))
    loss = torch.nn.functional.cross_entropy(attacked, sparing.groups["attacked"].answer)
    assert float(loss) == pytest.approx(tried.fooled_loss, abs=1e-4)
    acts = {name: sae.encode(resid[name]) for name in ("attacked", "neutral")}
    for each in acts.values():
        each[:, store] = 0
    want = (acts["attacked"].sum(1).mean(0) - acts["neutral"].sum(1).mean(0)).numpy()
    np.testing.assert_allclose(ranking.contrast, want, atol=1e-3)
    touching = TextFit(
        clip, POINT, sae, pairs, fit.seen.text_embeds,
        seen=(Seen(clip, POINT, sae, fit.seen.text_embeds, pairs, resid), torch.arange(30)),
    )  # fmt: skip
    assert np.abs(touching.rank().contrast - want).max() > 1e-2
    assert np.abs(touching.rank().effect - ranking.effect).max() > 1e-4
    with pytest.raises(ConfigError, match="give both the same"):
        Trial(touching, np.arange(60), config)


def test_the_joint_step_lowers_the_loss_that_it_minimizes_and_follows_its_seed(fit):
    config = FitConfig(n_candidates=60, steps=60, batch=30)
    trial = Trial(fit, np.arange(60), config)
    removal = fit.learn_removal(trial, config)
    assert ((removal >= 0) & (removal <= 1)).all()

    def loss(removed: np.ndarray) -> float:
        with torch.inference_mode():
            answers = [trial.logits(name, torch.from_numpy(removed).float()) for name in fit.groups]
        return (
            sum(float(torch.nn.functional.cross_entropy(each, fit.groups["attacked"].answer)) for each in answers) / 3
        )

    assert loss(removal) < loss(np.zeros(60)) - 0.01
    np.testing.assert_array_equal(removal, fit.learn_removal(trial, config))


def test_weight_moves_to_the_arm_with_the_larger_loss(fit):
    def loss_of_the_worst(worst_rate: float) -> float:
        config = FitConfig(n_candidates=60, steps=60, batch=30, worst_rate=worst_rate)
        trial = Trial(fit, np.arange(60), config)
        removal = torch.from_numpy(fit.learn_removal(trial, config)).float()
        with torch.inference_mode():
            answers = {name: trial.logits(name, removal) for name in fit.groups}
        return max(float(torch.nn.functional.cross_entropy(answers[name], fit.groups[name].answer)) for name in answers)

    assert loss_of_the_worst(50.0) < loss_of_the_worst(0.0) - 0.001


def test_a_latent_that_costs_more_than_it_helps_is_not_removed(fit):
    assert fit.choose(np.arange(60), FitConfig(n_candidates=60, sparsity=10.0)).latents == ()


def planned(monkeypatch, kept_accuracy, fooled_loss):
    """Let the measures depend on the number of latents alone, and note which numbers are tried."""
    seen = []

    def measure(_trial, columns, _removal):
        seen.append(len(columns))
        return Tried(len(columns), kept_accuracy(len(columns)), fooled_loss(len(columns)))

    monkeypatch.setattr("defense.fit.selecting.Trial.measure", measure)
    monkeypatch.setattr(
        "defense.fit.selecting._SiteFit.learn_removal", lambda _fit, trial, _config: np.linspace(1, 0.1, 60)
    )
    return seen


def test_what_does_not_help_stays_out_under_any_budget(fit, monkeypatch):
    planned(monkeypatch, lambda n: 0.0, lambda n: float(n))
    assert fit.choose(np.arange(60), FitConfig(n_candidates=60, clean_budget=1.0)).latents == ()


@pytest.mark.parametrize("n_borne", [0, 1, 7, 30, 59, 60])
def test_as_many_are_removed_as_the_budget_bears(fit, monkeypatch, n_borne):
    seen = planned(monkeypatch, lambda n: 0.9 if n <= n_borne else 0.5, lambda n: -float(n))
    selection = fit.choose(np.arange(59, -1, -1), FitConfig(n_candidates=60, clean_budget=0.1))
    assert list(selection.latents) == list(range(59, 59 - n_borne, -1))
    assert len(seen) == len(set(seen)) <= 10
    assert {0, 15, 30, 45, 60} <= set(seen), "a curve, whatever the budget"
    assert [each.n for each in selection.tried] == sorted(seen)
    np.testing.assert_allclose(selection.gains, 1 - np.linspace(1, 0.1, 60)[:n_borne])


@pytest.mark.parametrize("fields", [{"batch": 0}, {"steps": 0}, {"clean_budget": -0.1}, {"clean_budget": float("nan")}])
def test_settings_that_mean_nothing_are_refused(fields):
    with pytest.raises(ConfigError, match=next(iter(fields))):
        FitConfig(**fields)


def test_no_candidates_give_an_empty_selection(fit):
    selection = fit.choose(np.arange(0), FitConfig())
    assert selection.latents == ()
    assert selection.tried == (selection.before,) == (selection.after,)


def test_no_budget_means_no_clean_picture_may_change_its_mind(fit):
    selection = fit.choose(np.arange(60), FitConfig(n_candidates=60, steps=60, clean_budget=0.0))
    assert selection.after.kept_accuracy >= selection.before.kept_accuracy


def test_the_order_leaves_out_latents_that_do_not_read_or_do_not_act():
    ranking = Ranking(np.array([1, 1, -1, 1, 0.1]), np.array([1, 3, 9, -1, 5.0]))
    assert ranking.order().tolist() == [4, 1, 0]


def test_fitting_on_nothing_is_refused(tiny_clip):
    empty = torch.zeros(0, 3, 32, 32)
    none = torch.zeros(0, dtype=torch.int64)
    nothing = Pairs(empty, empty, empty, none, none)
    with pytest.raises(ConfigError, match="at least one picture"):
        TextFit(clip_of(tiny_clip), "blocks.1.hook_resid_post", random_sae(), nothing, empty)


def some_groups(n: int = 40) -> Groups:
    index = torch.arange(n)
    return Groups(images(n, 5), index % 2, index // 2 % 2)


@pytest.fixture
def group_fit(tiny_clip):
    text_embeds = torch.nn.functional.normalize(torch.randn(2, 32, generator=torch.Generator().manual_seed(4)), dim=1)
    return GroupFit(
        clip_of(tiny_clip), "blocks.1.hook_resid_post", random_sae(act="topk", k=8), some_groups(), text_embeds
    )


def test_the_fooled_groups_are_those_that_the_model_gets_wrong_most(group_fit):
    def accuracy(name: str) -> float:
        group = group_fit.groups[name]
        with torch.inference_mode():
            return float((group_fit.logits(group.resid).argmax(1) == group.answer).float().mean())

    assert len(group_fit.fooled) == 2
    for y, name in enumerate(group_fit.fooled):
        assert name.startswith(f"{y}-")
        assert accuracy(name) == min(accuracy(f"{y}-0"), accuracy(f"{y}-1"))
    assert set(group_fit.kept) == {"0-0", "0-1", "1-0", "1-1"}


def test_the_rival_of_a_picture_is_its_likeliest_wrong_answer(group_fit):
    for group in group_fit.groups.values():
        assert torch.equal(group.rival, 1 - group.answer)


def test_contrast_between_groups_is_the_range_over_the_attribute(group_fit):
    means = {name: group_fit.sae.encode(group.resid).sum(1).mean(0) for name, group in group_fit.groups.items()}
    by_value = [(means[f"0-{a}"] + means[f"1-{a}"]) / 2 for a in (0, 1)]
    np.testing.assert_allclose(group_fit.rank().contrast, (by_value[0] - by_value[1]).abs().numpy(), atol=1e-4)


def test_choosing_for_groups_lowers_the_loss_of_the_fooled_within_the_budget(group_fit):
    config = FitConfig(n_candidates=80, steps=60, clean_budget=0.05)
    selection = group_fit.choose(np.arange(80), config)
    assert selection.latents
    assert selection.after.fooled_loss < selection.before.fooled_loss
    assert selection.after.kept_accuracy >= selection.before.kept_accuracy - 0.05
    latent_set = group_fit.latent_set(selection, group_fit.rank(), config, "place")
    assert latent_set.provenance["n_pictures"] == {name: 10 for name in group_fit.groups}


def test_a_group_without_pictures_is_refused(tiny_clip):
    groups = some_groups()
    with pytest.raises(ConfigError, match="no picture of class 1 has attribute 1"):
        GroupFit(
            clip_of(tiny_clip),
            "blocks.1.hook_resid_post",
            random_sae(),
            Groups(groups.pixel_values[:3], groups.y[:3], groups.a[:3]),
            torch.eye(2, 32),
        )
    with pytest.raises(ConfigError, match="at least two"):
        GroupFit(
            clip_of(tiny_clip),
            "blocks.1.hook_resid_post",
            random_sae(),
            Groups(groups.pixel_values, groups.y, groups.a * 0),
            torch.eye(2, 32),
        )
