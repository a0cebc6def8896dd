"""Embeddings that were computed before, on disk, by a key that changes with all that decides their content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from defense.store.folders import read_tensors, replacing, write_tensors

_VERSION = 1
"""Part of every key: to be raised where the code gives other embeddings than before."""


class Store:
    """Named arrays by key, kept across runs.

    Args:
        folder: Holds one safetensors file per key; it is made if it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the arrays kept under a key; where there are none, compute and keep them.

        Raises:
            CheckpointError: The file of that key is damaged.
        """
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            # safetensors writes the memory behind a view, not what the view shows
            arrays = {name: np.ascontiguousarray(array) for name, array in compute().items()}
            with replacing(path) as partial:
                write_tensors(arrays, partial, save_file)
        return read_tensors(path)


def key_of(*parts: Any) -> str:
    """Return a hex key that changes with any of some JSON values."""
    return hashlib.sha256(json.dumps([_VERSION, *parts], sort_keys=True).encode()).hexdigest()
