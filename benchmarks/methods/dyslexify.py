"""Dyslexify: silence the attention heads through which the CLS token reads.

A head (l, i) is scored by how much of CLS's attention to patches falls on those with writing,

    T[l, i]  =  mean over pictures x of  sum_t 1_text(t) A[l, i, t](x) / sum_t A[l, i, t](x)

Heads that lie 2 standard deviations above the mean are tried, best first: one stays silent if attacked pictures get
better (by 0.001) and clean ones lose less than 1 % in all; the search ends where they would lose more, or after 10
heads in a row that did not help. Only what a head writes to CLS becomes 0; what it writes to patches stays.

Source, and what differs from it: `Dyslexify.record`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Example, Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.material import (
    CLEAN_BUDGET,
    accuracies,
    class_embeds_of,
    pixel_batches,
    training_sides,
    training_twins,
)
from defense.hosts.clip import Clip

if TYPE_CHECKING:
    from torch import Tensor

    from defense.benchmarks.methods.heads import Head

MIN_GAIN = 0.001
MAX_SKIPS = 10

_WRITTEN = 0.25
"""A patch is written on where the twins differ by this share of the largest difference."""


@dataclass
class Dyslexify:
    """Head ablation against written words.

    Attributes:
        name: In tables.
        heads: What was silenced, (block, head).
    """

    record: ClassVar[Record] = Record(
        "Hufe et al. 2025, arXiv:2508.20570",
        "sections 3 and 4",
        "The task's own training pictures in place of 10,000 photographs with text on the bottom two rows of "
        "patches; where the writing is, is read off the twins: the patches that differ by at least a quarter of "
        "the most that any does. In a small tower too many heads read for any to stand out by 2 standard "
        "deviations; where none of them does, those above 1 are tried.",
    )
    name: str
    heads: tuple[Head, ...] = field(default=(), init=False)
    _deviations: int = field(default=0, init=False)

    def settings(self) -> Mapping[str, Any]:
        """Return the heads that are silenced, and how far above the mean those were that were tried."""
        return {"heads": [list(head) for head in self.heads], "standard_deviations": self._deviations}

    def fit(self, clip: Clip, task: Task) -> None:
        """Score the heads and choose.

        Raises:
            NotApplicableError: The task has no training pictures with twins, or the CLIP no heads of this kind.
        """
        import torch

        from defense.benchmarks.methods.heads import ablated, embeds_from, vision_with_heads

        tower = vision_with_heads(clip.model, self.name)
        attacked, _ = training_twins(task, self.name)
        twins = training_sides(task, self.name)
        first = max(1, len(tower.blocks) // 2)  # no reading head was found in the first half
        hook_point = f"blocks.{first - 1}.hook_resid_post"
        scores, resids = _read(clip, hook_point, *twins)
        candidates, self._deviations = standing_out(scores, first)
        class_embeds = class_embeds_of(clip, attacked)

        def accuracy_without(side: int, heads: Sequence[Head]) -> float:
            with torch.inference_mode(), ablated(tower, heads):
                embeds = embeds_from(tower, resids[side], hook_point)
            return float(accuracies(embeds, class_embeds, twins[side]).mean())

        self.heads = tuple(chosen(candidates, partial(accuracy_without, 0), partial(accuracy_without, 1)))

    @contextmanager
    def apply(self, clip: Clip) -> Iterator[Encoder]:
        """Silence the heads."""
        from defense.benchmarks.methods.heads import ablated, vision_with_heads

        with ablated(vision_with_heads(clip.model, self.name), self.heads):
            yield Encoder(clip)


def _read(
    clip: Clip, hook_point: str, attacked: Sequence[Example], clean: Sequence[Example]
) -> tuple[np.ndarray, tuple[Tensor, Tensor]]:
    """Return T, float64 [n_layers, n_heads], and the residuals of attacked and clean pictures at the hook point."""
    from defense.benchmarks.methods.heads import attention_of, cls_attention

    tower = clip.tower
    n_layers, n_heads = len(tower.blocks), attention_of(tower, 0).num_heads
    scores = np.zeros((n_layers, n_heads))

    def score(block: int, x: Tensor, is_written: Tensor) -> None:
        to_patches = cls_attention(attention_of(tower, block), x).pattern[..., tower.n_prefix :].double().cpu()
        on_text = (to_patches * is_written[:, None]).sum(-1) / to_patches.sum(-1)
        scores[block] += on_text.sum(0).numpy() / len(attacked)

    return scores, read_twins(clip, hook_point, attacked, clean, range(n_layers), score)


def read_twins(
    clip: Clip,
    hook_point: str,
    attacked: Sequence[Example],
    clean: Sequence[Example],
    blocks: Sequence[int],
    score: Callable[[int, Tensor, Tensor], None],
) -> tuple[Tensor, Tensor]:
    """Show a function what some blocks attend to on attacked pictures, and return the residuals at the hook point.

    Args:
        clip: The CLIP.
        hook_point: Where residuals are wanted.
        attacked: Pictures with writing.
        clean: Their twins without.
        blocks: Which.
        score: Called with a block, its attention's input [batch, pos, d_model], and which patches are written on, bool
            [batch, n_patches].

    Returns:
        The residuals of the attacked and of the clean pictures, [n, pos, d_model].
    """
    import torch

    from defense.benchmarks.methods.heads import watching

    resids: tuple[list[Tensor], list[Tensor]] = ([], [])
    for batch in zip(pixel_batches(clip, attacked), pixel_batches(clip, clean), strict=True):
        pixels, twin_pixels = map(torch.from_numpy, batch)
        is_written = written_on(pixels, twin_pixels, clip.tower.grid_size)

        def see(block: int, x: Tensor, _written: Tensor, is_written: Tensor = is_written) -> None:
            score(block, x, is_written)

        with watching(clip.tower, blocks, see):
            resids[0].append(clip.tower.resid_and_embeds(pixels, hook_point)[0])  # the whole pass: later blocks count
        resids[1].append(clip.tower.resid(twin_pixels, hook_point))
    return torch.cat(resids[0]), torch.cat(resids[1])


def written_on(attacked: Tensor, clean: Tensor, grid_size: tuple[int, int]) -> Tensor:
    """Return which patches carry the writing, bool [batch, n_patches], of twins' pixel_values."""
    from torch.nn import functional

    difference = functional.adaptive_avg_pool2d((attacked - clean).abs().mean(1), grid_size).flatten(1)
    return (difference > 0) & (difference >= _WRITTEN * difference.amax(1, keepdim=True))


