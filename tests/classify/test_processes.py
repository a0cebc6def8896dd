"""A classifier in other processes: copied, pickled, forked from a busy parent; and how much it remembers."""

from __future__ import annotations

import copy
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("open_clip")

from defense.classify import zeroshot
from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.hosts.attach import attached
from defense.hosts.clip import load_clip
from defense.hosts.controls import Controls

from ..conftest import random_defense, random_sae

LABELS = ["dog", "cat", "fish"]


@pytest.fixture
def clf(tiny_clip, tiny_folder):
    site = (1, random_sae(act="topk", k=8), LatentSet("text", tuple(range(60))))
    defense = random_defense(tiny_clip, site, name=f"local-dir:{tiny_folder}")
    return RobustClassifier(load_clip(f"local-dir:{tiny_folder}"), defense, batch_size=4).set_labels(LABELS)


def pickled(clf: RobustClassifier) -> RobustClassifier:
    return pickle.loads(pickle.dumps(clf))


@pytest.mark.parametrize("copy_of", [pickled, copy.deepcopy], ids=["pickle", "deepcopy"])
def test_fault_74_a_copy_gives_the_same_answers_bit_for_bit_and_is_of_its_own(clf, seven_pictures, copy_of):
    clf.sae("blocks.1.hook_resid_post")  # kept by the identity of its site
    want, controls = clf(seven_pictures), Controls(steer={("blocks.1.hook_resid_post", 3): 2.0})
    steered = clf.classify_with(seven_pictures[0], controls)
    twin = copy_of(clf)
    assert twin(seven_pictures) == want
    assert twin.classify_with(seven_pictures[0], controls) == steered
    assert twin.explain(seven_pictures[0]).removed == clf.explain(seven_pictures[0]).removed
    attached(twin.clip.model).set_strength(0)
    twin.set_labels(["x", "y"])
    assert clf(seven_pictures) == want


SPAWNED = """
import multiprocessing, pickle, sys
import numpy as np

def answer(clf):
    return clf.predict_proba(np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)).tolist()

if __name__ == "__main__":
    with open(sys.argv[1], "rb") as file:
        clf = pickle.load(file)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        print(pool.map(answer, [clf]) == [answer(clf)])
"""


@pytest.mark.slow
def test_fault_74_a_spawned_process_takes_a_classifier(clf, tmp_path):
    (tmp_path / "clf.pickle").write_bytes(pickle.dumps(clf))
    (tmp_path / "main.py").write_text(SPAWNED)
    command = [sys.executable, tmp_path / "main.py", tmp_path / "clf.pickle"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "True", done.stderr


FORKED = """
import os, pickle, sys, threading, time, warnings
import numpy as np
import torch

torch.set_num_threads(int(sys.argv[2]))
warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, which is what this is about
with open(sys.argv[1], "rb") as file:
    clf = pickle.load(file)
pictures = list(np.random.default_rng(0).integers(0, 256, (4, 40, 48, 3), dtype=np.uint8))
want = clf(pictures)

def work():
    while True:
        clf(pictures)
        clf.latent_map(pictures[0], "blocks.1.hook_resid_post", 3)
        clf.explain(pictures[0])

threading.Thread(target=work, daemon=True).start()
codes = []
for n in range(8):
    time.sleep(0.01 * n)
    child = os.fork()
    if child == 0:
        threading.Timer(30, os._exit, [9]).start()
        got = clf(pictures)
        near = all(
            abs(a["score"] - b["score"]) < 1e-5 for x, y in zip(got, want, strict=True) for a, b in zip(x, y)
        )
        os._exit(0 if near else 3)
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.write(1, str(sorted(set(codes))).encode())
os._exit(0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork; runs on Linux and macOS")
@pytest.mark.parametrize("n_threads", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_fault_73_a_child_of_a_parent_that_was_predicting_predicts(clf, tmp_path, n_threads):
    (tmp_path / "clf.pickle").write_bytes(pickle.dumps(clf))
    command = [sys.executable, "-c", FORKED, tmp_path / "clf.pickle", str(n_threads)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout == "[0]", done.stderr
    assert ("torch uses one thread" in done.stderr) == (n_threads > 1)


# --- what is remembered -----------------------------------------------------------------------------------------------


def test_fault_labels_of_many_calls_do_not_fill_the_memory(clf, monkeypatch):
    n_bytes = clf.text_embeds().nbytes
    monkeypatch.setattr(zeroshot, "_MAX_LABEL_BYTES", 3 * n_bytes)
    picture = np.zeros((40, 40, 3), np.uint8)
    for n in range(6):
        clf(picture, candidate_labels=[f"a{n}", f"b{n}", f"c{n}"])
        clf(picture)  # those in use stay
    assert len(clf._text_embeds) == 3
    assert clf.prompts.sha256() in clf._text_embeds


def test_labels_larger_than_what_is_kept_are_used_all_the_same(clf, monkeypatch):
    monkeypatch.setattr(zeroshot, "_MAX_LABEL_BYTES", 1)
    assert len(clf(np.zeros((40, 40, 3), np.uint8))) == 3
    assert len(clf._text_embeds) == 1
