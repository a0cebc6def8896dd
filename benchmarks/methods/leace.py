"""LEACE: the least change to the image embeddings after which no linear classifier tells the concept.

With x the embedding and z the concept (one column per value but one),

    r(x) = x - W^+ P W (x - E[x]),     W = (cov(x, x)^1/2)^+,     P the projection onto the columns of W cov(x, z)

The concept is what the task attacks with: whether a word is written (on the training pictures and their twins), or the
spurious attribute. Groups count alike there: in proportion to their sizes, the attribute would go with the label, and
the label would be erased with it.

Source, and what differs from it: `Leace.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.embeddings import EditedImages
from defense.benchmarks.methods.material import (
    digest_of,
    image_embeds_of,
    picked,
    training_groups,
    training_split,
    training_twins,
)
from defense.hosts.clip import Clip


@dataclass(frozen=True)
class Erasure:
    """The fitted map.

    Attributes:
        mean: E[x], float64 [d_embed].
        matrix: W^+ P W, float64 [d_embed, d_embed].
    """

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Return r(x), float64 [n, d_embed]."""
        return x - (x - self.mean) @ self.matrix.T


def erasure_of(x: np.ndarray, z: np.ndarray, weights: np.ndarray | None = None) -> Erasure:
    """Return the map that erases a concept.

    Args:
        x: Embeddings, [n, d_embed].
        z: The concept, [n, n_columns].
        weights: Of the rows, [n]; equal by default.
    """
    x, z = x.astype(np.float64), z.astype(np.float64)
    weights = np.full(len(x), 1 / len(x)) if weights is None else weights / weights.sum()
    mean = weights @ x
    centered = x - mean
    cov_xx = (centered * weights[:, None]).T @ centered
    cov_xz = (centered * weights[:, None]).T @ (z - weights @ z)
    values, vectors = np.linalg.eigh(cov_xx)
    is_used = values > values.max() * len(values) * np.finfo(np.float64).eps
    roots, vectors = np.sqrt(values[is_used]), vectors[:, is_used]
    whiten, unwhiten = (vectors / roots) @ vectors.T, (vectors * roots) @ vectors.T
    directions, lengths, _ = np.linalg.svd(whiten @ cov_xz, full_matrices=False)
    # A whitened column is a correlation, at most about 1: what is below rounding is no direction.
    basis = directions[:, lengths > len(values) * np.finfo(np.float64).eps]
    return Erasure(mean, unwhiten @ basis @ basis.T @ whiten)


@dataclass
class Leace:
    """Erase the written word's presence, or the spurious attribute, from the image embeddings."""

    record: ClassVar[Record] = Record(
        "Belrose et al. 2023, arXiv:2306.03819",
        "theorem 4.3",
        "Fitted on the image embeddings alone, not on every layer; edited embeddings are normalized again, as the "
        "cosine to the labels asks; equal weight of groups.",
    )
    name: str
    _erasure: Erasure | None = field(default=None, init=False)
    _concept: str = field(default="", init=False)
    _n: int = field(default=0, init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return what was erased, and a hash of the map."""
        assert self._erasure is not None, "fit() comes first"
        sha256 = digest_of(self._erasure.mean, self._erasure.matrix)
        return {"concept": self._concept, "n_train": self._n, "map_sha256": sha256}

    def fit(self, clip: Clip, task: Task) -> None:
        """Fit the map on the training pictures.

        Raises:
            NotApplicableError: The task has no training pictures with twins or groups.
        """
        train = training_split(task, self.name)
        if train.group_names:
            self._fit_groups(clip, task)
        else:
            self._fit_twins(clip, task)

    def _fit_twins(self, clip: Clip, task: Task) -> None:
        attacked, clean = training_twins(task, self.name)
        rows = picked(attacked)
        examples = [dataset.examples[row] for dataset in (attacked, clean) for row in rows]
        has_word = np.repeat([1.0, 0.0], len(rows))
        self._learn("a word is written", image_embeds_of(clip, examples), has_word, None)

    def _fit_groups(self, clip: Clip, task: Task) -> None:
        train = training_groups(task, self.name)
        examples = [train.examples[row] for row in picked(train)]
        attribute = np.array([float(example.attribute or 0) for example in examples])
        groups = np.array([example.group for example in examples])
        weights = 1 / np.bincount(groups)[groups]
        self._learn("the spurious attribute", image_embeds_of(clip, examples), attribute, weights)

    def _learn(self, concept: str, embeds: np.ndarray, z: np.ndarray, weights: np.ndarray | None) -> None:
        self._erasure = erasure_of(embeds, z[:, None], weights)
        self._concept, self._n = concept, len(embeds)

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the stock CLIP with the concept erased from its image embeddings."""
        assert self._erasure is not None, "fit() comes first"
        yield EditedImages(clip, self._erasure)
