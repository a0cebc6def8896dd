"""A bundle on disk: what is accepted, and what is refused with which error."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
from safetensors.numpy import load_file, save_file

from defense.errors import CheckpointError, ConfigError, IntegrityError, NonFiniteError
from defense.export import bundle
from defense.export.runtime import OnnxClassifier
from defense.store.defenses import MANIFEST
from defense.store.folders import sha256_of

from ..conftest import restated

FILES = ["model.onnx", "text.onnx", "labels.safetensors", "golden.safetensors", "README.md", "Dockerfile"]


def flip(path: Path, at: float = 0.5) -> None:
    """Flip one bit of one byte."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("at", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_fault_52_one_flipped_bit_anywhere_is_refused(copied, name, at):
    flip(copied / name, at)
    with pytest.raises(IntegrityError) as caught:
        bundle.load(copied)
    assert caught.value.file == str(copied / name)


def test_fault_53_an_edited_manifest_has_another_hash(copied):
    before = bundle.load(copied).manifest_sha256
    assert before == sha256_of(copied / MANIFEST)
    manifest = json.loads((copied / MANIFEST).read_text())
    (copied / MANIFEST).write_text(json.dumps({**manifest, "labels": ["dog", "cat", "blue fish"]}))
    assert bundle.load(copied).manifest_sha256 != before


@pytest.mark.parametrize("name", FILES)
def test_fault_51_a_missing_file_is_named(copied, name):
    (copied / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        bundle.load(copied)


@pytest.mark.parametrize("name", ["notes.txt", "more/notes.txt"])
def test_fault_51_an_unexpected_file_is_named(copied, name):
    (copied / name).parent.mkdir(exist_ok=True)
    (copied / name).write_text("mine")
    with pytest.raises(CheckpointError, match=f"{name} is not in the manifest"):
        bundle.load(copied)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not the manifest of a bundle"),
        ('{"schema": 1, "kind": "a cake"}', "not the manifest of a bundle"),
        ('{"schema": 1, "kind": "clip-defense ONNX bundle"}', "has the keys"),
        ('{"schema": 99, "kind": "clip-defense ONNX bundle", "package_version": "9.9"}', r"clip-defense 9\.9"),
    ],
    ids=["no-json", "list", "other-kind", "no-keys", "newer"],
)
def test_fault_51_a_bad_manifest_is_refused(copied, text, message):
    (copied / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=message):
        bundle.load(copied)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", ["dog", "cat"], r"\[3, 32\]; want float32 \[2, 32\]"),
        ("labels", [], "no label was given"),
        ("logit_scale", "high", "logit_scale is 'high'"),
        ("model", "other.onnx", "names other.onnx"),
        ("preprocess", {"size": [32, 32]}, "preprocess has the keys"),
        ("tolerance", {"atol": 1.0}, "tolerance has the keys"),
    ],
)
def test_fault_51_a_field_that_does_not_go_with_the_rest_is_refused(copied, field, value, message):
    with pytest.raises(CheckpointError, match=message):
        bundle.load(restated(copied, **{field: value}))


