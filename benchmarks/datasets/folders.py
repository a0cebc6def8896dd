"""Your own classified pictures: a folder per class, or WebDataset shards as CLIP_benchmark reads them.

| folder per class | |
|---|---|
| `dog/a.jpg`, `red_fox/b.jpg` | pictures; the names of classes are those of the folders, with a space for _ |
| `classnames.txt` | or stand here, one a line, in the sorted order of the folders; may be missing |

| shards | |
|---|---|
| `test/nshards.txt`, `test/0.tar`, ... | pairs of `000.jpg` and `000.cls`, an index into the names |
| `classnames.txt` | one name a line |
| `zeroshot_classification_templates.txt` | one template a line, with {c} for the name; may be missing |
"""

from __future__ import annotations

import hashlib
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from PIL import Image

from defense.benchmarks.datasets.base import File, Picture
from defense.benchmarks.datasets.files import (
    check_bytes,
    listed,
    number,
    read_text,
    require_folder,
)
from defense.data.images import DEFAULT_LIMITS, Limits, decode
from defense.data.labels import TEMPLATES, resolve_templates
from defense.data.listing import PICTURE_SUFFIXES, files_below, kind_of, why_ignored
from defense.errors import ConfigError, InvalidImageError

TITLE = "An image folder"
SOURCE = "your own disk: a folder per class, or WebDataset shards"


@dataclass(frozen=True)
class Classified:
    """Pictures with their classes.

    Attributes:
        class_names: Names of the classes.
        templates: Prompts, each with one literal {}.
        pictures: (key, picture, index of its class).
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...]
    pictures: tuple[tuple[str, Picture, int], ...]


@dataclass(frozen=True)
class Member:
    """A picture within an uncompressed tar file, read from its place there.

    Attributes:
        tar: The file.
        offset: First byte of the picture in it.
        size: Bytes of the picture.
    """

    tar: Path
    offset: int
    size: int

    def _bytes(self, limits: Limits = DEFAULT_LIMITS) -> bytes:
        if self.size > limits.max_bytes:  # asked before reading: a header states any size
            raise InvalidImageError("too_large", f"{self.tar} has a picture of {self.size} bytes; shrink it")
        try:
            with self.tar.open("rb") as stream:
                stream.seek(self.offset)
                return stream.read(self.size)
        except OSError as error:
            raise InvalidImageError("not_found", f"{self.tar} cannot be read: {error}") from error

    def digest(self) -> str:
        """Return the sha256 of the picture's bytes."""
        return hashlib.sha256(self._bytes()).hexdigest()

    def load(self, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture."""
        return decode(self._bytes(limits), limits=limits, rotate=False).image


def read_classified(root: Path) -> Classified:
    """Read either of the two layouts.

    Raises:
        ConfigError: It is neither, names and classes do not fit together, or files lie there that are no pictures.
    """
    require_folder(root, TITLE, SOURCE)
    return _read_shards(root) if (root / "test" / "nshards.txt").exists() else _read_folders(root)


def _read_folders(root: Path) -> Classified:
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not why_ignored(path.relative_to(root)))
    if not folders:
        raise ConfigError(f"{root} has no folder per class, nor test/nshards.txt")
    names = [folder.name.replace("_", " ") for folder in folders]
    if (root / "classnames.txt").exists():
        names = _lines(root / "classnames.txt")
    if len(names) != len(folders):
        raise ConfigError(f"{root / 'classnames.txt'} has {len(names)} names for {len(folders)} folders")
    pictures: list[tuple[str, Picture, int]] = []
    for label, folder in enumerate(folders):
        files = files_below(folder)
        if strangers := [str(path.relative_to(root)) for path in files if kind_of(path) != "pictures"]:
            raise ConfigError(f"{root} holds files that are no pictures: {listed(strangers)}")
        pictures += [(path.relative_to(root).as_posix(), File(path), label) for path in files]
    return Classified(tuple(names), TEMPLATES["simple"], tuple(pictures))


def _read_shards(root: Path) -> Classified:
    folder = root / "test"
    names = _lines(root / "classnames.txt")
    n_shards = number(read_text(folder / "nshards.txt"), range(1, 100_000), str(folder / "nshards.txt"))
    pictures: list[tuple[str, Picture, int]] = []
    for shard in range(n_shards):
        pictures += _members(folder / f"{shard}.tar", len(names))
    templates = TEMPLATES["simple"]
    path = root / "zeroshot_classification_templates.txt"
    if path.exists():
        templates = resolve_templates([line.replace("{c}", "{}") for line in _lines(path)])
    return Classified(tuple(names), templates, tuple(pictures))


def _lines(path: Path) -> list[str]:
    lines = [line.strip() for line in read_text(path).rstrip("\n").split("\n")]
    if "" in lines:  # dropped, it would shift all that follow
        raise ConfigError(f"{path}, line {lines.index('') + 1} is blank")
    return lines


def _members(path: Path, n_classes: int) -> list[tuple[str, Picture, int]]:
    """Return the pictures of a shard in its order."""
    pictures: dict[str, Member] = {}
    labels: dict[str, int] = {}
    try:
        with path.open("rb") as stream:
            check_bytes(stream.read(512), path)
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                name = PurePosixPath(member.name)
                if not member.isfile() or why_ignored(name):
                    continue
                key = str(name.with_name(name.name.partition(".")[0]))
                if name.suffix.lower() in PICTURE_SUFFIXES:
                    pictures[key] = Member(path, member.offset_data, member.size)
                elif name.suffix == ".cls":
                    content = tar.extractfile(member)
                    assert content is not None  # a regular file has one
                    labels[key] = number(content.read().decode("ascii", "replace"), range(n_classes), f"{path}: {name}")
    except (OSError, tarfile.TarError) as error:
        raise ConfigError(f"{path} cannot be read as a shard: {error}") from error
    if odd := sorted(pictures.keys() ^ labels.keys()):
        raise ConfigError(f"{path}: {listed(odd)} has a picture without a .cls file, or the other way round")
    return [(f"{path.stem}/{key}", picture, labels[key]) for key, picture in pictures.items()]
