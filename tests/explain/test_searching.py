"""Names by search, where the text tower is known: a phrase is the sum of its words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from defense.errors import ConfigError
from defense.explain.searching import by_templates, lines_of, search, search_beside_random

WORDS = ("apple", "dog", "red", "blue", "small", "house", "tree", "fish")
RNG = np.random.default_rng(0)
OF = {word: row / np.linalg.norm(row) for word, row in zip(WORDS, RNG.normal(size=(8, 64)), strict=True)}
TEMPLATES = ("red {}", "blue {}", "small {}", "{} on a tree")


def embed(texts) -> np.ndarray:
    rows = np.array([sum((OF[word] for word in text.split() if word in OF), np.zeros(64)) for text in texts])
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def test_a_planted_phrase_is_found_in_as_many_rounds_as_it_has_words_to_go():
    directions = embed(["small blue fish", "red apple", "dog"])
    found = search(directions, WORDS, embed, by_templates(TEMPLATES))
    assert [names[0][0] for names in found.names][1:] == ["red apple", "dog"]
    assert sorted(found.names[0][0][0].split()) == ["blue", "fish", "small"]
    np.testing.assert_allclose(found.best, 1, atol=1e-3)
    assert found.start[0] < 0.8
    assert found.start[2] == pytest.approx(1, abs=1e-6)
    once = search(directions, WORDS, embed, by_templates(TEMPLATES), rounds=1)
    assert once.best[0] < 0.95, "one round adds one word"
    assert once.best[1] == pytest.approx(1, abs=1e-3)


def test_names_fall_in_their_cosine_and_the_words_are_among_them():
    found = search(embed(["red apple"]), WORDS, embed, by_templates(TEMPLATES), n_names=4)
    cosines = [cosine for _, cosine in found.names[0]]
    assert cosines == sorted(cosines, reverse=True)
    for name, cosine in found.names[0]:
        assert cosine == pytest.approx(float((embed([name]) @ embed(["red apple"]).T)[0, 0]), abs=1e-4)
    nothing = search(embed(["red apple"]), WORDS, embed, lambda _names: [])
    assert nothing.names[0][0][0] in ("red", "apple")
    assert nothing.n_scored == len(WORDS)


def test_a_function_may_propose_and_sees_the_names_so_far():
    seen = []

    def propose(names):
        seen.append(list(names))
        return ["red apple", "red apple", "apple"]

    found = search(embed(["red apple"]), WORDS, embed, propose, n_names=2)
    assert found.names[0][0][0] == "red apple"
    assert set(seen[0]) == {"red", "apple"}
    assert seen[1][0] == "red apple"
    assert found.n_scored == len(WORDS) + 1, "nothing is scored twice"


def test_of_too_many_proposals_those_of_most_directions_are_scored_and_the_rest_is_counted():
    directions = embed(["red apple", "red dog", "blue house"])

    proposed, scored = set(), []

    def propose(names):
        phrases = ["shared tree", *(f"red {name}" for name in names)]
        proposed.update(phrases)
        return phrases

    def watched(texts):
        scored.append(list(texts))
        return embed(texts)

    found = search(directions, WORDS, watched, propose, rounds=1, n_most=1)
    assert scored[1] == ["shared tree"]
    assert (found.n_scored, found.n_left_out) == (len(WORDS) + 1, len(proposed) - 1)


def test_latents_with_a_phrase_gain_more_than_random_directions_and_dead_ones_have_no_name():
    directions = np.concatenate([embed([f"{color} {thing}" for color in ("red", "blue") for thing in ("dog", "fish")])])
    directions = np.concatenate([directions, np.zeros((1, 64), np.float32)])
    found = search_beside_random(directions, WORDS, embed, by_templates(TEMPLATES), seed=0, n_names=2)
    assert list(found["names"]) == [0, 1, 2, 3]
    gained = {kind: found[kind]["phrase"] - found[kind]["word"] for kind in ("latents", "random")}
    assert gained["latents"] > gained["random"] >= 0
    assert found["latents"]["nearer"] == 1
    lines = lines_of(json.loads(json.dumps(found)))
    assert "of latents" in lines[0]
    assert "of random directions" in lines[1]
    assert len(lines) == 2 + 4
    assert "not scored" in lines_of({**found, "n_left_out": 3})[2]


@pytest.mark.parametrize("fields", [{"n_names": 0}, {"rounds": 0}, {"n_most": 0}])
def test_numbers_that_mean_nothing_are_refused(fields):
    with pytest.raises(ConfigError, match="at least 1"):
        search(embed(["dog"]), WORDS, embed, by_templates(TEMPLATES), **fields)
    with pytest.raises(ConfigError, match="0 words"):
        search(embed(["dog"]), (), embed, by_templates(TEMPLATES))
