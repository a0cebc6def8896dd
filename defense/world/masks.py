"""Where things are in a drawn scene: masks that are known, to hold what a model sees against."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from .scenes import SIZE, Finish, Scene, letters_at, render

_LEAST = 12
"""Gray levels in some channel by which a subject stands out from what is behind it."""


def subject_mask(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Return which pixels the subject of a scene shows in, bool [size, size]; not where writing covers it.

    They are the pixels that change with it. A pixel that has the very color of the background counts as background.

    Args:
        scene: What is drawn.
        size: Width and height of the picture, in pixels.
    """
    bare = replace(scene, finish=Finish(0), oversample=1)
    shown = [np.asarray(render(each, size), np.int16) for each in (bare, replace(bare, subject=None))]
    mask: np.ndarray = np.abs(shown[0] - shown[1]).max(-1) >= _LEAST
    return mask


def letters_mask(scene: Scene, size: int = SIZE) -> np.ndarray:
    """Return which pixels lie within the letters of a scene, each with the room around it, bool [size, size].

    Args:
        scene: What is drawn.
        size: Width and height of the picture, in pixels.
    """
    centers = (np.arange(size) + 0.5) / size
    points = np.stack(np.meshgrid(centers, centers), -1).reshape(-1, 2)
    mask: np.ndarray = (letters_at(scene, points) > 0).reshape(size, size)
    return mask
