"""What `defense fit` fits on: pictures of a user, made into `Pairs` or `Groups`.

| from | right answer | what should not count |
|---|---|---|
| `text_material` | plain CLIP's own, on the picture as it is | another label, written on it |
| `metadata_material` | a column of a csv file | another column; without one, whether plain CLIP is right |
| `spurious_material` | plain CLIP's, with thresholds for each spurious prompt | the spurious prompt that fits best |

The first and the last ask for no labels. Pictures that cannot be read are left out and named.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .activations import Tap, prepared
from .classifier import RobustClassifier
from .errors import ConfigError
from .fit import Groups, Pairs
from .pictures import Picture, Pictures
from .writing import writable, write_word

WORD_HEIGHT = (0.14, 0.28)
"""Font size of the written label, as a fraction of the picture's shorter side."""

_TEST_SPLITS = ("2", "2.0", "test")
_MOST_VALUES = 20
"""Distinct values of an attribute; a column with more is something else."""


@dataclass(frozen=True)
class Material:
    """Pictures to fit on.

    Attributes:
        data: The pictures themselves.
        strata: Which group each belongs to, int64 [n]; folds hold the same share of each.
        unreadable: Names of the pictures that were left out.
        provenance: Where they came from, as JSON values.
    """

    data: Pairs | Groups
    strata: np.ndarray
    unreadable: tuple[str, ...]
    provenance: Mapping[str, Any]

    def folds(self, n: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return `n` splits into pictures to fit on and pictures held out, each by index, int64.

        Raises:
            ConfigError: A group has fewer pictures than there are folds.
        """
        rng = np.random.default_rng([seed, n])
        fold_of = np.empty(len(self.strata), dtype=np.int64)
        for group in np.unique(self.strata):
            rows = rng.permutation(np.flatnonzero(self.strata == group))
            if len(rows) < n:
                raise ConfigError(
                    f"{len(rows)} pictures (of one group, where there are groups) cannot be split into {n} folds; give "
                    "more pictures or fewer --folds"
                )
            fold_of[rows] = np.arange(len(rows)) % n
        splits = [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(n)]
        return [(torch.from_numpy(fitted), torch.from_numpy(held_out)) for fitted, held_out in splits]


# --- pictures -----------------------------------------------------------------------------------------------------


def sample(source: Pictures, n: int, seed: int) -> list[Picture]:
    """Return up to `n` pictures of a source, in random order of its shards."""
    return list(islice(_shuffled(source, seed), n))


def _shuffled(source: Pictures, seed: int) -> Iterator[Picture]:
    for shard in np.random.default_rng(seed).permutation(len(source.shards)):
        yield from source.shards[shard].pictures()


@dataclass(frozen=True)
class _Read:
    """Pictures that could be read, in order, with pixel_values float32 [n, 3, height, width] and the index of each."""

    rows: list[int]
    pixel_values: np.ndarray
    unreadable: tuple[str, ...]


def _read(
    clf: RobustClassifier,
    pictures: Sequence[Picture],
    change: Callable[[Picture, Image.Image], Image.Image] = lambda _, image: image,
) -> _Read:
    tap = Tap(clf.host, "blocks.0.hook_resid_post")
    found = [pixels for batch in prepared(tap, pictures, change=change) for _, pixels in batch]
    readable = {row: pixels for row, pixels in enumerate(found) if pixels is not None}
    unreadable = tuple(picture.name for picture, pixels in zip(pictures, found, strict=True) if pixels is None)
    if not readable:
        raise ConfigError(f"none of {len(pictures)} pictures can be read; is this the right folder?")
    return _Read(list(readable), np.stack(list(readable.values())), unreadable)


def _embeds(clf: RobustClassifier, pixel_values: np.ndarray) -> np.ndarray:
    """Return image_embeds of plain CLIP, float32 [n, d_embed], normalised."""
    n, batch = len(pixel_values), clf.batch_size
    return np.concatenate([clf.encode_pixels(pixel_values[i : i + batch]) for i in range(0, n, batch)])


def _provenance(kind: str, pictures: Sequence[Picture], read: _Read, **more: Any) -> dict[str, Any]:
    """Return what was read, with a sha256 over the names of the pictures used."""
    names = [pictures[row].name for row in read.rows]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return {"kind": kind, "n": len(names), "n_unreadable": len(read.unreadable), "pictures_sha256": digest, **more}


# --- text ---------------------------------------------------------------------------------------------------------


def text_material(clf: RobustClassifier, source: Pictures, *, n: int, seed: int) -> Material:
    """Return pictures with a wrong label written on each, and their twins.

    The right answer is plain CLIP's own on the picture without the writing: no labels are needed, and what the defense
    may lose is agreement with plain CLIP where nothing is written.

    Args:
        clf: Plain CLIP with the labels to choose from.
        source: Pictures; some writing on them does no harm.
        n: Pictures to use, at most.
        seed: Decides which pictures, which label is written on each, and how.

    Raises:
        ConfigError: Fewer than two labels can be written in letters A-Z and a-z, or no picture can be read.
    """
    words = [writable(str(label)) for label in clf.classes_]
    choices = [index for index, word in enumerate(words) if word]
    if len(choices) < 2:
        raise ConfigError(
            f"{len(choices)} of the {len(words)} labels can be written with the letters A-Z; it takes two, so that a "
            "wrong one can be written on any picture. Give more labels"
        )
    pictures = sample(source, n, seed)
    clean = _read(clf, pictures)
    label = (_embeds(clf, clean.pixel_values) @ clf.text_embeds().T).argmax(1)
    readable = [pictures[row] for row in clean.rows]
    chosen = {  # by picture: two folders may hold one of the same name
        picture: int(_rng(seed, picture).choice([c for c in choices if c != answer]))
        for picture, answer in zip(readable, label, strict=True)
    }

    def written(*, blank: bool) -> np.ndarray:
        def change(picture: Picture, image: Image.Image) -> Image.Image:
            rng = _rng(seed + 1, picture)
            return write_word(image, rng, words[chosen[picture]], height=WORD_HEIGHT, blank=blank)

        return _read(clf, readable, change).pixel_values

    data = Pairs(
        clean=torch.from_numpy(clean.pixel_values),
        neutral=torch.from_numpy(written(blank=True)),
        attacked=torch.from_numpy(written(blank=False)),
        label=torch.from_numpy(label),
        word=torch.tensor([chosen[picture] for picture in readable]),
    )
    provenance = _provenance("text", pictures, clean, source_sha256=source.fingerprint)
    return Material(data, np.zeros(len(label), dtype=np.int64), clean.unreadable, provenance)


def _rng(seed: int, picture: Picture) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(picture.name.encode())])


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
        Picture(row[path_column], i, _within(root, row[path_column], f"{path}, line {line}"))
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


def metadata_material(clf: RobustClassifier, metadata: Metadata, *, n: int, seed: int) -> Material:
    """Return group-labelled pictures, as many of each group as may be.

    Where no attribute is known, it is whether plain CLIP is right: its errors stand for the minority (Liu et al. 2021,
    arXiv:2107.09044, "Just Train Twice").

    Args:
        clf: Plain CLIP with the classes for labels.
        metadata: The rows.
        n: Pictures to use, at most.
        seed: Decides which.

    Raises:
        ConfigError: A group is empty, or no picture can be read.
    """
    n_values = max(1, len(metadata.values))
    group = metadata.y * n_values + (0 if metadata.a is None else metadata.a)
    rows = _balanced(group, n, seed)
    pictures = [metadata.pictures[row] for row in rows]
    read = _read(clf, pictures)
    y = metadata.y[rows][read.rows]
    values = metadata.values
    if metadata.a is None:
        answers = (_embeds(clf, read.pixel_values) @ clf.text_embeds().T).argmax(1)
        a, values = (answers == y).astype(np.int64), ("plain CLIP is wrong", "plain CLIP is right")
    else:
        a = metadata.a[rows][read.rows]
    kind = "errors of plain CLIP" if metadata.a is None else "group labels"
    return _groups(clf, pictures, read, y, a, values, kind, n_test_rows_left_out=metadata.n_test)


def _balanced(group: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return the index of up to `n` pictures, from each group as evenly as its size allows."""
    rng = np.random.default_rng(seed)
    queues = [rng.permutation(np.flatnonzero(group == each)) for each in np.unique(group)]
    rounds = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return np.sort(np.array(rounds[:n]))


# --- groups, without labels ---------------------------------------------------------------------------------------


def spurious_material(
    clf: RobustClassifier, source: Pictures, spurious: Sequence[str], *, n: int, seed: int
) -> Material:
    """Return pictures grouped by what CLIP sees in them.

    The attribute is the spurious prompt that fits best. The class is plain CLIP's, but judged among pictures of one
    attribute: a class's margin over the others counts from the threshold that best splits those pictures in two (Otsu
    1979, IEEE Trans. SMC 9(1)). A cue moves the margins of all of them alike, so it does not decide, and the class
    departs from plain CLIP's where it did. Every class must be seen with every attribute, or a split cuts through one.

    Args:
        clf: Plain CLIP with the classes for labels.
        source: Pictures of the classes.
        spurious: Two prompts or more for what should not count, taken as they are.
        n: Pictures to use, at most.
        seed: Decides which.

    Raises:
        ConfigError: There are fewer than two prompts or classes, a group comes out empty, or no picture can be read.
    """
    if len(spurious) < 2:
        raise ConfigError(f"the spurious prompts are {list(spurious)}; give two or more, which exclude each other")
    if len(clf.classes_) < 2:
        raise ConfigError(f"the classes are {list(clf.classes_)}; give two or more")
    pictures = sample(source, n, seed)
    read = _read(clf, pictures)
    embeds = _embeds(clf, read.pixel_values)
    spurious_embeds = RobustClassifier(clf.host).set_labels(spurious, "{}").text_embeds()
    a = (embeds @ spurious_embeds.T).argmax(1)
    margins = _margins(embeds @ clf.text_embeds().T)
    for value in np.unique(a):
        margins[a == value] -= np.apply_along_axis(_threshold, 0, margins[a == value])
    y = margins.argmax(1)
    more = {"spurious": list(spurious), "source_sha256": source.fingerprint}
    return _groups(clf, pictures, read, y, a, tuple(spurious), "spurious prompts", **more)


def _margins(logits: np.ndarray) -> np.ndarray:
    """Return how far each label is above the best of the others, [n, n_labels]."""
    others = np.stack([np.delete(logits, label, axis=1).max(1) for label in range(logits.shape[1])], axis=1)
    return logits - others


def _threshold(values: np.ndarray) -> float:
    """Return where values [n] are best split in two: the means of the parts differ most, weighed by their sizes."""
    if len(values) < 2:
        return 0.0
    ordered = np.sort(values.astype(np.float64))
    below = np.arange(1, len(ordered))
    above = len(ordered) - below
    sums = ordered.cumsum()
    between = below * above * (sums[:-1] / below - (sums[-1] - sums[:-1]) / above) ** 2
    cut = int(between.argmax())
    return float(ordered[cut] + ordered[cut + 1]) / 2


def _groups(
    clf: RobustClassifier,
    pictures: Sequence[Picture],
    read: _Read,
    y: np.ndarray,
    a: np.ndarray,
    values: Sequence[str],
    kind: str,
    **more: Any,
) -> Material:
    """Return the material of group-labelled pictures, none of whose groups is empty."""
    names = [str(label) for label in clf.classes_]
    counts = Counter(zip(y.tolist(), a.tolist(), strict=True))
    sizes = {f"{names[i]}, {values[j]}": counts[i, j] for i in range(len(names)) for j in range(len(values))}
    empty = [group for group, size in sizes.items() if size == 0]
    if empty:
        raise ConfigError(
            f"no picture is in the group {'; '.join(empty)} (there are {json.dumps(sizes, ensure_ascii=False)}); every "
            "class needs pictures with every value. Give more pictures, or fewer classes"
        )
    data = Groups(torch.from_numpy(read.pixel_values), torch.from_numpy(y), torch.from_numpy(a))
    provenance = _provenance(kind, pictures, read, groups=sizes, **more)
    return Material(data, y * len(values) + a, read.unreadable, provenance)
