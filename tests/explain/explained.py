"""Rules, edits, sets and pictures for what a defense did to a picture."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")

from defense.core.latents import LatentSet
from defense.world import draws, scenes

LABELS = ["dog", "cat", "fish", "tree", "car", "boat"]
BLOCK = "blocks.1.hook_resid_post"
RULES = {
    "relu": {"act": "relu"},
    "jumprelu": {"act": "jumprelu", "norm": "layer_norm"},
    "batchtopk": {"act": "batchtopk"},
    "gated": {"act": "gated"},
    "topk": {"act": "topk", "k": 8},
    "topk-none": {"act": "topk", "k": 8, "topk_relu": "none", "norm": "constant_norm_rescale"},
}
EDITS = ("scale", "project", "set")

rules = pytest.mark.parametrize("fields", RULES.values(), ids=RULES)
edits = pytest.mark.parametrize("edit", EDITS)


def picture(seed: int = 0, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def a_set(latents=range(40), name: str = "text", **fields) -> LatentSet:
    latents = tuple(latents)
    if fields.get("edit") == "set":
        fields["values"] = tuple(0.5 + 0.01 * latent for latent in latents)
    return LatentSet(name, latents, **fields)


def attacked_scene(seed: int) -> Image.Image:
    (case,) = draws.typographic(1, seed)
    return scenes.render(case.scene)


def scores(prediction) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in prediction}


def close(got, want) -> None:
    assert scores(got) == pytest.approx(scores(want), abs=1e-5)
