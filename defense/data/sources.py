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
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

from defense.errors import ConfigError, InvalidImageError

from . import images
from .images import DEFAULT_LIMITS, Limits
from .listing import PICTURE_SUFFIXES as PICTURE_SUFFIXES
from .listing import as_text, class_folders, list_files
from .notes import NoteLog
from .preprocess import Preprocess
from .shards import HELD_OUT_EVERY as HELD_OUT_EVERY
from .shards import FileShard, RowGroupShard, Shard, TarShard, row_groups
from .shards import Picture as Picture
from .shards import Slice as Slice
from .threads import decoding_threads

log = logging.getLogger(__name__)

T = TypeVar("T")

_notes = NoteLog()
"""Of all pictures that this process reads from sources."""


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
        fingerprint: sha256 over the names and sizes of what it consists of, and unusual limits.
        folders: The classes of a folder with sub-folders, sorted; or those that Parquet files name, in their order.
        ignored: Reason -> how many files were passed over.
        limits: What is accepted of each picture at most.
    """

    shards: tuple[Shard, ...]
    fingerprint: str
    folders: tuple[str, ...] = ()
    ignored: Mapping[str, int] = field(default_factory=dict)
    limits: Limits = DEFAULT_LIMITS

    def __iter__(self) -> Iterator[Picture]:
        """Yield all pictures in order."""
        return chain.from_iterable(map(self._of, self.shards))

    def _of(self, shard: Shard) -> Iterator[Picture]:
        """Yield the pictures of a shard."""
        return (replace(picture, limits=self.limits) for picture in shard.pictures())

    @property
    def passed_over(self) -> Counter[str]:
        """Reason -> how many files, and members of the tars read so far, were passed over."""
        tars = (shard.passed_over for shard in self.shards if isinstance(shard, TarShard))
        return sum(tars, Counter(self.ignored))

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
            for index, picture in enumerate(self._of(self.shards[order[n_done]])):
                if index >= first_picture and not picture.is_held_out:
                    yield picture, Position(epoch, n_done, index + 1)
            first_picture = 0

    def held_out(self, n: int) -> Iterator[Picture]:
        """Yield up to `n` of the pictures that `epoch` leaves out, spread over the shards as evenly as possible."""
        kept = [shard for shard in self.shards if not isinstance(shard, FileShard) or shard.picture.is_held_out]
        chosen = [kept[i * len(kept) // n] for i in range(n)] if len(kept) > n else kept
        per_shard = -(-n // max(1, len(chosen)))
        found = (islice((p for p in self._of(shard) if p.is_held_out), per_shard) for shard in chosen)
        yield from islice(chain.from_iterable(found), n)

    def class_of(self, picture: Picture, names: Sequence[str]) -> int | None:
        """Return the index of a picture's class in a list of names, or None where nothing says its class.

        A label is one of the names, or an index. Sub-folders, or classes of a Parquet file, that are called otherwise
        than the classes (WordNet ids, say) stand for them in their order if there are as many.

        Raises:
            ConfigError: The label is no name, no index and no such sub-folder.
        """
        label = picture.read_label()
        if label is None:
            return None
        if label in self.folders and len(self.folders) == len(names) and not set(self.folders) <= set(names):
            return self.folders.index(str(label))
        if label in names:
            return names.index(str(label))
        if str(label).isdecimal() and int(label) < len(names):
            return int(label)
        raise ConfigError(f"{picture.name} has the label {label!r}, which is none of the {len(names)} class names")


def open_pictures(paths: Sequence[str | os.PathLike[str]], *, limits: Limits = DEFAULT_LIMITS) -> Pictures:
    """Return the pictures of folders and files.

    Args:
        paths: Each a folder with pictures (the class of a picture is the first sub-folder it lies in, see
            `listing.class_folders`), with `.tar` or with `.parquet` files, or such a file itself. Hidden files are
            ignored.
        limits: What is accepted of each picture at most.

    Raises:
        ConfigError: A path does not exist, holds no such files or several kinds of them, or a file is damaged.
        MissingDependencyError: A Parquet file, and pyarrow is not installed.
    """
    if not paths:
        raise ConfigError("no pictures were given; pass a folder, tar files or Parquet files")
    shards: list[Shard] = []
    folders: set[str] = set()
    ignored: Counter[str] = Counter()
    digest = hashlib.sha256(b"" if limits == DEFAULT_LIMITS else repr(limits).encode())
    for path in map(Path, paths):
        listing = list_files(path)
        kind, files = listing.of_one_kind()
        ignored += listing.passed_over
        digest.update(json.dumps([(name_below(file, path), file.stat().st_size) for file in files]).encode())
        if kind == "pictures":
            own = class_folders(files, path) if path.is_dir() else [None]
            folders |= {name for name in own if name is not None}
            shards += [
                FileShard(Picture(name_below(file, path), ordinal, file, label))
                for ordinal, (file, label) in enumerate(zip(files, own, strict=True))
            ]
        else:
            for file in files:
                shards += [TarShard(file)] if kind == "tar" else row_groups(file)
    stated = {shard.label_names for shard in shards if isinstance(shard, RowGroupShard)}
    classes = stated.pop() if len(stated) == 1 and not folders else tuple(sorted(folders))
    return Pictures(tuple(shards), digest.hexdigest(), classes, ignored, limits)


def name_below(file: Path, root: Path) -> str:
    """Return a file's path below the folder that was given, with what is no UTF-8 as escapes."""
    return as_text(file.relative_to(root) if file != root else file.name)


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
        decoded = images.decode(picture.open(), limits=picture.limits)
        _notes.add(picture.name, decoded.warnings)
        return decoded.image
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
