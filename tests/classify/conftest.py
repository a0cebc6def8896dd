"""A classifier of the tiny CLIP with a TopK defense."""

from __future__ import annotations

import pytest

from defense.core.latents import LatentSet

from ..conftest import random_defense, random_sae
from .pictures import LABELS


@pytest.fixture
def tiny_defense(tiny_clip, tiny_folder):
    site = (1, random_sae(act="topk", k=8), LatentSet("text", tuple(range(60))))
    return random_defense(tiny_clip, site, name=f"local-dir:{tiny_folder}")


@pytest.fixture
def clf(tiny_folder, tiny_defense):
    from defense.classify.classifier import RobustClassifier
    from defense.hosts.clip import load_clip

    clip = load_clip(f"local-dir:{tiny_folder}")
    return RobustClassifier(clip, tiny_defense, batch_size=4).set_labels(LABELS)
