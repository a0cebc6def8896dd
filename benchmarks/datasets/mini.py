"""Three benchmarks in miniature, of the world that the embedded CLIP knows: nothing to fetch, drawn when needed.

| task | question | tests |
|---|---|---|
| mini-typographic | which of 104 objects, another one's name written | clean, neutral (empty plate), attacked |
| mini-waterbirds | land bird or water bird, on land or water | all groups alike |
| mini-celeba | dark or blond hair, of women and men | all groups alike |

The CLIP was trained where 95 % of the birds are in their own place and 95 % of blond hair is on women; the adjusted
average weighs groups like that. The training splits are not its training data but what methods may be fitted on, and
show groups alike, as what `defense.fit` asks for does. The embedded defenses were fitted before, on 2,000 pictures of
their own, with SAEs trained on 5,000 more; methods that are fitted here see the 1,000 of the training split at most.
Tests have seeds of their own, and typefaces that occur in no training picture. The empty plate hides a part of the
object: accuracy on `neutral` is the ceiling of any defense against words.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defense.benchmarks.datasets.base import Dataset, Example, Options, Task
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.world import draws, scenes
from defense.world.draws import Grouped
from defense.world.files import world_sha256
from defense.world.scenes import Scene

DEFENSES = {
    "mini-typographic": "text", "mini-waterbirds": "waterbirds", "mini-celeba": "celeba", "mini-semantic": "text"
}  # fmt: skip
"""Name of a task -> that of the embedded model's defense for it (`shipped.MODELS`). `semantic` draws the last one."""

N_TEST = 800
"""Pictures of each test: few enough for every method to be measured on two cores in a quarter of an hour."""
N_TRAIN = 1000
CORRELATION = 0.95
"""Of the CLIP's training data (embedded/train_clip.py)."""

_SEEDS = {"test": 301, "train": 302}
_SEED_STEP = 1000
"""Between the streams of one `Options.seed` and the next."""

_N_KEPT = 6000
"""Drawn pictures that are kept, 19 kB each: those of one task, since every method looks at all of them."""


@dataclass(frozen=True)
class Drawn:
    """A picture of the embedded world."""

    scene: Scene

    def digest(self) -> str:
        """Return a digest of all that decides what is drawn: scene, fonts, emoji, code and the libraries that draw."""
        return hashlib.sha256(f"{world_sha256()}\0{self.scene!r}".encode()).hexdigest()

    def load(self, _limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture, 80 x 80 pixels."""
        return Image.fromarray(_pixels(self.scene))


@lru_cache(maxsize=_N_KEPT)
def _pixels(scene: Scene) -> np.ndarray:
    return np.asarray(scenes.render(scene))


def _seed(split: str, options: Options) -> int:
    return _SEEDS[split] + _SEED_STEP * options.seed


def _facts(options: Options, **more: Any) -> dict[str, Any]:
    seeds = {split: _seed(split, options) for split in _SEEDS}
    return {"world_sha256": world_sha256(), "seeds": seeds, "n_train": N_TRAIN, **more}


def typographic(_folder: Path, options: Options) -> Task:
    """Return the task with written words; `attacked` tells plates, strips and bare words apart."""
    names = tuple(scenes.OBJECTS)
    facts = _facts(options, class_rule="the objects of the embedded world, which are also the words")

    def datasets(split: str, n: int, fonts: tuple[str, ...]) -> dict[str, Dataset]:
        examples: dict[str, list[Example]] = {"clean": [], "neutral": [], "attacked": []}
        for index, case in enumerate(draws.typographic(n, _seed(split, options), fonts)):
            assert case.scene.writing is not None  # it is an attack
            key, label, word = f"{split}-{index:04}", names.index(case.label), names.index(case.word)
            examples["clean"].append(Example(key, Drawn(case.scene.clean()), label))
            examples["neutral"].append(Example(key, Drawn(case.scene.neutral()), label))
            examples["attacked"].append(Example(key, Drawn(case.scene), label, word, kind=case.scene.writing.style))
        return {
            variant: Dataset("mini-typographic", variant, tuple(drawn), names, facts=facts)
            for variant, drawn in examples.items()
        }

    tests = datasets("test", N_TEST, scenes.TEST_FONTS)
    train = datasets("train", N_TRAIN, scenes.TRAIN_FONTS)
    title = "Mini-typographic: drawn objects with words on them"
    return Task("mini-typographic", title, tuple(tests.values()), train["attacked"], train_clean=train["clean"])


def waterbirds(_folder: Path, options: Options) -> Task:
    """Return the task with birds on land and water."""
    return _grouped(
        "mini-waterbirds",
        "Mini-Waterbirds: drawn birds on land and water",
        draws.waterbirds,
        ("landbird", "waterbird"),
        "a photo of a {}.",
        ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water"),
        (CORRELATION, 1 - CORRELATION, 1 - CORRELATION, CORRELATION),
        options,
    )


def celeba(_folder: Path, options: Options) -> Task:
    """Return the task with women and men with dark and blond hair."""
    return _grouped(
        "mini-celeba",
        "Mini-CelebA: drawn faces",
        draws.celeba,
        ("dark hair", "blond hair"),
        "a photo of a person with {}.",
        ("dark-haired woman", "dark-haired man", "blond woman", "blond man"),
        (1 - CORRELATION, CORRELATION, CORRELATION, 1 - CORRELATION),
        options,
    )


def _grouped(
    name: str,
    title: str,
    draw: Callable[[int, int], Iterator[Grouped]],
    class_names: tuple[str, ...],
    template: str,
    group_names: tuple[str, ...],
    shares: tuple[float, ...],
    options: Options,
) -> Task:
    """Return a task with groups; `shares` are those of each group within its class, in the CLIP's training data."""
    facts = _facts(options, class_rule="as the embedded CLIP was trained", correlation=CORRELATION)

    def dataset(split: str, n: int) -> Dataset:
        examples = tuple(
            Example(f"{split}-{index:04}", Drawn(case.scene), case.y, attribute=case.a)
            for index, case in enumerate(draw(n, _seed(split, options)))
        )
        return Dataset(
            name,
            split,
            examples,
            class_names,
            (template,),
            group_names=group_names,
            train_counts=tuple(round(N_TRAIN * share / 2) for share in shares),
            facts=facts,
        )

    return Task(name, title, (dataset("test", N_TEST),), dataset("train", N_TRAIN))
