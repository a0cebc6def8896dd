"""The files that servers want: checked against the servers' own schemas and against the graphs they describe."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from typer.testing import CliRunner

from defense.cli import app
from defense.errors import ConfigError
from defense.export import bundle, exporter, verify
from defense.export.exporter import export_onnx
from defense.export.layouts import memory_mib
from defense.export.repository import (
    GRAPH_NAME,
    PICTURE_REPOSITORY,
    PICTURES_NAME,
    RAW_NAME,
    REPOSITORY,
    STRENGTH_NAME,
    TEXT_NAME,
    VISION_NAME,
)
from defense.export.runtime import OnnxClassifier

PARITY = verify.Parity(40, (1, 2, 5, 32), 1e-7, 1.0, 1.0, 0.0)


@pytest.fixture(scope="module")
def export_as(tiny_classifier, tiny_graphs, tmp_path_factory):
    """Export in a layout; the graphs were traced and verified elsewhere."""

    def export(layout: str, **options):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(exporter, "trace_vision", lambda *_arguments: tiny_graphs["trace_vision"])
            patch.setattr(exporter, "trace_text", lambda *_arguments: tiny_graphs["trace_text"])
            patch.setattr(exporter, "verify", lambda *_arguments: PARITY)
            folder = tmp_path_factory.mktemp(layout) / "out"
            export_onnx(tiny_classifier, folder, layout=layout, **options)
        return folder

    return export


@pytest.fixture(scope="module")
def kserve(export_as):
    return export_as("kserve", text=True)


def config_of(folder, name, repository=REPOSITORY):
    """A model configuration, read by Triton's own schema."""
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    text_format = pytest.importorskip("google.protobuf.text_format")
    text = (folder / repository / name / "config.pbtxt").read_text(encoding="utf-8")
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def full(config, tensor) -> tuple[list[int], int]:
    """The dims of a tensor with those of its batch, and its type."""
    return [*([-1] if config.max_batch_size else []), *tensor.dims], tensor.data_type


def shape_of(tensor) -> list[int]:
    """What a graph gets, less the batch."""
    return list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)


TYPES = {"tensor(float)": "TYPE_FP32", "tensor(int64)": "TYPE_INT64"}


@pytest.mark.parametrize("name", [GRAPH_NAME, TEXT_NAME])
def test_fault_80_the_configuration_is_that_of_the_graph(kserve, name):
    config = config_of(kserve, name)
    clf = OnnxClassifier(kserve)
    session = clf._session(f"{REPOSITORY}/{name}/1/model.onnx")
    type_name = config.input[0].DESCRIPTOR.fields_by_name["data_type"].enum_type.values_by_number
    assert [(i.name, shape_of(i), type_name[i.data_type].name) for i in config.input] == [
        (i.name, i.shape[1:], TYPES[i.type]) for i in session.get_inputs()
    ]
    assert not [i.name for i in config.input if i.optional]  # the backend refuses these where there are batches
    n_labels = len(clf.bundle.prompts.labels)
    assert [(o.name, list(o.dims), type_name[o.data_type].name) for o in config.output] == [
        (o.name, [n_labels if axis == "n_labels" else axis for axis in o.shape[1:]], TYPES[o.type])
        for o in session.get_outputs()
    ]
    assert (config.name, config.backend) == (name, "onnxruntime")


@pytest.mark.parametrize("name", [GRAPH_NAME, TEXT_NAME])
def test_fault_80_batches_are_bounded_and_the_first_request_is_not_the_slow_one(kserve, name):
    config = config_of(kserve, name)
    assert config.max_batch_size == 32
    assert config.max_batch_size in verify.BATCHES
    assert 0 < config.dynamic_batching.max_queue_delay_microseconds <= 10_000
    assert [warmup.batch_size for warmup in config.model_warmup] == [1, 32]
    for warmup in config.model_warmup:
        assert set(warmup.inputs) == {tensor.name for tensor in config.input}
        for tensor in config.input:
            warm = warmup.inputs[tensor.name]
            assert (list(warm.dims), warm.data_type, warm.zero_data) == (list(tensor.dims), tensor.data_type, True)


def test_fault_80_labels_stand_in_the_order_of_the_logits(kserve):
    config = config_of(kserve, GRAPH_NAME)
    labeled = [output for output in config.output if output.label_filename]
    assert [output.name for output in labeled] == ["logits_per_image"]
    lines = (kserve / REPOSITORY / GRAPH_NAME / labeled[0].label_filename).read_text(encoding="utf-8").splitlines()
    assert tuple(lines) == bundle.load(kserve).prompts.labels


