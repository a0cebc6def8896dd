"""Where a bundle's graphs lie, and the files that a server wants beside them; the kinds of graph there are.

| layout | for | adds |
|---|---|---|
| bundle | `OnnxClassifier`, ONNX Runtime | Dockerfile, of the command |
| triton | NVIDIA Triton, its ONNX Runtime backend | model_repository, picture_repository, requirements.txt |
| triton-python | NVIDIA Triton, its Python backend, on a CPU | the same |
| kserve | KServe, which runs Triton, or kserve.py | model_repository, inference-service.yaml, Dockerfile of kserve.py |

repository.py says what is in the repositories. Every layout is a bundle: `OnnxClassifier` and `defense info` take each
of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
        (folder / "Dockerfile").write_text(_dockerfile(_COMMAND), encoding="utf-8")
        return {}
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.onnx*"))
    in_python = layout == "triton-python"
    moved = repository.place_graphs(folder, fields, in_python=in_python)
    if layout == "kserve":
        (folder / "inference-service.yaml").write_text(_inference_service(fields["dtype"], n_bytes), encoding="utf-8")
        (folder / "Dockerfile").write_text(_dockerfile(_PREDICTOR), encoding="utf-8")
        return moved
    repository.write_picture_models(folder, fields, in_python=in_python)
    (folder / REQUIREMENTS).write_text(_requirements(), encoding="utf-8")
    return moved


def _requirements() -> str:
    """Return what the Python environment of Triton's Python backend has to hold."""
    return f"""# For the Python of Triton's Python backend, the first python3 in PATH. With it, in this folder:
#     python3 -m pip wheel -w ../wheels "CHECKOUT[onnx]" "numpy<2"
#     python3 -m pip install -r requirements.txt
# CHECKOUT is the folder of clip-defense's sources, or its wheel. Nothing but the folder wheels beside this is asked.
--no-index
--find-links ../wheels
clip-defense[onnx]=={package_version()}
numpy<2  # the backend of Triton up to 2.51 (24.10) reads arrays of numpy 2 wrongly, which the models refuse
"""


def memory_mib(n_bytes: int) -> int:
    """Return how much memory to give a server, in MiB, a multiple of 256.

    While ONNX Runtime loads a graph it holds its weights up to three times: as a file, as a message and as tensors. One
    GiB is for the server, and for 32 pictures on their way.

    Args:
        n_bytes: Of the graphs.
    """
    return 256 * math.ceil((1024 + 3 * n_bytes / 2**20) / 256)


def _inference_service(dtype: str, n_bytes: int) -> str:
    memory = memory_mib(n_bytes)
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
          memory: {memory}Mi
        limits:
          memory: {memory}Mi  # by the size of the graphs{gpu}
"""


class _Image(NamedTuple):
    """What an image is for.

    Attributes:
        purpose: In a few words.
        run: Options of `docker run` and what follows the image's name.
        extra: Of this package.
        health: Command that fails where the container does not work.
        entrypoint: What it runs.
        ports: On which it listens.
    """

    purpose: str
    run: tuple[str, str]
    extra: str
    health: str
    entrypoint: str
    ports: str = ""


_COMMAND = _Image(
    "classifies pictures with this bundle",
    ('--network none -v "$PWD/pictures:/pictures:ro"', "/pictures --json"),
    "onnx",
    '["defense", "info", "/bundle"]',
    '["defense", "classify", "--defense", "/bundle"]',
)
_READY = "import urllib.request as r; r.urlopen('http://127.0.0.1:8080/v2/health/ready', timeout=5)"
_PREDICTOR = _Image(
    "serves this bundle by KServe's V2 protocol, REST and gRPC",
    ("-p 8080:8080 -p 8081:8081", ""),
    "kserve",
    f'["python", "-c", "{_READY}"]',
    '["python", "-m", "defense.export.kserve", "/bundle"]',
    "EXPOSE 8080 8081\n",
)


def _dockerfile(image: _Image) -> str:
    return f"""# An image without torch that {image.purpose}. In this folder:
#     python3.12 -m pip wheel -w wheels "CHECKOUT[{image.extra}]"
#     docker build --network none -t clip-defense .
#     docker run --rm --read-only --tmpfs /tmp {image.run[0]} clip-defense {image.run[1]}
# CHECKOUT is the folder of clip-defense's sources, or its wheel; the wheels are made by the Python that the image has.
# The build takes them, and asks no package index: none has clip-defense.
FROM python:3.12-slim
ENV ORT_DISABLE_TELEMETRY=1 HOME=/tmp PYTHONDONTWRITEBYTECODE=1
COPY . /bundle
RUN pip install --no-cache-dir --no-index --find-links=/bundle/wheels \\
    "clip-defense[{image.extra}]=={package_version()}" && \\
    rm -rf /bundle/wheels && defense info /bundle
USER 65534:65534
{image.ports}HEALTHCHECK --interval=1m --timeout=1m --start-period=2m CMD {image.health}
ENTRYPOINT {image.entrypoint}
"""
