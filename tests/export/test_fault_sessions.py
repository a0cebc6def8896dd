"""Faults around ONNX Runtime's sessions: graphs and arrays that do not fit, memory, what is sent to other processes."""

from __future__ import annotations

import pickle
import pickletools
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from onnx import TensorProto, helper

from defense.errors import BackendError, CheckpointError, DefenseError
from defense.export.runtime import OnnxClassifier

from ..conftest import restated

# --- fault 67: what does not fit our graphs ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clf(tiny_bundle):
    """For tests that leave it as it is."""
    return OnnxClassifier(tiny_bundle)


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


def test_the_graphs_of_these_tests_are_graphs():
    for form in (*GRAPHS.values(), OURS):
        onnx.checker.check_model(onnx.load_from_string(other_graph(*form)))


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
