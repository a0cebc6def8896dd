"""How stable S is: pictures drawn anew, latents that carry the cue in all of them, and what the defense records."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.errors import ConfigError
from defense.fit import stability
from defense.fit.encoded import Encoded
from defense.fit.material import Material, Pairs
from defense.fit.placing import fit_defense
from defense.fit.sites import fit_sites
from defense.fit.stability import Stability, bootstrap, drawn_anew, words_on
from defense.hosts.clip import load_clip
from defense.store import defenses

from .plans import POINT, plan

TEXT_EMBEDS = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)), dim=1)


@pytest.fixture
def clip(tiny_folder):
    return load_clip(f"local-dir:{tiny_folder}")


@pytest.fixture
def material(clip) -> Material:
    def noise(seed: int) -> torch.Tensor:
        return torch.randn(18, 3, 32, 32, generator=torch.Generator().manual_seed(seed))

    with torch.inference_mode():
        label = (clip.model.encode_image(noise(0)) @ TEXT_EMBEDS.T).argmax(1).clone()
    pairs = Pairs(noise(0), noise(1), noise(2), label, (label + 1) % 5)
    return Material(pairs, np.zeros(18, dtype=np.int64), (), {"kind": "text", "n": 18})


# --- what is drawn, and what is counted -------------------------------------------------------------------------------


def test_as_many_of_each_group_are_drawn_and_some_twice():
    strata = np.array([0] * 30 + [1] * 5 + [7])
    rows = drawn_anew(strata, np.random.default_rng(0))
    drawn = strata[rows.numpy()]
    assert [int((drawn == group).sum()) for group in (0, 1, 7)] == [30, 5, 1]
    assert len(set(rows.tolist())) < 36
    other = drawn_anew(strata, np.random.default_rng(1))
    assert not torch.equal(rows, other)


def test_shares_and_agreement_are_counted_over_the_runs():
    runs = Stability({"p": (frozenset({1, 2}), frozenset({2, 3}), frozenset({2}), frozenset())})
    assert runs.n == 4
    assert [runs.share("p", latent) for latent in (1, 2, 3, 9)] == [0.25, 0.75, 0.25, 0]
    pairs = [1 / 3, 1 / 2, 0, 1 / 2, 0, 0]
    assert runs.agreement("p") == pytest.approx(np.mean(pairs))
    found = json.loads(json.dumps(runs.to_dict()))
    assert found["sites"]["p"]["latents"] == [[2, 0.75], [1, 0.25], [3, 0.25]]
    assert "0 of 2 latents are chosen in at least 80 % of 4 runs" in words_on(found, "p", (2, 9))
    same = Stability({"p": (frozenset({1}),) * 3}).to_dict()
    assert words_on(same, "p", (1, 5)).startswith("1 of 2 latents")
    assert "100 % of their latents in common" in words_on(same, "p", (1, 5))


def test_runs_are_fits_of_the_pictures_that_were_drawn(clip, material, monkeypatch):
    seen = []
    monkeypatch.setattr(
        stability, "fit_sites", lambda part, *args, **o: seen.append(part) or fit_sites(part, *args, **o)
    )
    encoded = Encoded(clip, material.data)
    found = bootstrap(encoded, [plan(0), plan(1)], material, TEXT_EMBEDS, n=3, seed=5)
    assert [part.rows.tolist() for part in seen] == [
        drawn_anew(material.strata, np.random.default_rng([5, index])).tolist() for index in range(3)
    ]
    for index, part in enumerate(seen):
        alone = Pairs(*(column[part.rows] for column in vars(material.data).values()))
        assert torch.equal(part.data.label, alone.label), "twins and labels are drawn together"
        assert torch.equal(
            part.resid(POINT.format(0))["attacked"], Encoded(clip, alone).resid(POINT.format(0))["attacked"]
        )
        assert not part.data.attacked.numel(), "no run holds pixels of its own"
        again = fit_sites(Encoded(clip, alone), [plan(0)], TEXT_EMBEDS, name="again")
        assert found.chosen[POINT.format(0)][index] == frozenset(again[0].selection.latents)
    assert len({each for each in found.chosen[POINT.format(0)]}) > 1, "noise is not stable"


def test_a_cue_that_is_the_same_on_every_picture_is_stable(clip):
    """One picture and its twin, over and over: whatever is drawn, the material is the same."""
    one = torch.randn(3, 1, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    clean, neutral, attacked = (part.expand(12, -1, -1, -1).contiguous() for part in one)
    with torch.inference_mode():
        label = (clip.model.encode_image(clean) @ TEXT_EMBEDS.T).argmax(1).clone()
    data = Pairs(clean, neutral, attacked, label, (label + 1) % 5)
    alike = Material(data, np.zeros(12, dtype=np.int64), (), {})
    found = bootstrap(Encoded(clip, data), [plan(1)], alike, TEXT_EMBEDS, n=3, seed=0)
    assert found.chosen[POINT.format(1)][0]
    assert found.agreement(POINT.format(1)) == 1


# --- in the defense ---------------------------------------------------------------------------------------------------


def test_a_defense_has_the_share_of_each_of_its_latents_on_disk(clip, material, tiny_folder, tmp_path, open_gates):
    spec = clip.id_as(f"local-dir:{tiny_folder}")

    def fitted(n: int):
        return fit_defense(clip, spec, [plan(1)], material, TEXT_EMBEDS, name="text", folds=0, n_bootstraps=n)

    without, made = fitted(0), fitted(3)
    (site,), (plain,) = made.defense.sites, without.defense.sites
    assert site.sets[0].latents == plain.sets[0].latents, "S itself is that of all pictures"
    runs = dict(map(tuple, made.defense.provenance["stability"]["sites"][site.hook_point]["latents"]))
    shares = site.sets[0].scores[stability.COLUMN]
    assert shares == tuple(runs.get(latent, 0) for latent in site.sets[0].latents)
    assert set(shares) <= {0, 1 / 3, 2 / 3, 1}
    assert max(shares) > 0
    defenses.save(made.defense, tmp_path / "made")
    read = defenses.load(tmp_path / "made")
    assert read.sites[0].sets[0].scores[stability.COLUMN] == pytest.approx(shares)
    assert read.provenance["stability"]["n"] == 3
    assert stability.COLUMN not in plain.sets[0].scores
    assert "stability" not in without.defense.provenance


def test_a_fit_says_which_patches_are_long(clip, material, tiny_folder, open_gates):
    def with_a_store(resid: torch.Tensor) -> torch.Tensor:
        return torch.cat([resid[:, :4], 20 * resid[:, 4:5], resid[:, 5:]], 1)

    spec = clip.id_as(f"local-dir:{tiny_folder}")
    with clip.tower.changed(POINT.format(1), with_a_store):
        made = fit_defense(clip, spec, [plan(1)], material, TEXT_EMBEDS, name="text", folds=0)
    assert made.defense.provenance["high_norm"][POINT.format(1)]["share"] == pytest.approx(1 / 16)


def test_a_fit_may_leave_long_patches_alone_and_says_so_on_disk(clip, material, tiny_folder, open_gates, tmp_path):
    def with_a_store(resid: torch.Tensor) -> torch.Tensor:
        return torch.cat([resid[:, :4], 20 * resid[:, 4:5], resid[:, 5:]], 1)

    spec, one = clip.id_as(f"local-dir:{tiny_folder}"), plan(1)
    sparing = replace(one, config=replace(one.config, spares_high_norm=True))
    rankings = []
    with clip.tower.changed(POINT.format(0), with_a_store):
        for each in (one, sparing):
            made = fit_defense(clip, spec, [each], material, TEXT_EMBEDS, name="text", folds=2)
            rankings.append(made.sites[0].ranking.contrast)
    assert (rankings[0] != rankings[1]).any()
    read = defenses.load(defenses.save(made.defense, tmp_path / "made"))
    (latent_set,) = read.sites[0].sets
    assert latent_set.spares_high_norm
    assert latent_set.provenance["config"]["spares_high_norm"] is True


def test_one_run_is_refused_before_the_work(clip, material, tiny_folder):
    spec = clip.id_as(f"local-dir:{tiny_folder}")
    with pytest.raises(ConfigError, match="two or more"):
        fit_defense(clip, spec, [plan(1)], material, TEXT_EMBEDS, name="text", n_bootstraps=1)
    with pytest.raises(ConfigError, match="two or more"):
        bootstrap(Encoded(clip, material.data), [plan(1)], material, TEXT_EMBEDS, n=1, seed=0)
