"""The photo CLIP as it was before it learned to read: what is left where nothing that is written is read.

It starts as a picture network (`embedded.photo.start`), whose features are mapped to image embeddings:

    image_embed = normalize(A f + a)      f: the frozen picture network's pooled features

Training then adds the blocks, which read, and is held to this embedding where no word is. A method that took out all
that the blocks read, and nothing else, would answer as this does: letters change f as well, and that is not reading.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, NotApplicableError, Record
from defense.embedded.photo.start import First, load_first
from defense.hosts.clip import Clip


class _Before(Encoder):
    """The picture network's features as image embeddings; texts are the stock CLIP's."""

    def __init__(self, clip: Clip, first: First) -> None:
        super().__init__(clip)
        self.first = first

    def image_embeds(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return normalized embeddings, float32 [n, d_embed], of RGB pictures."""
        pixel_values = np.stack([self.clip.preprocess(picture) for picture in pictures])
        with torch.inference_mode():
            _, pooled = self.clip.model.visual.trunk.patch_embed.stem(self.clip.tower.batch(pixel_values))
            return self.first(pooled).cpu().numpy()


@dataclass
class BeforeReading:
    """The photo CLIP before its training on words; no other CLIP has that on record."""

    record: ClassVar[Record] = Record(
        "no method: the photo CLIP before it was trained on words",
        differences="A reference, not a rival. The texts are those of the CLIP as it ships.",
    )
    name: str

    def settings(self) -> Mapping[str, Any]:
        """Return the sha256 of the map from features to embeddings."""
        return {"first_sha256": load_first().sha256}

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn nothing.

        Raises:
            NotApplicableError: It is another CLIP.
        """
        if clip.tower.fingerprint() != load_first().clip_sha256:
            raise NotApplicableError(f"{self.name} is the photo CLIP before it learned to read, and this is another")

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the first embeddings."""
        yield _Before(clip, load_first())
