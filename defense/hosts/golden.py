"""Golden vectors: what a defended CLIP answered when its defense was made, and whether it still does."""

from __future__ import annotations

import numpy as np
from PIL import Image

from defense.errors import CheckpointError

from .clip import Clip
from .defense import Golden

TOLERANCE = 1e-4
"""Largest difference of an embedding that another machine's arithmetic may make."""


def make_golden(clip: Clip, pictures: np.ndarray) -> Golden:
    """Return the answers of a CLIP, with and without the defense that is attached to it.

    Args:
        clip: The CLIP.
        pictures: uint8 [n, height, width, 3].
    """
    pixel_values = np.stack([clip.preprocess(Image.fromarray(picture)) for picture in pictures])
    with clip.undefended():
        plain = clip.image_embeds(pixel_values).cpu().numpy()
    return Golden(pictures, plain, clip.image_embeds(pixel_values).cpu().numpy())


def golden_difference(clip: Clip, golden: Golden) -> float:
    """Return the largest difference between the embeddings of a defended CLIP and golden ones; NaN where one is NaN."""
    now = make_golden(clip, golden.pictures)
    differences = [np.abs(now.plain - golden.plain).max(), np.abs(now.defended - golden.defended).max()]
    return float(np.max(differences))  # unlike max(), NaN where one is NaN


def check_golden(clip: Clip, golden: Golden) -> float:
    """Return `golden_difference`, where it is one that passes.

    Raises:
        CheckpointError: It is larger.
    """
    difference = golden_difference(clip, golden)
    if not difference <= TOLERANCE:  # also where it is NaN
        raise CheckpointError(
            f"golden vectors differ by {difference:.2g}; expected at most {TOLERANCE}: this is not the CLIP that the "
            "defense was made with"
        )
    return difference
