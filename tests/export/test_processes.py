"""The torch-free runtime in threads, forks and copies, and in processes without torch."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from defense.export.runtime import OnnxClassifier

ROOT = Path(__file__).parents[2]


def in_fresh_process(code: str, *arguments: object, timeout: float = 60) -> str:
    command = [sys.executable, "-P", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# --- threads, forks, copies -------------------------------------------------------------------------------------------


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
