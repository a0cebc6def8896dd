"""Photographs with a wrong word on them, named `label=<object>_text=<word>.<ext>`: RTA-100 and PAINT.

Classes are the union of objects and words, sorted, as in the reference loaders (which leave the order to chance):
a word that could not be answered could not fool a model. Names are taken as they are spelled, wrong ones and
capitals included. The word ends at the last dot; the reference loader of PAINT cuts four characters instead, which
turns `TV.jpeg` into a class `TV.` and makes 162 classes of 159.

Source: RTA-100 is Azuma & Matsui 2023, arXiv:2304.04512; PAINT is Ilharco et al. 2022, arXiv:2208.05592.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from defense.benchmarks.datasets.base import Dataset, Example, File, Options, Task, shortfall_of
from defense.benchmarks.datasets.files import require_folder
from defense.data.listing import files_below, kind_of
from defense.errors import ConfigError

_NAME = re.compile(r"label=(.+?)_text=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Published:
    """What a published set holds, and where to get it.

    Attributes:
        name: Of the task.
        title: For captions.
        n_pictures: Pictures in it.
        n_classes: Objects and words in it.
        source: Where it is.
    """

    name: str
    title: str
    n_pictures: int
    n_classes: int
    source: str


RTA100 = Published(
    "rta100", "RTA-100", 1000, 100, "github.com/azuma164/Defense-Prefix (rta100.zip, which unpacks to ours/data)"
)
PAINT = Published("paint", "PAINT", 110, 159, "github.com/mlfoundations/patching (typographic_attack_data.zip)")


def read(folder: Path, options: Options, published: Published) -> Task:
    """Read one of the two.

    Args:
        folder: The one with the pictures, or one above it.
        options: Whether fewer pictures will do.
        published: What should be there.

    Raises:
        ConfigError: It is not there, other files lie between the pictures, or it is not the published set.
    """
    require_folder(folder, published.title, published.source)
    named = {path: parse(path) for path in _files_beside_pictures(folder, published)}
    problems = []
    if len(named) != published.n_pictures:
        problems.append(f"{len(named):,} of {published.n_pictures:,} pictures")
    class_names = tuple(sorted({name for pair in named.values() for name in pair}))
    if len(class_names) != published.n_classes:
        problems.append(f"{len(class_names)} of {published.n_classes} classes")
    stripped = Counter(name.strip() for name in class_names)
    if twice := [name for name, count in stripped.items() if count > 1]:
        raise ConfigError(f"{folder}: the class {twice[0]!r} is there with and without spaces around it")
    examples = tuple(
        Example(path.name, File(path), class_names.index(label), class_names.index(word))
        for path, (label, word) in named.items()
    )
    dataset = Dataset(
        published.name,
        "attacked",
        examples,
        class_names,
        shortfall=shortfall_of(published.title, problems, options),
        facts={"class_rule": "union of labels and words, sorted"},
    )
    return Task(published.name, published.title, (dataset,))


def _files_beside_pictures(folder: Path, published: Published) -> list[Path]:
    """Return the files of the one folder that holds pictures with such names, sorted by name."""
    files = files_below(folder)
    homes = {path.parent for path in files if path.name.startswith("label=")}
    if len(homes) != 1:
        found = f"{len(homes)} folders with" if homes else "no"
        raise ConfigError(
            f"{folder} has {found} pictures named label=<object>_text=<word>; want one such folder. {published.title} "
            f"is at {published.source}"
        )
    (home,) = homes
    return [path for path in files if path.parent == home]


def parse(path: Path) -> tuple[str, str]:
    """Return the object and the word of a file name.

    Raises:
        ConfigError: The name is not of this form.
    """
    match = _NAME.fullmatch(path.stem)
    if match is None or kind_of(path) != "pictures":
        raise ConfigError(
            f"{path} is not named label=<object>_text=<word> with the suffix of a picture; remove it from there"
        )
    return match[1], match[2]
