"""Faults around ONNX Runtime's sessions: graphs and arrays that do not fit, providers, options, memory, pickles."""

from __future__ import annotations

import logging
import os
import pickle
import pickletools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper

from defense.errors import (
    BackendError,
    CheckpointError,
    ConfigError,
    DefenseError,
    MissingDependencyError,
    NonFiniteError,
    ShapeError,
)
from defense.export import sessions
from defense.export.exporter import free_target
from defense.export.runtime import OnnxClassifier

from ..conftest import restated

# --- fault 67: what does not fit our graphs ---------------------------------------------------------------------------


ARRAYS = {
    "one-picture": np.zeros((3, 32, 32), np.float32),
    "channels-last": np.zeros((2, 32, 32, 3), np.float32),
    "another-size": np.zeros((2, 3, 33, 32), np.float32),
    "flat": np.zeros(3 * 32 * 32, np.float32),
    "a-number": np.float32(1),
    "five-axes": np.zeros((1, 1, 3, 32, 32), np.float32),
    "gray": np.zeros((2, 1, 32, 32), np.float32),
    "no-size": np.zeros((2, 3, 0, 32), np.float32),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_fault_67_arrays_of_another_layout_are_refused_with_the_right_one(clf, name):
    with pytest.raises(DefenseError, match=r"\[batch, 3, 32, 32\]"):
        clf.encode_pixels(ARRAYS[name])


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 32, 32, 3), (1, 3, 33, 32)])
def test_fault_67_pixels_of_another_shape_are_refused_with_the_right_one(clf, shape):
    with pytest.raises(ShapeError, match=r"want \[batch, 3, 32, 32\]"):
        clf.encode_pixels(np.zeros(shape, np.float32))


def test_fault_39_nan_in_pixels_is_refused(clf):
    with pytest.raises(NonFiniteError):
        clf.encode_pixels(np.full((1, 3, 32, 32), np.nan, np.float32))


@pytest.mark.parametrize("kind", [np.float16, np.float64, ">f4"])
def test_fault_67_floats_of_another_width_or_order_are_taken_as_float32(clf, kind):
    pixels = np.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=np.float32).reshape(2, 3, 32, 32)
    np.testing.assert_allclose(clf.encode_pixels(pixels.astype(kind)), clf.encode_pixels(pixels), atol=2e-3)


def other_graph(names: tuple[str, str], shape: list[object], kind: int) -> bytes:
    """A graph that turns pixels into 32 numbers a picture, under these names and with these pixels."""
    pixels = helper.make_tensor_value_info(names[0], kind, shape)
    embeds = helper.make_tensor_value_info(names[1], TensorProto.FLOAT, ["batch", 32])
    constant = helper.make_tensor("ones", TensorProto.FLOAT, [2, 32], np.ones(64, np.float32))
    nodes = [helper.make_node("Constant", [], [names[1]], value=constant)]
    graph = helper.make_graph(nodes, "other", [pixels], [embeds])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    return model.SerializeToString()


