"""The torch-free runtime: the answers of `RobustClassifier`, and what it does when things go wrong."""

from __future__ import annotations

import copy
import io
import json
import logging
import pickle
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx

from defense.data.tokenizer import ClipTokenizer
from defense.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    InvalidImageError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
)
from defense.export import sessions
from defense.export.runtime import OnnxClassifier
from defense.hosts.attach import attached

from ..conftest import restated

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def clf(tiny_bundle):
    """For tests that leave it as it is."""
    return OnnxClassifier(tiny_bundle, batch_size=4)


def in_fresh_process(code: str, *arguments: object, timeout: float = 60) -> str:
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- the answers ------------------------------------------------------------------------------------------------------


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


# --- strength ---------------------------------------------------------------------------------------------------------


def test_strength_0_is_the_clip_without_its_defense(tiny_bundle, tiny_classifier, seven_pictures):
    clf = OnnxClassifier(tiny_bundle, strength=0)
    defended = OnnxClassifier(tiny_bundle).transform(seven_pictures)
    with attached(tiny_classifier.clip.model).bypassed():
        plain = tiny_classifier.transform(seven_pictures)
    assert np.abs(defended - plain).max() > 1e-3
    np.testing.assert_allclose(clf.transform(seven_pictures), plain, atol=1e-6)
    assert clf.bundle.parity["plain_diff"] <= 1e-6


def test_a_strength_between_is_torch_s(tiny_bundle, tiny_classifier, seven_pictures):
    defense = attached(tiny_classifier.clip.model)
    defense.set_strength(0.5)
    try:
        want = tiny_classifier.transform(seven_pictures)
    finally:
        defense.set_strength(1)
    np.testing.assert_allclose(OnnxClassifier(tiny_bundle, strength=0.5).transform(seven_pictures), want, atol=1e-5)


def test_a_shadow_run_takes_the_same_session_and_leaves_the_other_alone(tiny_bundle, seven_pictures):
    clf = OnnxClassifier(tiny_bundle)
    want = clf.transform(seven_pictures)
    shadow = clf.with_strength(0)
    assert shadow._session("model.onnx") is clf._session("model.onnx")
    with ThreadPoolExecutor(4) as pool:
        both = list(pool.map(lambda made: made.transform(seven_pictures), [clf, shadow] * 8))
    for got, plain in zip(both[::2], both[1::2], strict=True):
        np.testing.assert_array_equal(got, want)
        assert np.abs(got - plain).max() > 1e-3
    shadow.set_labels(["stone", "tree"])
    assert list(clf.classes_) == ["dog", "cat", "red fish"]
    again = pickle.loads(pickle.dumps(shadow))
    np.testing.assert_array_equal(again.transform(seven_pictures), both[1])
    assert shadow.check_golden() <= 1e-5


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan"), "1", None])
def test_a_strength_out_of_range_is_refused(tiny_bundle, clf, strength):
    for make in (lambda: OnnxClassifier(tiny_bundle, strength=strength), lambda: clf.with_strength(strength)):
        with pytest.raises(ConfigError, match="must lie in"):
            make()


def test_each_picture_of_a_batch_can_have_a_strength_of_its_own(clf, seven_pictures):
    pixel_values = np.stack([clf.preprocess(Image.fromarray(picture)) for picture in seven_pictures])
    strengths = np.array([0, 1, 0.5, 0, 1, 1, 0.25], np.float32)
    got, logits = clf.outputs(pixel_values, strengths)
    want = np.concatenate(
        [clf.with_strength(float(s)).encode_pixels(row[None]) for s, row in zip(strengths, pixel_values, strict=True)]
    )
    np.testing.assert_allclose(got, want, atol=1e-6)
    np.testing.assert_allclose(logits, clf.logit_scale * want @ clf.text_embeds().T, atol=1e-4)


