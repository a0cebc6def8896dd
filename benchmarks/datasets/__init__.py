"""The data sets: which there are, and how each is read.

A new one is a module with a function (folder, options) -> `Task`, and a line in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from defense.benchmarks.datasets import (
    celeba,
    disentangling,
    mini,
    named,
    photo,
    real_names,
    scam,
    semantic,
    synthetic,
    waterbirds,
)
from defense.benchmarks.datasets.base import Dataset, Example, File, Options, Picture, Task
from defense.data.images import DEFAULT_LIMITS
from defense.errors import ConfigError

__all__ = [
    "PHOTO_SUITE",
    "READERS",
    "SUITES",
    "Dataset",
    "Example",
    "File",
    "Options",
    "Picture",
    "Reader",
    "Task",
    "read_tasks",
]


class Reader(NamedTuple):
    """How a data set is read.

    Attributes:
        folder: Name of its folder; None for one that is drawn and needs none.
        read: From that folder to the task.
    """

    folder: str | None
    read: Callable[[Path, Options], Task]


def _known(read: Callable[[Path, Options], Task], folder: Path, options: Options) -> Task:
    return real_names.known_only(read(folder, options))


READERS: Mapping[str, Reader] = {
    "rta100": Reader("rta100", partial(named.read, published=named.RTA100)),
    "paint": Reader("paint", partial(named.read, published=named.PAINT)),
    "disentangling": Reader("disentangling", disentangling.read),
    "scam": Reader("scam", scam.read),
    "synthetic": Reader("synthetic", synthetic.read),
    "semantic": Reader("semantic", semantic.read),
    "waterbirds": Reader("waterbirds", waterbirds.read),
    "celeba-blond": Reader("celeba", partial(celeba.read, direction=celeba.BLOND)),
    "celeba-male": Reader("celeba", partial(celeba.read, direction=celeba.MALE)),
    "photo-100": Reader("photos100", photo.read),
    "photo-1000": Reader("photos100", photo.read_thousand),
    "rta100-known": Reader("rta100", partial(_known, partial(named.read, published=named.RTA100))),
    "paint-known": Reader("paint", partial(_known, partial(named.read, published=named.PAINT))),
    "scam-known": Reader("scam", partial(_known, scam.read)),
    "mini-typographic": Reader(None, mini.typographic),
    "mini-waterbirds": Reader(None, mini.waterbirds),
    "mini-celeba": Reader(None, mini.celeba),
    "mini-semantic": Reader(None, semantic.drawn),
}
"""Name of a data set -> its reader."""

SUITES: Mapping[str, tuple[str, ...]] = {
    "mini": ("mini-typographic", "mini-waterbirds", "mini-celeba"),
    "typographic": ("rta100", "paint", "disentangling", "scam", "synthetic", "mini-typographic"),
    "waterbirds": ("waterbirds", "mini-waterbirds"),
    "celeba": ("celeba-blond", "celeba-male", "mini-celeba"),
    "semantic": ("semantic", "mini-semantic"),
    "photo": ("photo-100", "photo-1000", "rta100-known", "paint-known", "scam-known"),
    "all": tuple(READERS),
}
"""Name of several -> their names. Those that are drawn count where no other is there, or on request."""

PHOTO_SUITE = SUITES["photo"]
"""What the CLIP for photographs is measured on, where no other is named."""

DATA = Path("data")
"""Where data sets are looked for unless a folder is given."""


def read_tasks(
    suite: str, data: Path | None, options: Options, *, with_drawn: bool = False
) -> tuple[list[Task], list[str]]:
    """Read the data sets of a suite: those below a folder; those that are drawn where none of them is there.

    Args:
        suite: Of `SUITES` or `READERS`.
        data: The folder that holds the data sets' folders (`Reader.folder`), by default `DATA`; for one data set also
            its own folder.
        options: For the readers.
        with_drawn: Read those that are drawn beside real ones, too.

    Returns:
        The tasks, and the names of the data sets of the suite that are left out: not there, or drawn.

    Raises:
        ConfigError: There is no such suite, none of its data sets is there, or one that is there cannot be used.
    """
    if data is not None and not data.is_dir():
        raise ConfigError(f"there is no folder {data}; --data takes the one that holds the data sets' folders")
    root = data or DATA
    if suite in READERS and (suite not in SUITES or data is not None):
        others = [name for name in SUITES.get(suite, ()) if name != suite]
        read = (suite, *others) if with_drawn else (suite,)
        return [_read(name, root, options) for name in read], [name for name in others if name not in read]
    if suite not in SUITES:
        raise ConfigError(f"there is no data set {suite!r}; there are {', '.join(dict.fromkeys([*SUITES, *READERS]))}")
    is_there = {name: _is_there(READERS[name], root) for name in SUITES[suite]}
    fetched = [name for name in is_there if READERS[name].folder is not None]
    if data is not None and fetched and not any(is_there[name] for name in fetched):
        raise ConfigError(
            f"{data} holds none of {', '.join(fetched)}, each in a folder of its name; nothing is downloaded: "
            "ask for one of them by name to see where to get it"
        )
    if not with_drawn and any(is_there[name] for name in fetched):
        is_there |= {name: False for name in is_there if READERS[name].folder is None}
    tasks = [_read(name, root, options) for name, here in is_there.items() if here]
    return tasks, [name for name, here in is_there.items() if not here]


def _is_there(reader: Reader, root: Path) -> bool:
    return reader.folder is None or (root / reader.folder).exists()


def _read(name: str, root: Path, options: Options) -> Task:
    """Read a data set from its folder below `root`, or from `root` itself."""
    reader = READERS[name]
    below = root / (reader.folder or "")
    task = reader.read(below if below.exists() else root, options)
    return task if options.limits == DEFAULT_LIMITS else task.limited(options.limits)
