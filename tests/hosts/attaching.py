"""Pictures and latent sets for a tiny CLIP that is wrapped."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
import torch

from defense.core.latents import LatentSet

TOPK = {"act": "topk", "k": 8}


def pictures(model, n: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    height, width = model.visual.image_size
    return torch.randn(n, 3, height, width, generator=torch.Generator().manual_seed(3)).to(dtype)


def a_set(n: int = 40, **fields) -> LatentSet:
    return LatentSet("test", tuple(range(n)), **fields)
