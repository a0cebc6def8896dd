"""RobustClassifier: the pipeline's calls, scikit-learn's calls, streams, errors, explanations."""

from __future__ import annotations

import io
import itertools
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
import torch

from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.data.images import Limits
from defense.errors import ConfigError, InvalidImageError, NonFiniteError
from defense.explain.counterfactual import counterfactual
from defense.hosts.clip import Clip, load_clip
from defense.hosts.controls import Controls

from ..conftest import random_defense, random_sae
from .pictures import LABELS, picture


def test_one_picture_gives_a_list_of_labels_and_scores_best_first(clf):
    answer = clf(picture())
    assert [set(entry) for entry in answer] == [{"label", "score"}] * 4
    assert {entry["label"] for entry in answer} == set(LABELS)
    scores = [entry["score"] for entry in answer]
    assert scores == sorted(scores, reverse=True)
    assert sum(scores) == pytest.approx(1, abs=1e-5)


def test_every_kind_of_input_gives_the_same_answer(clf, tmp_path):
    array = picture()
    image = Image.fromarray(array)
    path = tmp_path / "a picture ü.png"
    image.save(path)
    data = path.read_bytes()
    want = clf(array)
    for source in (str(path), path, data, io.BytesIO(data), path.open("rb"), image):
        assert clf(source) == want
        if hasattr(source, "close"):
            source.close()


def test_lists_give_lists_and_iterators_give_iterators(clf):
    batch = [picture(i) for i in range(9)]
    answers = clf(batch)
    assert isinstance(answers, list)
    assert len(answers) == 9
    lazily = clf(iter(batch))
    assert not isinstance(lazily, list)
    assert [a[0]["label"] for a in lazily] == [a[0]["label"] for a in answers]


def test_fault_41_any_batch_equals_picture_by_picture(clf):
    batch = [picture(i) for i in range(9)]
    alone = np.concatenate([clf.transform([image]) for image in batch])
    for size in (1, 2, 4, 5, 9, 16):
        clf.batch_size = size
        np.testing.assert_allclose(clf.transform(batch), alone, atol=1e-5)


def test_fault_42_good_and_bad_pictures_mixed(clf, caplog):
    batch = [picture(0), b"", picture(1), b"<html>", picture(2)]
    want = [clf(batch[0]), clf(batch[2]), clf(batch[4])]
    with caplog.at_level(logging.WARNING):
        returned = clf(batch, on_error="return")
    assert not caplog.text, "nothing was skipped"
    assert [type(item) for item in returned] == [list, InvalidImageError, list, InvalidImageError, list]
    assert returned[1].code == "empty"
    assert [returned[i][0]["label"] for i in (0, 2, 4)] == [answer[0]["label"] for answer in want]
    with caplog.at_level(logging.WARNING):
        assert len(clf(batch, on_error="skip")) == 3
    assert "empty" in caplog.text
    with pytest.raises(InvalidImageError):
        clf(batch)
    with pytest.raises(ConfigError, match="on_error"):
        clf(batch, on_error="ignore")


def test_fault_40_an_empty_batch_gives_empty_results(clf):
    assert clf([]) == []
    assert clf.predict([]).shape == (0,)
    assert clf.predict_proba([]).shape == (0, 4)
    assert clf.transform([]).shape == (0, 32)


def test_fault_43_an_iterator_is_read_only_as_far_as_needed(clf):
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield picture()

    assert len(list(itertools.islice(clf(endless()), 3))) == 3
    assert len(taken) == clf.batch_size


def test_fault_32_a_path_that_is_no_file_hints_at_labels(clf):
    with pytest.raises(InvalidImageError, match="did you mean candidate_labels"):
        clf("dog")


def test_fault_39_nan_pixels_are_refused(clf):
    pixels = np.zeros((2, 3, 32, 32), np.float32)
    pixels[1, 0, 0, 0] = np.nan
    with pytest.raises(NonFiniteError, match="input"):
        clf.encode_pixels(pixels)


def test_the_scikit_learn_shape(clf):
    batch = [picture(i) for i in range(5)]
    proba = clf.predict_proba(batch)
    assert proba.shape == (5, 4)
    np.testing.assert_allclose(proba.sum(1), 1, atol=1e-5)
    assert list(clf.classes_) == LABELS
    assert list(clf.predict(batch)) == [LABELS[i] for i in proba.argmax(1)]
    np.testing.assert_allclose(np.linalg.norm(clf.transform(batch), axis=1), 1, atol=1e-5)
    assert [clf(image)[0]["label"] for image in batch] == list(clf.predict(batch))


def test_permuting_labels_permutes_the_scores(clf):
    batch = [picture(i) for i in range(3)]
    forward = clf.predict_proba(batch)
    backward = clf.set_labels(LABELS[::-1]).predict_proba(batch)
    np.testing.assert_allclose(forward, backward[:, ::-1], atol=1e-6)


