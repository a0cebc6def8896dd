"""A fit of several blocks: sites in turn, cross-validation, the sweep, and how often the network runs for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from PIL import Image

from defense.errors import ConfigError, HookPointError
from defense.fit import report
from defense.fit.encoded import Encoded
from defense.fit.material import Groups, Material, Pairs
from defense.fit.placing import Fitted, Option, best, fit_defense, placements, sweep
from defense.fit.selecting import TextFit
from defense.fit.shipping import ship
from defense.fit.sites import SitePlan, fit_sites, plan_sites
from defense.fit.validation import CrossValidation, cross_validate, measure
from defense.hosts.clip import Clip, load_clip
from defense.hosts.families import tower_of
from defense.hosts.tower import VisionTower
from defense.store import defenses
from defense.store.checkpoint import Checkpoint

from ..conftest import random_sae
from .plans import EASY, POINT, plan


@pytest.fixture
def clip(tiny_folder):
    return load_clip(f"local-dir:{tiny_folder}")


@pytest.fixture
def spec(clip, tiny_folder):
    return clip.id_as(f"local-dir:{tiny_folder}")


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


TEXT_EMBEDS = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)), dim=1)


@pytest.fixture
def material(clip) -> Material:
    """Noise whose right answer is plain CLIP's."""
    clean = noise(18, 0)
    with torch.inference_mode():
        label = (clip.model.encode_image(clean) @ TEXT_EMBEDS.T).argmax(1).clone()
    pairs = Pairs(clean, noise(18, 1), noise(18, 2), label, (label + 1) % 5)
    return Material(pairs, np.zeros(18, dtype=np.int64), (), {"kind": "text", "n": 18})


# --- sites in turn ------------------------------------------------------------------------------------------------


def test_a_block_is_fitted_with_those_before_it_at_work(clip, material):
    plans = [plan(0), plan(1)]
    with torch.inference_mode():
        before = clip.model.encode_image(material.data.clean)
    first, second = fit_sites(Encoded(clip, material.data), plans, TEXT_EMBEDS, name="text")
    with torch.inference_mode():
        assert torch.equal(clip.model.encode_image(material.data.clean), before), "the host must be as it was"
    with clip.edited([first.site]):
        alone = TextFit(clip, POINT.format(1), plans[1].sae, material.data, TEXT_EMBEDS)
        ranking = alone.rank()
        assert alone.choose(ranking.order(), EASY).latents == second.selection.latents
    assert first.selection.latents
    np.testing.assert_array_equal(ranking.effect, second.ranking.effect)
    unaware = TextFit(clip, POINT.format(1), plans[1].sae, material.data, TEXT_EMBEDS).rank()
    assert not np.array_equal(unaware.effect, second.ranking.effect)


@pytest.mark.parametrize(("scope", "tokens"), [("cls", slice(0, 1)), ("patch", slice(1, None))])
def test_latents_are_ranked_by_the_tokens_that_are_edited(clip, material, scope, tokens):
    only = plan(1, replace(EASY, scope=scope), tokens=scope)
    (fitted,) = fit_sites(Encoded(clip, material.data), [only], TEXT_EMBEDS, name="text")
    fit = TextFit(clip, POINT.format(1), only.sae, material.data, TEXT_EMBEDS)
    acts = {
        name: only.sae.encode(fit.groups[name].resid[:, tokens]).sum((0, 1)) / 18 for name in ("attacked", "neutral")
    }
    want = (acts["attacked"] - acts["neutral"]).numpy()
    np.testing.assert_allclose(fitted.ranking.contrast, want, atol=1e-4)
    both = fit.rank("cls").effect + fit.rank("patch").effect
    np.testing.assert_allclose(both, fit.rank("all").effect, atol=1e-6)
    np.testing.assert_array_equal(fitted.ranking.effect, fit.rank(scope).effect)


def test_later_blocks_see_what_earlier_ones_do_as_stored(clip, material):
    fitted = fit_sites(Encoded(clip, material.data), [plan(0)], TEXT_EMBEDS, name="text", dtype=np.float16)
    stored = fitted[0].site.parameters["W_dec"]
    np.testing.assert_array_equal(stored, plan(0).sae.W_dec.numpy().astype(np.float16).astype(np.float32))


def test_two_saes_of_one_block_are_refused(clip, material):
    with pytest.raises(ConfigError, match="one SAE per block"):
        fit_sites(Encoded(clip, material.data), [plan(1), plan(1)], TEXT_EMBEDS, name="text")


