"""Export as a whole: what is verified, what a failure leaves behind, and what the bundle says of itself."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx
import torch
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.errors import BackendError, CheckpointError, ConfigError
from defense.export import bundle, exporter, readme, verify
from defense.export.exporter import export_onnx
from defense.export.runtime import OnnxClassifier
from defense.export.verify import ExportError, ParityError, Tolerance
from defense.export.vision import trace_vision

from ..conftest import restated


@pytest.fixture(autouse=True)
def _traced_once(tiny_graphs, monkeypatch):
    def traced(graph, *arguments):
        is_tiny = graph.tower.dtype == torch.float32
        return tiny_graphs["trace_vision"] if is_tiny else trace_vision(graph, *arguments)

    monkeypatch.setattr(exporter, "trace_vision", traced)


def test_report_says_what_was_measured(tiny_classifier, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(exporter, "verify", lambda *arguments: seen.append(arguments) or PARITY)
    report = export_onnx(tiny_classifier, tmp_path / "out")
    assert [arguments[0].name for arguments in seen] == ["model.onnx"]
    assert (report.mode, report.dtype, report.parity, report.text_parity) == ("exact", "fp32", PARITY, None)
    assert report.model_bytes == (tmp_path / "out" / "model.onnx").stat().st_size
    assert bundle.load(tmp_path / "out").manifest_sha256 == report.manifest_sha256


PARITY = verify.Parity(40, (1, 2, 5, 32), 1e-7, 1.0, 1.0, 0.0)


def test_bundle_holds_what_was_asked_for(tiny_bundle, tiny_classifier):
    loaded = bundle.load(tiny_bundle)
    assert loaded.prompts == tiny_classifier.prompts
    assert loaded.preprocess == tiny_classifier.clip.preprocess
    assert loaded.parity["max_abs_diff"] <= 1e-5
    assert loaded.parity["agreement"] == 1.0
    assert loaded.defense["sites"][0]["sets"] == [{"name": "text", "latents": 20, "edit": "project", "scope": "all"}]
    names = {"model.onnx", "text.onnx", "labels.safetensors", "golden.safetensors"}
    names |= {"README.md", "LICENCES.md", "Dockerfile"}
    assert {path.name for path in tiny_bundle.iterdir()} == names | {"manifest.json"}
    metadata = {entry.key: entry.value for entry in onnx.load(tiny_bundle / "model.onnx").metadata_props}
    assert metadata["labels"] == '["dog", "cat", "red fish"]'
    assert "blocks.1.hook_resid_post" in metadata["defense"]


def wrong(monkeypatch, change) -> None:
    """Let torch expect something else than what the graph computes."""
    right = exporter._expected_of_vision
    monkeypatch.setattr(exporter, "_expected_of_vision", lambda *arguments: change(right(*arguments)))


def shifted(expected: verify.Expected) -> verify.Expected:
    outputs = {**expected.outputs, "image_embeds": expected.outputs["image_embeds"] + np.float32(1e-3)}
    return replace(expected, outputs=outputs)


def quiet_shifted(expected: verify.Expected) -> verify.Expected:
    quiet = expected.further["quiet"]
    assert len(quiet.constants) == 1
    outputs = {**quiet.outputs, "image_embeds": quiet.outputs["image_embeds"] + np.float32(1e-3)}
    return replace(expected, further={**expected.further, "quiet": replace(quiet, outputs=outputs)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (shifted, "image_embeds differs by 0.001"),
        (quiet_shifted, "image_embeds differs by 0.001 at the quiet batch"),
        (lambda e: replace(e, input_axes={"pixels": ["batch", 3, 32, 32]}), r"its inputs are \['pixel_values'\]"),
    ],
    ids=["values", "quiet", "names"],
)
def test_a_graph_that_answers_otherwise_is_not_written(tiny_classifier, tmp_path, monkeypatch, change, message):
    wrong(monkeypatch, change)
    with pytest.raises(ParityError, match=message):
        export_onnx(tiny_classifier, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_int8_that_changes_labels_is_not_written(tiny_classifier, tmp_path, monkeypatch):
    def flipped(expected: verify.Expected) -> verify.Expected:
        logits = expected.outputs["logits_per_image"].copy()
        logits[:3, :] = np.where(logits[:3] == logits[:3].max(1, keepdims=True), -99, logits[:3])  # 3 of 200
        return replace(expected, outputs={**expected.outputs, "logits_per_image": logits})

    wrong(monkeypatch, flipped)
    with pytest.raises(ParityError, match=r"of 200 rows get another label; 99.0% must be the same"):
        export_onnx(tiny_classifier, tmp_path / "out", dtype="int8")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("broken", ["segfault", "refused"])
def test_fault_66_a_graph_that_kills_or_is_refused_by_the_runtime_is_not_written(
    tiny_classifier, tmp_path, monkeypatch, broken
):
    real = subprocess.run
    code = "import os; os.kill(os.getpid(), 11)" if broken == "segfault" else "raise SystemExit('no such operator')"
    monkeypatch.setattr(subprocess, "run", lambda _command, **options: real([sys.executable, "-c", code], **options))
    with pytest.raises(ExportError, match=r"signal 11" if broken == "segfault" else "no such operator"):
        export_onnx(tiny_classifier, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_fault_75_an_interrupted_export_leaves_nothing_behind(tiny_classifier, tmp_path, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "verify", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(tiny_classifier, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_fault_75_a_full_disk_leaves_nothing_behind(tiny_classifier, tmp_path, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporter, "write", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(tiny_classifier, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_replaced(tiny_classifier, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not an empty folder"):
        export_onnx(tiny_classifier, tmp_path)
    with pytest.raises(ConfigError, match="there is no folder"):
        export_onnx(tiny_classifier, tmp_path / "no" / "such")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_arguments_that_cannot_work_are_refused(tiny_classifier, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="layout='cake'"):
        export_onnx(tiny_classifier, tmp_path / "out", layout="cake")
    with pytest.raises(ConfigError, match="dtype='fp8'"):
        export_onnx(tiny_classifier, tmp_path / "out", dtype="fp8")
    monkeypatch.setattr(tiny_classifier, "prompts", None)
    with pytest.raises(ConfigError, match="no labels are set"):
        export_onnx(tiny_classifier, tmp_path / "out")


def test_a_factor_that_a_bundle_refuses_is_refused_before_the_work(tiny_classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(type(tiny_classifier.clip), "logit_scale", property(lambda _clip: 1e9))
    with pytest.raises(ConfigError, match="logit_scale is 1000000000"):
        export_onnx(tiny_classifier, tmp_path / "out")


def test_a_tokenizer_that_a_bundle_cannot_bring_is_refused(tiny_classifier, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny_classifier, "clip", replace(tiny_classifier.clip, tokenizer=str))
    with pytest.raises(ConfigError, match="tokenizer"):
        export_onnx(tiny_classifier, tmp_path / "out", text=True)


def test_the_code_in_its_readme_runs(copied):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(copied / "picture.jpg")
    blocks = re.findall(r"```python\n(.*?)```", (copied / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    restated(copied)  # the picture is in the folder too
    for block in blocks:
        done = subprocess.run(
            [sys.executable, "-P", "-c", block], cwd=copied, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        assert any(label in done.stdout for label in ("dog", "cat", "red fish"))


def test_its_readme_says_how_the_defense_is_switched_off_and_how_near_that_is(tiny_bundle):
    text = " ".join((tiny_bundle / "README.md").read_text(encoding="utf-8").split())
    plain_diff = bundle.load(tiny_bundle).parity["plain_diff"]
    assert f"At 0 the embeddings differed by {plain_diff:.1e} from PyTorch's" in text
    assert 0 < plain_diff <= 1e-5


def test_errors_are_those_of_a_rejected_bundle():
    assert issubclass(ParityError, ExportError)
    assert issubclass(ExportError, CheckpointError)
    assert Tolerance(1e-5, 0.99999, 1.0) == exporter.TOLERANCES["fp32"]


def test_int8_quantizes_the_tower_and_leaves_the_edit_alone(tiny_classifier, tmp_path, seven_pictures):
    report = export_onnx(tiny_classifier, tmp_path / "int8", dtype="int8")
    assert report.parity.rows == 200
    assert report.parity.cosine >= 0.99
    assert report.parity.agreement >= 0.99
    assert 1e-5 < report.parity.max_abs_diff <= exporter.TOLERANCES["int8"].atol
    model = onnx.load(tmp_path / "int8" / "model.onnx")
    n_linear = 3 * 4  # blocks, each with attention's two and the MLP's two
    assert sum(node.op_type == "MatMulInteger" for node in model.graph.node) == n_linear
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    edit = [name for name in types if name.endswith((".W_S", ".W_enc"))]
    assert len(edit) == 2
    assert {types[name] for name in edit} == {onnx.TensorProto.FLOAT}
    clf = OnnxClassifier(tmp_path / "int8")
    assert clf.check_golden() <= exporter.TOLERANCES["int8"].atol
    other = np.random.default_rng(0).normal(size=(7, 32)).astype(np.float32)
    pixel_values = np.stack([clf.bundle.preprocess(Image.fromarray(picture)) for picture in seven_pictures])
    feed = {"pixel_values": pixel_values, "text_embeds": other}
    assert clf._session("model.onnx").run(["logits_per_image"], feed)[0].shape == (7, 7)


def test_fault_66_half_precision_is_verified_in_another_process_and_refused_on_the_cpu(tiny_classifier, tmp_path):
    report = export_onnx(tiny_classifier, tmp_path / "fp16", dtype="fp16")
    assert report.parity.cosine >= 0.999
    assert next(tiny_classifier.clip.model.visual.parameters()).dtype == torch.float32
    model = onnx.load(tmp_path / "fp16" / "model.onnx")
    assert {value.type.tensor_type.elem_type for value in (*model.graph.input, *model.graph.output)} == {
        onnx.TensorProto.FLOAT
    }
    types = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert {types[name] for name in types if name.startswith("visual.")} == {onnx.TensorProto.FLOAT16}
    assert {types[name] for name in types if name.startswith("blocks.") and "latents" not in name} == {
        onnx.TensorProto.FLOAT
    }
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        OnnxClassifier(tmp_path / "fp16")


def test_a_host_that_is_not_float32_is_refused(tiny_clip, tiny_classifier, tmp_path):
    clip = replace(tiny_classifier.clip, model=tiny_clip.half())
    clf = RobustClassifier(clip).set_labels(["dog", "cat"])
    clf._text_embeds[clf.prompts.sha256()] = tiny_classifier.text_embeds()[:2]
    with pytest.raises(ConfigError, match="float16"):
        export_onnx(clf, tmp_path / "out")


def test_the_licenses_of_a_bundle_name_those_of_weights_that_ship():
    fields = {"host": {"model": "photo", "sha256": "0" * 64}, "licence": "Apache-2.0"}
    assert "EfficientNet-Lite0" in readme.licenses(fields)
    assert "as their publisher says" in readme.licenses({**fields, "host": {"model": "ViT-B-32", "sha256": "0" * 64}})
