"""SamplingTAR: find the heads that read by random directions, and turn CLS's attention away from what they read.

In each head of the last fifth of the blocks, random unit directions r stand for concepts. What token t adds to one on
the CLS token, with p the attention of CLS and v the head's values, is

    c[t]  =  p[t] <v[t], r>

The score of a direction is the share of the text in what it takes, mean c+ of the patches with writing over that plus
mean c+ of the others (c+ = max(c, 0)), on the pictures where the direction is most active. A head scores the mean of
its directions, and reads if it lies z standard deviations above the mean of its block. In those heads, CLS attends to
itself alone (alpha = 1).

Source, and what differs from it: `SamplingTar.record`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Example, Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.dyslexify import read_twins
from defense.benchmarks.methods.material import (
    CLEAN_BUDGET,
    accuracies,
    class_embeds_of,
    training_sides,
    training_twins,
)
from defense.hosts.clip import Clip

if TYPE_CHECKING:
    from torch import Tensor

    from defense.benchmarks.methods.heads import Head
    from defense.hosts.tower import VisionTower

LAST_PART = 0.2
SAMPLES_PER_DIMENSION = 8
Z_SCORES = (0.5, 1.0, 2.0)
SEED = 0

_N_ACTIVE = 16
"""Pictures that a direction is judged on."""


@dataclass
class SamplingTar:
    """Redirect the attention of heads that random directions show to read.

    Attributes:
        name: In tables.
        heads: What is redirected, (block, head).
    """

    record: ClassVar[Record] = Record(
        'Liu et al. 2026 ("nTAS"), arXiv:2607.02494',
        "attention reweighting",
        "Directions per dimension and z as there. The details are ours, since only abstract and project page were "
        "at hand: the attribution stops at the head's values, where it is exact; the normalization by area; that "
        "attention goes to CLS itself; z is what serves attacked training pictures best, among those that cost "
        "clean ones at most 1 %. Where the writing is, is read off the twins.",
    )
    name: str
    heads: tuple[Head, ...] = field(default=(), init=False)
    _z: float | None = field(default=None, init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return the heads that are redirected, and the threshold that chose them."""
        return {
            "heads": [list(head) for head in self.heads],
            "z": self._z,
            "samples_per_dimension": SAMPLES_PER_DIMENSION,
            "seed": SEED,
        }

    def fit(self, clip: Clip, task: Task) -> None:
        """Score the heads and choose the threshold.

        Raises:
            NotApplicableError: The task has no training pictures with twins, or the CLIP no heads of this kind.
        """
        import torch

        from defense.benchmarks.methods.heads import embeds_from, vision_with_heads

        tower = vision_with_heads(clip.model, self.name)
        attacked, _ = training_twins(task, self.name)
        twins = training_sides(task, self.name)
        first = max(1, len(tower.blocks) - math.ceil(LAST_PART * len(tower.blocks)))
        hook_point = f"blocks.{first - 1}.hook_resid_post"
        scores, resids = _read(clip, hook_point, *twins)
        class_embeds = class_embeds_of(clip, attacked)

        def accuracy_with(heads: Sequence[Head]) -> tuple[float, float]:
            found = []
            for resid, pictures in zip(resids, twins, strict=True):
                with torch.inference_mode(), redirected(tower, heads):
                    embeds = embeds_from(tower, resid, hook_point)
                found.append(float(accuracies(embeds, class_embeds, pictures).mean()))
            return found[0], found[1]

        self.heads, self._z = (), None
        best, floor = accuracy_with(())
        floor -= CLEAN_BUDGET
        for z in Z_SCORES:
            heads = standing_out(scores, z)
            on_attacked, on_clean = accuracy_with(heads)
            if on_attacked > best and on_clean >= floor:
                self.heads, self._z, best = heads, z, on_attacked

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Redirect the heads."""
        from defense.benchmarks.methods.heads import vision_with_heads

        with redirected(vision_with_heads(clip.model, self.name), self.heads):
            yield Encoder(clip)


def _read(
    clip: Clip, hook_point: str, attacked: Sequence[Example], clean: Sequence[Example]
) -> tuple[dict[int, np.ndarray], tuple[Tensor, Tensor]]:
    """Return the heads' scores by block, and the residuals of attacked and clean pictures at the hook point."""
    import torch

    from defense.benchmarks.methods.heads import HeadWeights, attention_of
    from defense.hosts.tower import block_of

    tower = clip.tower
    blocks = range(block_of(hook_point) + 1, len(tower.blocks))
    _, n_heads, d_head, _ = HeadWeights.of(attention_of(tower, 0)).qkv.shape
    directions = random_directions(n_heads, d_head).to(tower.device)
    seen: dict[int, list[tuple[Tensor, Tensor]]] = {block: [] for block in blocks}

    def score(block: int, x: Tensor, is_written: Tensor) -> None:
        added = contributions(attention_of(tower, block), x, directions)
        on_text = text_share(added[:, :, tower.n_prefix :], is_written.to(x.device))
        seen[block].append((added.sum(2), on_text))

    resids = read_twins(clip, hook_point, attacked, clean, blocks, score)
    scores = {
        block: head_scores(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
        for block, batches in seen.items()
    }
    return scores, resids


def random_directions(n_heads: int, d_head: int) -> Tensor:
    """Return unit directions of each head, [n_heads, n_directions, d_head]."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    drawn = torch.randn(n_heads, SAMPLES_PER_DIMENSION * d_head, d_head, generator=generator)
    return torch.nn.functional.normalize(drawn, dim=-1)


def contributions(attention: Any, x: Tensor, directions: Tensor) -> Tensor:
    """Return what each token adds to each direction on the CLS token, [batch, n_heads, pos, n_directions].

    Args:
        attention: Of a block.
        x: Its input, after the norm in front of it, [batch, pos, d_model].
        directions: [n_heads, n_directions, d_head].
    """
    import torch

    from defense.benchmarks.methods.heads import HeadWeights, cls_attention

    weights = HeadWeights.of(attention)
    value = torch.einsum("bpd,hed->bphe", x, weights.qkv[2]) + weights.bias[2]
    pattern = cls_attention(attention, x).pattern
    return torch.einsum("bhp,bphe,hme->bhpm", pattern, value, directions)


def text_share(added: Tensor, is_written: Tensor) -> Tensor:
    """Return the share of the writing in what directions take from patches, corrected for area, [batch, n_heads, m].

    0.5 where a patch with writing adds as much as another; 0.5 too where nothing is added, or nothing is written.

    Args:
        added: Of the patches, [batch, n_heads, n_patches, m].
        is_written: bool [batch, n_patches].
    """
    import torch

    mask = is_written[:, None, :, None].to(added.dtype)
    positive = added.clamp(min=0)
    on_text = (positive * mask).sum(2) / mask.sum(2).clamp(min=1)
    elsewhere = (positive * (1 - mask)).sum(2) / (1 - mask).sum(2).clamp(min=1)
    total = on_text + elsewhere
    is_defined = (total > 0) & (mask.sum(2) > 0)
    return torch.where(is_defined, on_text / total.clamp(min=torch.finfo(total.dtype).tiny), 0.5)


def head_scores(activity: Tensor, on_text: Tensor) -> np.ndarray:
    """Return each head's score, float64 [n_heads]: of its directions, on the pictures where they are most active.

    Args:
        activity: Of directions on the CLS token, [n, n_heads, n_directions].
        on_text: `text_share`, in the same shape.
    """
    active = activity.topk(min(_N_ACTIVE, len(activity)), dim=0).indices
    return on_text.gather(0, active).double().mean((0, 2)).cpu().numpy()


def standing_out(scores: Mapping[int, np.ndarray], z: float) -> tuple[Head, ...]:
    """Return the heads that lie z standard deviations above the mean of their block.

    Args:
        scores: Of the heads, by block.
        z: The threshold.
    """
    return tuple(
        (block, int(head))
        for block, column in scores.items()
        for head in np.flatnonzero(column >= column.mean() + z * column.std())
        if column.std() > 0
    )


@contextmanager
def redirected(tower: VisionTower, heads: Sequence[Head]) -> Iterator[None]:
    """Let CLS attend to itself alone in some heads; what they write to other tokens stays."""
    from defense.benchmarks.methods.heads import attention_of, cls_attention, watching

    by_block: dict[int, list[int]] = {}
    for block, head in heads:
        by_block.setdefault(block, []).append(head)

    def redirect(block: int, x: Tensor, written: Tensor) -> Tensor:
        attention = attention_of(tower, block)
        before = cls_attention(attention, x, by_block[block]).writes.sum(1)
        after = cls_attention(attention, x[:, :1], by_block[block]).writes.sum(1)
        return written - before + after

    with watching(tower, by_block, redirect):
        yield