def standing_out(scores: np.ndarray, first_block: int) -> tuple[list[Head], int]:
    """Return the heads that read, from a block on and best first, and how many standard deviations they stand out by.

    Args:
        scores: T, [n_layers, n_heads].
        first_block: The first to choose from.
    """
    order = [divmod(int(i), scores.shape[1]) for i in np.argsort(-scores, axis=None, kind="stable")]
    for deviations in (2, 1):
        least = scores.mean() + deviations * scores.std()
        heads = [head for head in order if scores[head] >= least and head[0] >= first_block]
        if heads:
            break
    return heads, deviations


def chosen(
    candidates: Sequence[Head],
    attacked_accuracy: Callable[[Sequence[Head]], float],
    clean_accuracy: Callable[[Sequence[Head]], float],
) -> list[Head]:
    """Return the candidates that help attacked pictures at a bearable cost to clean ones.

    Args:
        candidates: Best first.
        attacked_accuracy: Of attacked pictures, from the heads that are silent.
        clean_accuracy: Of clean ones.
    """
    heads: list[Head] = []
    attacked, floor = attacked_accuracy([]), clean_accuracy([]) - CLEAN_BUDGET
    skips = 0
    for head in candidates:
        gained = attacked_accuracy([*heads, head])
        if gained - attacked < MIN_GAIN:
            skips += 1
            if skips == MAX_SKIPS:
                break
            continue
        if clean_accuracy([*heads, head]) <= floor:
            break
        heads.append(head)
        attacked, skips = gained, 0
    return heads