def test_a_strength_without_an_axis_is_fed_as_one(copied, clf, seven_pictures):
    """As in bundles of an earlier version: one number for the whole batch."""
    model = onnx.load(copied / "model.onnx")
    for node in model.graph.node:
        node.input[:] = ["strength_row" if name == "strength" else name for name in node.input]
    del next(value for value in model.graph.input if value.name == "strength").type.tensor_type.shape.dim[:]
    del next(value for value in model.graph.initializer if value.name == "strength").dims[:]
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1]), "one_strength"))
    model.graph.node.insert(0, onnx.helper.make_node("Reshape", ["strength", "one_strength"], ["strength_row"]))
    (copied / "model.onnx").write_bytes(model.SerializeToString())
    old = OnnxClassifier(restated(copied), strength=0)
    assert [value.shape for value in old._session("model.onnx").get_overridable_initializers()][-1] == []
    np.testing.assert_allclose(old.transform(seven_pictures), clf.with_strength(0).transform(seven_pictures), atol=1e-6)
    with pytest.raises(ConfigError, match="takes one strength for a whole batch; export the defense again"):
        old.outputs(np.zeros((2, 3, *old.preprocess.size), np.float32), np.array([0, 1], np.float32))


def without_strength(folder: Path) -> Path:
    """A bundle as older versions wrote it: strength is a constant of the graph."""
    model = onnx.load(folder / "model.onnx")
    model.graph.input.remove(next(value for value in model.graph.input if value.name == "strength"))
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    parity = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["parity"]
    del parity["plain_diff"]
    return restated(folder, parity=parity)


def test_an_older_bundle_still_works_and_says_that_it_has_no_strength(copied, clf, seven_pictures):
    old = OnnxClassifier(without_strength(copied))
    np.testing.assert_array_equal(old.transform(seven_pictures), clf.transform(seven_pictures))
    assert (old.has_strength, clf.has_strength) == (False, True)
    for make in (lambda: OnnxClassifier(copied, strength=0), lambda: old.with_strength(0)):
        with pytest.raises(ConfigError, match="has no strength: export the defense again"):
            make()


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


# --- what cannot work -------------------------------------------------------------------------------------------------


def test_fault_39_nan_in_pixels_is_refused(clf):
    with pytest.raises(NonFiniteError):
        clf.encode_pixels(np.full((1, 3, 32, 32), np.nan, np.float32))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 32, 3), (1, 3, 33, 32)])
def test_fault_67_pixels_of_another_shape_are_refused_with_the_right_one(clf, shape):
    with pytest.raises(ShapeError, match=r"want \[batch, 3, 32, 32\]"):
        clf.encode_pixels(np.zeros(shape, np.float32))


def test_fault_67_a_graph_with_other_inputs_is_refused(copied):
    text = onnx.load(copied / "text.onnx")
    (copied / "model.onnx").write_bytes(text.SerializeToString())
    with pytest.raises(CheckpointError, match="'pixel_values'"):
        OnnxClassifier(restated(copied))


