"""Monosemanticity: how alike the pictures are that make a unit fire, from sums over one pass."""

from __future__ import annotations

import torch
from torch import Tensor

_CANCELED = 1e-9


class Likeness:
    """What one pass adds up for the monosemanticity of n units. It does not matter how the stream is cut into batches.

    Args:
        n: Units.
        device: Where the sums are.
    """

    def __init__(self, n: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.n_pictures = 0
        self.picture_sum, self.picture_square = zeros(n), zeros(n)
        self.least = torch.full((n,), torch.inf, dtype=torch.float64, device=device)
        self.embed_sum, self.act_embed_sum = zeros(0), zeros(0)

    def add(self, largest: Tensor, embeds: Tensor) -> None:
        """Take in pictures: each unit's largest activation [batch, n], and embeddings [batch, d_embed], normalized."""
        largest, embeds = largest.double(), embeds.double()
        self.n_pictures += len(largest)
        self.least = torch.minimum(self.least, largest.amin(0))
        self.picture_sum += largest.sum(0)
        self.picture_square += largest.square().sum(0)
        if not len(self.embed_sum):
            self.embed_sum = largest.new_zeros(embeds.shape[1])
            self.act_embed_sum = largest.new_zeros(largest.shape[1], embeds.shape[1])
        self.embed_sum += embeds.sum(0)
        self.act_embed_sum += largest.T @ embeds

    def scores(self) -> Tensor:
        """Return the mean cosine of pairs of pictures, weighted by how strongly both make a unit fire, float64 [n].

        In closed form from sums over pictures, the activation a less its minimum, e the normalized embeddings:

            (|| sum a e ||^2 - sum a^2) / ((sum a)^2 - sum a^2)

        The score's definition divides a by its range too, which cancels here, and takes e from an independent encoder.
        NaN where one picture alone makes the unit fire.

        Source: Pach et al. 2025, arXiv:2504.02821; the closed form is ours.
        """
        n, least = self.n_pictures, self.least
        total = self.picture_sum - n * least
        square = self.picture_square - 2 * least * self.picture_sum + n * least.square()
        moment = self.act_embed_sum - least[:, None] * self.embed_sum
        pairs = total.square() - square
        score = (moment.square().sum(1) - square) / pairs
        return torch.where(pairs > _CANCELED * total.square(), score, torch.nan)

    def all_pairs(self) -> float:
        """Return the mean cosine of all pairs of pictures: the score of a unit that fires alike on all."""
        n = self.n_pictures
        return float((self.embed_sum.square().sum() - n) / (n * (n - 1)))