SET = {"name": "text", "latents": 20, "edit": "project", "scope": "all"}
SITE = {"hook_point": "blocks.1.hook_resid_post", "act": "topk", "d_sae": 160, "sets": [SET]}
PREPROCESS = {
    "size": [32, 32], "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "shortest",
    "fill_color": 0,
}  # fmt: skip
TOLERANCE = {"atol": 1e-5, "cosine": 0.99999, "agreement": 1.0, "tie": 0.0}


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("logit_scale", 1e308, "logit_scale is 1e.308"),
        ("logit_scale", -100.0, "logit_scale is -100.0"),
        ("logit_scale", 0.0, "logit_scale is 0.0"),
        ("logit_scale", True, "logit_scale is True"),
        ("preprocess", {**PREPROCESS, "mean": [1e30] * 3}, "mean in 0 to 1"),
        ("preprocess", {**PREPROCESS, "mean": [-0.5] * 3}, "mean in 0 to 1"),
        ("preprocess", {**PREPROCESS, "std": [1e-30] * 3}, "std in 0.001 to 1000"),
        ("preprocess", {**PREPROCESS, "std": [0.5, -0.5, 0.5]}, "std in 0.001 to 1000"),
        ("preprocess", {**PREPROCESS, "std": 0.5}, "std 0.5"),
        ("labels", ["dog", "cat", 7], "labels.2. = 7 is of type int"),
        ("labels", ["dog", "cat", "dog"], "repeats labels.0."),
        ("labels", ["dog", "cat", " dog "], "repeats labels.0."),
        ("labels", ["dog", "cat", "<|endoftext|>"], "can start or end a prompt"),
        ("labels", ["dog", "cat", "a\nb"], "control character"),
        ("labels", ["dog", "cat", ""], "is blank"),
        ("templates", ["a photo"], "wants exactly one"),
        ("templates", [], "no template"),
        ("templates", [1], "of type int"),
        ("mode", "fast", "mode is 'fast'; want one of delta, exact, static"),
        ("dtype", "fp8", "dtype is 'fp8'; want one of"),
        ("d_embed", 0, "d_embed is 0"),
        ("d_embed", 33, r"want float32 \[3, 33\]"),
        ("context_length", None, "without the other"),
        ("context_length", -1, "context_length is -1"),
        ("tolerance", {**TOLERANCE, "atol": 1e9}, "atol is 1000000000.0"),
        ("tolerance", {**TOLERANCE, "cosine": -1.0}, "cosine is -1.0"),
        ("tolerance", {**TOLERANCE, "tie": "0"}, "tie is '0'"),
        ("host", {}, "sha256"),
        ("host", {"sha256": "abc"}, "sha256"),
        ("host", {"sha256": "0" * 64, "model": 3}, "model is 3"),
        ("defense", {}, "defense has the keys"),
        ("defense", {"manifest_sha256": None, "sites": [{**SITE, "sets": [{"name": "text"}]}]}, "a set of the defense"),
        ("defense", {"manifest_sha256": None, "sites": ["text"]}, "a site of the defense"),
    ],
)  # fmt: skip
def test_fault_a_value_that_the_api_would_refuse_is_refused_in_a_manifest(copied, field, value, message):
    with pytest.raises(CheckpointError, match=message):
        bundle.load(restated(copied, **{field: value}))


@pytest.mark.parametrize(
    ("file", "tensor", "change", "message"),
    [
        ("labels", "text_embeds", lambda a: a * 0, "row 0 has the length 0"),
        ("labels", "text_embeds", lambda a: a * 1000, "row 0 has the length 1000"),
        ("labels", "text_embeds", lambda a: a.astype(np.float64), "float64"),
        ("labels", "text_embeds", lambda a: a[:, :31], r"want float32 \[3, 32\]"),
        ("labels", "blank_tokens", lambda a: a.astype(np.int64), "want bool"),
        ("golden", "image_embeds", lambda a: a * 0, "row 0 has the length 0"),
        ("golden", "image_embeds", lambda a: a[:1], r"want float32 \[3, 32\]"),
        ("golden", "pictures", lambda a: a[:0], "want uint8"),
        ("golden", "pictures", lambda a: a.astype(np.float32), "want uint8"),
    ],
)
def test_fault_tensors_that_cannot_be_right_are_refused(copied, file, tensor, change, message):
    path = copied / f"{file}.safetensors"
    tensors = load_file(path)
    save_file({**tensors, tensor: np.ascontiguousarray(change(tensors[tensor]))}, path)
    with pytest.raises(CheckpointError, match=message):
        bundle.load(restated(copied))


@pytest.mark.parametrize(("file", "tensor"), [("labels", "text_embeds"), ("golden", "pictures")])
def test_fault_a_tensor_that_is_missing_is_refused(copied, file, tensor):
    path = copied / f"{file}.safetensors"
    save_file({name: array for name, array in load_file(path).items() if name != tensor}, path)
    with pytest.raises(CheckpointError, match=tensor):
        bundle.load(restated(copied))


def test_a_folder_that_is_no_bundle_is_refused(tmp_path):
    for source in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(CheckpointError, match=r"manifest\.json is missing|is not there; check the path"):
            bundle.load(source)
        assert not bundle.is_bundle(source)


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[:-4], lambda _data: b"", lambda _data: b"\x80\x04pickle"],
    ids=["cut", "empty", "pickle"],
)
def test_fault_54_damaged_safetensors_are_refused_without_a_traceback(copied, damage):
    path = copied / "labels.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        bundle.load(restated(copied))


def test_fault_55_nan_in_an_embedding_is_refused(copied):
    embeds = load_file(copied / "labels.safetensors")["text_embeds"].copy()
    embeds[1, 1] = np.nan
    save_file({"text_embeds": embeds}, copied / "labels.safetensors")
    with pytest.raises(NonFiniteError, match=r"labels\.safetensors: text_embeds"):
        bundle.load(restated(copied))