@pytest.mark.parametrize(("dtype", "kind"), [("fp32", "KIND_AUTO"), ("int8", "KIND_CPU")])
def test_instances_run_where_the_graph_can(export_as, dtype, kind):
    config = config_of(export_as("triton", dtype=dtype), GRAPH_NAME)
    kinds = config.instance_group[0].DESCRIPTOR.fields_by_name["kind"].enum_type.values_by_number
    assert [kinds[group.kind].name for group in config.instance_group] == [kind]


@pytest.mark.parametrize("layout", ["triton", "triton-python", "kserve"])
def test_clients_ask_one_model_of_the_same_inputs_in_every_layout_and_need_not_send_a_strength(export_as, layout):
    folder = export_as(layout)
    config = config_of(folder, VISION_NAME)
    assert [(i.name, list(i.dims), i.optional) for i in config.input] == [
        ("pixel_values", [3, *bundle.load(folder).preprocess.size], False),
        ("strength", [1], True),
    ]
    assert [output.name for output in config.output] == ["image_embeds", "logits_per_image"]
    assert config.max_batch_size == 32
    assert (config.backend, config.platform) == (("python", "") if layout == "triton-python" else ("", "ensemble"))


def test_the_graph_that_gives_a_strength_has_its_default_where_there_are_no_batches(kserve):
    config = config_of(kserve, STRENGTH_NAME)
    onnxruntime = pytest.importorskip("onnxruntime")
    graph = kserve / REPOSITORY / STRENGTH_NAME / "1" / "model.onnx"
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    (needed,), (optional,) = session.get_inputs(), session.get_overridable_initializers()
    assert [(i.name, i.optional, list(i.dims)[1:]) for i in config.input] == [
        (needed.name, False, needed.shape[1:]),
        (optional.name, True, optional.shape[1:]),
    ]
    assert (config.max_batch_size, config.backend) == (0, "onnxruntime")
    pixel_values = np.zeros((3, *needed.shape[1:]), np.float32)
    given = np.array([[0], [0.5], [1]], np.float32)
    for feed, want in (({}, np.ones((3, 1))), ({optional.name: given}, given)):
        (got,) = session.run(None, {needed.name: pixel_values, **feed})
        np.testing.assert_array_equal(got, want)


def test_the_picture_models_fit_each_other_and_the_graph(export_as):
    folder = export_as("triton", text=True)
    by_name = {
        path.parent.name: config_of(folder, path.parent.name, repository)
        for repository in (REPOSITORY, PICTURE_REPOSITORY)
        for path in (folder / repository).glob("*/config.pbtxt")
    }
    ensembles = {name: config for name, config in by_name.items() if config.platform == "ensemble"}
    assert set(ensembles) == {VISION_NAME, PICTURES_NAME, RAW_NAME}
    for ensemble in ensembles.values():
        known = {tensor.name: full(ensemble, tensor) for tensor in ensemble.input}
        for step in ensemble.ensemble_scheduling.step:
            model = by_name[step.model_name]
            assert {tensor.name for tensor in model.input if not tensor.optional} <= set(step.input_map)
            for tensor in model.input:
                if tensor.name in step.input_map:
                    assert known[step.input_map[tensor.name]] == full(model, tensor)
            known |= {step.output_map[t.name]: full(model, t) for t in model.output if t.name in step.output_map}
        for tensor in ensemble.output:
            assert known[tensor.name] == full(ensemble, tensor)
    assert len(by_name[RAW_NAME].input) == 1  # as a raw request wants it


def test_a_graph_in_python_is_for_a_cpu(tiny_classifier, tmp_path):
    with pytest.raises(ConfigError, match="triton-python' runs on a CPU"):
        export_onnx(tiny_classifier, tmp_path / "out", layout="triton-python", dtype="fp16")


@pytest.mark.parametrize(("n_bytes", "mib"), [(0, 1024), (1, 1280), (350 * 2**20, 2304), (1200 * 2**20, 4864)])
def test_memory_follows_the_size_of_the_graphs(n_bytes, mib):
    assert memory_mib(n_bytes) == mib


def test_every_layout_is_a_bundle_that_answers_alike(kserve, tiny_bundle, seven_pictures):
    clf = OnnxClassifier(kserve)
    np.testing.assert_array_equal(clf.transform(seven_pictures), OnnxClassifier(tiny_bundle).transform(seven_pictures))
    assert len(clf(seven_pictures[0], ["stone", "tree"])) == 2
    (kserve / REPOSITORY / "stray.txt").write_text("mine")
    with pytest.raises(Exception, match=r"stray\.txt is not in the manifest"):
        bundle.load(kserve)
    (kserve / REPOSITORY / "stray.txt").unlink()


