"""What the stages of a fit came to, kept on disk until the fit is done: one that was killed goes on from there.

A result is kept under a hash of everything that decides it, so another fit can only find what would be its own.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from defense.errors import CheckpointError, NonFiniteError
from defense.store import folders

log = logging.getLogger(__name__)

Arrays = Mapping[str, np.ndarray]


def digest(value: Any) -> str:
    """Return a sha256 of JSON values, or of an array's numbers."""
    if isinstance(value, np.ndarray):
        head = f"{value.dtype}{value.shape}".encode()
        return hashlib.sha256(head + np.ascontiguousarray(value).tobytes()).hexdigest()
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Saves:
    """Results of stages, by what decides them.

    Args:
        folder: Where they are kept; None to keep nothing.
        basis: What decides all of them, as JSON values.
    """

    def __init__(self, folder: Path | None = None, basis: Any = None) -> None:
        self.folder, self.basis = folder, basis
        self._used: set[Path] = set()

    def memo(self, key: Any, compute: Callable[[], Arrays]) -> Arrays:
        """Return the result that was kept for a key, else compute and keep it."""
        kept = self.get(key)
        if kept is not None:
            return kept
        found = compute()
        self.put(key, found)
        return found

    def get(self, key: Any) -> dict[str, np.ndarray] | None:
        """Return what was kept for a key; None where nothing was, or it cannot be read."""
        path = self._path(key)
        if path is None or not path.is_file():
            return None
        self._used.add(path)
        try:
            return folders.read_tensors(path)
        except (CheckpointError, NonFiniteError) as error:
            log.warning("%s; this stage is computed again", error)
            return None

    def put(self, key: Any, arrays: Arrays) -> None:
        """Keep a result, in place of one that was there."""
        path = self._path(key)
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        self._used.add(path)
        with folders.replacing(path) as partial:
            tensors = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
            folders.write_tensors(tensors, partial, save_file)

    def drop(self, key: Any) -> None:
        """Forget what was kept for a key."""
        path = self._path(key)
        if path is not None:
            path.unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget everything that was kept or found: the fit is done."""
        for path in self._used:
            path.unlink(missing_ok=True)
        self._used.clear()

    def _path(self, key: Any) -> Path | None:
        return None if self.folder is None else self.folder / f"{digest([self.basis, key])}.safetensors"
