"""What a defense is fitted on: a user's pictures and labels, or what there is without them."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from defense.data.labels import common_nouns
from defense.data.sources import Picture, Pictures
from defense.world import draws, scenes

WEAK = (
    "fitted on drawn scenes, because no pictures were given: it knows nothing of photographs. Run `defense protect` "
    "again with --pictures DIR, some hundred of the kind it will see"
)
"""What the provenance of a defense says, under "weak", that was fitted without pictures."""

_SEED = 83


@dataclass(frozen=True)
class Wanted:
    """What to fit on.

    Attributes:
        pictures: The pictures.
        labels: What to choose from.
        weak: What is wrong with them; None where they are a user's own.
    """

    pictures: Pictures
    labels: tuple[str, ...]
    weak: str | None


def wanted_pictures(own: Pictures | None, labels: Sequence[str] | None, *, n: int, size: tuple[int, int]) -> Wanted:
    """Return what to fit on.

    Args:
        own: A user's pictures; None for drawn scenes.
        labels: A user's labels; by default what the scenes show, or for pictures `common_nouns`.
        n: How many scenes to draw.
        size: Height and width of the CLIP's pictures.
    """
    if own is not None:
        return Wanted(own, tuple(labels or common_nouns()), None)
    return Wanted(_drawn(n, max(size)), tuple(labels or scenes.OBJECTS), WEAK)


@dataclass(frozen=True)
class _Drawn:
    """A scene that is drawn when it is asked for."""

    index: int
    side: int

    def pictures(self) -> Iterator[Picture]:
        rng = np.random.default_rng([_SEED, self.index])
        name = list(scenes.OBJECTS)[self.index % len(scenes.OBJECTS)]
        picture = scenes.render(draws.sample_scene(rng, draws.sample_object(rng, name), None), self.side)
        data = io.BytesIO()
        picture.save(data, "PNG")
        yield Picture(f"scene-{self.index}", self.index, data.getvalue())


def _drawn(n: int, side: int) -> Pictures:
    """Return scenes of one object each, without writing; the i-th depends on i and the side alone."""
    digest = hashlib.sha256(f"drawn scenes {_SEED} {n} {side}".encode()).hexdigest()
    return Pictures(tuple(_Drawn(index, side) for index in range(n)), digest)
