"""The comparison of ways to choose S, on a tiny CLIP: what each rule takes, when it stops, and that a run goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks import latents
from defense.benchmarks.latents import Bench, Settings
from defense.benchmarks.latents_choosing import (
    ABLATIONS,
    CANDIDATES,
    RULES,
    Choice,
    Chooser,
    random_dictionary,
    variants,
)
from defense.benchmarks.latents_report import packed, summary, table, unpacked, verdict
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.fit.config import FitConfig
from defense.fit.material import Pairs
from defense.fit.selecting import LEAST_REMOVAL, TextFit, Trial

from ..conftest import clip_of, random_sae

POINT = "blocks.1.hook_resid_post"
CONFIG = FitConfig(n_candidates=40, steps=20, batch=10, clean_budget=0.1)
STEERABILITY = np.where(np.arange(160) % 7, np.arange(160) / 160, np.nan)
N_TEST = 20


def pairs_of(clip, text_embeds: torch.Tensor, n: int, seed: int) -> Pairs:
    def images(kind: int) -> torch.Tensor:
        return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(10 * seed + kind))

    with torch.inference_mode():
        label = (torch.nn.functional.normalize(clip.encode_image(images(0)), dim=1) @ text_embeds.T).argmax(1).clone()
    return Pairs(images(0), images(1), images(2), label, (label + 1) % 5)


@pytest.fixture
def bench(tiny_clip) -> Bench:
    pictures = torch.randn(5, 3, 32, 32, generator=torch.Generator().manual_seed(9))
    with torch.inference_mode():
        embeds = torch.nn.functional.normalize(tiny_clip.encode_image(pictures), dim=1)
    text_embeds = torch.nn.functional.normalize(embeds - embeds.mean(0), dim=1).clone()  # so that answers differ

    def fit_of(seed: int, other: SparseAutoencoder | None) -> TextFit:
        pairs = pairs_of(tiny_clip, text_embeds, 30, seed)
        return TextFit(clip_of(tiny_clip), POINT, other or random_sae(act="topk", k=8), pairs, text_embeds)

    return Bench(fit_of, pairs_of(tiny_clip, text_embeds, N_TEST, 99), text_embeds)


@pytest.fixture
def chooser(bench) -> Chooser:
    return Chooser(bench.fit_of(0, None), CONFIG, STEERABILITY, 0, lambda other: bench.fit_of(0, other))


def test_ours_is_what_fitting_chooses(chooser) -> None:
    selection = chooser.fit.choose(chooser.ranking.order(), chooser.config)
    assert selection.latents
    assert chooser.ours == Choice(selection.latents, selection.gains)


def test_each_rule_ranks_by_its_own_score(chooser) -> None:
    ranking = chooser.ranking
    scores = {
        "contrast": ranking.contrast,
        "causal": ranking.effect,
        "contrast x causal": ranking.contrast * ranking.effect,
        "steerability": STEERABILITY,
    }
    for rule, score in scores.items():
        ranked = score[chooser.order(rule)]
        assert len(ranked) > 5
        assert (np.diff(ranked) <= 0).all(), rule
        assert (ranked > 0).all(), rule
    assert (ranking.contrast[chooser.order("steerability")] > 0).all()


def test_random_latents_are_none_of_ours_and_the_first_of_like_activity(chooser) -> None:
    activity = chooser.fit._activity("attacked").numpy()
    order = chooser.order("random")
    assert len(set(order.tolist())) == len(order)
    assert set(order.tolist()) | set(chooser.ours.latents) >= set(np.flatnonzero(activity).tolist())
    assert not set(order.tolist()) & set(chooser.ours.latents)
    ranks = activity.argsort().argsort()
    like = [abs(int(ranks[a]) - int(ranks[b])) for a, b in zip(order, chooser.ours.latents, strict=False)]
    assert max(like) <= 45


@pytest.mark.parametrize("rule", RULES[1:])
def test_equal_size_means_as_many_as_ours_removed_in_full(chooser, rule) -> None:
    choice = chooser.as_many(rule)
    assert len(choice.latents) == len(chooser.ours.latents)
    assert choice.gains == ()


@pytest.mark.parametrize("rule", ["contrast", "causal", "random"])
def test_a_rule_stops_where_clean_pictures_would_suffer(chooser, rule) -> None:
    choice = chooser.own_stop(rule)
    assert choice.latents == tuple(chooser.order(rule)[: len(choice.latents)])
    assert not any(choice.gains)
    trial = Trial(chooser.fit, chooser.order(rule)[: CONFIG.n_candidates], CONFIG)
    all_of_each = np.ones(len(trial.latents))
    before, after = (trial.measure(np.arange(n), all_of_each) for n in (0, len(choice.latents)))
    assert after.kept_accuracy >= before.kept_accuracy - CONFIG.clean_budget
    assert after.fooled_loss < before.fooled_loss or not choice.latents


def test_a_random_dictionary_has_the_size_and_the_sparsity_of_the_sae_and_nothing_else_of_it(chooser) -> None:
    sae = chooser.fit.sae
    found, again, other = (random_dictionary(sae, seed) for seed in (0, 0, 1))
    assert found.config == sae.config
    assert torch.equal(found.W_dec, again.W_dec)
    assert not torch.equal(found.W_dec, other.W_dec)
    torch.testing.assert_close(found.W_dec.norm(dim=1), torch.ones(160))
    assert torch.equal(found.W_enc.T, found.W_dec)
    alike = torch.nn.functional.cosine_similarity(found.W_dec[:, None], sae.W_dec[None], dim=-1)
    assert float(alike.abs().max()) < 0.7
    resid = chooser.fit.groups["clean"].resid[:2]
    assert ((found.encode(resid) > 0).sum(-1) <= 8).all()
    with pytest.raises(ConfigError, match="TopK"):
        random_dictionary(random_sae(), 0)


def test_ours_from_a_random_dictionary_is_what_a_fit_with_it_chooses_and_is_measured_with_it(bench, chooser) -> None:
    choice = chooser.among("a random dictionary")
    assert choice.sae is not None
    fit = bench.fit_of(0, choice.sae)
    selection = fit.choose(fit.rank().order(), chooser.config)
    assert selection.latents
    assert (choice.latents, choice.gains) == (selection.latents, selection.gains)
    own = Choice(tuple(range(160)), (0.0,) * 160)
    by_own, by_other = (bench.is_correct(chooser.fit, replace(own, sae=sae)) for sae in (None, choice.sae))
    assert (by_own["attacked"] != by_other["attacked"]).any() or (by_own["clean"] != by_other["clean"]).any()


def test_random_candidates_go_through_the_joint_step_and_the_budget(chooser) -> None:
    seen = {}
    chooser._chosen = lambda order, config: seen.update(order=order, config=config) or Choice(())
    chooser.among("random latents")
    fires = np.flatnonzero(chooser.fit._activity("attacked").numpy())
    assert sorted(seen["order"].tolist()) == fires.tolist()
    assert seen["order"].tolist() != fires.tolist()
    assert seen["config"] == chooser.config
    first = seen["order"].copy()
    chooser.among("random latents")
    np.testing.assert_array_equal(seen["order"], first)


def test_an_ablation_takes_out_its_ingredient_alone(chooser) -> None:
    ranking, config = chooser.ranking, chooser.config
    seen = {}

    def choose(order, config):
        seen["order"], seen["config"] = order, config
        return Choice(())

    chooser._chosen = choose
    chooser.without("contrast")
    assert set(seen["order"].tolist()) == set(np.flatnonzero(ranking.effect > 0).tolist())
    assert (np.diff(ranking.effect[seen["order"]]) <= 0).all()
    chooser.without("causal effect")
    assert set(seen["order"].tolist()) == set(np.flatnonzero(ranking.contrast > 0).tolist())
    assert (np.diff(ranking.contrast[seen["order"]]) <= 0).all()
    assert seen["config"] == config
    for ingredient, field, value in (("moving weights", "worst_rate", 0), ("sparsity", "sparsity", 0)):
        chooser.without(ingredient)
        np.testing.assert_array_equal(seen["order"], ranking.order())
        assert seen["config"] == replace(config, **{field: value})
    chooser.without("budget")
    assert seen["config"].clean_budget == 1
    chooser.without("most candidates")
    np.testing.assert_array_equal(seen["order"], ranking.order())
    assert seen["config"].n_candidates == 32
    chooser.without("most candidates and causal effect")
    assert (np.diff(ranking.contrast[seen["order"]]) <= 0).all()
    assert seen["config"].n_candidates == 32


def test_without_the_joint_step_candidates_are_removed_in_full_in_their_order(chooser) -> None:
    seen = {}
    chooser._stopped = lambda trial, ranked, removal: seen.update(latents=trial.latents[ranked], removal=removal)
    chooser.without("joint step")
    np.testing.assert_array_equal(seen["latents"], chooser.ranking.order()[: CONFIG.n_candidates])
    assert (seen["removal"] == 1).all()


def test_without_learned_gains_the_same_are_removed_in_full(chooser) -> None:
    choice = chooser.without("learnt gains")
    n = min(len(choice.latents), len(chooser.ours.latents))
    assert choice.latents[:n] == chooser.ours.latents[:n]
    assert n > 0
    assert not any(choice.gains)


def test_without_a_budget_all_that_the_joint_step_removes_goes(chooser) -> None:
    trial, ranked, removal = chooser._joint(chooser.ranking.order(), chooser.config)
    choice = chooser.without("budget")
    assert sorted(choice.latents) == sorted(trial.latents[removal >= LEAST_REMOVAL].tolist())
    assert choice.gains == pytest.approx(1 - removal[ranked])


def test_no_latents_are_the_plain_model(bench) -> None:
    fit = bench.fit_of(0, None)
    found = bench.is_correct(fit, Choice(()))
    assert found["clean"].all()
    with torch.inference_mode():
        answers = (
            fit.tower.embeds_from(fit.tower.resid(bench.pixel_values["attacked"], POINT), POINT) @ bench.text_embeds.T
        ).argmax(1)
    np.testing.assert_array_equal(found["attacked"], (answers == bench.label).numpy())


def test_gains_are_in_force_when_measured(bench) -> None:
    fit = bench.fit_of(0, None)
    all_of_them = tuple(range(160))
    kept = bench.is_correct(fit, Choice(all_of_them, (1.0,) * 160))
    assert kept["clean"].all()
    assert not bench.is_correct(fit, Choice(all_of_them))["clean"].all()


def test_packing_keeps_every_answer() -> None:
    answers = np.random.default_rng(0).random(13) < 0.5
    np.testing.assert_array_equal(unpacked(packed(answers), 13), answers)


def record(arm: str, seed: int, clean: list[int], attacked: list[int]) -> dict:
    correct = {"clean": packed(np.array(clean, bool)), "attacked": packed(np.array(attacked, bool))}
    return {"arm": arm, "seed": seed, "latents": [1] * (seed + 1), "correct": correct}


def test_the_summary_averages_over_seeds_and_compares_with_ours() -> None:
    records = [
        record("ours", 0, [1, 1, 1, 1], [1, 1, 1, 0]),
        record("ours", 1, [1, 1, 1, 1], [1, 1, 1, 1]),
        record("other", 0, [1, 1, 0, 0], [0, 0, 0, 0]),
        record("other", 1, [1, 0, 0, 0], [0, 0, 1, 0]),
    ]
    rows = summary(records, 4)
    assert rows["other"]["clean"]["value"] == 3 / 8
    assert rows["other"]["by_seed"]["clean"] == [0.5, 0.25]
    assert rows["other"]["less_ours"]["attacked"]["value"] == pytest.approx(1 / 8 - 7 / 8)
    assert rows["other"]["n_latents"] == [1, 2]
    assert rows["ours"]["less_ours"]["clean"]["value"] == 0


@pytest.mark.parametrize(
    ("clean", "attacked", "said"),
    [
        ((-0.02, 0.01), (-0.3, -0.1), "yes: attacked"),
        ((-0.02, -0.01), (-0.3, -0.1), "yes: clean and attacked"),
        ((-0.02, 0.01), (-0.1, 0.1), "no difference seen"),
        ((0.01, 0.02), (-0.1, 0.1), "no: better without"),
        ((0.01, 0.02), (-0.2, -0.1), "a trade: attacked for clean"),
    ],
)
def test_the_verdict_rests_on_intervals(clean, attacked, said) -> None:
    assert verdict({k: {"low": v[0], "high": v[1]} for k, v in (("clean", clean), ("attacked", attacked))}) == said


# --- the run ----------------------------------------------------------------------------------------------------------

SETTINGS = Settings(30, N_TEST, CONFIG)


@pytest.fixture
def run_tiny(bench, monkeypatch):
    """`run`, with the tiny CLIP in the embedded model's place."""

    site = SimpleNamespace(hook_point=POINT)
    found = {POINT: SimpleNamespace(columns={"steerability": STEERABILITY})}
    monkeypatch.setattr(latents.defenses, "load", lambda _: SimpleNamespace(sites=[site]))
    monkeypatch.setattr(latents.folders, "sha256_of", lambda _: "0" * 64)
    monkeypatch.setattr(latents.catalogue, "find", lambda _: found)
    monkeypatch.setattr(latents, "load_clip", lambda _: None)
    monkeypatch.setattr(latents, "_embedded_bench", lambda *_: bench)
    return lambda out, seeds=(0,), settings=SETTINGS, **options: latents.run(out, seeds, settings, **options)


