"""What methods are fitted on: pictures of the training split, and the stock CLIP's embeddings of them.

A task attacks either with words (each training picture has a twin without the writing) or with an attribute (each
training picture has a label and an attribute, which make its group).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image

from defense.benchmarks.datasets import Dataset, Example, Task
from defense.benchmarks.methods.base import Encoder, NotApplicableError
from defense.data.labels import Prompts, check_labels, resolve_templates
from defense.hosts.clip import Clip

N_MOST = 2000
"""Training pictures that a method looks at, twins not counted: as many as the defenses that ship were fitted on."""

CLEAN_BUDGET = 0.01
"""Accuracy that an edit may cost where nothing is to be gained: the budget of Dyslexify (arXiv:2508.20570)."""

_BATCH = 50


def training_split(task: Task, who: str) -> Dataset:
    """Return the training split.

    Raises:
        NotApplicableError: The task has none; `who` needs it.
    """
    if task.train is None:
        raise NotApplicableError(f"{who} needs a training split, and {task.title} has none")
    return task.train


def training_twins(task: Task, who: str) -> tuple[Dataset, Dataset]:
    """Return the training pictures with a word on them, and their twins without, in the same order.

    Raises:
        NotApplicableError: The task has no such pictures; `who` needs them.
    """
    train = training_split(task, who)
    if task.train_clean is None:
        raise NotApplicableError(
            f"{who} needs training pictures with and without a word written on them, and {task.title} has none"
        )
    return train, task.train_clean


def training_groups(task: Task, who: str) -> Dataset:
    """Return the training pictures with label and attribute.

    Raises:
        NotApplicableError: The task has no such pictures; `who` needs them.
    """
    train = training_split(task, who)
    if not train.group_names:
        raise NotApplicableError(
            f"{who} needs training pictures with an attribute, and those of {task.title} have none"
        )
    return train


def training_sides(task: Task, who: str) -> list[list[Example]]:
    """Return up to `N_MOST` training pictures as lists: what is to get better first, what must not get worse last.

    Of a task with words: the attacked pictures, and their clean twins. Of a task with groups: one list, whose worst
    group is to get better and whose average must not get worse.

    Raises:
        NotApplicableError: The task has no training pictures with twins or groups; `who` needs them.
    """
    has_groups = bool(training_split(task, who).group_names)
    datasets = (training_groups(task, who),) if has_groups else training_twins(task, who)
    rows = picked(datasets[0])
    return [[dataset.examples[row] for row in rows] for dataset in datasets]


def picked(dataset: Dataset, n: int = N_MOST) -> list[int]:
    """Return the indices of at most `n` pictures, spread over the data set; of groups, as many of each as there are."""
    if not dataset.group_names:
        return _spread(list(range(len(dataset.examples))), n)
    groups = range(len(dataset.group_names))
    members = [[i for i, example in enumerate(dataset.examples) if example.group == group] for group in groups]
    return sorted(i for group in members for i in _spread(group, n // len(members)))


def _spread(items: list[int], n: int) -> list[int]:
    return [items[i * len(items) // n] for i in range(n)] if len(items) > n else items


def batches(examples: Sequence[Example]) -> Iterator[list[Image.Image]]:
    """Yield the pictures, a few at a time.

    Raises:
        InvalidImageError: One cannot be read.
    """
    for first in range(0, len(examples), _BATCH):
        yield [example.load() for example in examples[first : first + _BATCH]]


def pixel_batches(clip: Clip, examples: Sequence[Example]) -> Iterator[np.ndarray]:
    """Yield pixel_values, float32 [n, 3, height, width], a few pictures at a time."""
    for pictures in batches(examples):
        yield np.stack([clip.preprocess(picture) for picture in pictures])


def image_embeds_of(clip: Clip, examples: Sequence[Example]) -> np.ndarray:
    """Return the stock CLIP's image_embeds, float32 [n, d_embed], normalized."""
    encoder = Encoder(clip)
    return np.concatenate([encoder.image_embeds(pictures) for pictures in batches(examples)])


def text_embeds_of(clip: Clip, names: Sequence[str], templates: Sequence[str], *, normalize_each: bool) -> np.ndarray:
    """Return the stock CLIP's text_embeds, float32 [n_labels, d_embed], normalized."""
    prompts = Prompts(check_labels(names), resolve_templates(templates))
    return Encoder(clip).text_embeds(prompts, normalize_each=normalize_each)


def class_embeds_of(clip: Clip, dataset: Dataset) -> np.ndarray:
    """Return the text_embeds of a data set's classes, float32 [n_classes, d_embed], normalized."""
    return text_embeds_of(clip, dataset.class_names, dataset.templates, normalize_each=dataset.normalize_each)


def accuracies(image_embeds: np.ndarray, class_embeds: np.ndarray, examples: Sequence[Example]) -> np.ndarray:
    """Return the share of right answers in each group that occurs, [n_groups]; of pictures without groups, [1]."""
    answers = (image_embeds @ class_embeds.T).argmax(1)
    is_right = answers == np.array([example.label for example in examples])
    groups = np.array([-1 if example.group is None else example.group for example in examples])
    return np.array([is_right[groups == group].mean() for group in np.unique(groups)])


def side_accuracies(
    image_embeds: Sequence[np.ndarray], class_embeds: np.ndarray, sides: Sequence[Sequence[Example]]
) -> tuple[float, float]:
    """Return the accuracy of what is to get better and of what must not get worse; see `training_sides`."""
    found = [accuracies(x, class_embeds, side) for x, side in zip(image_embeds, sides, strict=True)]
    return float(found[0].min()), float(found[-1].mean())


def best_of(scores: Sequence[tuple[float, float]]) -> int:
    """Return the index of the edit that helps most, of those that cost at most `CLEAN_BUDGET`.

    Args:
        scores: `side_accuracies` of each edit; the first is that of none. Of equal ones the first wins.
    """
    floor = scores[0][1] - CLEAN_BUDGET
    bearable = [i for i, (_, kept) in enumerate(scores) if kept >= floor]
    return max(bearable, key=lambda i: scores[i][0])


def digest_of(*arrays: np.ndarray) -> str:
    """Return a sha256 of arrays: shapes, types and bytes."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()