def test_fault_68_a_provider_that_is_not_there_is_refused(tiny_bundle):
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider.*clip-defense\[onnx-gpu\]"):
        OnnxClassifier(tiny_bundle, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(BackendError, match="has no cpu"):
        OnnxClassifier(tiny_bundle, providers=["cpu"])


class OnCpu:
    """A session that was asked for CUDA and runs on the CPU all the same, as onnxruntime-gpu does without a driver."""

    def __init__(self, *_arguments, **_options) -> None:
        pass

    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_fault_68_a_provider_that_does_not_start_is_refused_or_told(tmp_path, monkeypatch, caplog):
    import onnxruntime

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [sessions.CUDA, sessions.CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", OnCpu)
    with pytest.raises(BackendError, match="does not start on this machine"):
        sessions.open_session(tmp_path, [sessions.CUDA, sessions.CPU], {})
    with caplog.at_level(logging.WARNING):
        sessions.open_session(tmp_path, None, {})
    assert "CUDAExecutionProvider is there but does not start" in caplog.text


def test_fault_66_a_half_precision_bundle_is_refused_on_the_cpu(copied):
    with pytest.raises(BackendError, match="this bundle is fp16"):
        OnnxClassifier(restated(copied, dtype="fp16"))


def test_fault_69_both_wheels_are_one_error_with_the_way_out(monkeypatch):
    monkeypatch.setattr(sessions, "version", lambda _package: "1.31.1")
    assert sessions.installed_wheels() == ["onnxruntime", "onnxruntime-gpu"]
    with pytest.raises(BackendError, match="pip uninstall -y onnxruntime onnxruntime-gpu"):
        sessions.import_onnxruntime()


def test_fault_70_without_a_runtime_the_error_names_the_extra(tiny_bundle, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r'pip install "clip-defense\[onnx\]"'):
        OnnxClassifier(tiny_bundle)


class Small:
    """A session with memory for two pictures."""

    def __init__(self, real) -> None:
        self.real, self.batches = real, []
        self.get_inputs, self.get_overridable_initializers = real.get_inputs, real.get_overridable_initializers

    def run(self, names, feed):
        self.batches.append(len(feed["pixel_values"]))
        if self.batches[-1] > 2:
            raise RuntimeError("Failed to allocate memory for requested buffer of size 1")
        return self.real.run(names, feed)


def test_fault_71_a_batch_that_does_not_fit_is_halved_until_it_does(tiny_bundle, seven_pictures, caplog):
    clf = OnnxClassifier(tiny_bundle)
    want = clf.transform(seven_pictures)
    small = clf._sessions["model.onnx"] = Small(clf._session("model.onnx"))
    with caplog.at_level(logging.WARNING):
        got = clf.transform(seven_pictures)
    np.testing.assert_allclose(got, want, atol=1e-6)
    assert small.batches == [7, 3, 1, 2, 4, 2, 2]
    assert "a batch of 7 does not fit into memory, trying 3" in caplog.text


def test_fault_71_other_failures_of_the_runtime_are_told_at_once(tiny_bundle, seven_pictures):
    clf = OnnxClassifier(tiny_bundle)

    class Broken:
        get_inputs = list

        def run(self, _names, _feed):
            raise RuntimeError("device lost")

    clf._sessions["model.onnx"] = Broken()
    with pytest.raises(BackendError, match="on a batch of 7: device lost"):
        clf.transform(seven_pictures)


@pytest.mark.parametrize("fields", [{"threads": 1}, {"_private": 1}, {"intra_op_num_threads": "many"}])
def test_session_options_that_do_not_exist_are_refused(tiny_bundle, fields):
    with pytest.raises(ConfigError):
        OnnxClassifier(tiny_bundle, session_options=fields)


def test_threads_follow_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(sessions, "usable_cores", lambda: 3)
    assert sessions.make_options({}).intra_op_num_threads == 3
    assert sessions.make_options({"intra_op_num_threads": 1}).intra_op_num_threads == 1


# --- threads and processes --------------------------------------------------------------------------------------------


def test_fault_73_threads_get_the_same_answers_bit_for_bit(tiny_bundle, seven_pictures):
    clf = OnnxClassifier(tiny_bundle)
    want = clf.transform(seven_pictures)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: clf.transform(seven_pictures), range(24)):
            np.testing.assert_array_equal(got, want)


def test_fault_73_a_forked_process_builds_its_own_session(tiny_bundle):
    code = """
import os, sys, numpy as np
from defense.export.runtime import OnnxClassifier
pictures = list(np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8))
clf = OnnxClassifier(sys.argv[1], session_options={"intra_op_num_threads": 2})
want = clf.transform(pictures)
pid = os.fork()
if pid == 0:
    os._exit(0 if np.allclose(clf.transform(pictures), want) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    assert in_fresh_process(code, tiny_bundle) == "0"


FORKED_BUSY = """
import io, os, signal, sys, threading, time
import numpy as np
from PIL import Image
from defense.export.runtime import OnnxClassifier

def encoded(pixels):  # decoding takes a lock that arrays do not
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()

pictures = [encoded(each) for each in np.random.default_rng(0).integers(0, 256, (6, 40, 40, 3), dtype=np.uint8)]
clf = OnnxClassifier(sys.argv[1], session_options={"intra_op_num_threads": 2}, batch_size=2)
want = clf.predict_proba(pictures)
clf.set_labels(["stone", "tree"])
parent, fast = os.getpid(), Image.open

def slow(*arguments, **options):  # so that a fork finds the decoder at work, whatever it holds then
    if os.getpid() == parent:
        time.sleep(0.05)
    return fast(*arguments, **options)

Image.open = slow
done = threading.Event()

def work():
    while not done.is_set():
        clf.predict_proba(pictures)

def label():
    while not done.is_set():
        clf.set_labels(["stone", "tree"]).text_embeds()
        clf.forget_labels(0)

threads = [threading.Thread(target=each) for each in (work, work, label)]
for thread in threads: thread.start()
right = 0
for _ in range(int(sys.argv[2])):
    time.sleep(0.02)
    pid = os.fork()
    if pid == 0:
        signal.alarm(10)  # a child that hangs dies of this
        clf.prompts = clf.bundle.prompts
        os._exit(0 if np.allclose(clf.predict_proba(pictures), want, atol=1e-5) else 1)
    right += os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
done.set()
for thread in threads: thread.join()
print(right)
"""


def test_fault_73_children_of_a_busy_parent_answer(tiny_bundle):
    assert in_fresh_process(FORKED_BUSY, tiny_bundle, 6, timeout=200) == "6"


def test_fault_73_a_spawned_process_gets_a_working_copy(tiny_bundle):
    code = """
import sys, pickle, numpy as np
clf = pickle.loads(bytes.fromhex(sys.argv[1]))
print(clf.predict(list(np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8))))
"""
    clf = OnnxClassifier(tiny_bundle)
    want = clf.predict(list(np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8)))
    assert in_fresh_process(code, pickle.dumps(clf).hex()) == str(want)


@pytest.mark.parametrize(
    "copied_by", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy], ids=["pickle", "deepcopy"]
)
def test_fault_74_copies_answer_alike(tiny_bundle, seven_pictures, copied_by):
    clf = OnnxClassifier(tiny_bundle).set_labels(["stone", "tree"])
    other = copied_by(clf)
    np.testing.assert_array_equal(other.predict_proba(seven_pictures), clf.predict_proba(seven_pictures))
    assert list(other.classes_) == ["stone", "tree"]
    assert other.running_on == "CPUExecutionProvider"


# --- without torch ----------------------------------------------------------------------------------------------------

BLOCKED = """
import sys
for name in ("torch", "torchvision", "open_clip", "timm", "onnx", "onnxscript"):
    sys.modules[name] = None
