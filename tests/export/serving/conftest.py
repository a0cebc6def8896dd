"""Bundles in a server's layout, made of one that is there: no torch is needed where servers run."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

from defense.export import layouts
from defense.export.layouts import Layout
from defense.export.runtime import OnnxClassifier

from ...conftest import restated
from .installed import environment, wheels_of
from .servers import triton_home


@pytest.fixture(scope="session")
def ready(request) -> Path:
    """A bundle with a text tower: $CLIP_DEFENSE_BUNDLE, or where torch is, the tiny one."""
    if given := os.environ.get("CLIP_DEFENSE_BUNDLE"):
        return Path(given)
    return request.getfixturevalue("tiny_bundle")


@pytest.fixture(scope="session")
def clf(ready) -> OnnxClassifier:
    """That bundle, called directly."""
    return OnnxClassifier(ready)


@pytest.fixture(scope="session")
def arranged(ready, tmp_path_factory):
    """Make a copy of that bundle in another layout, with its text tower or without."""

    def arrange(layout: Layout, *, text: bool = True) -> Path:
        folder = Path(shutil.copytree(ready, tmp_path_factory.mktemp(layout) / "bundle"))
        (folder / "Dockerfile").unlink()
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        fields: dict[str, Any] = {}
        if not text:
            (folder / manifest["text_model"]).unlink()
            fields = {"text_model": None, "context_length": None}
        fields |= layouts.arrange(folder, layout, manifest | fields)
        return restated(folder, **fields)

    return arrange


@pytest.fixture(scope="session")
def wheels(tmp_path_factory) -> Path:
    """Wheels of this checkout and of what it needs to serve a bundle."""
    return wheels_of(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def python(arranged, wheels, tmp_path_factory) -> Path:
    """The environment of Triton's Python backend that a bundle asks for."""
    triton_home()
    requirements = arranged("triton-python", text=False) / layouts.REQUIREMENTS
    folder = tmp_path_factory.mktemp("python") / "env"
    return environment(folder, "--no-index", "--find-links", wheels, "-r", requirements)


def png(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "PNG")
    return stream.getvalue()


def jpeg(picture: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(picture).save(stream, "JPEG")
    return stream.getvalue()


@pytest.fixture(scope="session")
def golden(clf) -> tuple[list[bytes], np.ndarray, np.ndarray]:
    """The golden pictures as files and as pixel_values, and torch's image_embeds of them."""
    pictures = clf.bundle.golden["pictures"]
    pixel_values = np.stack([clf.preprocess(Image.fromarray(picture)) for picture in pictures])
    return [png(picture) for picture in pictures], pixel_values, clf.bundle.golden["image_embeds"]
