"""RoboShot: image embeddings without what a language model called harmful, with more of what it called helpful.

An insight is a pair of texts that differ in one thing; its direction v is the difference of their embeddings.

    harmful, all together:      x <- x - V (V^T V)^-1 V^T x
    helpful, one by one:        x <- x + <x, u> u / <u, u>

Source, and what differs from it: `RoboShot.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.concepts import Pairs, concepts_of, known, listed
from defense.benchmarks.methods.embeddings import EditedImages
from defense.benchmarks.methods.material import digest_of, text_embeds_of
from defense.benchmarks.methods.text_tower import check_reads_context
from defense.hosts.clip import Clip


def steered(x: np.ndarray, harmful: np.ndarray, helpful: np.ndarray) -> np.ndarray:
    """Return embeddings [n, d_embed] without harmful directions [n_harmful, d_embed] and with more of helpful ones."""
    x = x.astype(np.float64)
    x = x - x @ np.linalg.pinv(harmful) @ harmful
    for u in helpful:
        x = x + np.outer(x @ u, u) / (u @ u)
    return x


@dataclass
class RoboShot:
    """Steer the image embeddings by insights in words."""

    record: ClassVar[Record] = Record(
        "Adila et al. 2023, arXiv:2309.04344",
        "algorithm 1",
        "The insights are given, in place of asking a language model for each data set; one with a word that the "
        "CLIP has no embedding for is left out; embeddings are normalized again.",
        needs_context=True,
    )
    name: str
    _harmful: Pairs = field(default=(), init=False)
    _helpful: Pairs = field(default=(), init=False)
    _directions: tuple[np.ndarray, np.ndarray] = field(default=(np.zeros((0, 0)), np.zeros((0, 0))), init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return the insights, and a hash of their directions."""
        return {
            "harmful": listed(self._harmful),
            "helpful": listed(self._helpful),
            "directions_sha256": digest_of(*self._directions),
        }

    def fit(self, clip: Clip, task: Task) -> None:
        """Embed the insights.

        Raises:
            NotApplicableError: None are known for this task.
            CannotWorkError: See `check_reads_context`.
        """
        concepts = concepts_of(task, self.name)
        check_reads_context(clip, task, self.name)
        self._harmful, self._helpful = concepts.spurious, known(concepts.helpful, clip)
        self._directions = (_differences(clip, self._harmful), _differences(clip, self._helpful))

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the stock CLIP with its image embeddings steered."""
        yield EditedImages(clip, lambda embeds: steered(embeds, *self._directions))


def _differences(clip: Clip, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
    """Return a direction per pair, float64 [n_pairs, d_embed]."""
    if not pairs:
        return np.zeros((0, 0))
    texts = [text for pair in pairs for text in pair]
    embeds = text_embeds_of(clip, texts, ("{}",), normalize_each=True).astype(np.float64)
    return embeds[0::2] - embeds[1::2]
