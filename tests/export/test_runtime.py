"""The torch-free runtime gives the answers of `RobustClassifier`, for whatever labels and pictures."""

from __future__ import annotations

import io
import logging
import pickle
import threading
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from defense.data.tokenizer import ClipTokenizer
from defense.errors import CheckpointError, ConfigError, InvalidImageError, ShapeError
from defense.export.runtime import OnnxClassifier

from ..conftest import restated


def test_answers_are_those_of_the_classifier_it_was_exported_from(clf, tiny_classifier, seven_pictures):
    np.testing.assert_allclose(clf.transform(seven_pictures), tiny_classifier.transform(seven_pictures), atol=1e-5)
    np.testing.assert_allclose(
        clf.predict_proba(seven_pictures), tiny_classifier.predict_proba(seven_pictures), atol=1e-4
    )
    assert list(clf.predict(seven_pictures)) == list(tiny_classifier.predict(seven_pictures))
    assert list(clf.classes_) == ["dog", "cat", "red fish"]
    for got, want in zip(clf(seven_pictures), tiny_classifier(seven_pictures), strict=True):
        assert [row["label"] for row in got] == [row["label"] for row in want]


def test_other_labels_go_through_the_text_graph(clf, tiny_classifier, seven_pictures):
    got = clf(seven_pictures[0], ["a stone", "a tree"], hypothesis_template="a sketch of {}", top_k=2)
    want = tiny_classifier(seven_pictures[0], ["a stone", "a tree"], hypothesis_template="a sketch of {}", top_k=2)
    assert [row["label"] for row in got] == [row["label"] for row in want]
    assert [row["score"] for row in got] == pytest.approx([row["score"] for row in want], abs=1e-4)


def test_without_a_text_graph_labels_come_as_embeddings(copied, seven_pictures, tiny_classifier):
    (copied / "text.onnx").unlink()
    clf = OnnxClassifier(restated(copied, text_model=None, context_length=None))
    with pytest.raises(ConfigError, match="no text tower"):
        clf.set_labels(["stone", "tree"])
    assert list(clf.classes_) == ["dog", "cat", "red fish"]
    text_embeds = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)
    scores = clf.set_label_embeds(["stone", "tree"], text_embeds).predict_proba(seven_pictures)
    unit = text_embeds / np.linalg.norm(text_embeds, axis=1, keepdims=True)
    want = tiny_classifier.scores(tiny_classifier.transform(seven_pictures), unit)
    np.testing.assert_allclose(scores, want, atol=1e-4)
    with pytest.raises(ShapeError, match=r"\[2, 3\], want \[2, 32\]"):
        clf.set_label_embeds(["stone", "tree"], np.zeros((2, 3)))


def test_some_of_the_labels_of_a_bundle_without_a_text_graph_are_candidates_too(copied, seven_pictures):
    (copied / "text.onnx").unlink()
    clf = OnnxClassifier(restated(copied, text_model=None, context_length=None))
    whole = {row["label"]: row["score"] for row in clf(seven_pictures[0])}
    two = clf(seven_pictures[0], ["red fish", "dog"])
    assert {row["label"] for row in two} == {"red fish", "dog"}
    odds = whole["red fish"] / whole["dog"]
    scores = {row["label"]: row["score"] for row in two}
    assert scores["red fish"] / scores["dog"] == pytest.approx(odds, rel=1e-4)
    assert list(clf.set_labels(["cat", "dog"]).predict(seven_pictures[:1])) in (["cat"], ["dog"])
    with pytest.raises(ConfigError, match=r"knows the labels 'dog', 'cat', 'red fish' in the template 'simple'"):
        clf.set_labels(["dog", "stone"])
    with pytest.raises(ConfigError, match="no text tower"):
        clf.set_labels(["dog", "cat"], "a sketch of {}")


def test_some_of_the_labels_that_were_handed_over_are_candidates_too(copied, seven_pictures):
    clf = OnnxClassifier(copied)
    text_embeds = np.random.default_rng(0).normal(size=(3, 32)).astype(np.float32)
    clf.set_label_embeds(["stone", "tree", "dog"], text_embeds)
    unit = text_embeds / np.linalg.norm(text_embeds, axis=1, keepdims=True)
    clf.set_labels(["dog", "stone"], ["{}"])
    np.testing.assert_allclose(clf.text_embeds(), unit[[2, 0]], atol=1e-6)


@pytest.mark.parametrize("factor", [1, 8], ids=["equal", "of another length"])
def test_fault_130_labels_with_one_embedding_are_refused(tiny_bundle, factor):
    clf = OnnxClassifier(tiny_bundle)
    before = clf.classes_
    embeds = np.random.default_rng(0).normal(size=(3, clf.bundle.text_embeds.shape[1])).astype(np.float32)
    embeds[2] = embeds[0] * np.float32(factor)
    with pytest.raises(ConfigError, match="'stone' and 'moss' have the same embedding"):
        clf.set_label_embeds(["stone", "tree", "moss"], embeds)
    assert list(clf.classes_) == list(before)


