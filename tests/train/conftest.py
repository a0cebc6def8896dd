"""Pictures of three classes, and a CLIP to train an SAE of."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Pictures of three classes, in sub-folders."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(60):
        path = folder / ("ant", "bee", "cow")[i % 3] / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    return folder


@pytest.fixture
def clip(tiny_folder):
    from defense.hosts.clip import load_clip

    return load_clip(f"local-dir:{tiny_folder}")
