"""Which files below a folder are pictures or hold some: one answer for every command, which counts what it passes over.

A file is a picture by its suffix; one whose name has no suffix that means anything, by its first bytes. Links are
followed, to folders too, since folders of classes often are links.
"""

from __future__ import annotations

import os
import re
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Literal, cast

from defense.errors import ConfigError

from .formats import FORMATS, HEAD_BYTES, format_of

_Identity = tuple[int, int]
"""Device and number of a folder."""

Kind = Literal["pictures", "tar", "parquet"]

PICTURE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".jif",
        ".pjpeg",
        ".mpo",
        ".png",
        ".apng",
        ".webp",
        ".gif",
        ".bmp",
        ".tif",
        ".tiff",
        ".avif",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
    ]
)
_HOLDERS: Mapping[str, Kind] = {".tar": "tar", ".parquet": "parquet"}
_UNREAD_SUFFIXES = frozenset(
    [
        ".heic",
        ".heif",
        ".svg",
        ".jp2",
        ".j2k",
        ".jxl",
        ".tga",
        ".psd",
        ".ico",
        ".eps",
        ".exr",
        ".hdr",
        ".dng",
        ".cr2",
        ".cr3",
        ".nef",
        ".arw",
        ".raw",
        ".pdf",
    ]
)
_ARCHIVES = frozenset([".zip", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar"])
_LEFT_BEHIND = frozenset({"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "Thumbs.db", "desktop.ini"})
_SUFFIX = re.compile(r"\.[a-z][a-z0-9]{1,7}")
"""What is a suffix and not the rest of a name such as "img.0001" or "St. Bernard"."""
_SPLIT = re.compile(r"(train|training|val|valid|validation|dev|test|testing)([-_ ]?\d+)?", re.IGNORECASE)


@dataclass(frozen=True)
class Listing:
    """The files that a path stands for.

    Attributes:
        root: The path.
        files: Those of each kind that is there, in sorted order.
        passed_over: Reason -> how many files, or folders with all they hold.
    """

    root: Path
    files: Mapping[Kind, tuple[Path, ...]]
    passed_over: Counter[str]

    def of_one_kind(self) -> tuple[Kind, tuple[Path, ...]]:
        """Return the kind and the files.

        Raises:
            ConfigError: There are none, or there are several kinds.
        """
        if not self.files:
            also = f" (passed over: {in_words(self.passed_over)})" if self.passed_over else ""
            raise ConfigError(
                f"{self.root} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}), no .tar and no .parquet "
                f"file{also}"
            )
        if len(self.files) > 1:
            raise ConfigError(
                f"{self.root} holds {' and '.join(sorted(self.files))} files; give those of one kind, in a folder of "
                "their own"
            )
        ((kind, files),) = self.files.items()
        return kind, files


def list_files(root: Path) -> Listing:
    """Return the files below a folder, or the one file, that are pictures or hold pictures.

    Raises:
        ConfigError: There is no such path.
    """
    if not root.exists():
        raise ConfigError(f"{root} is not there; give a folder with pictures, or tar or Parquet files")
    passed_over: Counter[str] = Counter()
    found: dict[Kind, list[Path]] = {}
    for file in sorted(_walk(root, passed_over) if root.is_dir() else [root]):
        kind = kind_of(file)
        if kind in ("pictures", "tar", "parquet"):
            found.setdefault(cast(Kind, kind), []).append(file)
        else:
            passed_over[kind] += 1
    if "pictures" in found and [file.name for file in found.get("parquet", ())] == ["metadata.parquet"]:
        del found["parquet"]
        passed_over["table about the pictures"] += 1
    return Listing(root, {kind: tuple(files) for kind, files in found.items()}, passed_over)


def kind_of(file: Path) -> str:
    """Return the `Kind` of a file, or the reason why it is passed over."""
    suffix = file.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        return "pictures"
    if suffix in _HOLDERS:
        return _HOLDERS[suffix]
    if suffix in _UNREAD_SUFFIXES:
        return "picture of a format that is not read"
    if suffix in _ARCHIVES:
        return "compressed archive"
    if _SUFFIX.fullmatch(suffix):
        return "no picture by its name"
    try:
        with file.open("rb") as stream:
            return kind_by_head(stream.read(HEAD_BYTES))
    except OSError:
        return "file that cannot be opened"


def kind_by_head(head: bytes) -> str:
    """Return "pictures" for the first bytes of one, or the reason why the file is passed over."""
    found = format_of(head)
    if found in FORMATS:
        return "pictures"
    return "no picture by its first bytes" if found is None else "picture of a format that is not read"


def is_meaningless(suffix: str) -> bool:
    """Return whether a suffix, with its dot and in lower case, is none: then the first bytes decide."""
    return not _SUFFIX.fullmatch(suffix)


def files_below(folder: Path) -> list[Path]:
    """Return the files below a folder that are not ignored whatever they hold, in sorted order."""
    return sorted(_walk(folder, Counter()))


def why_ignored(path: PurePath) -> str | None:
    """Return why a path below a root is ignored whatever it holds, or None."""
    if any(part.startswith(".") for part in path.parts):
        return "hidden"
    return "left behind by a system" if _LEFT_BEHIND.intersection(path.parts) else None


def _walk(root: Path, passed_over: Counter[str]) -> Iterator[Path]:
    """Yield the files below a folder.

    A folder is listed where it lies and wherever a link leads to it, but behind two links only if it was not listed
    before: folders that are linked to each other stand for no more files than there are.

    Args:
        root: Where to look.
        passed_over: Counted up.
    """
    listed: set[_Identity] = set()
    links: deque[tuple[Path, tuple[_Identity, ...], int]] = deque([(root, (), 0)])

    def below(folder: Path, above: tuple[_Identity, ...], n_links: int) -> Iterator[Path]:
        try:
            status = folder.stat()
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            passed_over["folder that cannot be listed"] += 1
            return
        identity = (status.st_dev, status.st_ino)
        if identity in above:
            passed_over["link back to a folder above"] += 1
            return
        if n_links > 1 and identity in listed:
            passed_over["link to a folder that is listed elsewhere"] += 1
            return
        listed.add(identity)
        for entry in entries:
            path = folder / entry.name
            if (reason := why_ignored(PurePath(entry.name))) is not None:
                passed_over[reason] += 1
            elif os.path.isdir(path) and entry.is_symlink():
                links.append((path, (*above, identity), n_links + 1))
            elif os.path.isdir(path):
                yield from below(path, (*above, identity), n_links)
            elif os.path.isfile(path):
                yield path
            else:
                passed_over["broken link, or no file"] += 1

    while links:  # what lies behind fewer links comes first
        yield from below(*links.popleft())


def class_folders(files: Sequence[Path], root: Path) -> list[str | None]:
    """Return the class of each picture: the first sub-folder that it lies in, None for one that lies in none.

    Where all of the sub-folders are named like splits (train, val, test), the classes are the folders in those.
    """
    places = [file.relative_to(root).parts[:-1] for file in files]
    firsts = {place[0] for place in places if place}
    depth = int(bool(firsts) and all(_SPLIT.fullmatch(name) for name in firsts))
    return [place[depth] if len(place) > depth else None for place in places]


def as_text(name: str | os.PathLike[str]) -> str:
    """Return a file's name as text that can be written anywhere: bytes that are no UTF-8 become escapes."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def in_words(passed_over: Mapping[str, int]) -> str:
    """Return what was passed over, most first, e.g. "3 hidden, 1 compressed archive"."""
    return ", ".join(f"{n} {reason}" for reason, n in sorted(passed_over.items(), key=lambda item: (-item[1], item[0])))