def test_forgotten_labels_are_encoded_again_and_given_ones_stay(tiny_bundle, tiny_classifier):
    clf = pickle.loads(pickle.dumps(OnnxClassifier(tiny_bundle)))
    given = tiny_classifier.text_embeds()[:2]
    clf.forget_labels(0)
    np.testing.assert_array_equal(clf.text_embeds(), clf.bundle.text_embeds)
    encoded = clf.set_labels(["stone", "tree"]).text_embeds()
    clf.set_label_embeds(["stone", "tree"], given)
    clf.forget_labels(0)
    np.testing.assert_allclose(clf.text_embeds(), given, atol=1e-6)
    again = clf.set_labels(["stone", "tree"]).text_embeds()
    assert again is not encoded
    np.testing.assert_array_equal(again, encoded)


def test_fault_40_an_empty_batch_keeps_its_shapes(clf):
    assert clf.transform([]).shape == (0, 32)
    assert clf.predict_proba([]).shape == (0, 3)
    assert clf([]) == []


@pytest.mark.parametrize("n", [1, 2, 4, 5, 7])
def test_fault_41_chunks_equal_single_pictures(clf, seven_pictures, n):
    alone = np.concatenate([clf.transform([picture]) for picture in seven_pictures[:n]])
    np.testing.assert_allclose(clf.transform(seven_pictures[:n]), alone, atol=1e-6)


def test_fault_42_errors_stand_where_their_pictures_stood(clf, seven_pictures):
    mixed = [seven_pictures[0], b"<html>", *seven_pictures[1:5], Path("nowhere.png")]
    answers = list(clf.stream(mixed, on_error="return"))
    assert [type(answer) for answer in answers] == [list, InvalidImageError, *[list] * 4, InvalidImageError]
    assert answers[0][0]["score"] == pytest.approx(clf(seven_pictures[0])[0]["score"], abs=1e-5)
    assert len(list(clf.stream(mixed, on_error="skip"))) == 5
    with pytest.raises(InvalidImageError):
        list(clf.stream(mixed))


@pytest.mark.parametrize("runtime", ["torch", "onnx"])
def test_a_picture_that_is_skipped_is_logged_and_one_whose_error_is_returned_is_not(
    clf, tiny_classifier, seven_pictures, caplog, runtime
):
    made = clf if runtime == "onnx" else tiny_classifier
    pictures = [seven_pictures[0], b"<html>"]
    with caplog.at_level(logging.WARNING):
        made(pictures, on_error="return")
        with pytest.raises(InvalidImageError):
            made(pictures)
        assert caplog.messages == []
        made(pictures, on_error="skip")
    (message,) = caplog.messages
    assert message.startswith("skipped a picture: ")
    assert message.endswith("(not_an_image)")


def test_fault_43_a_long_stream_needs_no_more_memory_than_a_short_one(clf):
    pixels = np.zeros((16, 16, 3), np.uint8)

    def peak(n: int) -> int:
        tracemalloc.start()
        for _ in clf.stream(pixels for _ in range(n)):
            pass
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(20)
    assert peak(2000) < peak(100) + 500_000


def test_a_label_with_a_token_that_the_text_tower_never_learned_is_named(copied, caplog):
    is_blank = np.zeros(49408, bool)
    is_blank[ClipTokenizer(16)(["zebra"])[0][1]] = True
    labels = load_file(copied / "labels.safetensors")
    save_file({**labels, "blank_tokens": is_blank}, copied / "labels.safetensors")
    clf = OnnxClassifier(restated(copied))
    with caplog.at_level(logging.WARNING):
        clf.set_labels(["dog", "a zebra"]).text_embeds()
    assert caplog.messages == ["this model never saw these labels, and guesses: 'a zebra'"]


def test_a_bundle_says_which_tokens_its_text_tower_never_learned(clf, tiny_classifier):
    np.testing.assert_array_equal(clf.bundle.blank_tokens, tiny_classifier.clip.blank_tokens())


def test_pictures_are_decoded_side_by_side_and_stay_in_order(tiny_bundle, seven_pictures, monkeypatch):
    """The first picture of a batch is done last, and the second is broken."""
    clf = OnnxClassifier(tiny_bundle, batch_size=3)
    monkeypatch.setattr("defense.export.runtime.decoding_threads", lambda: 3)
    others_done = threading.Semaphore(0)
    prepare = clf._prepare

    def slow_first(picture):
        if picture is seven_pictures[0]:
            assert others_done.acquire(timeout=30)
            assert others_done.acquire(timeout=30)
        try:
            return prepare(picture)
        finally:
            others_done.release()

    monkeypatch.setattr(clf, "_prepare", slow_first)
    pictures = [seven_pictures[0], b"<html>", *seven_pictures[2:]]
    parts = list(clf.chunks(pictures, "return"))
    assert [[error is None for error in errors] for errors, _ in parts] == [[True, False, True], [True] * 3, [True]]
    want = np.stack([prepare(picture) for picture in pictures if not isinstance(picture, bytes)])
    np.testing.assert_array_equal(np.concatenate([pixel_values for _, pixel_values in parts]), want)


def test_golden_embeddings_are_reproduced_or_refused(clf, copied):
    assert clf.check_golden() <= 1e-5
    clf = OnnxClassifier(copied)
    clf.bundle.golden["image_embeds"][0] = -clf.bundle.golden["image_embeds"][0]
    with pytest.raises(CheckpointError, match="golden embeddings differ"):
        clf.check_golden()


def test_a_file_object_is_a_picture_too(clf, seven_pictures):
    data = io.BytesIO()
    Image.fromarray(seven_pictures[0]).save(data, "PNG")
    data.seek(0)
    assert clf(data)[0]["label"] == clf(seven_pictures[0])[0]["label"]
