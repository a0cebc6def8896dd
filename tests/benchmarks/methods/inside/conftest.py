"""The tiny CLIP, its tower and a defense of it. What needs torch is imported where it is used."""

from __future__ import annotations

import pytest

from defense.core.latents import LatentSet
from defense.data.tokenizer import ClipTokenizer

from ....conftest import random_defense, random_sae


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    from defense.benchmarks.methods import embedding_sae

    monkeypatch.setattr(embedding_sae, "_STEPS", 20)
    monkeypatch.setattr("open_clip.IMAGENET_CLASSNAMES", ["goldfish", "tench", "drum", "rose"])


@pytest.fixture
def clip(tiny_clip):
    from defense.hosts.clip import Clip

    return Clip(tiny_clip, random_defense(tiny_clip).preprocess, ClipTokenizer(16))


@pytest.fixture
def tower(clip):
    from defense.hosts.families import tower_of

    return tower_of(clip.model)


@pytest.fixture
def defense(tiny_clip, tmp_path):
    from .tower_material import saved

    latent_set = LatentSet("text", tuple(range(30)), edit="project")
    return saved(random_defense(tiny_clip, (1, random_sae(act="topk", k=8), latent_set)), tmp_path / "defense")
