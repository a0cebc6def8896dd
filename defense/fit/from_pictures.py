"""Pictures of a user made into `Pairs` or `Groups`.

| from | right answer | what should not count |
|---|---|---|
| `text_material` | plain CLIP's own, on the picture as it is | another label, written on it |
| `metadata_material` | a column of a csv file | another column; without one, whether plain CLIP is right |
| `spurious_material` | plain CLIP's, with thresholds for each spurious prompt | the spurious prompt that fits best |

The first and the last ask for no labels. Pictures that cannot be read are left out and named.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import torch
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.data.progress import SILENT, Progress
from defense.data.sources import Picture, Pictures, decoded, prepared
from defense.data.writing import enlarged, writable, write_word
from defense.errors import ConfigError

from .material import Groups, Material, Pairs
from .metadata import Metadata

WORD_HEIGHT = (0.10, 0.28)
"""Of the written label's capitals, as a fraction of the picture's shorter side."""

_DECODED_AT_ONCE = 16
"""Whole pictures are large: 36 MB for one of 12 megapixels."""


# --- pictures -----------------------------------------------------------------------------------------------------


def sample(source: Pictures, n: int, seed: int) -> list[Picture]:
    """Return up to `n` pictures of a source, taken from its shards in a random order that `seed` decides."""
    return list(islice(_shuffled(source, seed), n))


def _shuffled(source: Pictures, seed: int) -> Iterator[Picture]:
    for shard in np.random.default_rng(seed).permutation(len(source.shards)):
        yield from source.shards[shard].pictures()


@dataclass(frozen=True)
class _Read:
    """Pictures that could be read, in order, with pixel_values float32 [n, 3, height, width] and the index of each."""

    rows: list[int]
    pictures: list[Picture]
    pixel_values: np.ndarray
    unreadable: tuple[str, ...]


def _read(clf: RobustClassifier, pictures: Sequence[Picture], progress: Progress) -> _Read:
    found = []
    with progress.stage("reading pictures", len(pictures)) as advance:
        for batch in prepared(clf.clip.preprocess, pictures):
            found += [pixels for _, pixels in batch]
            advance(len(batch))
    rows = [row for row, pixels in enumerate(found) if pixels is not None]
    unreadable = tuple(picture.name for picture, pixels in zip(pictures, found, strict=True) if pixels is None)
    _check_any(rows, pictures)
    pixel_values = np.stack([pixels for pixels in found if pixels is not None])
    return _Read(rows, [pictures[row] for row in rows], pixel_values, unreadable)


def _check_any(readable: Collection[Any], pictures: Sequence[Picture]) -> None:
    if not readable:
        raise ConfigError(f"none of {len(pictures)} pictures can be read; is this the right folder?")


def _embeds(clf: RobustClassifier, pixel_values: np.ndarray) -> np.ndarray:
    """Return image_embeds of plain CLIP, float32 [n, d_embed], normalized."""
    n, batch = len(pixel_values), clf.batch_size
    return np.concatenate([clf.encode_pixels(pixel_values[i : i + batch]) for i in range(0, n, batch)])


def _provenance(kind: str, pictures: Sequence[Picture], n_unreadable: int, **more: Any) -> dict[str, Any]:
    """Return what was read, with a sha256 over the names of the pictures used."""
    names = [picture.name for picture in pictures]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return {"kind": kind, "n": len(names), "n_unreadable": n_unreadable, "pictures_sha256": digest, **more}


# --- text ---------------------------------------------------------------------------------------------------------


def text_material(
    clf: RobustClassifier, source: Pictures, *, n: int, seed: int, progress: Progress = SILENT
) -> Material:
    """Return pictures with a wrong label written on each, and their twins.

    The right answer is plain CLIP's own on the picture without the writing: no labels are needed, and what the defense
    may lose is agreement with plain CLIP where nothing is written.

    Args:
        clf: Plain CLIP with the labels to choose from.
        source: Pictures; some writing on them does no harm.
        n: Pictures to use, at most.
        seed: Decides which pictures, which label is written on each, and how.
        progress: Told of the pictures.

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
    used: list[Picture] = []
    unreadable: list[str] = []
    columns: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    with progress.stage("reading pictures", len(pictures)) as advance:
        for batch in decoded(pictures, _DECODED_AT_ONCE):
            readable = [(picture, image) for picture, image in batch if image is not None]
            unreadable += [picture.name for picture, image in batch if image is None]
            if readable:
                used += [picture for picture, _ in readable]
                columns.append(_with_twins(clf, readable, words, choices, seed))
            advance(len(batch))
    _check_any(used, pictures)
    pairs = Pairs(*(torch.from_numpy(np.concatenate(column)) for column in zip(*columns, strict=True)))
    provenance = _provenance("text", used, len(unreadable), source_sha256=source.fingerprint)
    return Material(pairs, np.zeros(len(used), dtype=np.int64), tuple(unreadable), provenance)


