"""Readers of data sets' files that refuse stand-ins, such as a web page or a Git LFS pointer under the file's name."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from defense.errors import ConfigError

_LFS_SIZE = re.compile(rb"^size (\d+)", re.MULTILINE)


def require_folder(folder: Path, title: str, source: str) -> None:
    """Raise `ConfigError`, which says where to get the data, unless `folder` is a folder."""
    if folder.is_file():
        with folder.open("rb") as stream:
            check_bytes(stream.read(512), folder)
        raise ConfigError(f"{folder} is a file; unpack it and give the folder")
    if not folder.is_dir():
        raise ConfigError(f"{title} is not at {folder}; get it from {source} and give its folder")


def check_bytes(head: bytes, path: Path) -> None:
    """Raise `ConfigError` where a file's first bytes are those of a web page or of a Git LFS pointer."""
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        raise ConfigError(f"{path} is a web page, not the file (a quota or sign-in page?); download the file itself")
    if start.startswith(b"version https://git-lfs"):
        size = _LFS_SIZE.search(head)
        wanted = f" of {int(size[1]):,} bytes" if size else ""
        raise ConfigError(f"{path} is a Git LFS pointer, not the file{wanted}; run: git lfs pull")


def read_text(path: Path) -> str:
    r"""Return a text file, without a byte-order mark and with \n at the end of lines.

    Raises:
        ConfigError: It is missing, no UTF-8, a web page or a Git LFS pointer.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is missing")
    data = path.read_bytes()
    check_bytes(data[:512], path)
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text ({error.reason} at byte {error.start})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        ConfigError: See `read_text`, or it is not JSON.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON: {error}") from error


def read_rows(path: Path, columns: Sequence[str]) -> list[dict[str, str]]:
    """Return the rows of a CSV file, column -> text; columns may come in any order, with others beside them.

    Raises:
        ConfigError: See `read_text`; a column is missing, or a row has another number of cells than the header.
    """
    reader = csv.reader(io.StringIO(read_text(path)))
    header = next(reader, [])
    missing = [name for name in columns if name not in header]
    if missing:
        raise ConfigError(f"{path} has the columns {header}; {missing} are missing")
    rows = []
    for cells in reader:
        if len(cells) != len(header):
            raise ConfigError(f"{path}, line {reader.line_num}: {len(cells)} cells; want {len(header)}")
        rows.append(dict(zip(header, cells, strict=True)))
    return rows


def number(text: str, allowed: Iterable[int], where: str) -> int:
    """Return an integer in a text.

    Raises:
        ConfigError: It is no integer, or none that is allowed.
    """
    allowed = tuple(allowed)
    if text.strip() not in map(str, allowed):
        raise ConfigError(f"{where} is {text!r}; want one of {', '.join(map(str, allowed))}")
    return int(text)


def inside(root: Path, name: str, where: str) -> Path:
    """Return the path of a file that a table names relative to `root`.

    Raises:
        ConfigError: The name leads out of `root`.
    """
    parts = PurePosixPath(name.replace("\\", "/"))
    if not name or parts.is_absolute() or ".." in parts.parts or re.match("[A-Za-z]:", name):
        raise ConfigError(f"{where} names the file {name!r}; want a path inside of {root}")
    return root.joinpath(*parts.parts)


def listed(names: Sequence[str], n_shown: int = 5) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(repr(name) for name in names[:n_shown]) + more