def test_an_sae_is_held_against_the_host_and_the_scope(clip):
    def made(block: int = 1, provenance: dict | None = None, **sae) -> Checkpoint:
        return Checkpoint(random_sae(**sae), POINT.format(block), "tiny", provenance=provenance or {})

    assert plan_sites(clip, [made(tokens="cls")], EASY)[0].config.scope == "cls"
    assert plan_sites(clip, [made()], EASY, "patch")[0].config.scope == "patch"
    with pytest.raises(ConfigError, match="trained on cls tokens"):
        plan_sites(clip, [made(tokens="cls")], EASY, "all")
    with pytest.raises(HookPointError, match="only the CLS token"):
        plan_sites(clip, [made(2)], EASY, "patch")
    with pytest.raises(ConfigError, match=r"trained on the weights of tiny .*; this tower's are"):
        plan_sites(clip, [made(provenance={"host": {"sha256": "0" * 64}})], EASY)
    own = tower_of(clip.model).fingerprint()
    assert plan_sites(clip, [made(provenance={"host": {"sha256": own}})], EASY)


# --- measuring ----------------------------------------------------------------------------------------------------


def test_measures_are_fractions_of_the_pictures(clip, material):
    measured = measure(clip, material.data, TEXT_EMBEDS)
    with torch.inference_mode():
        attacked = (clip.model.encode_image(material.data.attacked) @ TEXT_EMBEDS.T).argmax(1)
    assert measured["clean"] == 1.0
    assert measured["attacked"] == pytest.approx(float((attacked == material.data.label).double().mean()))
    assert measured["attack_success"] == pytest.approx(float((attacked == material.data.word).double().mean()))


def test_group_measures_weigh_groups_alike(clip):
    pixel_values = noise(8, 3)
    with torch.inference_mode():
        answers = (clip.model.encode_image(pixel_values) @ TEXT_EMBEDS[:2].T).argmax(1)
    y = answers.clone()
    y[0] = 1 - y[0]
    a = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    measured = measure(clip, Groups(pixel_values, y, a), TEXT_EMBEDS[:2])
    groups = {key: value for key, value in measured.items() if "-" in key}
    assert measured["worst"] == min(groups.values()) < 1
    assert measured["average"] == pytest.approx(np.mean(list(groups.values())))


def test_cross_validation_measures_on_pictures_that_were_not_fitted_on(clip, material, monkeypatch):
    from defense.fit import sites, validation

    fitted_on, measured_on = [], []
    fit, measured = sites.fit_sites, validation.accuracies
    monkeypatch.setattr(
        validation, "fit_sites", lambda *args, **options: fitted_on.append(args[0].data) or fit(*args, **options)
    )
    monkeypatch.setattr(validation, "accuracies", lambda *args: measured_on.append(args[0]) or measured(*args))
    encoded = Encoded(clip, material.data)
    result = cross_validate(encoded, [plan()], material, TEXT_EMBEDS, folds=2, seed=0)
    for index, data in enumerate(fitted_on):
        seen = {tuple(picture.flatten()[:5].tolist()) for picture in data.clean}
        for held_out in measured_on[2 * index : 2 * index + 2]:
            assert len(held_out.label) == 9
            assert not seen & {tuple(picture.flatten()[:5].tolist()) for picture in held_out.clean}
    assert len(result.n_latents) == 2
    assert min(result.n_latents) > 0
    row = result.summary()["attacked"]
    assert row["change"] == pytest.approx(row["defended"] - row["plain"])
    assert result.gain == row["change"]
    assert result.loss == -result.summary()["clean"]["change"]
    with pytest.raises(ConfigError, match="two or more"):
        cross_validate(encoded, [plan()], material, TEXT_EMBEDS, folds=1, seed=0)


def folds(gain: float, loss: float) -> CrossValidation:
    plain = {"clean": 0.9, "neutral": 0.9, "attacked": 0.4, "attack_success": 0.5}
    defended = {**plain, "clean": 0.9 - loss, "attacked": 0.4 + gain}
    return CrossValidation((plain, plain), (defended, defended), (3, 4), (gain - 0.05, gain + 0.05))


