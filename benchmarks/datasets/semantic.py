"""Pictures composed of what a latent confuses with another class: an attack that writes nothing (arXiv:2406.04341).

A picture of one class is shown with a second thing beside it. The second thing is one that a latent confuses with a
third class, at which the attack aims and which is not in the picture (`defense.explain.confusions`). The attack
succeeds where the third class is the answer.

| variant | beside the picture's own thing |
|---|---|
| clean | nothing |
| random | a thing of any other class, in the same place; aimed at the same class |
| attacked | the thing that the latent confuses with the class aimed at |

`mini-semantic` draws both things in one scene, from what latents of the embedded model confuse; `semantic` puts two
photographs side by side:

| on disk | |
|---|---|
| a folder per class, or shards | see `folders` |
| `confusions.json` | what `python -m defense.benchmarks.confusions` wrote, best on other pictures |
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defense.benchmarks.datasets import mini
from defense.benchmarks.datasets.base import Dataset, Example, Options, Picture, Task
from defense.benchmarks.datasets.files import read_text
from defense.benchmarks.datasets.folders import read_classified
from defense.benchmarks.datasets.synthetic import SIZE, cropped
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.errors import ConfigError
from defense.world import scenes
from defense.world.composed import render_beside, sample_beside
from defense.world.files import world_sha256
from defense.world.scenes import Scene, Subject

RECIPE = "beside-1"
FILE = "confusions.json"
DRAWN = Path(__file__).with_name("semantic.json")
"""What latents of the embedded model confuse."""
VARIANTS = ("clean", "random", "attacked")

_SEED, _SEED_STEP = 303, 1000
_FIELDS = {"latent": int, "shown": str, "aimed": str, "push": float}


@dataclass(frozen=True)
class Case:
    """What one picture of the attack is made of, as indices of classes.

    Attributes:
        label: What the picture is of.
        shown: The thing beside it.
        other: The thing that stands there in its place, drawn at random.
        aimed: The class that the attack aims at.
    """

    label: int
    shown: int
    other: int
    aimed: int


def cases(
    found: Sequence[tuple[int, int]], labels: Sequence[int], n_classes: int, seeds: Sequence[Sequence[int]]
) -> list[Case]:
    """Return what each picture is made of.

    Args:
        found: Pairs of (shown, aimed).
        labels: The picture's class, for each; it is never the one that is shown or aimed at.
        n_classes: From which `other` is drawn, none of the three.
        seeds: Of each picture; nothing else decides what it gets.

    Raises:
        ConfigError: All of `found` are of one picture's own class.
    """
    made = []
    for label, seed in zip(labels, seeds, strict=True):
        rng = np.random.default_rng([*seed])
        fitting = [pair for pair in found if label not in pair]
        if not fitting:
            raise ConfigError(f"every confusion is of class {label} itself; find more, on pictures of more classes")
        shown, aimed = fitting[int(rng.integers(len(fitting)))]
        rest = [each for each in range(n_classes) if each not in (label, shown, aimed)]
        made.append(Case(label, shown, int(rng.choice(rest)), aimed))
    return made


def read_confusions(path: Path, class_names: Sequence[str]) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """Return (shown, aimed) as indices of classes, and what a result should record of the file.

    Raises:
        ConfigError: It is not there, is no such file, or names a class that there is not; or there are fewer than four
            classes.
    """
    if len(class_names) < 4:
        raise ConfigError(f"{len(class_names)} classes; it takes four: a picture's own, two confused, one at random")
    number = {name: place for place, name in enumerate(class_names)}
    text = read_text(path)
    try:
        stored = json.loads(text)
        rows = [{name: kind(row[name]) for name, kind in _FIELDS.items()} for row in stored["confusions"]]
        facts = {name: str(stored[name]) for name in ("hook_point", "host", "sae")}
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no file of confusions ({error!r}); write one: python -m defense.benchmarks.confusions --help"
        ) from error
    if unknown := sorted({row[side] for row in rows for side in ("shown", "aimed")} - number.keys()):
        raise ConfigError(f"{path} names {unknown[0]!r}, which is none of the {len(class_names)} classes here")
    if not rows:
        raise ConfigError(f"{path} holds no confusions")
    facts |= {"confusions_sha256": hashlib.sha256(text.encode()).hexdigest(), "recipe": RECIPE}
    return [(number[row["shown"]], number[row["aimed"]]) for row in rows], facts


def _datasets(
    name: str,
    cases: Sequence[Case],
    keys: Sequence[str],
    picture: Callable[[int, int | None], Picture],
    class_names: tuple[str, ...],
    **fields: Any,
) -> tuple[Dataset, ...]:
    """Return the three variants; `picture` makes one from a place in `cases` and the class that stands beside it."""
    beside: Mapping[str, Callable[[Case], int | None]] = {
        "clean": lambda _: None,
        "random": lambda case: case.other,
        "attacked": lambda case: case.shown,
    }
    return tuple(
        Dataset(
            name,
            variant,
            tuple(
                Example(key, picture(place, beside[variant](case)), case.label, _aimed(case, variant))
                for place, (key, case) in enumerate(zip(keys, cases, strict=True))
            ),
            class_names,
            **fields,
        )
        for variant in VARIANTS
    )


def _aimed(case: Case, variant: str) -> int | None:
    return None if variant == "clean" else case.aimed


# --- drawn ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DrawnBeside:
    """A drawn scene with a second thing in it."""

    scene: Scene
    beside: Subject

    def digest(self) -> str:
        """Return a digest of all that decides what is drawn."""
        return hashlib.sha256(f"{world_sha256()}\0{RECIPE}\0{self.scene!r}\0{self.beside!r}".encode()).hexdigest()

    def load(self, _limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture, 80 x 80 pixels."""
        return render_beside(self.scene, self.beside)


