"""Counterfactuals change the answer, and no part of one does."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest

pytest.importorskip("open_clip")

from defense.classify.classifier import RobustClassifier
from defense.errors import ConfigError
from defense.explain.counterfactual import counterfactual
from defense.hosts.controls import Controls

from .explained import BLOCK, RULES, a_set, attacked_scene, picture


def removing(clf: RobustClassifier, image, latents, candidates) -> str:
    off = frozenset(candidates) - frozenset(latents)
    return clf.classify_with(image, Controls(off=off))[0]["label"]


def test_a_counterfactual_changes_the_answer_and_no_part_of_it_does(defended):
    n_found, sizes = 0, []
    clf = defended(a_set(range(12)), **RULES["topk"])
    candidates = [(BLOCK, latent) for latent in range(12)]
    for seed in range(12):
        image = picture(seed)
        found = counterfactual(clf, image)
        plain = clf.explain(image).plain
        assert found.plain == plain
        if not found.found:
            assert found.latents == ()
            continue
        n_found += 1
        sizes.append(len(found.latents))
        assert found.flipped[0]["label"] == removing(clf, image, found.latents, candidates) != plain[0]["label"]
        for n in range(len(found.latents)):
            for part in itertools.combinations(found.latents, n):
                if n in (0, len(found.latents) - 1):
                    assert removing(clf, image, part, candidates) == plain[0]["label"]
        single = [place for place in candidates if removing(clf, image, [place], candidates) != plain[0]["label"]]
        assert (len(found.latents) == 1) == bool(single)
    assert n_found >= 2, sizes


def test_on_an_attacked_picture_a_few_of_the_latents_are_enough(embedded):
    image = attacked_scene(424_242)
    explanation = embedded.explain(image)
    assert explanation.changed, "the case must be one that the defense mends"
    found = counterfactual(embedded, image)
    assert 1 <= len(found.latents) <= 4 < len(explanation.removed)
    assert json.loads(json.dumps(found.to_dict()))["latents"] == [list(place) for place in found.latents]


def test_no_latent_of_a_counterfactual_can_be_left_out_even_where_they_depend_on_each_other(defended, monkeypatch):
    places = [(BLOCK, latent) for latent in range(4)]
    # Without 0 the answer stays changed, and only then can 3 go too.
    margins = {(): 4, (0,): 3, (0, 1): 2, (0, 1, 2): 1, (0, 1, 2, 3): -1, (1, 2, 3): -1, (1, 2): -1}

    def scores(_search, removed):
        margin = margins.get(tuple(sorted(latent for _, latent in removed)), 3.5)
        return np.array([0.5, 0.5 * np.exp(-margin), 0], np.float32)

    monkeypatch.setattr("defense.explain.counterfactual.Search.scores", scores)
    monkeypatch.setattr("defense.explain.counterfactual.Search.firing", lambda _search: list(places))
    monkeypatch.setattr("defense.explain.counterfactual.Search.n_tried", 0)
    assert counterfactual(defended(a_set(range(4))), picture()).latents == (places[1], places[2])


def test_where_no_latent_takes_anything_none_is_found(defended):
    clf = defended(a_set(gains=(1.0,) * 40))
    found = counterfactual(clf, picture())
    assert not found.found
    assert found.latents == ()
    assert found.flipped is None
    assert counterfactual(clf, picture(), controls=Controls(sets=())).n_tried == 0


def test_a_counterfactual_uses_only_what_the_controls_leave(embedded):
    image = attacked_scene(424_242)
    first = counterfactual(embedded, image)
    second = counterfactual(embedded, image, controls=Controls(off=frozenset(first.latents[:1])))
    assert first.latents[0] not in second.latents
    assert second.plain == first.plain, "what is left alone is not removed either"
    with pytest.raises(ConfigError, match="leave `steer` empty"):
        counterfactual(embedded, image, controls=Controls(steer={first.latents[0]: 1.0}))


def test_one_label_has_no_counterfactual(defended):
    with pytest.raises(ConfigError, match="set at least two"):
        counterfactual(defended(a_set()).set_labels(["dog"]), picture())