def test_the_best_placement_gains_most_within_the_budget():
    options = [
        Option((plan(0),), folds(0.1, 0.0)),
        Option((plan(1),), folds(0.2, 0.005)),
        Option((plan(0), plan(1)), folds(0.3, 0.02)),
    ]
    assert best(options, 0.01) is options[1]
    assert best(options, 0.03) is options[2]
    assert options[2].name == "blocks 0 + 1, all"
    with pytest.raises(ConfigError, match=r"blocks 0 \+ 1, all: \+30\.0 for 2\.0"):
        best(options[2:], 0.01)


def test_a_sweep_tries_each_block_and_scope_that_means_something(clip):
    def names(*plans: SitePlan) -> list[tuple[tuple[int, ...], str]]:
        found = placements(tower_of(clip.model), plans)
        return [(tuple(int(p.hook_point.split(".")[1]) for p in group), group[0].config.scope) for group in found]

    assert names(plan(1)) == [((1,), "cls"), ((1,), "patch"), ((1,), "all")]
    assert names(plan(2)) == [((2,), "cls")], "after the last block only the CLS token matters"
    assert names(plan(1, tokens="patch")) == [((1,), "patch")]
    both = names(plan(0), plan(1))
    assert both[-3:] == [((0, 1), "cls"), ((0, 1), "patch"), ((0, 1), "all")]
    halved = replace(EASY, clean_budget=0.005)
    budgets = [
        {p.config.clean_budget for p in group}
        for group in placements(tower_of(clip.model), [plan(0, halved), plan(1, halved)])
    ]
    assert budgets == [{0.01}] * 6 + [{0.005}] * 3


# --- the whole ----------------------------------------------------------------------------------------------------


