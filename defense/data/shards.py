"""Pictures that have not been opened yet, and the files that hold them: picture files, WebDataset tars, Parquet."""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from defense.errors import ConfigError, MissingDependencyError

from .cells import Unreadable, label_in, picture_in
from .formats import HEAD_BYTES
from .images import DEFAULT_LIMITS, Limits
from .listing import PICTURE_SUFFIXES, as_text, is_meaningless, kind_by_head, why_ignored

HELD_OUT_EVERY = 50
"""One picture in so many is kept from training, to measure on."""

_LABEL_SUFFIX = "cls"
_LABEL_BYTES = 1000
_IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "webp", "img", "bytes")
_LABEL_COLUMNS = ("label", "cls", "class", "fine_label")
_ROWS_AT_ONCE = 256

# Of several pictures of one sample, the photograph: masks are seldom JPEGs.
_BEST_FIRST = ("jpg", "jpeg", "jpe", "jfif", "webp", "avif", "png")
_MAIN_PARTS = frozenset({"image", "img", "input", "rgb", "photo", "picture", "original"})
_SIDE_PARTS = frozenset(
    [
        "seg",
        "segmentation",
        "mask",
        "masks",
        "depth",
        "alpha",
        "label",
        "labels",
        "annotation",
        "gt",
        "target",
        "normal",
        "normals",
        "thumb",
        "thumbnail",
    ]
)


@dataclass(frozen=True)
class Slice:
    """A part of a larger file, read when it is asked for."""

    path: Path
    offset: int
    size: int

    def read(self, limit: int | None = None) -> bytes:
        """Return the bytes, or the first `limit` of them."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size if limit is None else min(self.size, limit))


@dataclass(frozen=True)
class Picture:
    """One picture that has not been opened yet.

    Attributes:
        name: What it is called; no other of its source has the name.
        ordinal: Its number within its folder or file.
        source: Where its bytes are, or the bytes, or why there are none.
        label: Its class: a name, an index, or where the text of one of them is; None where nothing says it.
        limits: What `images.decode` is to accept at most.
    """

    name: str
    ordinal: int
    source: Path | Slice | bytes | Unreadable
    label: str | int | Slice | None = None
    limits: Limits = DEFAULT_LIMITS

    def open(self) -> Path | bytes | Unreadable:
        """Return what `images.decode` takes: of a part of a file, no more than shows that it is too large."""
        return self.source.read(self.limits.max_bytes + 1) if isinstance(self.source, Slice) else self.source

    def read_label(self) -> str | int | None:
        """Return the label, read where it stands in a file; None where nothing says it. See `cells.label_in`."""
        return label_in(self.label.read(_LABEL_BYTES) if isinstance(self.label, Slice) else self.label)

    @property
    def is_held_out(self) -> bool:
        """Whether this picture is kept from training: the first of every `HELD_OUT_EVERY`."""
        return self.ordinal % HELD_OUT_EVERY == 0


class Shard(Protocol):
    """What is read from front to back."""

    def pictures(self) -> Iterator[Picture]:
        """Yield the pictures in the order of the file."""


@dataclass(frozen=True)
class FileShard:
    """One picture file."""

    picture: Picture

    def pictures(self) -> Iterator[Picture]:
        """Yield the picture."""
        yield self.picture


@dataclass(frozen=True)
class _Member:
    """A file in a tar."""

    name: str
    stem: str
    parts: tuple[str, ...]
    """What follows the sample's key, between dots; the last one is the suffix, in lower case."""
    content: Slice
    is_picture: bool


@dataclass(frozen=True)
class TarShard:
    """A tar file in WebDataset's layout: a sample's files stand together, alike up to the first dot of the name.

    Names with more dots are told apart: "0001.seg.png" is another file of the sample 0001, "img.0001.jpg" and
    "st.bernard.jpg" are samples of their own.

    Attributes:
        path: The file.
        passed_over: Reason -> how many members were passed over, as far as the file was read the last time.
    """

    path: Path
    passed_over: Counter[str] = field(default_factory=Counter, compare=False)

    def pictures(self) -> Iterator[Picture]:
        """Yield the picture of each sample with its label, the members being counted anew."""
        self.passed_over.clear()
        ordinal, key = 0, ""
        group: list[_Member] = []
        for member_key, member in self._members():
            if member_key != key:
                for name, content, label in self._samples(group):
                    yield Picture(as_text(f"{self.path.name}:{name}"), ordinal, content, label)
                    ordinal += 1
                key, group = member_key, []
            group.append(member)
        for name, content, label in self._samples(group):
            yield Picture(as_text(f"{self.path.name}:{name}"), ordinal, content, label)
            ordinal += 1

    def _samples(self, group: list[_Member]) -> Iterator[tuple[str, Slice, Slice | None]]:
        """Yield name, bytes and label of the pictures among the files with one key: one, unless they are samples."""
        pictures = [member for member in group if member.is_picture]
        plain = [member for member in pictures if len(member.parts) == 1]
        main = [member for member in pictures if member.parts[0].lower() in _MAIN_PARTS]
        if plain or main:
            chosen = [min(plain or main, key=_rank)]
        else:
            chosen = [member for member in pictures if member.parts[0].lower() not in _SIDE_PARTS]
        if len(pictures) > len(chosen):
            self.passed_over["further picture of a sample"] += len(pictures) - len(chosen)
        labels = {member.stem: member.content for member in group if member.parts[-1] == _LABEL_SUFFIX}
        shared = next((member.content for member in group if member.parts == (_LABEL_SUFFIX,)), None)
        for member in chosen:
            yield member.name, member.content, labels.get(member.stem, shared)

    def _members(self) -> Iterator[tuple[str, _Member]]:
        """Yield the files that may be of a sample, with the sample's key."""
        for member in self._files():
            path = PurePosixPath(member.name)
            reason = why_ignored(path)
            if reason is None and (not member.isreg() or member.issparse()):
                reason = "link or other special member of a tar"
            if reason is not None:
                self.passed_over[reason] += not member.isdir()
                continue
            stem, dot, suffix = path.name.rpartition(".")
            content = Slice(self.path, member.offset_data, member.size)
            is_picture = f".{suffix.lower()}" in PICTURE_SUFFIXES
            if not dot or is_meaningless(f".{suffix.lower()}"):
                is_picture = kind_by_head(content.read(HEAD_BYTES)) == "pictures"
            first, *parts = path.name.split(".") if dot else (path.name, "")
            while len(parts) > 1 and parts[0].isdigit():  # a number is a part of the name
                first = f"{first}.{parts.pop(0)}"
            parts[-1] = parts[-1].lower()
            yield f"{path.parent}/{first}", _Member(member.name, stem, tuple(parts), content, is_picture)

    def _files(self) -> Iterator[tarfile.TarInfo]:
        try:
            with tarfile.open(self.path, "r:") as tar:
                for member in tar:
                    tar.members = []  # type: ignore[attr-defined]  # it would keep them all
                    yield member
        except (tarfile.TarError, OSError) as error:
            raise ConfigError(
                f"{self.path} cannot be read as a tar file ({error}); it must be complete and not compressed"
            ) from error


