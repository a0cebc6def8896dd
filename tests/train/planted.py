"""Residuals made of known directions, and streams of a tiny CLIP's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.sae import SparseAutoencoder
from defense.data.sources import open_pictures
from defense.train.residuals import Stream
from defense.train.runs import train_in_memory
from defense.train.trainer import TrainConfig

POINT = "blocks.1.hook_resid_post"
CONFIG = TrainConfig(d_sae=64, k=6, steps=600, batch=128, lr=5e-3)
VARIANTS = {
    "topk": CONFIG,
    "batchtopk": replace(CONFIG, variant="batchtopk"),
    "matryoshka": replace(CONFIG, variant="matryoshka"),
    "relu": replace(CONFIG, variant="relu", k=None, l1=0.3),
}
SHORT = TrainConfig(d_sae=256, k=2, steps=24, batch=200, lr=3e-3, variant="batchtopk", dead_after=500, aux_k=16)
"""Short enough to run twice, with enough latents that some die and come back."""

DIRECTIONS = np.random.default_rng(7).normal(size=(32, 24)) / 24**0.5
NAMES = ("ant", "bee", "cow")


def planted(n: int, seed: int = 0) -> torch.Tensor:
    """Residuals that are sparse sums of 32 directions, around an offset."""
    rng = np.random.default_rng(seed)
    codes = rng.uniform(0.5, 1.5, (n, 32)) * (rng.random((n, 32)) < 0.08)
    return torch.from_numpy(codes @ DIRECTIONS * 10 + 3).float()


def stream_of(clip, folder: Path, **options) -> Stream:
    """A stream that fills its buffer three times an epoch."""
    return Stream(clip, POINT, open_pictures([folder]), **{"buffer": 20 * 17, "text_rate": 0.3, **options})


@cache
def trained(variant: str) -> SparseAutoencoder:
    """An SAE of planted residuals, whose tokens are made of 2.6 directions on average."""
    return train_in_memory(planted(20_000), VARIANTS[variant])
