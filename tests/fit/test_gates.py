"""What a fit has to show before it becomes a defense."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError, GateError
from defense.fit.gates import GATES, explained_variance
from defense.fit.material import Groups, Pairs
from defense.fit.placing import fit_defense
from defense.fit.selecting import GroupFit
from defense.fit.trial import Trial
from defense.fit.validation import CrossValidation, gain_interval, n_fooled, shares

from ..conftest import D_MODEL, clip_of, random_sae
from .test_resuming import CONFIG, POINT, TEXT_EMBEDS, SitePlan, clip, material_of, noise  # noqa: F401 - fixtures


def perfect_sae(b_dec: np.ndarray | None = None) -> SparseAutoencoder:
    """An SAE that reconstructs what lies around b_dec without an error: each direction, both ways."""
    eye = np.eye(D_MODEL, dtype=np.float32)
    parameters = {
        "W_enc": np.concatenate([eye, -eye], 1),
        "b_enc": np.zeros(2 * D_MODEL, np.float32),
        "W_dec": np.concatenate([eye, -eye]),
        "b_dec": np.zeros(D_MODEL, np.float32) if b_dec is None else b_dec,
    }
    return SparseAutoencoder(SAEConfig(D_MODEL, 2 * D_MODEL, "relu"), parameters)


def test_explained_variance_is_1_for_a_perfect_sae_and_0_for_the_mean():
    resid = torch.randn(500, D_MODEL, generator=torch.Generator().manual_seed(0)) + 3
    assert explained_variance(perfect_sae(), resid) == pytest.approx(1)
    mean = resid.mean(0).numpy()
    silent = perfect_sae(mean)
    silent.W_enc.zero_()
    silent.folded_bias.zero_()
    assert explained_variance(silent, resid) == pytest.approx(0, abs=1e-5)
    assert explained_variance(random_sae(), resid) < 0


def test_an_sae_of_another_clip_is_refused_before_anything_long(clip, monkeypatch):  # noqa: F811
    monkeypatch.setattr("defense.fit.placing.fit_sites", lambda *_, **__: pytest.fail("it was fitted"))
    monkeypatch.setattr("defense.fit.placing.cross_validate", lambda *_, **__: pytest.fail("it was fitted"))
    for block in (0, 1):
        plans = [SitePlan(POINT.format(0), perfect_sae(), CONFIG), SitePlan(POINT.format(1), perfect_sae(), CONFIG)]
        plans[block] = replace(plans[block], sae=random_sae())
        with pytest.raises(GateError, match=rf"the SAE at blocks\.{block}.* explains -?\d+ % .*less than 30 %"):
            fit_defense(clip, clip.id_as("tiny"), plans, material_of(clip), TEXT_EMBEDS, name="text")


def test_what_was_measured_before_is_held_against_the_gate_and_not_measured_again(clip, monkeypatch):  # noqa: F811
    monkeypatch.setattr("defense.fit.placing.explained_variance", lambda *_: pytest.fail("it was measured again"))
    monkeypatch.setattr("defense.fit.placing.n_fooled", lambda *_: 0)
    plans, point = [SitePlan(POINT.format(1), perfect_sae(), CONFIG)], POINT.format(1)
    for explained, message in ((0.29, r"the SAE at blocks\.1.* explains 29 %"), (0.31, "plain CLIP is wrong on 0 of")):
        with pytest.raises(GateError, match=message):
            fit_defense(
                clip, clip.id_as("tiny"), plans, material_of(clip), TEXT_EMBEDS, name="text",
                explained={point: explained},
            )  # fmt: skip


def test_pictures_that_fool_nobody_are_refused(clip):  # noqa: F811
    material = material_of(clip)
    same = replace(material.data, attacked=material.data.clean, neutral=material.data.clean)
    plans = [SitePlan(POINT.format(1), perfect_sae(), CONFIG)]
    with pytest.raises(GateError, match="wrong on 0 of 24 pictures with the cue, and it takes 10"):
        fit_defense(clip, clip.id_as("tiny"), plans, replace(material, data=same), TEXT_EMBEDS, name="text")


def validation(gain: float, low: float, loss: float, *, is_held_out: bool = True) -> CrossValidation:
    plain = {"clean": 0.9, "attacked": 0.4}
    defended = {"clean": 0.9 - loss, "attacked": 0.4 + gain}
    return CrossValidation((plain,), (defended,), (3,), (low, 2 * gain - low), is_held_out)


def test_a_gain_that_could_be_chance_is_refused():
    GATES.check_validation(validation(0.2, 0.01, 0.005), 0.01)
    GATES.check_validation(validation(0.2, 0.01, 1 - 0.99), 0.01)  # as the choice by the budget has it
    with pytest.raises(GateError, match=r"\+20\.0 points gained \(95 % interval \+0\.0 to \+40\.0\) .*held-out"):
        GATES.check_validation(validation(0.2, 0.0, 0.0), 0.01)
    with pytest.raises(GateError, match="on the pictures that it was fitted on"):
        GATES.check_validation(validation(0.2, -0.1, 0.0, is_held_out=False), 0.01)


def test_a_loss_beyond_the_budget_is_refused():
    with pytest.raises(GateError, match=r"costs more than its clean budget of 1\.0 points: .* 8\.3 lost"):
        GATES.check_validation(validation(0.2, 0.1, 0.083), 0.01)


def test_the_interval_of_a_gain_holds_it_and_narrows_with_pictures():
    rng = np.random.default_rng(0)
    plain = rng.random(400) < 0.4
    defended = plain | (rng.random(400) < 0.2)
    gain = defended.mean() - plain.mean()
    low, high = gain_interval([(plain, defended)])
    assert 0 < low < gain < high
    few = gain_interval([(plain[:40], defended[:40])])
    assert few[1] - few[0] > high - low
    assert gain_interval([(plain, plain)]) == (0.0, 0.0)
    one = plain.copy()
    one[np.flatnonzero(~plain)[0]] = True
    assert gain_interval([(plain, one)])[0] == 0, "one picture more is no gain"


def test_the_worst_group_counts_whichever_it_is():
    good, bad = np.ones(50, bool), np.arange(50) < 10
    low, high = gain_interval([(good, bad), (bad, good)])
    assert low < 0 < high, "the two changed places"


# --- the budget of groups ---------------------------------------------------------------------------------------------


@pytest.fixture
def unbalanced() -> Groups:
    index = torch.arange(40)
    share = {(0, 0): 0.73, (0, 1): 0.04, (1, 0): 0.01, (1, 1): 0.22}
    return Groups(noise(40, 5), index % 2, index // 2 % 2, share)


def test_the_clean_budget_of_groups_binds_on_their_shares(tiny_clip, unbalanced):
    fit = GroupFit(clip_of(tiny_clip), POINT.format(1), random_sae(), unbalanced, TEXT_EMBEDS[:2])
    trial = Trial(fit, np.arange(30), CONFIG)
    columns, removal = np.arange(20), np.ones(30)
    accuracy = {
        name: float((trial.removed(name, columns, removal).argmax(1) == group.answer).double().mean())
        for name, group in fit.groups.items()
    }
    want = sum(unbalanced.shares[tuple(map(int, name.split("-")))] * each for name, each in accuracy.items())
    assert trial.measure(columns, removal).kept_accuracy == pytest.approx(want)
    assert want != pytest.approx(np.mean(list(accuracy.values())))


def test_what_is_lost_on_held_out_pictures_is_weighed_alike(unbalanced):
    answers = {"picture": np.zeros(40, dtype=np.int64)}  # all of class 0
    found = shares(unbalanced, answers)
    assert found["weighted"] == pytest.approx(0.77)
    assert found["average"] == pytest.approx(0.5)
    assert shares(replace(unbalanced, shares=None), answers)["weighted"] == pytest.approx(0.5)
    assert n_fooled(unbalanced, answers) == 20
    result = CrossValidation((found,), ({**found, "weighted": 0.7, "average": 0.6},), (1,), (0.0, 0.0))
    assert result.loss == pytest.approx(0.07)


def test_pairs_are_fooled_where_the_attacked_one_is_wrong():
    label = torch.tensor([0, 1, 2])
    nothing = torch.zeros(3, 3, 2, 2)
    answers = {kind: np.array([0, 1, 2]) for kind in ("clean", "neutral")} | {"attacked": np.array([0, 0, 0])}
    assert n_fooled(Pairs(nothing, nothing, nothing, label, label), answers) == 2


# --- without folds ----------------------------------------------------------------------------------------------------


def test_without_folds_nothing_is_held_out_and_the_defense_says_so(clip, open_gates):  # noqa: F811
    plans = [SitePlan(POINT.format(1), random_sae(), CONFIG)]
    fitted = fit_defense(clip, clip.id_as("tiny"), plans, material_of(clip), TEXT_EMBEDS, name="text", folds=0)
    record = fitted.defense.provenance["cross_validation"]
    assert (record["folds"], "held_out" in record, "fitted_on" in record) == (0, False, True)
    assert fitted.validation.summary()["clean"]["spread"] == 0
    assert fitted.defense.sites[0].part is not None
    assert set(fitted.defense.provenance["gates"]) == {
        "least_explained", "least_fooled", "explained_variance", "n_fooled",
    }  # fmt: skip
    with pytest.raises(ConfigError, match="folds=0 holds none out"):
        fit_defense(
            clip, clip.id_as("tiny"), plans, material_of(clip), TEXT_EMBEDS, name="text", folds=0, is_swept=True
        )