def _rank(member: _Member) -> int:
    suffix = member.parts[-1]
    return _BEST_FIRST.index(suffix) if suffix in _BEST_FIRST else len(_BEST_FIRST)


@dataclass(frozen=True)
class RowGroupShard:
    """A row group of a Parquet file: a column of pictures, perhaps one of labels.

    Attributes:
        path: The file.
        group: Number of the row group.
        first_ordinal: Of its first row in the file.
        image_column: Name of the column with the pictures.
        label_column: Name of that with the labels, or None.
        label_names: What the numbers in it stand for; none where the file does not say it.
    """

    path: Path
    group: int
    first_ordinal: int
    image_column: str
    label_column: str | None
    label_names: tuple[str, ...] = ()

    def pictures(self) -> Iterator[Picture]:
        """Yield a picture per row."""
        for ordinal, row in enumerate(self._rows(), start=self.first_ordinal):
            label = None if self.label_column is None else self._named(row[self.label_column])
            source = picture_in(row[self.image_column], self.path.parent)
            yield Picture(as_text(f"{self.path.name}#{ordinal}"), ordinal, source, label)

    def _named(self, cell: Any) -> Any:
        """Return the name that a number in the column of labels stands for, and anything else as it is."""
        number = label_in(cell)
        if isinstance(number, int) and 0 <= number < len(self.label_names):
            return self.label_names[number]
        return cell

    def _rows(self) -> Iterator[dict[str, Any]]:
        columns = [column for column in (self.image_column, self.label_column) if column is not None]
        with _parquet(self.path) as file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, row_groups=[self.group], columns=columns):
                yield from batch.to_pylist()


def row_groups(file: Path) -> Iterator[RowGroupShard]:
    """Yield the row groups of a Parquet file.

    Raises:
        ConfigError: It cannot be read, or no column holds pictures.
        MissingDependencyError: pyarrow is not installed.
    """
    with _parquet(file) as parquet:
        image = _image_column(file, parquet.schema_arrow)
        names = parquet.schema_arrow.names
        stated = _class_names(parquet.schema_arrow.metadata)
        candidates = [*_LABEL_COLUMNS, *(stated if len(stated) == 1 else ())]
        label = next((name for name in candidates if name in names), None)
        check_single(names, image, label)
        first = 0
        for group in range(parquet.num_row_groups):
            yield RowGroupShard(file, group, first, image, label, stated.get(label or "", ()))
            first += parquet.metadata.row_group(group).num_rows


def check_single(names: Sequence[str], *chosen: str | None) -> None:
    """Refuse a table in which a column that is read stands twice: which of the two is meant, nobody can say.

    Raises:
        ConfigError: One does.
    """
    for name in chosen:
        if name is not None and names.count(name) > 1:
            raise ConfigError(f"there are {names.count(name)} columns {name!r}; rename all but the one that is meant")


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return what the numbers in columns of labels stand for, as `datasets` writes it into a table (ClassLabel).

    Returns:
        Column -> its names in the order of their numbers.
    """
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"].items()
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):  # a table of somebody else's
        return {}
    found = {column: feature.get("names") for column, feature in features if isinstance(feature, dict)}
    return {
        column: tuple(names)
        for column, names in found.items()
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names)
    }


def _image_column(file: Path, schema: Any) -> str:
    """Return the column with the pictures: by its name, or as `datasets` writes one, a struct of bytes and path."""
    named = [name for name in _IMAGE_COLUMNS if name in schema.names]
    structs = [
        each.name for each in schema if str(each.type).startswith("struct<") and each.type.get_field_index("bytes") >= 0
    ]
    if not named and len(structs) != 1:
        raise ConfigError(
            f"{file} has the columns {schema.names}; one of {', '.join(_IMAGE_COLUMNS)} must hold pictures"
        )
    return str((named or structs)[0])


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """Open a Parquet file; what goes wrong with it inside the context is a `ConfigError`."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet") from error
    try:
        # As bytes: pyarrow takes no path of text that is not UTF-8.
        with pyarrow.OSFile(os.fsencode(path)) as stream, parquet.ParquetFile(stream) as file:
            yield file
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"{path} cannot be read as Parquet: {error}") from error
