"""What a bundle does without torch, on whichever ONNX Runtime is installed.

`.ci/run` runs this with the oldest one that pyproject.toml allows, on the bundle $CLIP_DEFENSE_BUNDLE, which was
exported where torch is: one with calibrated thresholds, and one with a TopK rule. Elsewhere the tiny bundle, which has
a TopK rule, is exported here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from defense.errors import BackendError
from defense.export import bundle
from defense.export import strength as strengths_of
from defense.export.runtime import OnnxClassifier

_SILENT = -1e30


@pytest.fixture(scope="module")
def ready(request) -> Path:
    """A bundle with a text tower and a defense."""
    if given := os.environ.get("CLIP_DEFENSE_BUNDLE"):
        return Path(given)
    return request.getfixturevalue("tiny_bundle")


@pytest.fixture
def noise() -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (5, 90, 100, 3), dtype=np.uint8))


def test_the_golden_embeddings_are_reproduced(ready):
    clf = OnnxClassifier(ready)
    assert clf.check_golden() <= 1e-5
    assert clf.bundle.mode == "exact"


def test_a_topk_rule_is_in_the_graph_as_topk(ready):
    clf = OnnxClassifier(ready)
    rules = {site["act"] for site in clf.bundle.defense["sites"]}
    assert rules in ({"topk"}, {"batchtopk"})
    assert (b"TopK" in (ready / clf.bundle.model).read_bytes()) == (rules == {"topk"})


def test_fault_85_a_batch_in_which_no_latent_fires_is_answered_and_is_plain_clip(ready, noise):
    """In a process of its own, since a runtime that cannot do it dies."""
    code = """
import sys, numpy as np, onnxruntime as ort
from defense.export.runtime import OnnxClassifier
clf = OnnxClassifier(sys.argv[1])
options, kept = ort.SessionOptions(), []
for i, site in enumerate(clf.bundle.defense["sites"]):
    for j, each in enumerate(site["sets"]):
        bias = ort.OrtValue.ortvalue_from_numpy(np.full(each["latents"], float(sys.argv[2]), np.float32))
        options.add_initializer(f"blocks.{i}.edits.{j}.suppressor.b_S", bias)
        kept.append(bias)
quiet = ort.InferenceSession(clf.bundle.folder / clf.bundle.model, options, providers=["CPUExecutionProvider"])
rng = np.random.default_rng(0)
for batch in (1, 5, 0):
    pixel_values = rng.normal(size=(batch, 3, *clf.bundle.preprocess.size)).astype(np.float32)
    (got,) = quiet.run(["image_embeds"], {"pixel_values": pixel_values})
    plain = clf.with_strength(0).encode_pixels(pixel_values)
    assert got.shape == plain.shape == (batch, clf.bundle.text_embeds.shape[1])
    assert np.abs(got - plain).max(initial=0) < 1e-5, np.abs(got - plain).max()
    if batch:
        assert np.abs(clf.encode_pixels(pixel_values) - plain).max() > 1e-4
print("answered")
"""
    command = [sys.executable, "-P", "-c", code, str(ready), str(_SILENT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.strip() == "answered"


def test_batches_equal_pictures_one_by_one(ready, noise):
    clf = OnnxClassifier(ready, batch_size=4)
    alone = np.concatenate([clf.transform([picture]) for picture in noise])
    np.testing.assert_allclose(clf.transform(noise), alone, atol=1e-6)


def test_labels_are_chosen_among_and_chosen_anew(ready, noise):
    clf = OnnxClassifier(ready)
    some = list(clf.bundle.prompts.labels[:2])
    assert {row["label"] for row in clf(noise[0], some)} == set(some)
    encoded = clf.encode_text(np.zeros((2, clf.bundle.context_length), np.int64))
    assert encoded.shape == (2, clf.bundle.text_embeds.shape[1])
    assert {row["label"] for row in clf(noise[0], ["a stone", "a tree"])} == {"a stone", "a tree"}


def test_the_command_line_answers(ready, noise, tmp_path):
    from PIL import Image

    Image.fromarray(noise[0]).save(tmp_path / "noise.png")
    main = [sys.executable, "-P", "-c", "from defense.cli import main; main()"]
    done = subprocess.run([*main, "info", str(ready)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "golden      reproduced" in done.stdout
    command = [*main, "classify", str(tmp_path), "--defense", str(ready), "--json"]
    answers = []
    for strength in ("1", "0"):
        done = subprocess.run([*command, "--strength", strength], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        answers.append(json.loads(done.stdout)["robust"])
    assert answers[0] != answers[1]


@pytest.mark.parametrize(("version", "is_refused"), [("1.24.2", True), ("1.30.1", True), ("1.31.0", False)])
def test_a_graph_of_an_older_version_is_refused_where_the_runtime_could_die_of_it(
    ready, monkeypatch, version, is_refused
):
    """It has no strength, and met empty tensors where the rule is TopK, as in this one's manifest."""
    loaded = bundle.load(ready)
    sites = [{**site, "act": "topk"} for site in loaded.defense["sites"]]
    older = replace(loaded, mode="exact", defense={**loaded.defense, "sites": sites})
    monkeypatch.setattr(bundle, "load", lambda *_args, **_options: older)
    monkeypatch.setattr(strengths_of, "STRENGTH", "no such input")
    monkeypatch.setattr(ort, "__version__", version)
    if is_refused:
        with pytest.raises(BackendError, match=r"onnxruntime 1\.\d+\.\d can end the process.*1\.31"):
            OnnxClassifier(ready)
    else:
        assert not OnnxClassifier(ready).has_strength
