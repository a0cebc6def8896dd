"""What a data set is to the benchmarks: pictures with their right answers, the names to choose from, the prompts.

A reader (one module per data set) makes a `Task`; `robust.py` runs methods over its data sets. Nothing here imports
torch, and nothing is decoded before it is measured.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from defense.data.images import DEFAULT_LIMITS, Limits, decode
from defense.data.labels import TEMPLATES
from defense.errors import ConfigError, InvalidImageError

Choice = Literal["all", "pair"]


class Picture(Protocol):
    """Where the pixels of an example come from."""

    def digest(self) -> str:
        """Return a hex digest that changes with whatever decides the pixels."""
        ...

    def load(self, limits: Limits = DEFAULT_LIMITS, /) -> Image.Image:
        """Return the picture, mode RGB, as stored: EXIF does not turn it (published figures are made that way).

        Args:
            limits: What is accepted at most.

        Raises:
            InvalidImageError: It cannot be read.
        """
        ...


@dataclass(frozen=True)
class File:
    """A picture in a file of its own."""

    path: Path

    def digest(self) -> str:
        """Return the sha256 of the file's bytes."""
        if not self.path.is_file():  # asked before opening: opening a pipe would wait for a writer
            raise InvalidImageError("not_found", f"{self.path}: no such file")
        try:
            with self.path.open("rb") as stream:
                return hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise InvalidImageError("not_found", f"{self.path} cannot be read: {error}") from error

    def load(self, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture."""
        return decode(self.path, limits=limits, rotate=False).image


@dataclass(frozen=True)
class Example:
    """One picture and its right answer.

    Attributes:
        key: Its name, unique in the data set; the same for twins in other variants.
        picture: Its pixels.
        label: Index of the right answer in `Dataset.class_names`.
        word: Index of the wrong answer that it is made for: the name that is written on it, or what a composed picture
            aims at; None where there is none.
        attribute: The spurious attribute, 0 or 1; None where there is none.
        kind: What kind of picture it is, e.g. how the word is written; a result gives the accuracy of each kind.
        limits: What is accepted of the picture at most.
    """

    key: str
    picture: Picture
    label: int
    word: int | None = None
    attribute: int | None = None
    kind: str | None = None
    limits: Limits = DEFAULT_LIMITS

    def load(self) -> Image.Image:
        """Return the picture; see `Picture.load`."""
        return self.picture.load(self.limits)

    @property
    def group(self) -> int | None:
        """Number of the group, 2 * label + attribute as in group_DRO's code; None without an attribute."""
        return None if self.attribute is None else 2 * self.label + self.attribute


@dataclass(frozen=True)
class Dataset:
    """The pictures of one variant, what is chosen from, and the prompts.

    Attributes:
        name: Which data set, e.g. "rta100".
        variant: Which of its versions, e.g. "clean" or "attacked".
        examples: The pictures.
        class_names: What is chosen from.
        templates: What the names are put into, each with one literal {}.
        choice: "all" names, or the "pair" of label and word of each picture.
        normalize_each: See `labels.average_templates`.
        group_names: Names of the groups 0 to 3; empty where there are none.
        train_counts: Pictures per group in the training data, the weights of the adjusted average; may be empty.
        shortfall: How the data differ from the published ones; None where they do not.
        facts: What else a result should record, as JSON values.

    Raises:
        ConfigError: No pictures, a key or name that repeats, an index out of range, a word that equals the label, or
            an empty group.
    """

    name: str
    variant: str
    examples: tuple[Example, ...]
    class_names: tuple[str, ...]
    templates: tuple[str, ...] = TEMPLATES["simple"]
    choice: Choice = "all"
    normalize_each: bool = True
    group_names: tuple[str, ...] = ()
    train_counts: tuple[int, ...] = ()
    shortfall: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.examples:
            raise ConfigError(f"{self.full_name} holds no pictures")
        for what, names in (("picture", [each.key for each in self.examples]), ("class name", self.class_names)):
            repeated = [name for name, count in Counter(names).items() if count > 1]
            if repeated:
                raise ConfigError(f"{self.full_name}: the {what} {repeated[0]!r} is there twice")
        n_classes = len(self.class_names)
        for each in self.examples:
            if not (0 <= each.label < n_classes and 0 <= (each.word or 0) < n_classes):
                raise ConfigError(f"{self.full_name}: {each.key} names a class outside of 0 to {n_classes - 1}")
            if each.word == each.label:
                raise ConfigError(
                    f"{self.full_name}: {each.key} has {self.class_names[each.label]!r} written on itself"
                )
            if self.choice == "pair" and each.word is None:
                raise ConfigError(f"{self.full_name}: {each.key} has no word to choose from beside its label")
            if (each.attribute is None) != (not self.group_names):
                raise ConfigError(f"{self.full_name}: {each.key} has attribute {each.attribute}; all or none have one")
        counts = self.group_counts()
        for name, count in zip(self.group_names, counts, strict=True):
            if not count:
                raise ConfigError(f"{self.full_name}: the group {name!r} is empty, so there is no worst group")

    @property
    def full_name(self) -> str:
        """Name and variant."""
        return f"{self.name}-{self.variant}"

    @property
    def is_attacked(self) -> bool:
        """Whether the pictures are made for a wrong answer, as by a name that is written on them."""
        return any(each.word is not None for each in self.examples) and self.variant != "clean"

    def group_counts(self) -> tuple[int, ...]:
        """Return the number of pictures in each group; empty without groups."""
        counts = Counter(each.group for each in self.examples)
        return tuple(counts[group] for group in range(len(self.group_names)))


@dataclass(frozen=True)
class Task:
    """Data sets that belong together: what methods may be fitted on, and what they are measured on.

    Attributes:
        name: E.g. "waterbirds".
        title: The same for a caption.
        tests: Data sets to measure on; a variant "clean" is what clean change is measured on.
        train: The training split; None where the data set has none.
        val: The validation split; None where the data set has none.
        train_clean: Of a task with written words, the twins of `train` without the writing, in its order.
    """

    name: str
    title: str
    tests: tuple[Dataset, ...]
    train: Dataset | None = None
    val: Dataset | None = None
    train_clean: Dataset | None = None

    def limited(self, limits: Limits) -> Task:
        """Return the same with other limits for its pictures."""

        def each(dataset: Dataset) -> Dataset:
            return replace(dataset, examples=tuple(replace(example, limits=limits) for example in dataset.examples))

        train, val, train_clean = (each(other) if other else None for other in (self.train, self.val, self.train_clean))
        return replace(
            self, tests=tuple(each(test) for test in self.tests), train=train, val=val, train_clean=train_clean
        )


@dataclass(frozen=True)
class Options:
    """What every reader is given beside the folder.

    Attributes:
        allow_partial: Read data that differ from the published ones, and say so in every result.
        font: Font file of drawn words; None for the fonts that ship with the package.
        seed: Of whatever is drawn.
        limits: What is accepted of each picture at most.
        n: Pictures of each split of the miniatures, for a quick look; None for all.
    """

    allow_partial: bool = False
    font: Path | None = None
    seed: int = 0
    limits: Limits = DEFAULT_LIMITS
    n: int | None = None


def shortfall_of(title: str, problems: Sequence[str], options: Options) -> str | None:
    """Return how a data set differs from the published one, as one sentence; None where it does not.

    Args:
        title: Of the published one.
        problems: How it differs, one entry each.
        options: Whether a difference is allowed.

    Raises:
        ConfigError: It differs, and partial data are not allowed.
    """
    if not problems:
        return None
    sentence = "; ".join(problems)
    if not options.allow_partial:
        raise ConfigError(
            f"this is not the published {title}: {sentence}. Fetch all of it, or pass --allow-partial (allow_partial="
            "True) to measure what is there; every result then says so"
        )
    return sentence
