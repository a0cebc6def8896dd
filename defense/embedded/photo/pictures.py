"""Labeled photographs from disk: a folder of Parquet files, or an unpacked `tiny-imagenet-200`. Nothing is downloaded.

A folder of Parquet files holds `train-*.parquet` and `val-*.parquet` (columns `image`, encoded, and `label`, an index
into `classnames.txt`) and `wnids.json`, from class names to WordNet ids.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from defense.data.listing import list_files
from defense.errors import ConfigError, MissingDependencyError

from .names import load_words

Split = Literal["train", "val"]
SIDE = 64
"""Width and height of these photographs, in pixels."""
HELD_OUT_EVERY = 5
"""Of the classes at hand, in the order of their WordNet ids, every fifth is never trained on."""


@dataclass(frozen=True)
class Photographs:
    """Small photographs in memory.

    Attributes:
        pixels: uint8 [n, SIDE, SIDE, 3].
        labels: Classes, as indices into `Words.names`, int64 [n].
        classes: All classes of the folder, in order, int64.
    """

    pixels: np.ndarray
    labels: np.ndarray
    classes: np.ndarray

    @property
    def is_held_out(self) -> np.ndarray:
        """Which photographs show a class that is never trained on, bool [n]."""
        return np.isin(self.labels, self.classes[::HELD_OUT_EVERY])

    def trained_on(self) -> Photographs:
        """Return the photographs of the other classes."""
        kept = ~self.is_held_out
        return Photographs(self.pixels[kept], self.labels[kept], self.classes)


def read_photographs(folder: Path, split: Split) -> Photographs:
    """Return the photographs of a split.

    Raises:
        ConfigError: The folder is of neither kind, or has no photographs of the split.
        MissingDependencyError: It holds Parquet files, and pyarrow is not installed.
    """
    if (folder / "wnids.json").exists():
        rows = list(_parquet_rows(folder, split))
    elif (folder / "wnids.txt").exists():
        rows = list(_tiny_rows(folder, split))
    else:
        raise ConfigError(
            f"{folder} holds neither wnids.json (Parquet files) nor wnids.txt (tiny-imagenet-200); give such a folder"
        )
    if not rows:
        raise ConfigError(f"{folder} holds no photographs of the split {split!r}")
    index_of = {wnid: index for index, wnid in enumerate(load_words().wnids)}
    pixels = np.stack([_decode(data) for data, _ in rows])
    labels = np.array([index_of[wnid] for _, wnid in rows], np.int64)
    return Photographs(pixels, labels, np.unique(labels))


def _parquet_rows(folder: Path, split: Split) -> Iterator[tuple[bytes, str]]:
    """Yield pictures, encoded, and their WordNet ids."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise MissingDependencyError("pyarrow", "parquet") from error
    wnids = json.loads((folder / "wnids.json").read_text(encoding="utf-8"))
    names = (folder / "classnames.txt").read_text(encoding="utf-8").splitlines()
    for path in sorted(folder.glob(f"{split}-*.parquet")):
        table = pyarrow.parquet.read_table(path, columns=["image", "label"])
        for data, label in zip(table["image"].to_pylist(), table["label"].to_pylist(), strict=True):
            yield data, wnids[names[label]]


def _tiny_rows(folder: Path, split: Split) -> Iterator[tuple[bytes, str]]:
    """Yield pictures, encoded, and their WordNet ids."""
    if split == "train":
        for path in sorted(folder.glob("train/n*/images/*.JPEG")):
            yield path.read_bytes(), path.parts[-3]
        return
    for line in (folder / "val" / "val_annotations.txt").read_text(encoding="utf-8").splitlines():
        name, wnid = line.split("\t")[:2]
        yield (folder / "val" / "images" / name).read_bytes(), wnid


def _decode(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB").resize((SIDE, SIDE), Image.Resampling.BICUBIC))


def crops_of(folder: Path, n: int, side: int, seed: int) -> np.ndarray:
    """Return crops of large pictures of any content, uint8 [n, side, side, 3]: sharp, and without words.

    Args:
        folder: Searched for pictures as `list_files` does it; each large one gives about as many crops.
        n: How many.
        side: Their width and height, in pixels. A crop covers between that and the whole picture.
        seed: Decides where they are taken from.

    Raises:
        ConfigError: There is no such folder, or no large picture in it.
    """
    paths = list_files(folder).files.get("pictures", ())
    pictures = [path for path in paths if min(_size_of(path)) >= 2 * side]
    if not pictures:
        raise ConfigError(f"{folder} holds no picture of at least {2 * side} pixels each way")
    crops = np.empty((n, side, side, 3), np.uint8)
    for number, rows in enumerate(np.array_split(np.arange(n), len(pictures))):
        rng = np.random.default_rng([seed, number])
        file = Image.open(pictures[number])
        file.draft("RGB", (1600, 1600))  # of a JPEG, no more is decoded than that
        picture = file.convert("RGB")
        picture.thumbnail((1600, 1600))
        for row in rows:
            extent = side * (min(picture.size) / side) ** rng.uniform(0, 1)
            left, top = rng.uniform(0, picture.width - extent), rng.uniform(0, picture.height - extent)
            box = (left, top, left + extent, top + extent)
            crops[row] = np.asarray(picture.resize((side, side), Image.Resampling.BICUBIC, box, reducing_gap=2.0))
    return crops


def _size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as picture:
        return picture.size