def _with_twins(
    clf: RobustClassifier,
    readable: Sequence[tuple[Picture, Image.Image]],
    words: Sequence[str | None],
    choices: Sequence[int],
    seed: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the columns of `Pairs` for some pictures.

    Args:
        clf: Plain CLIP with the labels to choose from.
        readable: The pictures, decoded.
        words: Each label as it can be written; None where it cannot.
        choices: The labels that can, by index.
        seed: Decides which label is written on each, and how.
    """
    preprocess = clf.clip.preprocess
    readable = [(picture, enlarged(image)) for picture, image in readable]  # so that twins differ by the writing alone
    clean = np.stack([preprocess(image) for _, image in readable])
    label = (_embeds(clf, clean) @ clf.text_embeds().T).argmax(1)
    word = np.array(
        [
            int(_rng(seed, picture).choice([choice for choice in choices if choice != answer]))
            for (picture, _), answer in zip(readable, label, strict=True)
        ]
    )

    def written(*, blank: bool) -> np.ndarray:
        changed = (
            write_word(image, _rng(seed + 1, picture), words[index], height=WORD_HEIGHT, blank=blank)
            for (picture, image), index in zip(readable, word, strict=True)
        )
        return np.stack([preprocess(image) for image in changed])

    return clean, written(blank=True), written(blank=False), label, word


def _rng(seed: int, picture: Picture) -> np.random.Generator:
    return np.random.default_rng([seed, zlib.crc32(picture.name.encode())])


def metadata_material(
    clf: RobustClassifier, metadata: Metadata, *, n: int, seed: int, progress: Progress = SILENT
) -> Material:
    """Return group-labeled pictures, as many of each group as may be.

    Where no attribute is known, it is whether plain CLIP is right: its errors stand for the minority (Liu et al. 2021,
    arXiv:2107.09044, "Just Train Twice").

    Args:
        clf: Plain CLIP with the classes for labels.
        metadata: The rows.
        n: Pictures to use, at most.
        seed: Decides which.
        progress: Told of the pictures.

    Raises:
        ConfigError: A group is empty, or no picture can be read.
    """
    n_values = max(1, len(metadata.values))
    group = metadata.y * n_values + (0 if metadata.a is None else metadata.a)
    rows = _balanced(group, n, seed)
    pictures = [metadata.pictures[row] for row in rows]
    read = _read(clf, pictures, progress)
    y = metadata.y[rows][read.rows]
    values = metadata.values
    if metadata.a is None:
        answers = (_embeds(clf, read.pixel_values) @ clf.text_embeds().T).argmax(1)
        a, values = (answers == y).astype(np.int64), ("plain CLIP is wrong", "plain CLIP is right")
    else:
        a = metadata.a[rows][read.rows]
    kind = "errors of plain CLIP" if metadata.a is None else "group labels"
    material = _groups(clf, read, y, a, values, kind, n_test_rows_left_out=metadata.n_test)
    assert isinstance(material.data, Groups)
    return replace(material, data=replace(material.data, shares=_shares(metadata, y, a)))


def _shares(metadata: Metadata, y: np.ndarray, a: np.ndarray) -> dict[tuple[int, int], float]:
    """Return the share of each group among all rows: the pictures that are used are balanced.

    Args:
        metadata: All rows.
        y: Classes of the pictures that are used, int64 [n].
        a: Their attribute, int64 [n], which is known of these alone where no column holds it: then each class has the
            share of its rows, and within it each value that of its pictures.
    """
    if metadata.a is not None:
        counts = Counter(zip(metadata.y.tolist(), metadata.a.tolist(), strict=True))
        return {group: count / len(metadata.y) for group, count in counts.items()}
    counts = Counter(zip(y.tolist(), a.tolist(), strict=True))
    of_class = {each: float((metadata.y == each).mean()) for each in set(y.tolist())}
    return {(i, j): of_class[i] * count / int((y == i).sum()) for (i, j), count in counts.items()}


def _balanced(group: np.ndarray, n: int, seed: int) -> np.ndarray:
    """Return the index of up to `n` pictures, from each group as evenly as its size allows."""
    rng = np.random.default_rng(seed)
    queues = [rng.permutation(np.flatnonzero(group == each)) for each in np.unique(group)]
    rounds = [queue[turn] for turn in range(max(map(len, queues))) for queue in queues if turn < len(queue)]
    return np.sort(np.array(rounds[:n]))


# --- groups, without labels ---------------------------------------------------------------------------------------


def spurious_material(
    clf: RobustClassifier,
    source: Pictures,
    spurious: Sequence[str],
    *,
    n: int,
    seed: int,
    progress: Progress = SILENT,
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
        progress: Told of the pictures.

    Raises:
        ConfigError: There are fewer than two prompts or classes, a group comes out empty, or no picture can be read.
    """
    if len(spurious) < 2:
        raise ConfigError(f"the spurious prompts are {list(spurious)}; give two or more, which exclude each other")
    if len(clf.classes_) < 2:
        raise ConfigError(f"the classes are {list(clf.classes_)}; give two or more")
    pictures = sample(source, n, seed)
    read = _read(clf, pictures, progress)
    embeds = _embeds(clf, read.pixel_values)
    spurious_embeds = RobustClassifier(clf.clip).set_labels(spurious, "{}").text_embeds()
    a = (embeds @ spurious_embeds.T).argmax(1)
    margins = _margins(embeds @ clf.text_embeds().T)
    for value in np.unique(a):
        margins[a == value] -= np.apply_along_axis(_threshold, 0, margins[a == value])
    y = margins.argmax(1)
    more = {"spurious": list(spurious), "source_sha256": source.fingerprint}
    return _groups(clf, read, y, a, tuple(spurious), "spurious prompts", **more)


def _margins(logits: np.ndarray) -> np.ndarray:
    """Return how far each label is above the best of the others, [n, n_labels]."""
    others = np.stack([np.delete(logits, label, axis=1).max(1) for label in range(logits.shape[1])], axis=1)
    margins: np.ndarray = logits - others
    return margins


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
    read: _Read,
    y: np.ndarray,
    a: np.ndarray,
    values: Sequence[str],
    kind: str,
    **more: Any,
) -> Material:
    """Return the material of group-labeled pictures, none of whose groups is empty."""
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
    provenance = _provenance(kind, read.pictures, len(read.unreadable), groups=sizes, **more)
    return Material(data, y * len(values) + a, read.unreadable, provenance)