# The fields of KServe's v1beta1 InferenceService that are used here.
QUANTITIES = {"type": "object", "additionalProperties": {"type": "string"}}
INFERENCE_SERVICE = {
    "type": "object",
    "additionalProperties": False,
    "required": ["apiVersion", "kind", "metadata", "spec"],
    "properties": {
        "apiVersion": {"const": "serving.kserve.io/v1beta1"},
        "kind": {"const": "InferenceService"},
        "metadata": {
            "type": "object",
            "required": ["name"],
            "properties": {"name": {"type": "string", "pattern": "^[a-z]([-a-z0-9]*[a-z0-9])?$"}},
        },
        "spec": {
            "type": "object",
            "required": ["predictor"],
            "properties": {
                "predictor": {
                    "type": "object",
                    "required": ["model"],
                    "properties": {
                        "model": {
                            "type": "object",
                            "additionalProperties": False,
                            "required": ["modelFormat", "protocolVersion", "storageUri"],
                            "properties": {
                                "modelFormat": {"type": "object", "required": ["name"]},
                                "protocolVersion": {"enum": ["v1", "v2", "grpc-v1", "grpc-v2"]},
                                "runtime": {"type": "string"},
                                "storageUri": {"type": "string", "pattern": "^(pvc|s3|gs|https|hf)://"},
                                "env": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "additionalProperties": False,
                                        "required": ["name", "value"],
                                        "properties": {"name": {"type": "string"}, "value": {"type": "string"}},
                                    },
                                },
                                "resources": {
                                    "type": "object",
                                    "additionalProperties": {
                                        "type": "object",
                                        "additionalProperties": {"type": "string"},
                                    },
                                },
                            },
                        }
                    },
                }
            },
        },
    },
}


def test_the_inference_service_is_one(kserve):
    yaml = pytest.importorskip("yaml")
    jsonschema = pytest.importorskip("jsonschema")
    service = yaml.safe_load((kserve / "inference-service.yaml").read_text(encoding="utf-8"))
    jsonschema.validate(service, INFERENCE_SERVICE)
    model = service["spec"]["predictor"]["model"]
    assert (model["modelFormat"]["name"], model["protocolVersion"]) == ("onnx", "v2")
    assert model["storageUri"].endswith(REPOSITORY)
    n_bytes = sum(path.stat().st_size for path in kserve.rglob("*.onnx"))
    for kind in ("requests", "limits"):
        assert model["resources"][kind]["memory"] == f"{memory_mib(n_bytes)}Mi"
    assert model["env"] == [{"name": "ORT_DISABLE_TELEMETRY", "value": "1"}]


def test_the_client_in_the_readme_sends_what_the_graph_takes(kserve):
    (block,) = re.findall(r"```py\n(.*?)```", (kserve / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    compile(block, "README.md", "exec")
    config = config_of(kserve, VISION_NAME)
    assert f'InferInput("{config.input[0].name}"' in block
    assert f'.infer("{config.name}", [request, strength]' in block
    assert 'InferInput("strength", [1, 1], "FP32")' in block
    assert "kubectl apply -f inference-service.yaml" in (kserve / "README.md").read_text(encoding="utf-8")


def test_the_code_for_onnxruntime_alone_feeds_what_the_graph_of_a_server_wants(kserve, tmp_path, seven_pictures):
    from PIL import Image

    Image.fromarray(seven_pictures[0]).save(tmp_path / "a.png")
    blocks = re.findall(r"```python\n(.*?)```", (kserve / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (code,) = [block for block in blocks if "import onnxruntime" in block]
    code = code.replace('"picture.jpg"', repr(str(tmp_path / "a.png")))
    done = subprocess.run([sys.executable, "-P", "-c", code], cwd=kserve, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in bundle.load(kserve).prompts.labels


def test_what_the_container_runs_is_a_command_that_works(tiny_bundle, tmp_path, seven_pictures):
    from PIL import Image

    lines = (tiny_bundle / "Dockerfile").read_text(encoding="utf-8").splitlines()
    assert lines[-1].startswith("ENTRYPOINT ")
    assert not [line for line in lines if "torch" in line and not line.startswith("#")]
    assert "USER 65534:65534" in lines
    command = re.findall(r'"([^"]+)"', lines[-1])
    assert command[0] == "defense"
    Image.fromarray(seven_pictures[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"<html>")
    arguments = [str(tiny_bundle) if part == "/bundle" else part for part in command[1:]]
    result = CliRunner().invoke(app, [*arguments, *shlex.split(f"{tmp_path} --json --on-error return")])
    assert result.exit_code == 4
    first, second = result.stdout.splitlines()
    assert '"robust": [{"label"' in first
    assert '"code": "not_an_image"' in second