OURS = (("pixel_values", "image_embeds"), ["batch", 3, 32, 32], TensorProto.FLOAT)
GRAPHS = {
    "input-name": (("input0", "image_embeds"), *OURS[1:]),
    "output-name": (("pixel_values", "output"), *OURS[1:]),
    "layout": (OURS[0], ["batch", 32, 32, 3], OURS[2]),
    "rank": (OURS[0], ["batch", 3 * 32 * 32], OURS[2]),
    "size": (OURS[0], ["batch", 3, 64, 64], OURS[2]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_fault_67_a_graph_of_another_form_is_refused_when_it_is_loaded(copied, name):
    (copied / "model.onnx").write_bytes(other_graph(*GRAPHS[name]))
    with pytest.raises(CheckpointError, match=r"want \{'pixel_values': \[3, 32, 32\], 'image_embeds': \[32\]\}"):
        OnnxClassifier(restated(copied))


def test_fault_67_a_graph_of_our_form_passes_that_check(copied):
    (copied / "model.onnx").write_bytes(other_graph(*OURS))
    assert OnnxClassifier(restated(copied)).encode_pixels(np.zeros((2, 3, 32, 32), np.float32)).shape == (2, 32)


@pytest.mark.parametrize("kind", [TensorProto.DOUBLE, TensorProto.UINT8, TensorProto.FLOAT16])
def test_fault_67_a_graph_for_numbers_of_another_kind_is_one_error_of_ours(copied, kind):
    (copied / "model.onnx").write_bytes(other_graph(*OURS[:2], kind))
    with pytest.raises((CheckpointError, BackendError), match=r"tensor\(|want"):
        OnnxClassifier(restated(copied)).encode_pixels(np.zeros((2, 3, 32, 32), np.float32))


def test_fault_67_a_graph_with_other_inputs_is_refused(copied):
    text = onnx.load(copied / "text.onnx")
    (copied / "model.onnx").write_bytes(text.SerializeToString())
    with pytest.raises(CheckpointError, match="'pixel_values'"):
        OnnxClassifier(restated(copied))


def test_the_graphs_of_these_tests_are_graphs():
    for form in (*GRAPHS.values(), OURS):
        onnx.checker.check_model(onnx.load_from_string(other_graph(*form)))


# --- faults 66 and 68 to 70: providers and wheels ---------------------------------------------------------------------


def test_fault_68_a_provider_that_is_not_there_is_refused(tiny_bundle):
    with pytest.raises(BackendError, match=r"has no CUDAExecutionProvider.*pip install .*\[onnx-gpu\]"):
        OnnxClassifier(tiny_bundle, providers=["CUDAExecutionProvider", "CPUExecutionProvider"])
    with pytest.raises(BackendError, match="has no cpu"):
        OnnxClassifier(tiny_bundle, providers=["cpu"])


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_fault_135_a_path_that_is_no_utf8_is_refused_before_any_work(tmp_path):
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    folder.mkdir()
    (folder / "model.onnx").write_bytes(other_graph(*OURS))
    with pytest.raises(ConfigError, match=r"f\\xff.model\.onnx holds bytes that are not UTF-8.*rename"):
        sessions.open_session(folder / "model.onnx", None, {})
    with pytest.raises(ConfigError, match="not UTF-8"):
        free_target(folder / "bundle")


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
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[onnx\]"):
        OnnxClassifier(tiny_bundle)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fields", [{"threads": 1}, {"_private": 1}, {"intra_op_num_threads": "many"}])
def test_session_options_that_do_not_exist_are_refused(tiny_bundle, fields):
    with pytest.raises(ConfigError):
        OnnxClassifier(tiny_bundle, session_options=fields)


def test_threads_follow_the_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(sessions, "usable_cores", lambda: 3)
    assert sessions.make_options({}).intra_op_num_threads == 3
    assert sessions.make_options({"intra_op_num_threads": 1}).intra_op_num_threads == 1


# --- fault 71: no memory for a batch ----------------------------------------------------------------------------------


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


# --- fault 72: how many pictures are decoded at once ------------------------------------------------------------------

DECODES_AT_ONCE = """
import os, resource, sys, threading, time
import numpy as np
cores, gib = int(sys.argv[2]), float(sys.argv[3])
os.sched_getaffinity = lambda _pid: set(range(cores))
from defense.data import images
from defense.export.runtime import OnnxClassifier
clf = OnnxClassifier(sys.argv[1], session_options={"intra_op_num_threads": 1}, batch_size=16)
decode, lock, now, most = images.decode, threading.Lock(), 0, 0
def counted(*arguments, **options):
    global now, most
    with lock:
        now += 1
        most = max(most, now)
    time.sleep(0.02)
    with lock:
        now -= 1
    return decode(*arguments, **options)
images.decode = counted
if gib:
    resource.setrlimit(resource.RLIMIT_AS, (int(gib * 2**30), resource.RLIM_INFINITY))
answers = clf([np.zeros((20, 20, 3), np.uint8)] * 48)
assert len(answers) == 48
print(most)
"""


@pytest.mark.parametrize(("cores", "gib", "most"), [(3, 0, 3), (1, 0, 1), (6, 3, 1)])
def test_fault_72_no_more_pictures_are_decoded_at_once_than_cores_and_memory_allow(tiny_bundle, cores, gib, most):
    """Where there are three cores, three at once; where memory is for one of the largest pictures, one."""
    command = [sys.executable, "-P", "-c", DECODES_AT_ONCE, str(tiny_bundle), str(cores), str(gib)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == most


# --- fault 74: what goes to other processes ---------------------------------------------------------------------------


def test_fault_74_nothing_of_a_runtime_or_of_threads_is_pickled(tiny_bundle, seven_pictures):
    clf = OnnxClassifier(tiny_bundle)
    want = clf.predict_proba(seven_pictures)  # with a session and a pool of threads by now
    data = pickle.dumps(clf)
    texts = [str(argument) for _, argument, _ in pickletools.genops(data) if isinstance(argument, str)]
    assert "defense.export.runtime" in texts
    foreign = ("onnxruntime", "threading", "_thread", "concurrent", "queue")
    assert not [text for text in texts if text.split(".")[0].split(" ")[0] in foreign]
    other = pickle.loads(data)
    assert other.session_options == clf.session_options
    np.testing.assert_array_equal(other.predict_proba(seven_pictures), want)
    np.testing.assert_array_equal(clf.predict_proba(seven_pictures), want)  # and the first works on
