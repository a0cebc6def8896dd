"""Sources of pictures, too many to hold: folders, WebDataset tars, Parquet files. Without torch.

A source is a list of shards: things that are read from front to back. A picture file is a shard of its own, a tar file
is one, and so is each row group of a Parquet file. Shards are visited in random order, so that memory does not grow
with the source; where a shard holds many pictures, their order within it is that of the file.

Nothing is decoded here. A `Picture` says where its bytes are; `images.decode` takes what `Picture.open` returns.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tarfile
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from defense.errors import ConfigError, InvalidImageError, cannot_import

from . import images
from .preprocess import Preprocess
from .threads import decoding_threads

log = logging.getLogger(__name__)

T = TypeVar("T")

PICTURE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
HELD_OUT_EVERY = 50
"""One picture in so many is kept from training, to measure on."""

_LABEL_SUFFIX = ".cls"
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes")
_LABEL_COLUMNS = ("label", "cls", "class", "fine_label")
_ROWS_AT_ONCE = 256


@dataclass(frozen=True)
class Slice:
    """A part of a larger file, read when it is asked for."""

    path: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the bytes."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@dataclass(frozen=True)
class Picture:
    """One picture that has not been opened yet.

    Attributes:
        name: What it is called; no other of its source has the name.
        ordinal: Its number within its folder or file.
        source: Where its bytes are, or the bytes.
        label: Its class: a name, an index, or where the text of one of them is; None where nothing says it.
    """

    name: str
    ordinal: int
    source: Path | Slice | bytes
    label: str | int | Slice | None = None

    def open(self) -> Path | bytes:
        """Return what `images.decode` takes."""
        return self.source.read() if isinstance(self.source, Slice) else self.source

    @property
    def is_held_out(self) -> bool:
        """Whether this picture is kept from training: the first of every `HELD_OUT_EVERY`."""
        return self.ordinal % HELD_OUT_EVERY == 0


class Shard(Protocol):
    """What is read from front to back."""

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures in the order of the file."""


class Position(NamedTuple):
    """How far the endless stream of training pictures has been read."""

    epoch: int = 0
    shard: int = 0
    """How many shards of this epoch's order are done."""
    picture: int = 0
    """How many pictures of the next shard are done."""


START = Position()
"""Nothing of the stream has been read."""


