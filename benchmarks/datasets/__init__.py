"""The data sets: which there are, and how each is read.

A new one is a module with a function (folder, options) -> `Task`, and a line in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

from defense.benchmarks.datasets import celeba, disentangling, named, scam, synthetic, waterbirds
from defense.benchmarks.datasets.base import Dataset, Example, File, Options, Picture, Task
from defense.errors import ConfigError

__all__ = ["READERS", "SUITES", "Dataset", "Example", "File", "Options", "Picture", "Reader", "Task", "read_tasks"]


class Reader(NamedTuple):
    """How a data set is read.

    Attributes:
        folder: Name of its folder; None for one that is drawn and needs none.
        read: From that folder to the task.
    """

    folder: str | None
    read: Callable[[Path, Options], Task]


READERS: Mapping[str, Reader] = {
    "rta100": Reader("rta100", partial(named.read, published=named.RTA100)),
    "paint": Reader("paint", partial(named.read, published=named.PAINT)),
    "disentangling": Reader("disentangling", disentangling.read),
    "scam": Reader("scam", scam.read),
    "synthetic": Reader("synthetic", synthetic.read),
    "waterbirds": Reader("waterbirds", waterbirds.read),
    "celeba-blond": Reader("celeba", partial(celeba.read, direction=celeba.BLOND)),
    "celeba-male": Reader("celeba", partial(celeba.read, direction=celeba.MALE)),
}
"""Name of a data set -> its reader."""

SUITES: Mapping[str, tuple[str, ...]] = {
    "typographic": ("rta100", "paint", "disentangling", "scam", "synthetic"),
    "celeba": ("celeba-blond", "celeba-male"),
    "all": tuple(READERS),
}
"""Name of several -> their names."""


def read_tasks(suite: str, data: Path, options: Options) -> tuple[list[Task], list[str]]:
    """Read the data sets of a suite that are below a folder.

    Args:
        suite: Of `SUITES` or `READERS`.
        data: The folder that holds the data sets' folders (`Reader.folder`); for one data set also its own folder.
        options: For the readers.

    Returns:
        The tasks, and the names of the data sets that are not there.

    Raises:
        ConfigError: There is no such suite, none of its data sets is there, or one that is there cannot be used.
    """
    if suite in READERS:
        folder = data / (READERS[suite].folder or "")
        return [READERS[suite].read(folder if folder.is_dir() else data, options)], []
    if suite not in SUITES:
        raise ConfigError(f"there is no data set {suite!r}; there are {', '.join([*SUITES, *READERS])}")
    tasks, missing = [], []
    for name in SUITES[suite]:
        reader = READERS[name]
        if reader.folder is None or (data / reader.folder).exists():
            tasks.append(reader.read(data / (reader.folder or ""), options))
        else:
            missing.append(name)
    if not tasks:
        raise ConfigError(
            f"{data} holds none of {', '.join(missing)}, each in a folder of its name; nothing is downloaded: "
            "ask for one of them by name to see where to get it"
        )
    return tasks, missing
