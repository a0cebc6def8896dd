"""The least change of strengths: exact where the network is linear, and never more than the least set elsewhere."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("open_clip")

from defense.errors import ConfigError
from defense.explain.counterfactual import counterfactual
from defense.explain.report_words import least
from defense.explain.strengths import _shortest, least_strengths
from defense.hosts.controls import Controls

from ..command import run
from .explained import BLOCK, RULES, a_set, attacked_scene, close, picture


@pytest.fixture
def linear(defended, monkeypatch):
    """Return a function: `least_strengths` where the margin of the plain answer is `margin` - slopes . strengths."""

    def found(margin: float, slopes: dict[int, float]):
        def scores_at(_search, strengths):
            fallen = margin - sum(slopes[latent] * part for (_, latent), part in strengths.items())
            return np.array([0.5, 0.5 * np.exp(-fallen), 0], np.float32)

        monkeypatch.setattr("defense.explain.counterfactual.Search.scores_at", scores_at)
        monkeypatch.setattr(
            "defense.explain.counterfactual.Search.firing", lambda _: [(BLOCK, latent) for latent in slopes]
        )
        return least_strengths(defended(a_set(range(4))), picture())

    return found


def test_where_margins_are_linear_it_is_the_projection_onto_where_the_answer_changes(linear):
    slopes = {0: 2.0, 1: 1.0, 2: 0.0, 3: -1.0}
    got = linear(2.0, slopes).strengths
    assert got == pytest.approx({(BLOCK, 0): 0.8, (BLOCK, 1): 0.4}, rel=0.01)  # 2 * (2, 1) / (2^2 + 1^2)
    assert list(got) == [(BLOCK, 0), (BLOCK, 1)]


def test_no_latent_goes_by_more_than_all_of_it_and_the_others_take_over(linear):
    got = linear(3.0, {0: 2.0, 1: 1.0, 2: 0.5})
    assert got.strengths == pytest.approx({(BLOCK, 0): 1.0, (BLOCK, 1): 0.8, (BLOCK, 2): 0.4}, rel=0.01)
    assert got.length == pytest.approx(np.sqrt(1 + 0.64 + 0.16), rel=0.01)
    nothing = linear(4.0, {0: 2.0, 1: 1.0, 2: 0.5})
    assert (nothing.strengths, nothing.flipped) == ({}, None)
    assert "No part of these latents" in least(nothing, {})


@pytest.mark.parametrize("seed", range(5))
def test_the_shortest_is_no_longer_than_any_other_within_the_bounds(seed):
    rng = np.random.default_rng(seed)
    slopes = rng.exponential(size=6)
    fall = rng.uniform(0, slopes.sum())
    found = _shortest(slopes, fall)
    assert slopes @ found == pytest.approx(fall)
    assert 0 <= found.min() <= found.max() <= 1
    for other in rng.uniform(size=(2000, 6)):
        if slopes @ other >= fall:
            assert np.linalg.norm(other) >= np.linalg.norm(found) - 1e-9


def test_the_answer_changes_by_it_and_not_by_a_few_percent_less(defended):
    clf, n_found = defended(a_set(range(12)), **RULES["topk"]), 0
    for seed in range(12):
        image = picture(seed)
        got, fewest = least_strengths(clf, image), counterfactual(clf, image)
        assert got.plain == fewest.plain
        if got.flipped is None:
            assert not fewest.found
            continue
        n_found += 1
        close(clf.classify_with(image, got.controls), got.flipped)
        assert got.flipped[0]["label"] != got.plain[0]["label"]
        less = {key: 0.97 * got.controls.strengths.get(key, 1.0) for key in got.strengths}
        answer = clf.classify_with(image, Controls(off=got.controls.off, strengths=less))
        assert answer[0]["label"] == got.plain[0]["label"]
        if fewest.found:
            assert got.length <= np.sqrt(len(fewest.latents)) + 1e-6
    assert n_found >= 2


def test_on_an_attacked_picture_it_is_shorter_than_the_least_set(embedded):
    image = attacked_scene(424_242)
    got, fewest = least_strengths(embedded, image), counterfactual(embedded, image)
    assert 0 < got.length < np.sqrt(len(fewest.latents))
    assert len(got.strengths) > len(fewest.latents)
    assert sum(part < 1 for part in got.strengths.values()) > 1
    assert json.loads(json.dumps(got.to_dict()))["length"] == pytest.approx(got.length)
    said = least(got, {})
    assert f"turn {got.plain[0]['label']} into {got.flipped[0]['label']}" in said
    assert f"and less of {len(got.strengths) - 5} more" in said
    with pytest.raises(ConfigError, match="leave `steer` empty"):
        least_strengths(embedded, image, controls=Controls(steer={next(iter(got.strengths)): 1.0}))


def test_the_command_shows_it_where_it_was_asked_for_and_the_answer_changed(tmp_path):
    attacked_scene(424_242).save(tmp_path / "a.png")
    for name in ("r.json", "r.html"):
        code, _, err = run(
            "explain", tmp_path / "a.png", "--defense", "embedded", "--out", tmp_path / name, "--strengths"
        )
        assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert len(found["strengths"]["strengths"]) > 1
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert f"Removed in part, {len(found['strengths']['strengths'])} latents turn" in page