def test_fault_62_a_pickle_is_no_bundle(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x04")
    with pytest.raises(CheckpointError, match="is missing"):
        bundle.load(tmp_path)
    with pytest.raises(CheckpointError):
        bundle.load(tmp_path / "model.pt")


def with_external_data(folder: Path, location: str = "model.onnx.data") -> Path:
    """Move the weights of the vision graph to a file beside it, and let the graph say where they are."""
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx.data", size_threshold=1024)
    if location != "model.onnx.data":
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for tensor in model.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = location
        (folder / "model.onnx").write_bytes(model.SerializeToString())
    return folder


def test_external_data_beside_the_graph_is_read(copied, tiny_bundle, seven_pictures):
    got = OnnxClassifier(restated(with_external_data(copied))).transform(seven_pictures)
    np.testing.assert_array_equal(got, OnnxClassifier(tiny_bundle).transform(seven_pictures))


def test_fault_63_external_data_that_is_missing_or_cut_is_refused(copied):
    restated(with_external_data(copied))
    data = copied / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="bytes, the manifest says"):
        bundle.load(copied)
    data.unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx\.data is missing"):
        bundle.load(copied)
    with pytest.raises(CheckpointError, match="refuses this graph"):
        OnnxClassifier(restated(copied))


@pytest.mark.parametrize("kind", ["parent", "absolute"])
def test_fault_63_external_data_outside_of_the_folder_is_refused(copied, tmp_path, kind):
    outside = tmp_path / "weights.data"
    with_external_data(copied, "../weights.data" if kind == "parent" else str(outside))
    shutil.move(copied / "model.onnx.data", outside)
    with pytest.raises(CheckpointError, match="refuses this graph"):
        OnnxClassifier(restated(copied))


def test_fault_63_a_link_that_leads_out_is_refused(copied, tmp_path):
    outside = Path(shutil.move(copied / "model.onnx", tmp_path / "elsewhere.onnx"))
    (copied / "model.onnx").symlink_to(outside)
    with pytest.raises(CheckpointError, match="leads out of the folder"):
        bundle.load(copied)


def test_fault_64_a_snapshot_in_a_hub_cache_is_read(copied, tmp_path, tiny_bundle, seven_pictures):
    restated(with_external_data(copied))
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for path in copied.iterdir():
        blob = repo / "blobs" / sha256_of(path)
        shutil.copy(path, blob)
        (snapshot / path.name).symlink_to(os.path.relpath(blob, snapshot))
    clf = OnnxClassifier(snapshot)
    np.testing.assert_array_equal(clf.transform(seven_pictures), OnnxClassifier(tiny_bundle).transform(seven_pictures))


def changed(kind: str) -> bytes:
    node = onnx.helper.make_node(
        "Gelu" if kind == "domain" else "Identity", ["x"], ["y"], domain="acme" * (kind == "domain")
    )
    value = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in ("x", "y")]
    graph = onnx.helper.make_graph([node], "graph", value[:1], value[1:])
    opsets = [onnx.helper.make_opsetid("", 99 if kind == "opset" else 18), onnx.helper.make_opsetid("acme", 1)]
    model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=99 if kind == "ir" else 10)
    data = model.SerializeToString()
    return {"empty": b"", "cut": data[: len(data) // 2], "text": b"<html>"}.get(kind, data)


@pytest.mark.parametrize("kind", ["opset", "ir", "domain", "empty", "cut", "text"])
def test_fault_65_a_graph_that_the_runtime_does_not_know_is_refused(copied, kind):
    (copied / "model.onnx").write_bytes(changed(kind))
    with pytest.raises(CheckpointError, match="refuses this graph"):
        OnnxClassifier(restated(copied))


def test_size_is_checked_without_reading_everything(copied):
    flip(copied / "model.onnx")
    bundle.load(copied, verify="size")
    with pytest.raises(ConfigError, match="verify='none'"):
        bundle.load(copied, verify="none")


def test_a_server_s_operator_may_change_what_is_not_read_and_nothing_else(copied):
    (copied / "Dockerfile").write_text("FROM scratch")
    (copied / "__pycache__").mkdir()
    (copied / "__pycache__" / "model.pyc").write_bytes(b"x")
    with pytest.raises(CheckpointError):
        bundle.load(copied)
    assert bundle.load(copied, is_served=True).model == "model.onnx"
    graph = copied / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1] + b"x")
    with pytest.raises(IntegrityError):
        bundle.load(copied, is_served=True)
    graph.unlink()
    with pytest.raises(CheckpointError, match=r"model\.onnx is missing"):
        bundle.load(copied, is_served=True)