def test_a_swept_fit_says_how_it_came_about_and_the_report_shows_it(
    clip, spec, material, tmp_path, monkeypatch, open_gates
):
    pytest.importorskip("matplotlib")
    cls, both = plan(1, replace(EASY, scope="cls")), (plan(0), plan(1))
    options = [Option((cls,), folds(0.2, 0.0)), Option(both, folds(0.1, 0.0))]
    monkeypatch.setattr("defense.fit.placing.sweep", lambda *_, **__: options)
    material = replace(material, provenance={"kind": "text", "n": 18, "n_unreadable": 0, "pictures_sha256": "ab" * 32})
    fitted = fit_defense(
        clip, spec, both, material, TEXT_EMBEDS, name="words", seed=3, is_swept=True, provenance={"task": "text"}
    )
    provenance = fitted.defense.provenance
    assert (provenance["task"], provenance["seed"]) == ("text", 3)
    assert provenance["pictures"]["pictures_sha256"] == "ab" * 32
    assert provenance["cross_validation"] == options[0].result.to_dict()
    assert [entry["gain"] for entry in provenance["sweep"]] == [pytest.approx(0.2), pytest.approx(0.1)]
    assert provenance["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    (site,) = fitted.defense.sites
    (latent_set,) = site.sets
    assert (site.hook_point, latent_set.scope, latent_set.name) == (POINT.format(1), "cls", "words")
    assert latent_set.provenance["config"]["scope"] == "cls"
    tried = latent_set.provenance["tried"]
    assert tried[0]["n"] == 0
    assert len(latent_set.latents) in [each["n"] for each in tried]
    assert defenses.load(defenses.save(fitted.defense, tmp_path / "defense")).provenance == dict(provenance)
    check_report(fitted, tmp_path / "report")


def check_report(fitted: Fitted, folder: Path) -> None:
    report.write(fitted, folder)
    files = {path.name for path in folder.iterdir()}
    assert files == {"report.md", "contrast-1.png", "budget-1.png", "sweep.png"}
    for name in files - {"report.md"}:
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    text = (folder / "report.md").read_text()
    assert "The place was chosen by these figures" in text
    row = fitted.validation.summary()["attacked"]
    assert f"| right with a wrong word on it | {100 * row['plain']:.1f} | {100 * row['defended']:.1f} ±" in text
    for latent in fitted.defense.sites[0].sets[0].latents:
        assert f"\n| {latent} |" in text
    report.write(fitted, folder)  # over the old one
    (folder / "holiday.png").write_text("mine")
    with pytest.raises(ConfigError, match="no report"):
        report.write(fitted, folder)
    (folder / "report.md").unlink()
    with pytest.raises(ConfigError, match="no report"):
        report.write(fitted, folder)
    assert (folder / "holiday.png").read_text() == "mine"


def test_nothing_that_helps_is_an_error(clip, spec, material, open_gates):
    strict = replace(EASY, sparsity=100.0)
    with pytest.raises(ConfigError, match=r"nothing helps: .* candidates at blocks\.1"):
        fit_defense(clip, spec, [plan(1, strict)], material, TEXT_EMBEDS, name="text", folds=2)


def test_an_edit_is_measured_alike_in_chunks_and_at_once(clip, material, monkeypatch):
    from defense.fit.selecting import Trial

    fit = TextFit(clip, POINT.format(1), plan().sae, material.data, TEXT_EMBEDS)
    for edit in ("scale", "project"):
        trial = Trial(fit, np.arange(30), replace(EASY, edit=edit))
        with torch.no_grad():
            at_once = trial.removed("attacked", np.arange(20), np.full(30, 0.7))
            monkeypatch.setattr("defense.fit.chunks.AT_ONCE", 5 * trial.bytes_each)
            in_chunks = trial.removed("attacked", np.arange(20), np.full(30, 0.7))
        torch.testing.assert_close(in_chunks, at_once, atol=1e-4, rtol=0)


# --- how often the network runs -----------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, str]]:
    """(number of pictures, hook point) of each pass from pixels on; the rest of the network does not count."""
    seen: list[tuple[int, str]] = []
    resid = VisionTower.resid

    def counted(self, pixel_values, hook_point, *scope):
        seen.append((len(pixel_values), hook_point))
        return resid(self, pixel_values, hook_point, *scope)

    monkeypatch.setattr(VisionTower, "resid", counted)
    monkeypatch.setattr(VisionTower, "resid_and_embeds", lambda *_: pytest.fail("a whole pass"))
    monkeypatch.setattr(Clip, "image_embeds", lambda *_: pytest.fail("a whole pass"))
    return seen


def test_a_sweep_encodes_each_picture_once_per_block(clip, material, passes):
    plans, n_twins = [plan(0), plan(1)], 3
    options = sweep(Encoded(clip, material.data), plans, material, TEXT_EMBEDS, folds=3, seed=0)
    assert len(options) == 9
    assert sum(n for n, _ in passes) == n_twins * 18 * len(plans)
    assert {point for _, point in passes} == {POINT.format(0), POINT.format(1)}


def test_a_fit_of_several_blocks_encodes_each_picture_once(clip, spec, passes, open_gates):
    """From the first block on the second is reached, edited, without the blocks before it."""
    index = torch.arange(24)
    groups = Groups(noise(24, 5), index % 2, index // 2 % 2)
    material = Material(groups, (groups.y * 2 + groups.a).numpy(), (), {})
    fit_defense(clip, spec, [plan(0), plan(1)], material, TEXT_EMBEDS[:2], name="place", folds=2)
    assert passes == [(24, POINT.format(0))]


@pytest.mark.parametrize(("block", "scope"), [(0, "all"), (1, "patch"), (1, "cls"), (2, "cls"), (2, "all")])
def test_a_defense_can_be_fitted_behind_every_block_the_last_one_included(
    clip, spec, material, tmp_path, open_gates, block, scope
):
    plans = [plan(block, replace(EASY, scope=scope), tokens=scope)]
    for folder in (None, tmp_path, tmp_path):  # nothing kept, then kept, then read
        fitted = fit_defense(clip, spec, plans, material, TEXT_EMBEDS, name="text", folds=2, cache=folder)
        (site,) = fitted.defense.sites
        assert site.sets[0].latents
    shipped = ship(clip, fitted.defense, material, TEXT_EMBEDS.numpy()).defense
    with clip.defended(shipped):
        edited = clip.image_embeds(material.data.attacked)
    assert not torch.equal(edited, clip.image_embeds(material.data.attacked))


def test_what_is_kept_is_what_a_pass_would_give(clip, material):
    encoded, rows = Encoded(clip, material.data), torch.tensor([3, 1, 7])
    first, second = fit_sites(encoded, [plan(0), plan(1)], TEXT_EMBEDS, name="text")
    part = encoded.take(torch.arange(10)).take(rows)
    with clip.edited([first.site]):
        for kind, resid in part.resid(POINT.format(1), [POINT.format(0)]).items():
            fresh = clip.tower.resid(material.data.pictures()[kind][rows], POINT.format(1))
            torch.testing.assert_close(resid, fresh, atol=1e-5, rtol=0)
    with clip.edited([first.site, second.site]):
        embeds = part.image_embeds(POINT.format(0))["attacked"]
        torch.testing.assert_close(embeds, clip.image_embeds(material.data.attacked[rows]), atol=1e-5, rtol=0)
