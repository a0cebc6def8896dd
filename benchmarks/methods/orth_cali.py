"""Orth-Cali: class names' embeddings without spurious directions, calibrated to be the same with either attribute.

With V the embeddings of texts that name the spurious attribute (as columns), and pairs (z_i, z_j) of texts that name
the same class with either value of it,

    P_0 = I - V (V^T V)^-1 V^T
    P   = P_0 (I + lambda M)^-1,     M = mean over pairs of (z_i - z_j) (z_i - z_j)^T

and each class embedding z becomes P z.

Source, and what differs from it: `OrthCali.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.concepts import Concepts, concepts_of, listed
from defense.benchmarks.methods.embeddings import EditedTexts
from defense.benchmarks.methods.material import digest_of, text_embeds_of
from defense.benchmarks.methods.text_tower import check_reads_context
from defense.hosts.clip import Clip

LAMBDA = 1000.0


def calibrated_projection(spurious: np.ndarray, pairs: np.ndarray, lam: float = LAMBDA) -> np.ndarray:
    """Return P, float64 [d_embed, d_embed].

    Args:
        spurious: Embeddings of texts that name the attribute, [n, d_embed].
        pairs: Embeddings of the same class with either value of it, [n_pairs, 2, d_embed].
        lam: Weight of the calibration.
    """
    V = spurious.astype(np.float64).T
    eye = np.eye(len(V))
    differences = (pairs[:, 0] - pairs[:, 1]).astype(np.float64)
    M = differences.T @ differences / len(differences)
    return (eye - V @ np.linalg.pinv(V)) @ np.linalg.inv(eye + lam * M)


@dataclass
class OrthCali:
    """Project the class names' embeddings, from texts alone."""

    record: ClassVar[Record] = Record(
        "Chuang et al. 2023, arXiv:2302.00070",
        "section 4",
        "Texts of our own in place of theirs; lambda as in the authors' code; embeddings are normalized again.",
        needs_context=True,
    )
    name: str
    _concepts: Concepts | None = field(default=None, init=False)
    _projection: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return the texts, lambda, and a hash of the projection."""
        assert self._concepts is not None, "fit() comes first"
        return {
            "spurious": listed(self._concepts.spurious),
            "crossed": listed(self._concepts.crossed),
            "lambda": LAMBDA,
            "projection_sha256": digest_of(self._projection),
        }

    def fit(self, clip: Clip, task: Task) -> None:
        """Compute the projection.

        Raises:
            NotApplicableError: No texts are known that name what should not count.
            CannotWorkError: See `check_reads_context`.
        """
        self._concepts = concepts_of(task, self.name)
        check_reads_context(clip, task, self.name)
        spurious = [text for pair in self._concepts.spurious for text in pair]
        crossed = [text for pair in self._concepts.crossed for text in pair]
        embeds = text_embeds_of(clip, [*spurious, *crossed], ("{}",), normalize_each=True)
        pairs = embeds[len(spurious) :].reshape(len(self._concepts.crossed), 2, -1)
        self._projection = calibrated_projection(embeds[: len(spurious)], pairs)

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the stock CLIP with its text embeddings projected."""
        yield EditedTexts(clip, lambda embeds: embeds @ self._projection.T)
