"""A csv file with a row per picture, such as Waterbirds' or CelebA's."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defense.data.images import DEFAULT_LIMITS, Limits
from defense.data.sources import Picture
from defense.errors import ConfigError

_TEST_SPLITS = ("2", "2.0", "test")
_MOST_VALUES = 20
"""Distinct values of an attribute; a column with more is something else."""


# --- groups, from a csv file --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metadata:
    """The rows of a csv file that can be used.

    Attributes:
        pictures: One per row.
        y: Index of the class, int64 [n].
        a: Index of the attribute's value, int64 [n]; None where no column holds it.
        values: The attribute's values, as they stand there.
        n_test: Rows that were left out because a column "split" puts them into the test set.
        has_split: Whether there is such a column.
    """

    pictures: tuple[Picture, ...]
    y: np.ndarray
    a: np.ndarray | None
    values: tuple[str, ...]
    n_test: int
    has_split: bool


def read_metadata(
    path: Path,
    classes: Sequence[str],
    *,
    path_column: str,
    label_column: str,
    attribute_column: str | None = None,
    root: Path | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> Metadata:
    """Read a csv file with a row per picture, such as Waterbirds' metadata.csv or CelebA's list_attr_celeba.csv.

    Rows whose column "split" says "test", or 2, are left out: nothing is fitted on a test set. A file without that
    column, such as CelebA's, is used as a whole.

    Args:
        path: The file: UTF-8, comma separated, names of the columns in the first line.
        classes: The classes, in the order of their numbers.
        path_column: Where a picture is, relative to `root` and within it.
        label_column: Its class: one of the names, its number from 0, or -1 and 1 for the first and second.
        attribute_column: What should not count: any values.
        root: Folder of the pictures; by default that of the file.
        limits: What is accepted of each picture at most.

    Raises:
        ConfigError: The file is no csv file, lacks a column, has no rows to fit on, holds a value that is none of
            these, or a path that leads out of `root`.
    """
    root = path.parent if root is None else root
    wanted = [column for column in (path_column, label_column, attribute_column) if column is not None]
    rows = _csv_rows(path, wanted)
    split = next((name for name in (rows[0][1] if rows else ()) if str(name).strip().lower() == "split"), "")
    used = [(line, row) for line, row in rows if (row.get(split) or "").strip().lower() not in _TEST_SPLITS]
    if not used:
        raise ConfigError(f"{path} has no rows to fit on, apart from {len(rows)} of the test split")
    y = np.array([_class_of(row[label_column], classes, f"{path}, line {line}") for line, row in used])
    a: np.ndarray | None = None
    values: tuple[str, ...] = ()
    if attribute_column is not None:
        cells = [row[attribute_column].strip() for _, row in used]
        values = tuple(sorted(set(cells)))
        if not 2 <= len(values) <= _MOST_VALUES:
            raise ConfigError(
                f"the column {attribute_column!r} of {path} has {len(values)} different values; an attribute has from "
                f"2 to {_MOST_VALUES}"
            )
        a = np.array([values.index(cell) for cell in cells])
    pictures = tuple(
        Picture(row[path_column], i, _within(root, row[path_column], f"{path}, line {line}"), limits=limits)
        for i, (line, row) in enumerate(used)
    )
    return Metadata(pictures, y, a, values, len(rows) - len(used), bool(split))


def _within(root: Path, cell: str, where: str) -> Path:
    if not Path(os.path.abspath(root / cell)).is_relative_to(os.path.abspath(root)):
        raise ConfigError(f"{where}: the path {cell!r} leads out of the pictures' folder {root}; give paths within it")
    return root / cell


def _csv_rows(path: Path, wanted: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Return the rows of a csv file with the number of their line."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{path} cannot be read as a csv file in UTF-8: {error}") from error
    if text.lstrip()[:9].lower().startswith(("<!doctype", "<html")):
        raise ConfigError(f"{path} is a web page, not a csv file; download the file itself")
    reader = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    try:
        names = list(reader.fieldnames or ())
        missing = [column for column in wanted if column not in names]
        if missing:
            raise ConfigError(
                f"{path} has no column {', '.join(map(repr, missing))}; it has {', '.join(map(repr, names)) or 'none'}"
            )
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        raise ConfigError(f"{path}, line {reader.line_num}: {error}; it must be a csv file") from error
    for line, row in rows:
        empty = [column for column in wanted if not (row[column] or "").strip()]
        if empty:
            raise ConfigError(f"{path}, line {line}: nothing in the column {', '.join(map(repr, empty))}")
    return rows


def _class_of(cell: str, classes: Sequence[str], where: str) -> int:
    value = cell.strip()
    if value in classes:
        return classes.index(value)
    if value.isdecimal() and int(value) < len(classes):
        return int(value)
    if value == "-1" and len(classes) == 2:
        return 0
    raise ConfigError(
        f"{where}: the label {value!r} is none of the classes {', '.join(map(repr, classes))}, nor the number of one"
    )