"""


def test_nothing_here_needs_torch(tiny_bundle, tmp_path):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    code = (
        BLOCKED
        + """
from defense.export.runtime import OnnxClassifier
clf = OnnxClassifier(sys.argv[1])
print(clf(sys.argv[2], top_k=1)[0]["label"], clf(sys.argv[2], ["stone", "tree"])[0]["label"], clf.check_golden() < 1e-5)
"""
    )
    label, other, is_golden = in_fresh_process(code, tiny_bundle, tmp_path / "red.png").rsplit(" ", 2)
    assert label in ("dog", "cat", "red fish")
    assert other in ("stone", "tree")
    assert is_golden == "True"


def test_no_socket_is_opened(tiny_bundle):
    code = """
import socket, sys, numpy as np
def refuse(*arguments): raise AssertionError("a socket was opened")
socket.socket.connect = socket.socket.connect_ex = refuse
from defense.export.runtime import OnnxClassifier
print(len(OnnxClassifier(sys.argv[1])(np.zeros((40, 40, 3), np.uint8))))
"""
    assert in_fresh_process(code, tiny_bundle) == "3"


@pytest.mark.slow
def test_an_environment_with_the_extra_onnx_alone_is_enough(tiny_bundle, tmp_path):
    """Needs a package index."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"{ROOT}[onnx]"], check=True)
    listed = subprocess.run([python, "-m", "pip", "list"], check=True, capture_output=True, text=True).stdout
    assert "onnxruntime" in listed
    assert "torch" not in listed
    Image.new("RGB", (40, 40), "red").save(tmp_path / "red.png")
    code = """
import sys
from defense.export.runtime import OnnxClassifier
print(OnnxClassifier(sys.argv[1]).predict([sys.argv[2]]))
"""
    command = [python, "-P", "-c", code, tiny_bundle, tmp_path / "red.png"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert any(label in done.stdout for label in ("dog", "cat", "red fish"))


def test_a_file_object_is_a_picture_too(clf, seven_pictures):
    data = io.BytesIO()
    Image.fromarray(seven_pictures[0]).save(data, "PNG")
    data.seek(0)
    assert clf(data)[0]["label"] == clf(seven_pictures[0])[0]["label"]
