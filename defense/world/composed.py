"""Two things in one scene, side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from .draws import sample_object, sample_scene
from .scenes import SIZE, Scene, Subject, _apply_finish, _draw_background, _draw_subject

_NEAR, _FAR = (0.24, 0.29), (0.71, 0.76)
"""Centers of the two, as fractions of the picture's width."""
_SCALE = (0.42, 0.5)


def sample_beside(rng: np.random.Generator, name: str, other: str) -> tuple[Scene, Subject]:
    """Return a scene with a named object on one side, and the subject for its other side, neither larger than half.

    Args:
        rng: Source of every choice; none of them depends on the names.
        name: Of the scene's own object.
        other: Of the object beside it.
    """
    sides = (_NEAR, _FAR) if rng.random() < 0.5 else (_FAR, _NEAR)
    placed = []
    for each, side in zip((name, other), sides, strict=True):
        center, scale = (float(rng.uniform(*side)), float(rng.uniform(0.42, 0.58))), float(rng.uniform(*_SCALE))
        placed.append(replace(sample_object(rng, each), center=center, scale=scale))
    return sample_scene(rng, placed[0], None), placed[1]


def render_beside(scene: Scene, beside: Subject, size: int = SIZE) -> Image.Image:
    """Draw a scene without writing and a second subject in it, as an RGB picture of `size` x `size` pixels."""
    assert scene.subject is not None
    picture = _draw_background(scene.background, size * scene.oversample)
    for subject in (scene.subject, beside):
        _draw_subject(picture, subject)
    if scene.oversample > 1:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return _apply_finish(picture, scene.finish)
