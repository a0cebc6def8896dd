"""Waterbirds: birds cut out of CUB-200 on backgrounds of Places, where land birds are mostly on land.

`metadata.csv` has a row per picture: img_filename, y (1 for a waterbird), split (0 train, 1 val, 2 test), place (1 for
water) and others, read by name; `place_filename` is where a background came from, and never opened. Copies with other
rows circulate: what does not have exactly the published test counts is not called Waterbirds.

Source: Sagawa et al. 2020, arXiv:1911.08731; group ids 2 y + place as in github.com/kohpangwei/group_DRO.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from defense.benchmarks.datasets.base import Dataset, Example, File, Options, Task, shortfall_of
from defense.benchmarks.datasets.files import inside, number, read_rows, require_folder
from defense.errors import ConfigError

TITLE = "Waterbirds"
SOURCE = "nlp.stanford.edu/data/dro/waterbird_complete95_forest2water2.tar.gz"
GROUPS = ("landbird on land", "landbird on water", "waterbird on land", "waterbird on water")
TRAIN_COUNTS = (3498, 184, 56, 1057)
TEST_COUNTS = (2255, 2255, 642, 642)
CLASS_NAMES = ("landbird", "waterbird")
TEMPLATE = "This is a picture of a {}."
"""Of Chuang et al. 2023, arXiv:2302.00070, like the class names."""

_SPLITS = ("train", "val", "test")
_FOLDER = "waterbird_complete95_forest2water2"


@dataclass(frozen=True)
class Row:
    """A row of `metadata.csv`.

    Attributes:
        name: Path of the picture, relative to the folder.
        y: 1 for a waterbird.
        split: "train", "val" or "test".
        place: 1 for water.
    """

    name: str
    y: int
    split: str
    place: int


def read(folder: Path, options: Options) -> Task:
    """Read the data set.

    Args:
        folder: The one with `metadata.csv`, or the one above it.
        options: Whether other pictures will do.

    Raises:
        ConfigError: It is not there, its table cannot be used, a split or group is empty, or it is not the benchmark.
    """
    require_folder(folder, TITLE, SOURCE)
    if (folder / _FOLDER).is_dir():
        folder = folder / _FOLDER
    table = folder / "metadata.csv"
    rows = read_metadata(table)
    counts = {split: group_counts(rows, split) for split in _SPLITS}
    problems = [
        f"{split} groups of {counts[split]}, not {published}"
        for split, published in (("train", TRAIN_COUNTS), ("test", TEST_COUNTS))
        if counts[split] != published
    ]
    shortfall = shortfall_of(TITLE, problems, options)

    def dataset(split: str) -> Dataset:
        return Dataset(
            "waterbirds",
            split,
            tuple(
                Example(row.name, File(inside(folder, row.name, str(table))), row.y, attribute=row.place)
                for row in rows
                if row.split == split
            ),
            CLASS_NAMES,
            templates=(TEMPLATE,),
            group_names=GROUPS,
            train_counts=counts["train"],
            shortfall=shortfall,
            facts={"class_rule": "fixed", "prompts_from": "arXiv:2302.00070"},
        )

    return Task("waterbirds", TITLE, (dataset("test"),), dataset("train"), dataset("val"))


def read_metadata(path: Path) -> list[Row]:
    """Return the rows of a `metadata.csv`, in its order.

    Raises:
        ConfigError: A column is missing, a value is none of those that it may have, or a picture is there twice.
    """
    rows = []
    for line, fields in enumerate(read_rows(path, ("img_filename", "y", "split", "place")), start=2):
        where = f"{path}, line {line}"
        split = _SPLITS[number(fields["split"], range(3), f"{where}: split")]
        y, place = (number(fields[name], range(2), f"{where}: {name}") for name in ("y", "place"))
        rows.append(Row(fields["img_filename"], y, split, place))
    repeated = [name for name, count in Counter(row.name for row in rows).items() if count > 1]
    if repeated:
        raise ConfigError(f"{path} names {repeated[0]!r} twice")
    return rows


def group_counts(rows: list[Row], split: str) -> tuple[int, ...]:
    """Return the pictures of a split in each of the four groups."""
    counts = Counter(2 * row.y + row.place for row in rows if row.split == split)
    return tuple(counts[group] for group in range(len(GROUPS)))