def results_of(result: dict) -> dict:
    arms_done = [{**each, "seconds": 0} for each in result["arms"]]
    return {**result, "arms": arms_done, "environment": None}


def test_a_run_that_was_interrupted_goes_on_to_the_same_result(run_tiny, tmp_path) -> None:
    whole = run_tiny(tmp_path / "whole.json")
    assert [each["arm"] for each in whole["arms"]] == list(variants())
    n_done = 0

    def interrupt(_line: str) -> None:
        nonlocal n_done
        n_done += 1
        if n_done == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_tiny(tmp_path / "cut", report=interrupt)
    stored = json.loads((tmp_path / "cut" / "latents.json").read_text())
    assert len(stored["arms"]) == 6
    with pytest.raises(ConfigError, match="was interrupted"):
        table(stored)
    again: list[str] = []
    assert results_of(run_tiny(tmp_path / "cut", report=again.append)) == results_of(whole)
    assert len(again) == len(variants()) - 6
    assert results_of(json.loads((tmp_path / "whole.json").read_text())) == results_of(whole)
    text = table(whole)
    assert all(f"| {name} |" in text for name in (*RULES, *ABLATIONS, *CANDIDATES))
    assert "not measured" not in text
    older = {name: row for name, row in whole["rows"].items() if not name.startswith("ours, from")}
    assert table({**whole, "rows": older}).count("not measured") == len(CANDIDATES)


def test_another_run_is_not_overwritten(run_tiny, tmp_path) -> None:
    path = tmp_path / "latents.json"
    path.write_text(json.dumps({"seeds": [5]}))
    with pytest.raises(ConfigError, match="other settings"):
        run_tiny(path)
    assert json.loads(path.read_text()) == {"seeds": [5]}


def test_without_a_catalogue_the_error_says_what_to_run(run_tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(latents.catalogue, "find", lambda _: {})
    with pytest.raises(ConfigError, match=r"python -m defense.embedded.catalogues"):
        run_tiny(tmp_path / "out.json")
