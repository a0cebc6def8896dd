"""Latents of a tiny CLIP, described."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.explain.catalogue import Catalogue
from defense.explain.describe import describe
from defense.explain.sums import Example
from defense.hosts.clip import Clip

from ..conftest import random_sae

POINT = "blocks.1.hook_resid_post"
WORDS = ("dog", "cat", "red fish", "tree", "house")
N = 12


def sparse_sae(**fields):
    """A TopK SAE, of whose latents some never fire."""
    return random_sae(act="topk", k=3, **fields)


def described(clip: Clip, pictures: list[Example], **options) -> Catalogue:
    return describe(clip, POINT, sparse_sae(), pictures, WORDS, **{"n_top": 4, "n_steered": 2, **options})


def acts_and_embeds(clip: Clip, pictures: list[Example]) -> tuple[np.ndarray, np.ndarray]:
    pixels = torch.from_numpy(np.stack([picture.pixel_values for picture in pictures]))
    with torch.inference_mode():
        acts = sparse_sae().encode(clip.tower.resid(pixels, POINT))
        embeds = torch.nn.functional.normalize(clip.model.encode_image(pixels), dim=1)
    return acts.double().numpy(), embeds.double().numpy()
