"""Every method that works inside the vision tower, or on what an SAE says of it."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.methods import NotApplicableError, make_methods, material
from defense.classify.classifier import RobustClassifier
from defense.errors import ConfigError

from .tower_material import NEED_A_SPLIT, NEED_NOTHING, embeds, groups_task, image_embeds, without_split, words_task

# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEED_NOTHING + NEED_A_SPLIT)
def test_the_host_is_restored_bit_for_bit_and_two_fits_give_the_same(clip, defense, name):
    state, before, task = clip.model.state_dict(), embeds(clip), words_task()
    state = {key: tensor.clone() for key, tensor in state.items()}
    results = []
    for _ in range(2):
        (method,) = make_methods([name], defense)
        method.fit(clip, task)
        results.append((image_embeds(method, clip, task.tests[1]), json.dumps(method.settings())))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert torch.equal(embeds(clip), before)
    assert state.keys() == clip.model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in clip.model.state_dict().items())
    assert not any(module._forward_hooks for module in clip.model.modules())


@pytest.mark.parametrize("name", NEED_NOTHING + NEED_A_SPLIT)
def test_the_host_is_restored_when_the_run_fails(clip, defense, name):
    before, task = embeds(clip), words_task()
    (method,) = make_methods([name], defense)
    method.fit(clip, task)
    with pytest.raises(KeyboardInterrupt), method.apply(clip):
        raise KeyboardInterrupt
    assert torch.equal(embeds(clip), before)


@pytest.mark.parametrize("name", NEED_A_SPLIT)
def test_a_task_without_a_training_split_is_refused(clip, defense, name):
    (method,) = make_methods([name], defense)
    with pytest.raises(NotApplicableError, match=f"{name} needs a training split, and Words has none"):
        method.fit(clip, without_split(words_task()))


@pytest.mark.parametrize("name", ["embedding-sae", "dyslexify", "textspan"])
def test_attacked_pictures_without_their_twins_are_refused(clip, name):
    (method,) = make_methods([name], None)
    with pytest.raises(NotApplicableError, match="needs training pictures with and without a word"):
        method.fit(clip, replace(words_task(), train_clean=None))


def test_dyslexify_is_for_written_words_only(clip):
    (method,) = make_methods(["dyslexify"], None)
    with pytest.raises(NotApplicableError, match="needs training pictures with and without a word"):
        method.fit(clip, groups_task())


@pytest.mark.parametrize(
    "name", ["random-latents", "naive-splice", "defense-scale", "defense-project", "defense-delta"]
)
def test_what_edits_with_the_latents_of_a_defense_needs_one(clip, name):
    (method,) = make_methods([name], None)
    with pytest.raises(NotApplicableError, match="needs a defense"):
        method.fit(clip, words_task())


@pytest.mark.parametrize("name", ["dyslexify@0.5", "textspan@1", "embedding-sae@0.5", "naive-splice@0.5"])
def test_a_method_without_a_strength_refuses_one(defense, name):
    with pytest.raises(ConfigError, match="has no strength"):
        make_methods([name], defense)


@pytest.mark.parametrize("name", ["random-latents", "embedding-sae", "textspan"])
def test_methods_for_both_kinds_of_cue_take_groups(clip, defense, name):
    task = groups_task()
    (method,) = make_methods([name], defense)
    method.fit(clip, task)
    assert image_embeds(method, clip, task.tests[0]).shape == (40, 32)


# --- material ---------------------------------------------------------------------------------------------------------


def test_picked_pictures_are_spread_and_groups_even():
    assert material.picked(words_task(40).tests[0], 4) == [0, 10, 20, 30]
    assert material.picked(words_task(3).tests[0], 4) == [0, 1, 2]
    task = groups_task(40)
    rows = material.picked(task.tests[0], 8)
    groups = [task.tests[0].examples[row].group for row in rows]
    assert sorted(groups) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows == sorted(rows)


def test_embeddings_of_examples_are_those_of_the_classifier(clip):
    task = words_task(60)  # more than a batch
    pictures = [example.picture.load() for example in task.tests[0].examples]
    found = material.image_embeds_of(clip, task.tests[0].examples)
    np.testing.assert_allclose(found, RobustClassifier(clip).transform(pictures), atol=1e-6)


def test_accuracies_are_those_of_each_group():
    class_embeds = np.eye(2)
    examples = groups_task(8).tests[0].examples  # labels 0 1 0 1 ..., attributes 0 1 1 0 ...
    answers = np.eye(2)[[0, 1, 0, 0, 0, 1, 1, 0]]
    np.testing.assert_array_equal(material.accuracies(answers, class_embeds, examples), [1.0, 0.5, 0.0, 1.0])
    plain = [replace(example, attribute=None) for example in examples]
    np.testing.assert_array_equal(material.accuracies(answers, class_embeds, plain), [5 / 8])


def test_the_best_edit_is_the_first_of_the_best_within_the_clean_budget():
    assert material.best_of([(0.2, 0.9), (0.5, 0.895), (0.9, 0.88), (0.5, 0.9)]) == 1
    assert material.best_of([(0.2, 0.9), (0.1, 0.9)]) == 0
