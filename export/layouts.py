"""Where a bundle's graphs lie, and the files that a server wants beside them; the kinds of graph there are.

| layout | for | adds |
|---|---|---|
| bundle | `OnnxClassifier`, ONNX Runtime | Dockerfile |
| triton | NVIDIA Triton, its ONNX Runtime backend | model_repository, picture_repository, requirements.txt |
| triton-python | NVIDIA Triton, its Python backend, on a CPU | the same |
| kserve | KServe, which runs Triton, or our own predictor | model_repository, inference-service.yaml |

repository.py says what is in the repositories. Every layout is a bundle: `OnnxClassifier` and `defense info` take each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from defense.export import repository
from defense.store.folders import package_version

Layout = Literal["bundle", "triton", "triton-python", "kserve"]
Mode = Literal["delta", "exact", "static"]
"""How a defense is written in a graph (vision.py)."""
Dtype = Literal["fp32", "fp16", "int8"]
"""Numbers of a graph."""

REQUIREMENTS = "requirements.txt"


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
    moved = repository.place_graphs(folder, fields, in_python=layout == "triton-python")
    if layout == "kserve":
        (folder / "inference-service.yaml").write_text(_inference_service(fields["dtype"]), encoding="utf-8")
        return moved
    repository.write_picture_models(folder, fields)
    (folder / REQUIREMENTS).write_text(_requirements(), encoding="utf-8")
    return moved


def _requirements() -> str:
    """Return what the Python environment of Triton's Python backend has to hold."""
    return f"""# For the Python that Triton's Python backend runs: pip install -r requirements.txt
clip-defense[onnx]=={package_version()}
numpy<2  # the backend of Triton up to 2.51 (24.10) cannot hand out arrays of numpy 2
"""


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
      storageUri: pvc://models/{repository.REPOSITORY}  # where you put that folder of this bundle
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