def test_scores_equal_open_clips_own_arithmetic(tiny_folder):
    import open_clip

    clf = RobustClassifier(load_clip(f"local-dir:{tiny_folder}")).set_labels(LABELS, "openai")
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{tiny_folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{tiny_folder}")
    with torch.inference_mode():
        classifier = open_clip.build_zero_shot_classifier(model, tokenizer, LABELS, open_clip.OPENAI_IMAGENET_TEMPLATES)
        features = model.encode_image(transform(Image.fromarray(picture()))[None], normalize=True)
        want = (model.logit_scale.exp() * features @ classifier).softmax(1)[0].numpy()
    np.testing.assert_allclose(clf.predict_proba([picture()])[0], want, atol=1e-5)


def test_labels_are_encoded_once(clf, monkeypatch):
    clf(picture())
    calls = []
    encode_text = clf.clip.model.encode_text
    monkeypatch.setattr(clf.clip.model, "encode_text", lambda *args: calls.append(1) or encode_text(*args))
    clf(picture(1), candidate_labels=LABELS)
    assert not calls
    clf(picture(1), candidate_labels=LABELS, hypothesis_template="a sketch of a {}.")
    assert len(calls) == 1
    clf(picture(1), candidate_labels=["one", "two"])
    assert clf.prompts.templates == ("a photo of a {}.",), "what one call chooses is for that call"


def test_an_empty_template_is_refused_and_not_replaced_by_another(clf):
    with pytest.raises(ConfigError, match="template"):
        clf(picture(), hypothesis_template="")


def test_classifying_without_labels_is_refused(tiny_folder):
    clf = RobustClassifier(load_clip(f"local-dir:{tiny_folder}"))
    with pytest.raises(ConfigError, match="set_labels"):
        clf(picture())


def test_labels_without_an_embedding_are_named(clf, caplog):
    with torch.no_grad():
        clf.clip.model.token_embedding.weight[np.asarray(clf.clip.tokenizer(["zebra"]))[0, 1]] = 0
    with caplog.at_level(logging.WARNING):
        clf.set_labels(["dog", "zebra"]).text_embeds()
    assert "never saw" in caplog.text
    assert "'zebra'" in caplog.text
    assert "'dog'" not in caplog.text


def test_where_reading_is_the_task_it_is_said_once_that_words_are_removed(clf, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            clf.set_labels(["stop sign", "dog"]).text_embeds()
    (said,) = caplog.messages
    assert "'stop sign'" in said
    assert "'dog'" not in said
    caplog.clear()
    clf.set_labels(["cat", "dog"]).text_embeds()
    assert not caplog.messages


def test_plain_clip_may_read(tiny_folder, caplog):
    with caplog.at_level(logging.WARNING):
        RobustClassifier(load_clip(f"local-dir:{tiny_folder}")).set_labels(["stop sign", "dog"]).text_embeds()
    assert not [said for said in caplog.messages if "name text" in said]


def test_explain_accounts_for_what_was_removed(clf):
    explanation = clf.explain(picture())
    assert {entry["label"] for entry in explanation.plain} == set(LABELS)
    assert explanation.heatmap.shape == (4, 4)
    assert (explanation.heatmap >= 0).all()
    assert explanation.heatmap.sum() > 0
    assert 0 < explanation.fraction < 10
    energies = [item.energy for item in explanation.removed]
    assert energies == sorted(energies, reverse=True)
    assert sum(item.share for item in explanation.removed) == pytest.approx(1)
    assert all(item.set_name == "text" and item.latent < 60 for item in explanation.removed)
    assert explanation.robust == clf(picture())
    import json

    assert json.loads(json.dumps(explanation.to_dict()))["changed"] == explanation.changed


def test_explain_of_an_edit_that_removes_nothing_changes_nothing(tiny_folder, tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(), LatentSet("off", (1, 2), (1.0, 1.0))))
    clf = RobustClassifier(load_clip(f"local-dir:{tiny_folder}"), defense).set_labels(LABELS)
    explanation = clf.explain(picture())
    assert explanation.removed == ()
    assert explanation.plain == explanation.robust
    assert not explanation.changed
    assert explanation.fraction == 0


def test_explain_needs_a_defense(tiny_folder):
    with pytest.raises(ConfigError, match="no defense"):
        RobustClassifier(load_clip(f"local-dir:{tiny_folder}")).set_labels(LABELS).explain(picture())


@pytest.mark.parametrize("batch_size", [0, -3])
def test_a_batch_size_below_one_is_refused(tiny_folder, batch_size):
    with pytest.raises(ConfigError, match="batch_size"):
        RobustClassifier(load_clip(f"local-dir:{tiny_folder}"), batch_size=batch_size)


def test_fewer_than_one_label_to_return_is_refused_before_anything_is_read(clf):
    def unread():
        raise AssertionError("the pictures were read")
        yield

    for call in (
        lambda: clf(picture(), top_k=0),
        lambda: clf(unread(), top_k=-1),
        lambda: clf.explain(picture(), top_k=0),
    ):
        with pytest.raises(ConfigError, match="top_k"):
            call()


@pytest.mark.parametrize("call", ["transform", "predict_proba", "predict"])
@pytest.mark.parametrize("one", ["dog.png", b"...", Path("dog.png")])
def test_one_picture_where_scikit_learn_takes_many_is_refused(clf, call, one):
    with pytest.raises(ConfigError, match="must be a list"):
        getattr(clf, call)(one)


@pytest.mark.parametrize(
    "call",
    [
        lambda clf: scores_of(clf(picture())),
        lambda clf: scores_of(next(clf.stream([picture()]))),
        lambda clf: scores_of(clf.classify_with(picture(), Controls(strength=0.5))),
        lambda clf: scores_of(clf.explain(picture()).plain),
        lambda clf: scores_of(clf.explain(picture()).robust),
        lambda clf: scores_of(counterfactual(clf, picture()).plain),
        lambda clf: clf.predict([picture(i) for i in range(5)]).tolist(),
    ],
    ids=["call", "stream", "classify_with", "explain-plain", "explain-robust", "counterfactual", "predict"],
)
def test_labels_that_another_thread_sets_meanwhile_do_not_get_these_scores(clf, monkeypatch, call):
    want = call(clf)
    before, after = clf.prompts, replace(clf.prompts, labels=tuple(reversed(LABELS)))
    for n_before in range(1, 7):  # however many looks at the labels come before the other thread
        looks = itertools.chain([before] * n_before, itertools.repeat(after))
        monkeypatch.setattr(RobustClassifier, "prompts", property(lambda _, looks=looks: next(looks)), raising=False)
        assert call(clf) == pytest.approx(want, abs=1e-5)


def scores_of(prediction) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in prediction}


