"""Patches whose norm stands far above those of their picture: where large towers keep what is of no patch.

Large vision transformers turn a few patches of the background into stores of global information, with norms of several
times the others' (arXiv:2309.16588). What an SAE, a map or an edit says of such a patch is not about the place that it
is at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FACTOR = 4.0
"""Times the median norm of the patches of a picture above which one of them counts as high. Ours: in towers that have
such patches the two groups lie far apart, so that much between 3 and 6 finds the same."""


@dataclass(frozen=True)
class HighNorm:
    """Patches of high norm on some pictures.

    Attributes:
        n_patches: Patches that were looked at.
        share: How many of them are high, as a share.
        share_of_pictures: Share of the pictures that have one.
        largest: The largest norm over the median of its picture.
        factor: What "high" means.
    """

    n_patches: int
    share: float
    share_of_pictures: float
    largest: float
    factor: float = FACTOR

    def words(self) -> str:
        """Return a sentence."""
        return (
            f"{100 * self.share:.2g} % of patches, on {100 * self.share_of_pictures:.0f} % of the pictures, have more "
            f"than {self.factor:g} times the median norm of their picture (the largest {self.largest:.1f} times)"
        )


def is_high(patches: Tensor) -> Tensor:
    """Return which patches are high, bool [batch, n_patches]; of no patches, none.

    Args:
        patches: Of pictures, [batch, n_patches, d_model].
    """
    norms = patches.float().norm(dim=-1)
    middle = max(0, norms.shape[1] - 1) // 2
    median = norms.sort(1).values[:, middle : middle + 1]  # `median` has no deterministic kernel
    high: Tensor = norms > FACTOR * median
    return high


def high_tokens(resid: Tensor, n_prefix: int) -> Tensor:
    """Return which tokens are patches of high norm, bool [batch, pos]; those before the patches never are.

    Args:
        resid: Of whole pictures, [batch, pos, d_model].
        n_prefix: Tokens before the patches.
    """
    high = is_high(resid[:, n_prefix:])
    return torch.cat([high.new_zeros(len(high), n_prefix), high], 1)


class HighNormSums:
    """What a stream of pictures adds up to."""

    def __init__(self) -> None:
        self.n_pictures, self.n_patches, self.n_high, self.n_with, self.largest = 0, 0, 0, 0, 0.0

    def add(self, patches: Tensor) -> None:
        """Take in the patches of pictures, [batch, n_patches, d_model]."""
        if not patches.shape[0] or not patches.shape[1]:
            return
        norms = patches.float().norm(dim=-1)
        ratio = norms / norms.median(1, keepdim=True).values.clamp(min=1e-30)
        high = is_high(patches)
        self.n_pictures += len(patches)
        self.n_patches += high.numel()
        self.n_high += int(high.sum())
        self.n_with += int(high.any(1).sum())
        self.largest = max(self.largest, float(ratio.max()))

    def result(self) -> HighNorm | None:
        """Return what they come to; None where no patch was seen."""
        if not self.n_patches:
            return None
        return HighNorm(self.n_patches, self.n_high / self.n_patches, self.n_with / self.n_pictures, self.largest)
