"""Where a bundle's graphs lie, and the files that a server wants beside them; the kinds of graph there are.

| layout | for | adds |
|---|---|---|
| bundle | `OnnxClassifier`, ONNX Runtime | Dockerfile |
| triton | NVIDIA Triton | model_repository/NAME/{config.pbtxt, labels.txt, 1/model.onnx} |
| kserve | KServe, which runs Triton | the same, and inference-service.yaml |

Every layout is a bundle: `OnnxClassifier` and `defense info` take each of them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

Layout = Literal["bundle", "triton", "kserve"]
Mode = Literal["delta", "exact", "static"]
"""How a defense is written in a graph (vision.py)."""
Dtype = Literal["fp32", "fp16", "int8"]
"""Numbers of a graph."""

REPOSITORY = "model_repository"
VISION_NAME, TEXT_NAME = "clip_defense", "clip_defense_text"
_MAX_BATCH = 32
_MAX_DELAY_US = 2000
# fp16 ends a CPU's process, and int8 was made for CPUs.
_INSTANCE_KIND = {"fp32": "KIND_AUTO", "fp16": "KIND_GPU", "int8": "KIND_CPU"}


def arrange(folder: Path, layout: Layout, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Bring a folder with model.onnx, and perhaps text.onnx, into a layout, and return where the graphs are now.

    Args:
        folder: Of the bundle.
        layout: See the module.
        fields: What its manifest would say before.

    Returns:
        The fields of the manifest that change: none, or "model" and "text_model" as paths in the folder.
    """
    if layout == "bundle":
        (folder / "Dockerfile").write_text(_dockerfile(), encoding="utf-8")
        return {}
    height, width = fields["preprocess"]["size"]
    labels = "".join(f"{label}\n" for label in fields["labels"])
    moved = {
        "model": _place(
            folder,
            fields["model"],
            _config(
                VISION_NAME,
                fields["dtype"],
                ("pixel_values", "TYPE_FP32", [3, height, width]),
                {"image_embeds": fields["d_embed"], "logits_per_image": len(fields["labels"])},
                labels_of="logits_per_image",
            ),
            VISION_NAME,
        )
    }
    (folder / REPOSITORY / VISION_NAME / "labels.txt").write_text(labels, encoding="utf-8")
    if fields["text_model"] is not None:
        text_input = ("input_ids", "TYPE_INT64", [fields["context_length"]])
        config = _config(TEXT_NAME, "fp32", text_input, {"text_embeds": fields["d_embed"]})
        moved["text_model"] = _place(folder, fields["text_model"], config, TEXT_NAME)
    if layout == "kserve":
        (folder / "inference-service.yaml").write_text(_inference_service(fields["dtype"]), encoding="utf-8")
    return moved


def _place(folder: Path, graph: str, config: str, name: str) -> str:
    """Move a graph, with its external data, into the repository; return its path in the folder."""
    version = folder / REPOSITORY / name / "1"
    version.mkdir(parents=True)
    for path in folder.glob(f"{graph}*"):
        # The external data keeps its name: the graph has it inside.
        shutil.move(path, version / ("model.onnx" if path.name == graph else path.name))
    (version.parent / "config.pbtxt").write_text(config, encoding="utf-8")
    return (version / "model.onnx").relative_to(folder).as_posix()


def _config(
    name: str,
    dtype: str,
    graph_input: tuple[str, str, list[int]],
    outputs: Mapping[str, int],
    labels_of: str | None = None,
) -> str:
    """Return Triton's model configuration; its dims leave the batch out."""
    input_name, data_type, dims = graph_input
    shape = ", ".join(map(str, dims))
    output_blocks = ",\n".join(
        f'  {{ name: "{output}", data_type: TYPE_FP32, dims: [ {width} ]'
        + (', label_filename: "labels.txt" }' if output == labels_of else " }")
        for output, width in outputs.items()
    )
    return f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: {_MAX_BATCH}
version_policy: {{ latest: {{ num_versions: 1 }} }}
input [
  {{ name: "{input_name}", data_type: {data_type}, dims: [ {shape} ] }}
]
output [
{output_blocks}
]
instance_group [ {{ kind: {_INSTANCE_KIND[dtype]} }} ]
dynamic_batching {{ max_queue_delay_microseconds: {_MAX_DELAY_US} }}
model_warmup [
{_warmup(input_name, data_type, shape, 1)},
{_warmup(input_name, data_type, shape, _MAX_BATCH)}
]
"""


def _warmup(input_name: str, data_type: str, shape: str, batch: int) -> str:
    tensor = f"{{ data_type: {data_type}, dims: [ {shape} ], zero_data: true }}"
    return f'  {{ name: "batch of {batch}", batch_size: {batch}, inputs {{ key: "{input_name}", value: {tensor} }} }}'


def _inference_service(dtype: str) -> str:
    gpu = '\n          nvidia.com/gpu: "1"' if dtype == "fp16" else ""
    return f"""apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: clip-defense
spec:
  predictor:
    model:
      modelFormat:
        name: onnx
      protocolVersion: v2  # without it KServe finds no runtime for ONNX
      runtime: kserve-tritonserver
      storageUri: pvc://models/{REPOSITORY}  # where you put that folder of this bundle
      env:
        - name: ORT_DISABLE_TELEMETRY
          value: "1"
      resources:
        requests:
          cpu: "1"
          memory: 2Gi
        limits:
          memory: 2Gi{gpu}
"""


def _dockerfile() -> str:
    return """# An image without torch that classifies pictures with this bundle:
#     docker build -t clip-defense .
#     docker run --rm -v "$PWD/pictures:/pictures:ro" clip-defense /pictures --json
FROM python:3.12-slim
# Or the path of a wheel in this folder, with its extra: ./clip_defense-...-py3-none-any.whl[onnx]
ARG CLIP_DEFENSE="clip-defense[onnx]"
COPY . /bundle
WORKDIR /bundle
RUN pip install --no-cache-dir "$CLIP_DEFENSE" && rm -f /bundle/*.whl && defense info /bundle
USER nobody
ENTRYPOINT ["defense", "classify", "--defense", "/bundle"]
"""