def test_labels_that_were_forgotten_are_encoded_again(clf, monkeypatch):
    encoded = []
    encode_text = Clip.encode_text
    monkeypatch.setattr(Clip, "encode_text", lambda self, ids: (encoded.append(len(ids)), encode_text(self, ids))[1])
    for names in (["a"], ["b", "c"], ["d", "e", "f"]):
        clf.set_labels(names).text_embeds()
    clf.forget_labels(2)
    for names in (["d", "e", "f"], ["b", "c"], ["a"]):
        clf.set_labels(names).text_embeds()
    assert encoded == [1, 2, 3, 1]


def test_a_map_of_a_latent_is_that_of_the_plain_network(clf):
    (site,) = clf.defense.sites
    plain = clf.clip.latent_map(site.hook_point, clf.sae(site.hook_point), 3, picture())
    np.testing.assert_array_equal(clf.latent_map(picture(), site.hook_point, 3), plain)
    assert plain.shape == (4, 4)
    with pytest.raises(ConfigError, match="no defense at"):
        clf.latent_map(picture(), "blocks.0.hook_resid_post", 3)


def test_a_stream_keeps_the_labels_that_were_set_when_it_began(clf):
    stream = clf.stream([picture(i) for i in range(6)])
    first = next(stream)
    clf.set_labels(["sun", "moon"])
    assert {entry["label"] for entry in next(stream)} == {entry["label"] for entry in first} == set(LABELS)
    assert {entry["label"] for entry in clf(picture())} == {"sun", "moon"}


def test_warnings_about_pictures_reach_the_caller(clf, caplog):
    hidden = Image.new("RGBA", (40, 40), (0, 0, 0, 0))
    batch = [hidden, b"", picture(1), hidden, Image.new("RGB", (8, 9))]
    answers = list(clf.answers(batch))
    assert [answer.warnings for answer in answers] == [("invisible",), (), (), ("invisible",), ("tiny",)]
    assert [answer.error is None for answer in answers] == [True, False, True, True, True]
    assert answers[1].prediction is None
    assert not caplog.records
    assert [answer.prediction for answer in answers if answer.error is None] == clf(batch, on_error="skip")
    assert "picture 4: it is fewer than 16 pixels" in caplog.text, "the number is that of the input"
    good = [batch[i] for i in (0, 2, 3, 4)]
    for call in (clf, clf.predict, clf.transform):  # results without room for warnings: each kind is logged once
        caplog.clear()
        call(good)
        told = [record.getMessage() for record in caplog.records]
        assert [text.partition(":")[0] for text in told] == ["picture 0", "picture 3"]


def test_limits_are_the_classifiers(clf):
    clf.limits = Limits(max_pixels=99)
    for call in (clf, clf.explain, clf.probe):
        with pytest.raises(InvalidImageError, match="more than 99"):
            call(picture(0))
    clf.limits = Limits()
