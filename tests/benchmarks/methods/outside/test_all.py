"""Every method that compares with ours and leaves its SAE alone."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.methods import FACTORIES, NotApplicableError
from defense.benchmarks.methods.embeddings import EditedImages, EditedTexts, unit
from defense.benchmarks.named_clip import weights_sha256
from defense.classify.classifier import RobustClassifier
from defense.data.labels import Prompts
from defense.errors import ConfigError

from .task_material import GROUPED, NAMES, TYPOGRAPHIC, method, n_hooks, needs_tesseract, pictures, twins

CASES = [pytest.param(name, "typographic", id=name) for name in TYPOGRAPHIC if name != "ocr-blur"]
CASES += [pytest.param(name, "grouped", id=f"{name}-groups") for name in GROUPED]
CASES.append(pytest.param("ocr-blur", "typographic", id="ocr-blur", marks=needs_tesseract))


@pytest.mark.parametrize(("name", "task"), CASES)
def test_the_host_is_restored_bit_for_bit(name, task, clip, request):
    before, sha256 = RobustClassifier(clip).transform(pictures()), weights_sha256(clip.model)
    texts = clip.model.encode_text(torch.from_numpy(clip.tokenizer(["a photo of a * dog."])))
    made = method(name)
    made.fit(clip, request.getfixturevalue(task))
    encoded = []

    def fail_after_use() -> None:
        with made.apply(clip) as encoder:
            encoded.append(encoder.image_embeds(pictures()))
            encoded.append(encoder.text_embeds(Prompts(NAMES, ("a photo of a {}.",))))
            raise KeyError

    with pytest.raises(KeyError):
        fail_after_use()
    embeds, text_embeds = encoded
    assert embeds.dtype == text_embeds.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeds, axis=1), 1, rtol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(text_embeds, axis=1), 1, rtol=1e-5)
    assert n_hooks(clip.model) == 0
    assert weights_sha256(clip.model) == sha256
    np.testing.assert_array_equal(RobustClassifier(clip).transform(pictures()), before)
    assert torch.equal(clip.model.encode_text(torch.from_numpy(clip.tokenizer(["a photo of a * dog."]))), texts)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_two_fits_learn_the_same_and_settings_are_json(name, task, clip, request):
    first, second = method(name), method(name)
    first.fit(clip, request.getfixturevalue(task))
    second.fit(clip, request.getfixturevalue(task))
    assert json.loads(json.dumps(first.settings())) == second.settings()


@pytest.mark.parametrize("name", ["leace", "sampling-tar", "defense-prefix"])
def test_settings_tell_what_was_learned_apart(name, clip, typographic, monkeypatch):
    made, other = method(name), method(name)
    made.fit(clip, typographic)
    if name == "sampling-tar":
        other.heads = ((0, 0),)
    else:
        fewer = replace(typographic, train=twins(6)[0], train_clean=twins(6)[1])
        other.fit(clip, fewer)
    assert made.settings() != other.settings()


@pytest.mark.parametrize("name", ["leace", "sampling-tar", "defense-prefix"])
@pytest.mark.parametrize("missing", [{"train": None, "train_clean": None}, {"train_clean": None}])
def test_a_task_without_training_twins_is_not_applicable(name, missing, clip, typographic):
    with pytest.raises(NotApplicableError, match=f"{name} needs"):
        method(name).fit(clip, replace(typographic, **missing))


@pytest.mark.parametrize("name", ["sampling-tar", "defense-prefix", "ocr-blur"])
def test_methods_against_words_refuse_tasks_without(name, clip, grouped):
    with pytest.raises(NotApplicableError, match=f"{name} needs"):
        method(name).fit(clip, grouped)


@pytest.mark.parametrize("name", ["orth-cali", "roboshot"])
def test_methods_that_know_the_attribute_from_texts_refuse_other_tasks(name, clip, typographic):
    with pytest.raises(NotApplicableError, match=f"{name} needs texts"):
        method(name).fit(clip, typographic)


@pytest.mark.parametrize("name", [*TYPOGRAPHIC, "orth-cali", "roboshot"])
def test_a_strength_is_refused(name):
    with pytest.raises(ConfigError, match="no strength"):
        FACTORIES[name](f"{name}@0.5", None, 0.5)


def test_a_row_of_zeros_stays_one():
    np.testing.assert_array_equal(unit(np.array([[3.0, 4.0], [0.0, 0.0]])), np.float32([[0.6, 0.8], [0, 0]]))


def test_edits_reach_the_embeddings_they_name_and_no_others(clip):
    prompts = Prompts(NAMES, ("{}",))
    stock_images = RobustClassifier(clip).transform(pictures())
    images, texts = EditedImages(clip, np.negative), EditedTexts(clip, np.negative)
    np.testing.assert_allclose(images.image_embeds(pictures()), -stock_images, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(texts.image_embeds(pictures()), stock_images)
    np.testing.assert_allclose(texts.text_embeds(prompts), -images.text_embeds(prompts), rtol=1e-6, atol=1e-7)
    assert texts.edits_text
    assert not images.edits_text
