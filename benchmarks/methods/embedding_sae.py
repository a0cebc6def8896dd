"""An SAE on the image embeddings, whose cue latents are projected out there; nothing is decoded.

    image_embeds'  =  (I - A (A^T A)^-1 A^T) image_embeds,     A = the encoder columns of K latents

The K latents are those whose activation differs most with the cue: between the training pictures with and without a
word, or between values of the attribute, all groups alike. K is what serves attacked training pictures (or the worst
group) best, of 1, 2, 4 ... 64, among those that cost clean ones (or the average) at most 1 %.

Source, and what differs from it: `EmbeddingSAE.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Example, Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.embeddings import EditedImages, Map
from defense.benchmarks.methods.material import (
    best_of,
    class_embeds_of,
    digest_of,
    image_embeds_of,
    side_accuracies,
    training_sides,
    training_split,
)
from defense.hosts.clip import Clip

if TYPE_CHECKING:
    from defense.core.sae import SparseAutoencoder

KS = (1, 2, 4, 8, 16, 32, 64)

_EXPANSION, _ACTIVE, _STEPS, _LR = 4, 8, 1500, 3e-3


@dataclass
class EmbeddingSAE:
    """Projection in the space of the embeddings, along latents of an SAE.

    Attributes:
        name: In tables.
    """

    record: ClassVar[Record] = Record(
        '"S&P Top-K", arXiv:2509.10809',
        "",
        "A TopK SAE trained on the task's own training pictures in place of a JumpReLU SAE trained on many others; "
        "K chosen on them; alpha = 1; no axis of a logistic regression.",
    )
    name: str
    _basis: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return how many directions are projected out, and a hash of them."""
        return {"k": self._basis.shape[1], "directions_sha256": digest_of(self._basis)}

    def fit(self, clip: Clip, task: Task) -> None:
        """Train the SAE and choose the latents.

        Raises:
            NotApplicableError: The task has no training pictures with twins or groups.
        """
        import torch

        sides = training_sides(task, self.name)
        embeds = [image_embeds_of(clip, side) for side in sides]
        sae = trained_on(np.concatenate(embeds))
        with torch.inference_mode():
            acts = sae.encode(torch.from_numpy(np.concatenate(embeds))).numpy()
        label = np.array([example.label for side in sides for example in side])
        order = np.argsort(-np.abs(contrast(acts, cue_of(sides), label)), kind="stable").copy()
        W_enc = sae.W_enc.double().numpy()
        bases = [np.linalg.qr(W_enc[:, order[:k]])[0] for k in (0, *KS)]
        class_embeds = class_embeds_of(clip, training_split(task, self.name))
        edited = ([without(basis)(x) for x in embeds] for basis in bases)
        self._basis = bases[best_of([side_accuracies(x, class_embeds, sides) for x in edited])]

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Yield the stock CLIP with the directions projected out of its image embeddings."""
        yield EditedImages(clip, without(self._basis))


def trained_on(embeds: np.ndarray) -> SparseAutoencoder:
    """Return an SAE of embeddings [n, d_embed]."""
    import torch

    from defense.train.runs import train_in_memory
    from defense.train.trainer import TrainConfig

    d_sae = _EXPANSION * embeds.shape[1]
    config = TrainConfig(d_sae, min(_ACTIVE, d_sae), _STEPS, batch=min(256, len(embeds)), lr=_LR)
    return train_in_memory(torch.from_numpy(embeds), config)


def cue_of(sides: Sequence[Sequence[Example]]) -> np.ndarray:
    """Return the cue of `training_sides`: the attribute; or 1 for pictures with a word and then 0 for their twins."""
    cues: list[int] = []
    for side, examples in enumerate(sides):
        cues += [1 - side if example.attribute is None else example.attribute for example in examples]
    return np.array(cues)


def contrast(acts: np.ndarray, cue: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Return how much more each latent fires with the cue than without, mean over labels, [d_sae].

    Args:
        acts: [n, d_sae].
        cue: 0 or 1, [n].
        label: [n]; one that goes with one value of the cue alone says nothing, and is passed over.
    """
    differences = []
    for value in np.unique(label):
        rows = [acts[(label == value) & (cue == side)] for side in (0, 1)]
        if len(rows[0]) and len(rows[1]):
            differences.append(rows[1].mean(0) - rows[0].mean(0))
    return np.mean(differences, axis=0)


def without(basis: np.ndarray) -> Map:
    """Return the map that projects the span of orthonormal columns [d_embed, k] out of embeddings."""
    return lambda embeds: embeds - embeds @ basis @ basis.T
