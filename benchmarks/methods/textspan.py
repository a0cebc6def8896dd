"""TEXTSPAN: describe late heads by the texts that span what they write, and mean-ablate those that are about the cue.

The image embedding is a sum. With the LayerNorm before the projection made linear (at each picture's own deviation), a
head of the last four blocks contributes to it directly

    C[h]  =  P ln_post'(write_h)            [n_pictures, d_embed]

TEXTSPAN names a head: project the text embeddings on the 80 leading directions of C[h]; take the text along which C[h]
varies most, note it, remove its direction from C[h] and from all texts; 20 times. Heads that are about the cue are then
replaced by their mean over the training pictures: image_embeds - sum over those heads of (C[h] - mean C[h]).

Source, and what differs from it: `TextSpan.record`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from PIL import Image

from defense.benchmarks.datasets import Dataset, Example, Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.embeddings import unit
from defense.benchmarks.methods.material import (
    batches,
    best_of,
    class_embeds_of,
    digest_of,
    side_accuracies,
    text_embeds_of,
    training_sides,
    training_split,
)
from defense.data.labels import TEMPLATES
from defense.hosts.clip import Clip

if TYPE_CHECKING:
    from torch import Tensor

    from defense.benchmarks.methods.heads import Head

N_LATE_BLOCKS = 4
N_TEXTS = 20
RANK = 80


class _Contributions(Encoder):
    """The stock CLIP, with what some heads contribute to its embeddings.

    Args:
        clip: The CLIP.
        heads: Which.
        means: What takes their place, float64 [n_heads, d_embed].
    """

    def __init__(self, clip: Clip, heads: Sequence[Head], means: np.ndarray | None = None) -> None:
        from defense.benchmarks.methods.heads import vision_with_heads

        super().__init__(clip)
        self.tower = vision_with_heads(clip.model, "TEXTSPAN")
        self.heads, self.means = heads, means

    def decompose(self, pictures: Sequence[Image.Image]) -> tuple[np.ndarray, np.ndarray]:
        """Return the embeddings, not normalized, float64 [n, d_embed], and the heads' parts, [n, n_heads, d_embed]."""
        import torch

        from defense.benchmarks.methods.heads import (
            attention_of,
            cls_attention,
            layer_scale_of,
            readout_of,
            watching,
        )

        norm, projection = readout_of(self.tower)
        writes: dict[Head, Tensor] = {}
        seen: list[Tensor] = []

        def see(block: int, x: Tensor, _written: Tensor) -> None:
            heads = [head for at, head in self.heads if at == block]
            written = layer_scale_of(self.tower, block)(cls_attention(attention_of(self.tower, block), x, heads).writes)
            writes.update({(block, head): written[:, i] for i, head in enumerate(heads)})

        pixel_values = np.stack([self.clip.preprocess(picture) for picture in pictures])
        handle = norm.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
        try:
            with torch.inference_mode(), watching(self.tower, {block for block, _ in self.heads}, see):
                embeds = self.tower.encode(self.tower.batch(pixel_values)).double()
        finally:
            handle.remove()
        resid = seen[0] if seen[0].ndim == 2 else seen[0][:, 0]
        deviation = (resid.double().var(-1, correction=0) + norm.eps).sqrt()
        parts = torch.stack([writes[head] for head in self.heads], dim=1).double()
        centered = parts - parts.mean(-1, keepdim=True)
        direct = centered / deviation[:, None, None] * norm.weight.double() @ projection.double()
        return embeds.cpu().numpy(), direct.cpu().numpy()

    def decompose_all(self, examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
        """Return what `decompose` does, of many pictures."""
        wholes, parts = zip(*map(self.decompose, batches(examples)), strict=True)
        return np.concatenate(wholes), np.concatenate(parts)

    def image_embeds(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return embeddings with the heads' parts replaced by their means, float32 [n, d_embed], normalized."""
        if not self.heads:
            return super().image_embeds(pictures)
        embeds, parts = self.decompose(pictures)
        return unit(embeds - (parts - self.means).sum(1))


@dataclass
class TextSpan:
    """Mean-ablation of the heads that are about the cue.

    Attributes:
        name: In tables.
        heads: What is replaced by its mean, (block, head).
        texts: For each, what it is about: the texts along which it varies most, most first.
    """

    record: ClassVar[Record] = Record(
        "Gandelsman et al. 2023, arXiv:2310.05916",
        "sections 3 to 5",
        "There a person read the texts and said which heads are about the cue; here the training pictures say it. "
        "Along a head's texts, the mean differs more between values of the cue (the attribute, or the word that is "
        "written) than between labels, all groups alike; of such heads, those where it does most, as many as serve "
        "attacked training pictures (or the worst group) best and cost clean ones (or the average) at most 1 %. "
        "Texts are the class names of ImageNet and of the task in place of 3,500 sentences written by a language "
        "model. Earlier blocks and the MLPs stay, where the paper puts their means in their place too: the paper's "
        "towers have 12 to 32 blocks, but in one of 6 those hold much of the answer.",
    )
    name: str
    heads: tuple[Head, ...] = field(default=(), init=False)
    texts: tuple[tuple[str, ...], ...] = field(default=(), init=False)
    _means: np.ndarray = field(default_factory=lambda: np.zeros((0, 0)), init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return the heads, the first texts of each, and a hash of their means."""
        first = [list(texts[:3]) for texts in self.texts]
        return {"heads": [list(head) for head in self.heads], "texts": first, "means_sha256": digest_of(self._means)}

    def fit(self, clip: Clip, task: Task) -> None:
        """Describe the late heads and choose.

        Raises:
            NotApplicableError: The task has no training pictures with words or attributes, or the CLIP no heads of this
                kind.
        """
        from defense.benchmarks.methods.heads import all_heads, vision_with_heads

        tower = vision_with_heads(clip.model, self.name)
        sides = training_sides(task, self.name)
        late = all_heads(tower, max(0, len(tower.blocks) - N_LATE_BLOCKS))
        encoder = _Contributions(clip, late)
        wholes, parts = zip(*(encoder.decompose_all(side) for side in sides), strict=True)
        train = training_split(task, self.name)
        names, text_embeds = _texts(clip, train)
        spans = [textspan(parts[0][:, i], text_embeds) for i in range(len(late))]
        shares = np.array([cue_share(along, sides[0]) for _, along in spans])
        order = [int(i) for i in np.argsort(-shares, kind="stable") if shares[i] > 0.5]
        means = parts[0].mean(0)
        class_embeds = class_embeds_of(clip, train)

        def score(chosen: list[int]) -> tuple[float, float]:
            edited = [
                whole - (part[:, chosen] - means[chosen]).sum(1) for whole, part in zip(wholes, parts, strict=True)
            ]
            return side_accuracies(edited, class_embeds, sides)

        chosen = order[: best_of([score(order[:n]) for n in range(len(order) + 1)])]
        self.heads = tuple(late[i] for i in chosen)
        self.texts = tuple(tuple(names[text] for text in spans[i][0]) for i in chosen)
        self._means = means[chosen]

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Put the means in."""
        yield _Contributions(clip, self.heads, self._means)


def _texts(clip: Clip, dataset: Dataset) -> tuple[list[str], np.ndarray]:
    """Return what a head may be about, and the embeddings of that."""
    from open_clip import IMAGENET_CLASSNAMES

    names = [name for name in dict.fromkeys(IMAGENET_CLASSNAMES) if name not in dataset.class_names]
    embeds = text_embeds_of(clip, names, TEMPLATES["simple"], normalize_each=True)
    return [*dataset.class_names, *names], np.concatenate([class_embeds_of(clip, dataset), embeds])


def textspan(parts: np.ndarray, text_embeds: np.ndarray) -> tuple[list[int], np.ndarray]:
    """Return the texts that span a head, most first, and what it writes along each.

    Args:
        parts: What the head contributes, float64 [n, d_embed].
        text_embeds: [n_texts, d_embed].

    Returns:
        Indices of texts, and the head's coordinates along their directions, float64 [n, n_spanning].
    """
    left = parts - parts.mean(0)
    _, lengths, directions = np.linalg.svd(left, full_matrices=False)
    rows = directions[:RANK][lengths[:RANK] > lengths[0] * 1e-9]
    texts = (text_embeds - text_embeds.mean(0)) @ rows.T @ rows
    spanning, along = [], []
    for _ in range(min(N_TEXTS, len(rows), len(texts))):
        norms = np.linalg.norm(texts, axis=1)
        text = int(((left @ texts.T) ** 2).sum(0).argmax())
        if norms[text] < 1e-9:
            break
        direction = texts[text] / norms[text]
        spanning.append(text)
        along.append(left @ direction)
        left = left - np.outer(along[-1], direction)
        texts = texts - np.outer(texts @ direction, direction)
    return spanning, np.array(along).reshape(len(spanning), len(parts)).T


def cue_share(along: np.ndarray, examples: Sequence[Example]) -> float:
    """Return how much a head's coordinates [n, n_spanning] tell of the cue, as a share of that and of the label."""
    groups = np.array([-1 if example.group is None else example.group for example in examples])
    _, where, counts = np.unique(groups, return_inverse=True, return_counts=True)
    weights = 1 / counts[where]  # by numbers the attribute would go with the label
    label = np.array([example.label for example in examples])
    cue = np.array([example.word if example.attribute is None else example.attribute for example in examples])
    of_cue, of_label = between(along, cue, weights), between(along, label, weights)
    return of_cue / (of_cue + of_label) if of_cue else 0.0


def between(along: np.ndarray, values: np.ndarray, weights: np.ndarray) -> float:
    """Return the variance of the means of rows with equal values, summed over columns; rows count by their weights."""
    mean = np.average(along, axis=0, weights=weights)
    total = 0.0
    for value in np.unique(values):
        rows = values == value
        total += weights[rows].sum() * float(
            ((np.average(along[rows], axis=0, weights=weights[rows]) - mean) ** 2).sum()
        )
    return total / float(weights.sum())
