"""A defense of random numbers, in memory and on disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.hosts.defense import ClipId, Defense, Golden
from defense.store.defenses import save

from .defense_folders import D_MODEL, random_site


@pytest.fixture
def defense() -> Defense:
    """Two sites, three sets, golden vectors, and text that is not ASCII."""
    rng = np.random.default_rng(1)
    text = LatentSet("text", (3, 1), (0.0, 0.25), scores={"effect": (0.5, 0.1)}, provenance={"n_pairs": 8})
    sky = LatentSet("ciel étoilé", (4,), edit="set", scope="patch", values=(0.1,))
    return Defense(
        ClipId("ViT-B-32", "laion2b_s34b_b79k", "ab" * 32, False, D_MODEL, 12),
        Preprocess((8, 8), (0.5, 0.4, 0.3), (0.5, 0.6, 0.7), "bicubic", "shortest"),
        (random_site(7, "jumprelu", text, sky), random_site(9, "topk", replace(text, edit="project"), seed=2)),
        Golden(
            rng.integers(0, 256, (3, 8, 8, 3), np.uint8),
            rng.normal(size=(3, 5)).astype(np.float32),
            rng.normal(size=(3, 5)).astype(np.float32),
        ),
        license="© Łukasz: frei für alle, 自由",
        provenance={"seed": 3, "report": {"plain": {"accuracy": 0.5}}, "name": "да"},
    )


@pytest.fixture
def folder(defense: Defense, tmp_path: Path) -> Path:
    """The defense on disk."""
    return save(defense, tmp_path / "text")
