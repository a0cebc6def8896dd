"""Erase: what some texts name, taken out of the image embedding in CLIP's joint space. No SAE, no training.

    for each text, with t its embedding at length 1:   x <- x - <x, t> t   where <x, t> > 0

Which texts: of a task with groups each value of the spurious attribute, of a task with words what says that something
is written. Which word is written is not known.

Source, and what differs from it: `Erase.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, NotApplicableError, Record
from defense.benchmarks.methods.concepts import WRITING, concepts_of, known
from defense.benchmarks.methods.embeddings import EditedImages
from defense.benchmarks.methods.material import digest_of, text_embeds_of
from defense.hosts.clip import Clip


def erased(x: np.ndarray, directions: np.ndarray) -> np.ndarray:
    """Return embeddings [n, d_embed] without what they hold of directions [n_texts, d_embed] of length 1, in turn."""
    x = x.astype(np.float64)
    for t in directions:
        x = x - np.outer((x @ t).clip(min=0), t)
    return x


@dataclass
class Erase:
    """Project directions that texts name out of the image embeddings."""

    record: ClassVar[Record] = Record(
        "Jiang et al. (ProjectAway), arXiv:2410.02762",
        "section 4.1",
        "There it takes objects that are not there out of the captions of a language model with eyes. The space is "
        "that of the image embedding, where texts of their own tower are, not a layer of the language model; the "
        "texts are given for the task and not for the picture; one with a word that the CLIP has no embedding for "
        "is left out; embeddings are normalized again.",
    )
    name: str
    _texts: tuple[str, ...] = field(default=(), init=False)
    _directions: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return the texts, and a hash of their directions."""
        return {"texts": list(self._texts), "directions_sha256": digest_of(self._directions)}

    def fit(self, clip: Clip, task: Task) -> None:
        """Embed the texts.

        Raises:
            NotApplicableError: None are known for this task, or the CLIP knows a word of none.
        """
        has_groups = bool(task.tests[0].group_names)
        spurious = concepts_of(task, self.name).spurious if has_groups else (WRITING,)
        texts = dict.fromkeys(text for each in spurious for text in each)
        self._texts = tuple(text for (text,) in known(tuple((text,) for text in texts), clip))
        if not self._texts:
            raise NotApplicableError(
                f"{self.name} erases what texts name, and this CLIP knows none of: {', '.join(texts)}"
            )
        embeds = text_embeds_of(clip, self._texts, ("{}",), normalize_each=True)
        self._directions = embeds.astype(np.float64)

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the stock CLIP with these directions taken out of its image embeddings."""
        yield EditedImages(clip, lambda embeds: erased(embeds, self._directions))