def drawn(_folder: Path, options: Options) -> Task:
    """Return the task of drawn objects; the same scenes in all variants."""
    names = tuple(scenes.OBJECTS)
    found, facts = read_confusions(DRAWN, names)
    seed = _SEED + _SEED_STEP * options.seed
    keys = [f"test-{place:04}" for place in range(mini.N_TEST)]
    labels = [int(np.random.default_rng([seed, place, 0]).integers(len(names))) for place in range(mini.N_TEST)]
    made = cases(found, labels, len(names), [(seed, place, 1) for place in range(mini.N_TEST)])

    def picture(place: int, beside: int | None) -> Picture:
        case = made[place]
        rng = np.random.default_rng([seed, place, 2])
        scene, subject = sample_beside(rng, names[case.label], names[case.shown])
        if beside is None:
            return mini.Drawn(scene)
        return DrawnBeside(scene, replace(subject, emoji=scenes.OBJECTS[names[beside]]))

    facts |= {
        "world_sha256": world_sha256(),
        "seeds": {"test": seed},
        "class_rule": "the objects of the embedded world",
    }
    title = "Semantic attack, drawn: a thing beside the object that a latent confuses with a third"
    return Task("mini-semantic", title, _datasets("mini-semantic", made, keys, picture, names, facts=facts))


# --- photographs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SideBySide:
    """Two pictures, each the middle of its central square, side by side; or one, with nothing beside it.

    Attributes:
        left: The one.
        right: The other; None leaves its side gray.
    """

    left: Picture
    right: Picture | None

    def digest(self) -> str:
        """Return a digest of both."""
        right = None if self.right is None else self.right.digest()
        return hashlib.sha256(repr((self.left.digest(), right, RECIPE)).encode()).hexdigest()

    def load(self, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture, 224 x 224 pixels."""
        joined = Image.new("RGB", (SIZE, SIZE), (128, 128, 128))
        for place, each in enumerate((self.left, self.right)):
            if each is not None:
                joined.paste(
                    cropped(each.load(limits)).crop((SIZE // 4, 0, 3 * SIZE // 4, SIZE)), (place * SIZE // 2, 0)
                )
        return joined


def read(folder: Path, options: Options) -> Task:
    """Make the data set from classified pictures and a file of confusions.

    Args:
        folder: Where they are.
        options: The seed decides what stands beside each picture.

    Raises:
        ConfigError: See `read_confusions`, `cases` and `folders.read_classified`; or a class has no picture.
    """
    classified = read_classified(folder)
    names = classified.class_names
    found, facts = read_confusions(folder / FILE, names)
    of_class: list[list[Picture]] = [[] for _ in names]
    for _, each, label in classified.pictures:
        of_class[label].append(each)
    if empty := [name for name, pictures in zip(names, of_class, strict=True) if not pictures]:
        raise ConfigError(f"{folder}: the class {empty[0]!r} has no picture")
    keys, _, labels = zip(*classified.pictures, strict=True)
    seeds = [(options.seed, *hashlib.sha256(key.encode()).digest()) for key in keys]
    made = cases(found, labels, len(names), seeds)

    def picture(place: int, beside: int | None) -> Picture:
        base = classified.pictures[place][1]
        if beside is None:
            return SideBySide(base, None)
        others = of_class[beside]
        return SideBySide(base, others[int(np.random.default_rng([*seeds[place], 1]).integers(len(others)))])

    facts |= {"seed": options.seed, "class_rule": "classes of the folder"}
    tests = _datasets("semantic", made, keys, picture, names, templates=classified.templates, facts=facts)
    return Task("semantic", f"Semantic attack on {folder.resolve().name}: two pictures side by side", tests)
