"""What a cell of a table holds: the one place that knows how tables keep pictures and their labels."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from defense.errors import InvalidImageError


class Unreadable:
    """Stands for a picture that is not there, in a list of those that are: reading it raises its error.

    Attributes:
        error: What `images.decode` raises.
    """

    def __init__(self, error: InvalidImageError) -> None:
        self.error = error

    def read(self, _n_bytes: int = -1) -> bytes:
        """Raise the error."""
        raise self.error


def picture_in(cell: Any, folder: Path | None = None) -> Any:
    """Return what `images.decode` takes, of a cell.

    Args:
        cell: Encoded bytes; a path; an array; a PIL image; a mapping with "bytes" and "path", as the package `datasets`
            writes a picture, of which the bytes count where there are some; or null.
        folder: What paths are relative to, and must lie in: that of the table's file. None takes them as they are.
    """
    if hasattr(cell, "as_py"):  # a scalar of Arrow
        cell = cell.as_py()
    if isinstance(cell, Mapping) and ("bytes" in cell or "path" in cell):
        data = cell.get("bytes")
        cell = data if data is not None else cell.get("path")
    if cell is None or (isinstance(cell, float) and math.isnan(cell)):  # pandas writes null as NaN
        return Unreadable(InvalidImageError("empty", "the cell holds no picture: it is null"))
    if folder is not None and isinstance(cell, str) and not re.match(r"(?i)data:|[a-z][a-z0-9+.-]+://", cell):
        return _within(folder, cell)
    return cell


def _within(folder: Path, path: str) -> Path | Unreadable:
    """Return a path below a folder; a table may come from a stranger, so it names no other files."""
    if not Path(os.path.abspath(folder / path)).is_relative_to(os.path.abspath(folder)):
        reason = f"{path[:100]!r} leads out of the table's folder {folder}; put the pictures beside the table"
        return Unreadable(InvalidImageError("not_found", reason))
    return folder / path


def label_in(cell: Any) -> str | int | None:
    """Return the label in a cell: a name or an index. Null, NaN, an empty text and -1 say that there is none."""
    if isinstance(cell, float):
        cell = int(cell) if math.isfinite(cell) and cell.is_integer() else None if math.isnan(cell) else str(cell)
    if isinstance(cell, bytes):
        cell = cell.decode("utf-8", "replace")
    if isinstance(cell, str):
        cell = cell.strip()
    return None if cell in (None, "", -1, "-1") else cell
