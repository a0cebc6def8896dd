"""Requests of the V2 protocol, by Triton's clients, for whichever server speaks it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("geventhttpclient", reason="tritonclient.http needs it")
pytest.importorskip("tritonclient.http")

import tritonclient.grpc as grpc
import tritonclient.http as http

from defense.export.repository import VISION_NAME
from defense.export.runtime import OnnxClassifier

from .servers import HOST

ATOL = 1e-5
OUTPUTS = ("image_embeds", "label", "score", "scores", "error")


def infer(server: Any, model: str, inputs: dict[str, np.ndarray], by: str = "http") -> dict[str, np.ndarray]:
    """Ask by a protocol of Triton's, and return all outputs."""
    library, port = (http, server.http) if by == "http" else (grpc, server.grpc)
    given = []
    for name, array in inputs.items():
        kind = "BYTES" if array.dtype == object else {"f": "FP32", "d": "FP64", "l": "INT64"}[array.dtype.char]
        given.append(library.InferInput(name, array.shape, kind))
        given[-1].set_data_from_numpy(array)
    with library.InferenceServerClient(f"{HOST}:{port}") as client:
        answer = client.infer(model, given)
        names = OUTPUTS if "picture" in inputs else ("image_embeds", "logits_per_image")
        return {name: answer.as_numpy(name) for name in names}


def check_graph(server: Any, golden: tuple[Any, np.ndarray, np.ndarray], clf: OnnxClassifier, by: str) -> None:
    """The graph behind a server answers the golden pictures as torch did when the bundle was made."""
    _, pixel_values, embeds = golden
    got = infer(server, VISION_NAME, {"pixel_values": pixel_values}, by)
    np.testing.assert_allclose(got["image_embeds"], embeds, atol=ATOL)
    np.testing.assert_allclose(got["logits_per_image"], clf.logit_scale * embeds @ clf.text_embeds().T, atol=1e-3)


def pictures(files: list[bytes]) -> dict[str, np.ndarray]:
    """Encoded pictures as a tensor."""
    return {"picture": np.array(files, dtype=object)[:, None]}


def named(labels: list[str], n: int) -> dict[str, np.ndarray]:
    """Labels for a request of n pictures."""
    return {"labels": np.array([[label.encode() for label in labels]] * n, dtype=object)}


def texts(rows: np.ndarray) -> list[str]:
    """A tensor of texts."""
    return [text.decode() for text in rows.reshape(-1)]
