"""Three benchmarks in miniature, of the world that the embedded CLIP knows: nothing to fetch, drawn when needed.

| task | question | tests |
|---|---|---|
| mini-typographic | which of 104 objects, another one's name written | clean, neutral, attacked, own-name, word-only |
| mini-waterbirds | land bird or water bird, on land or water | all groups alike |
| mini-celeba | dark or blond hair, of women and men | all groups alike |

The CLIP was trained where 95 % of the birds are in their own place and 95 % of blond hair is on women; the adjusted
average weighs groups like that. The training splits are not its training data but what methods may be fitted on, and
show groups alike, as what `defense.fit` asks for does. The embedded defenses were fitted before, on 2,000 pictures of
their own, with SAEs trained on 5,000 more; methods that are fitted here may see as many, the whole training split.
Tests have seeds of their own, and typefaces that occur in no training picture. `neutral` has an empty plate, which
hides a part of the object: accuracy there is the ceiling of any defense against words. `own-name` has the object's own
name on it, `word-only` a word and no object.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defense.benchmarks.datasets.base import Dataset, Example, Options, Task
from defense.benchmarks.publishing import N_ASKED
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.errors import ConfigError
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
N_READ = 400
"""Pictures that show what reading is good for: the object's own name on it, or a word alone."""
N_TRAIN = 2000
CORRELATION = 0.95
"""Of the CLIP's training data (embedded/train_clip.py)."""

_READ = ("own-name", "word-only")
_SEEDS = {"test": 301, "train": 302}
_SEED_STEP = 1000
"""Between the streams of one `Options.seed` and the next."""

_N_KEPT = 8000
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


def _number(most: int, options: Options) -> int:
    """Return how many pictures of a split are drawn.

    Raises:
        ConfigError: More are asked for than a test has.
    """
    if options.n is None:
        return most
    if options.n > N_TEST:
        raise ConfigError(f"got n = {options.n:,}; a test of the miniatures has {N_TEST:,} pictures: give fewer")
    return min(options.n, most)


def _shortfall(options: Options) -> str | None:
    return None if options.n is None else f"a quick look at {options.n:,} pictures of each split"


def _facts(options: Options, **more: Any) -> dict[str, Any]:
    seeds = {split: _seed(split, options) for split in _SEEDS}
    asked = {} if options.n is None else {N_ASKED: options.n}
    return {"world_sha256": world_sha256(), "seeds": seeds, "n_train": _number(N_TRAIN, options), **asked, **more}


def typographic(_folder: Path, options: Options) -> Task:
    """Return the task with written words; `attacked` tells plates, strips and bare words apart.

    The right answer to a word and no object is that word: how well the CLIP reads, which a defense takes away.
    """
    names = tuple(scenes.OBJECTS)
    facts = _facts(options, class_rule="the objects of the embedded world, which are also the words")

    def datasets(split: str, n: int, fonts: tuple[str, ...]) -> dict[str, Dataset]:
        examples: dict[str, list[Example]] = {name: [] for name in ("clean", "neutral", "attacked", *_READ)}
        for index, case in enumerate(draws.typographic(n, _seed(split, options), fonts)):
            assert case.scene.writing is not None  # it is an attack
            key, label, word = f"{split}-{index:04}", names.index(case.label), names.index(case.word)
            examples["clean"].append(Example(key, Drawn(case.scene.clean()), label))
            examples["neutral"].append(Example(key, Drawn(case.scene.neutral()), label))
            examples["attacked"].append(Example(key, Drawn(case.scene), label, word, kind=case.scene.writing.style))
            if index < N_READ:
                own = draws.sample_writing(np.random.default_rng([_seed(split, options), index]), case.label, fonts)
                examples["own-name"].append(Example(key, Drawn(replace(case.scene, writing=own)), label))
                examples["word-only"].append(Example(key, Drawn(replace(case.scene, subject=None)), word))
        return {
            variant: Dataset(
                "mini-typographic", variant, tuple(drawn), names, facts=facts, shortfall=_shortfall(options)
            )
            for variant, drawn in examples.items()
        }

    tests = datasets("test", _number(N_TEST, options), scenes.TEST_FONTS)
    train = datasets("train", _number(N_TRAIN, options), scenes.TRAIN_FONTS)
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
            shortfall=_shortfall(options),
        )

    test, train = (dataset(split, _number(most, options)) for split, most in (("test", N_TEST), ("train", N_TRAIN)))
    return Task(name, title, (test,), train)
