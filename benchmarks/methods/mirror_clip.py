"""MirrorCLIP: what stays when the picture is mirrored. Objects do; words become unreadable.

With f and f' the normalized embeddings of a picture and of its mirror image, the dimensions in which both have the same
sign are taken to be visual:

    f_visual = m (f + f'),     m = 1 where f f' > 0, else 0

It needs no training, and twice the passes.

Source, and what differs from it: `MirrorClip.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from PIL import Image, ImageOps

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.embeddings import unit
from defense.hosts.clip import Clip


class _Mirrored(Encoder):
    def image_embeds(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return what a picture and its mirror image agree on, float32 [n, d_embed], normalized."""
        mirrored = [ImageOps.mirror(picture) for picture in pictures]
        return visual_part(super().image_embeds(pictures), super().image_embeds(mirrored))


def visual_part(embeds: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
    """Return f_visual, float32 [n, d_embed], normalized, of embeddings and those of the mirror images."""
    return unit(np.where(embeds * mirrored > 0, embeds + mirrored, 0))


@dataclass(frozen=True)
class MirrorClip:
    """Keep of the image embedding what its mirror image agrees with."""

    record: ClassVar[Record] = Record(
        'Wang et al., "CLIP in Mirror", NeurIPS 2024',
        "section 3, the visual filter",
        "Written from the formula; the textual filter, which serves other tasks, is left out.",
    )
    name: str

    def settings(self) -> Mapping[str, Any]:
        """Return nothing: there is nothing to set."""
        return {}

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn nothing."""

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield embeddings of two passes."""
        yield _Mirrored(clip)
