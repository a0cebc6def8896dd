"""Pictures to begin with: photographs, and scenes of the embedded world, drawn when they are asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image

from defense.data.images import decode
from defense.demo.engine import DemoTask, own_tasks
from defense.hosts.shipped import EMBEDDED, MODELS, PHOTO
from defense.world import draws, scenes
from defense.world.draws import Grouped
from defense.world.scenes import Scene

_SIZE = 320


@dataclass(frozen=True)
class ExamplePicture:
    """A picture, and what to do with it.

    Attributes:
        title: What it shows.
        source: A scene to draw, or a photograph.
        task: Name of the task that it belongs to.
        word: What is written on it at first.
    """

    title: str
    source: Scene | Path
    task: str
    word: str = ""

    @property
    def picture(self) -> Image.Image:
        """The picture without the word."""
        return _picture(self.source)


@functools.cache
def _picture(source: Scene | Path) -> Image.Image:
    return scenes.render(source, _SIZE) if isinstance(source, Scene) else decode(source).image


def examples(tasks: Sequence[DemoTask]) -> tuple[ExamplePicture, ...]:
    """Return the pictures for those of the tasks that are a shipped model's."""
    drawn, photographed = (own_tasks(MODELS[name]) for name in (EMBEDDED, PHOTO))
    names = {task.name for task in tasks if task in drawn}
    found: list[ExamplePicture] = []
    if any(task in photographed for task in tasks):
        folder = MODELS[PHOTO].folder("photographs")
        found += [ExamplePicture(title, folder / f"{title}.jpg", "text", word) for title, word in _PHOTOGRAPHS]
    if "text" in names:
        found += [_object(*row) for row in _OBJECTS]
    found += [ExamplePicture(title, _nth(draw, index), task) for title, task, draw, index in _GROUPS if task in names]
    return tuple(found)


_PHOTOGRAPHS = (("cat", "zebra"), ("espresso", "violin"), ("tripod", ""), ("rocket", ""))
"""A photograph, and the word that is written on it at first: one that works, or none."""
_OBJECTS = (
    ("apple", "pizza", 18),
    ("dog", "car", 1),
    ("guitar", "banana", 9),
    ("lion", "phone", 12),
    ("bus", "cat", 16),
    ("umbrella", "cheese", 16),
)
"""An object, the word that is written on it at first, and a seed. Chosen among 24 seeds because the word works."""


def _object(name: str, word: str, seed: int) -> ExamplePicture:
    rng = np.random.default_rng(seed)
    scene = draws.sample_scene(rng, draws.sample_object(rng, name), None)
    return ExamplePicture(name, replace(scene, oversample=1), "text", word)


_SEED = 3
_GROUPS = (
    ("landbird on water", "waterbirds", draws.waterbirds, 131),
    ("waterbird on land", "waterbirds", draws.waterbirds, 21),
    ("blond man", "celeba", draws.celeba, 62),
    ("dark-haired woman", "celeba", draws.celeba, 23),
)
"""Pictures of a small group, and where each stands in a stream. Chosen because plain CLIP is wrong there."""


def _nth(draw: Callable[[int, int], Iterator[Grouped]], index: int) -> Scene:
    return next(islice(draw(index + 1, _SEED), index, None)).scene