@dataclass(frozen=True)
class Pictures:
    """A source of pictures.

    Attributes:
        shards: Its parts.
        fingerprint: sha256 over the names and sizes of what it consists of.
        folders: The classes of a folder with sub-folders, sorted.
    """

    shards: tuple[Shard, ...]
    fingerprint: str
    folders: tuple[str, ...] = ()

    def epoch(self, seed: int, position: Position = START) -> Iterator[tuple[Picture, Position]]:
        """Yield the pictures for training from a position to the end of its epoch, each with the position after it.

        Args:
            seed: Decides the order of the shards, anew in each epoch.
            position: Where to start; one that was yielded before with the same seed.

        Raises:
            ConfigError: A file cannot be read.
        """
        epoch, first_shard, first_picture = position
        order = np.random.default_rng([seed, epoch]).permutation(len(self.shards))
        for n_done in range(first_shard, len(order)):
            for index, picture in enumerate(self.shards[order[n_done]].pictures()):
                if index >= first_picture and not picture.is_held_out:
                    yield picture, Position(epoch, n_done, index + 1)
            first_picture = 0

    def held_out(self, n: int) -> Iterator[Picture]:
        """Yield up to `n` of the pictures that `epoch` leaves out, spread over the shards as evenly as possible."""
        kept = [shard for shard in self.shards if not isinstance(shard, _File) or shard.picture.is_held_out]
        chosen = [kept[i * len(kept) // n] for i in range(n)] if len(kept) > n else kept
        per_shard = -(-n // max(1, len(chosen)))
        found = (islice((p for p in shard.pictures() if p.is_held_out), per_shard) for shard in chosen)
        yield from islice(chain.from_iterable(found), n)

    def class_of(self, picture: Picture, names: Sequence[str]) -> int | None:
        """Return the index of a picture's class in a list of names, or None where nothing says its class.

        A label is one of the names, or an index. Sub-folders that are called otherwise than the classes (WordNet ids,
        say) stand for them in sorted order if there are as many.

        Raises:
            ConfigError: The label is no name, no index and no such sub-folder.
        """
        label = picture.label
        if isinstance(label, Slice):
            label = label.read().decode("utf-8", "replace").strip()
        if label is None:
            return None
        if label in self.folders and len(self.folders) == len(names) and not set(self.folders) <= set(names):
            return self.folders.index(str(label))
        if label in names:
            return names.index(str(label))
        if str(label).isdecimal() and int(label) < len(names):
            return int(label)
        raise ConfigError(f"{picture.name} has the label {label!r}, which is none of the {len(names)} class names")


@dataclass(frozen=True)
class _File:
    """One picture file."""

    picture: Picture

    def pictures(self) -> Iterator[Picture]:
        yield self.picture


@dataclass(frozen=True)
class _Tar:
    """A tar file in WebDataset's layout: a sample's files stand together, alike up to the first dot of the name."""

    path: Path

    def pictures(self) -> Iterator[Picture]:
        ordinal, sample, found, label = 0, "", None, None
        for member in self._members():
            folder, _, file = member.name.rpartition("/")
            stem, _, suffix = file.partition(".")
            content = Slice(self.path, member.offset_data, member.size)
            if (key := f"{folder}/{stem}") != sample:
                if found is not None:
                    yield Picture(f"{self.path.name}:{found[0]}", ordinal, found[1], label)
                    ordinal += 1
                sample, found, label = key, None, None
            if f".{suffix.lower()}" in PICTURE_SUFFIXES:
                found = member.name, content
            elif f".{suffix.lower()}" == _LABEL_SUFFIX:
                label = content
        if found is not None:
            yield Picture(f"{self.path.name}:{found[0]}", ordinal, found[1], label)

    def _members(self) -> Iterator[tarfile.TarInfo]:
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    if member.isreg() and not PurePosixPath(member.name).name.startswith("."):
                        yield member
        except (tarfile.TarError, OSError) as error:
            raise ConfigError(
                f"{self.path} cannot be read as a tar file ({error}); it must be complete and not compressed"
            ) from error


@dataclass(frozen=True)
class _RowGroup:
    """A row group of a Parquet file: a column of picture bytes, perhaps one of labels."""

    path: Path
    group: int
    first_ordinal: int
    image_column: str
    label_column: str | None

    def pictures(self) -> Iterator[Picture]:
        for ordinal, row in enumerate(self._rows(), start=self.first_ordinal):
            cell = row[self.image_column]
            data = cell.get("bytes") if isinstance(cell, dict) else cell
            label = None if self.label_column is None else row[self.label_column]
            yield Picture(f"{self.path.name}#{ordinal}", ordinal, data or b"", label)

    def _rows(self) -> Iterator[dict[str, Any]]:
        columns = [column for column in (self.image_column, self.label_column) if column is not None]
        with _parquet(self.path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[self.group], columns=columns):
                yield from batch.to_pylist()


def open_pictures(paths: Sequence[str | os.PathLike[str]]) -> Pictures:
    """Return the pictures of folders and files.

    Args:
        paths: Each a folder with pictures (the class of a picture is the first sub-folder it lies in), with `.tar` or
            with `.parquet` files, or such a file itself. Hidden files are ignored.

    Raises:
        ConfigError: A path does not exist, holds no such files or several kinds of them, or a file is damaged.
        MissingDependencyError: A Parquet file, and pyarrow is not installed.
    """
    if not paths:
        raise ConfigError("no pictures were given; pass a folder, tar files or Parquet files")
    shards: list[Shard] = []
    folders: set[str] = set()
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = _files_of(path)
        digest.update(json.dumps([(_name(file, path), _size(file)) for file in files]).encode())
        kind = _kind(files[0])
        if kind == "pictures":
            found = [_picture(file, path, ordinal) for ordinal, file in enumerate(files)]
            folders |= {str(picture.label) for picture in found if picture.label is not None}
            shards += map(_File, found)
        else:
            for file in files:
                shards += [_Tar(file)] if kind == "tar" else _row_groups(file)
    return Pictures(tuple(shards), digest.hexdigest(), tuple(sorted(folders)))


def _files_of(path: Path) -> list[Path]:
    """Return the files of one kind that a path stands for, in sorted order."""
    if not path.exists():
        raise ConfigError(f"{path} is not there; give a folder with pictures, or tar or Parquet files")
    candidates = sorted(path.rglob("*")) if path.is_dir() else [path]
    files = [
        file
        for file in candidates
        if _kind(file) is not None
        and file.is_file()
        and not any(p.startswith(".") for p in file.relative_to(path).parts)
    ]
    kinds = sorted({str(_kind(file)) for file in files})
    if not files:
        raise ConfigError(
            f"{path} holds no pictures ({', '.join(sorted(PICTURE_SUFFIXES))}), no .tar and no .parquet file"
        )
    if len(kinds) > 1:
        raise ConfigError(f"{path} holds {' and '.join(kinds)} files; give those of one kind")
    return files


def _kind(file: Path) -> str | None:
    suffix = file.suffix.lower()
    return "pictures" if suffix in PICTURE_SUFFIXES else {".tar": "tar", ".parquet": "parquet"}.get(suffix)


def _name(file: Path, root: Path) -> str:
    """Return a file's path below the folder that was given, with what is no UTF-8 as escapes."""
    return os.fsencode(file.relative_to(root) if file != root else file.name).decode("utf-8", "backslashreplace")


def _size(file: Path) -> int:
    return file.stat().st_size


def _picture(file: Path, root: Path, ordinal: int) -> Picture:
    parts = file.relative_to(root).parts
    return Picture(_name(file, root), ordinal, file, parts[0] if len(parts) > 1 else None)


def _row_groups(file: Path) -> Iterator[_RowGroup]:
    with _parquet(file) as parquet:
        names = parquet.schema_arrow.names
        image = next((name for name in _IMAGE_COLUMNS if name in names), None)
        if image is None:
            raise ConfigError(f"{file} has the columns {names}; one of {', '.join(_IMAGE_COLUMNS)} must hold pictures")
        label = next((name for name in _LABEL_COLUMNS if name in names), None)
        first = 0
        for group in range(parquet.num_row_groups):
            yield _RowGroup(file, group, first, image, label)
            first += parquet.metadata.row_group(group).num_rows


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; what goes wrong with it inside the context is a `ConfigError`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise cannot_import("pyarrow", error) from error
    try:
        with parquet.ParquetFile(path) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error


def prepared(
    preprocess: Preprocess,
    pictures: Sequence[Picture],
    batch: int = 64,
    change: Callable[[Picture, Image.Image], Image.Image] = lambda _, image: image,
) -> Iterator[list[tuple[Picture, np.ndarray | None]]]:
    """Yield pictures in batches with their pixel_values [3, height, width]; None for one that cannot be read.

    Args:
        preprocess: What makes pixel_values of a picture.
        pictures: What to read; the next batch is being read while one is used.
        batch: Pictures at once.
        change: What is done to a picture before it is resized.
    """

    def prepare(picture: Picture) -> np.ndarray | None:
        image = _decoded(picture)
        return None if image is None else preprocess(change(picture, image))

    return _read_ahead(prepare, pictures, batch)


def decoded(pictures: Sequence[Picture], batch: int) -> Iterator[list[tuple[Picture, Image.Image | None]]]:
    """Yield pictures in batches, decoded; None for one that cannot be read. Two batches are in memory at a time."""
    return _read_ahead(_decoded, pictures, batch)


def _decoded(picture: Picture) -> Image.Image | None:
    try:
        return images.decode(picture.open()).image
    except InvalidImageError as error:
        log.warning("left out: %s: %s", picture.name, error)
        return None


def _read_ahead(
    read: Callable[[Picture], T], pictures: Sequence[Picture], batch: int
) -> Iterator[list[tuple[Picture, T]]]:
    """Yield pictures in batches with what `read` makes of each; the next batch is being read while one is used."""
    ahead: deque[tuple[Sequence[Picture], list[Future[T]]]] = deque()
    with ThreadPoolExecutor(decoding_threads()) as pool:
        for first in range(0, len(pictures), batch):
            part = pictures[first : first + batch]
            ahead.append((part, [pool.submit(read, picture) for picture in part]))
            if len(ahead) > 1:
                yield _finished(*ahead.popleft())
        for part, futures in ahead:
            yield _finished(part, futures)


def _finished(pictures: Sequence[Picture], futures: list[Future[T]]) -> list[tuple[Picture, T]]:
    return [(picture, future.result()) for picture, future in zip(pictures, futures, strict=True)]
