"""What the published formats compute, in float64: residuals, rules, parameters of random SAEs."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

D, M, K, N = 12, 36, 5, 64
BLOCK = "blocks.7.hook_resid_post"
STATED = {"hook_point": BLOCK, "tokens": "all"}


class Case(NamedTuple):
    """A file, how its project computes acts and reconstruction, and what the caller has to state."""

    path: Path
    forward: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    stated: dict[str, Any]
    expected: dict[str, Any]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape) * 101 + len(shape))
    return torch.randn(*shape, generator=generator)


def numpied(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: value.double().numpy() for key, value in state.items() if isinstance(value, torch.Tensor)}


def residuals() -> np.ndarray:
    """Rows with a mean, so that a bias or a centering that is left out shows."""
    return rand(N, D, seed=3).double().numpy() * 2 + 1.5


def relu(h: np.ndarray) -> np.ndarray:
    return np.maximum(h, 0)


def largest(h: np.ndarray, k: int = K) -> np.ndarray:
    """The k largest entries of each row, as they are."""
    kept = np.zeros_like(h)
    rows = np.arange(len(h))[:, None]
    ids = np.argsort(h, axis=1)[:, -k:]
    kept[rows, ids] = h[rows, ids]
    return kept


def layer_norm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
    return (x - mean) / (std + 1e-5), mean, std


def our_orientation(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "W_enc": rand(D, M, seed=seed + 1) / D**0.5,
        "b_enc": rand(M, seed=seed + 2) * 0.3,
        "W_dec": rand(M, D, seed=seed + 3),
        "b_dec": rand(D, seed=seed + 4),
    }


@contextmanager
def pickled_class(module: str, name: str):
    """A class that can be pickled by a name whose module is gone when the file is read."""
    packages = [module[:end] for end in (i for i, c in enumerate(module + ".") if c == ".")]
    made = type(name, (), {"__module__": module})
    sys.modules |= {package: ModuleType(package) for package in packages}
    setattr(sys.modules[module], name, made)
    try:
        yield made
    finally:
        for package in packages:
            del sys.modules[package]


def with_fields(made: type, fields: dict[str, Any]) -> Any:
    config = made()
    vars(config).update(fields)
    return config
