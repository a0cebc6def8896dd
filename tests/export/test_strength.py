"""The strength of a bundle: off, on, between, one for each picture, and bundles that have none."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx

from defense.errors import ConfigError
from defense.export.runtime import OnnxClassifier
from defense.hosts.attach import attached

from ..conftest import restated


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
