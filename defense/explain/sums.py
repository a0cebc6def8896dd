"""What one streaming pass over pictures adds up about each latent of an SAE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .catalogue import BIN_EDGES
from .likeness import Likeness
from .spread import Spread

NUMBERS_AT_ONCE = 2**25


class Example(NamedTuple):
    """One picture to look at.

    Attributes:
        key: How `catalogue.picture` finds it again.
        pixel_values: float32 [3, height, width].
        label: Its class, if it has one.
    """

    key: str
    pixel_values: np.ndarray
    label: str | None = None


class Reservoir:
    """Keeps n of a stream's rows, each with the same chance (Vitter's algorithm R)."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.rng = n, np.random.default_rng(seed)
        self.kept: list[Tensor] = []
        self.n_seen = 0

    def add(self, rows: Tensor) -> None:
        for row in rows:
            self.n_seen += 1
            if len(self.kept) < self.n:
                self.kept.append(row)
            elif (place := int(self.rng.integers(self.n_seen))) < self.n:
                self.kept[place] = row


class Sums:
    """What one pass adds up. It does not matter how the stream is cut into batches.

    Attributes:
        keys: Of the pictures seen.
        labels: Their classes, None for a picture without one.
        top: Indices of the pictures with the largest activations, int64 [d_sae, n_top]; -1 for none.
        top_activation: Those activations, [d_sae, n_top].
        histogram: int64 [d_sae, n_bins].
        likeness: For monosemanticity.
        spread: For the share of pictures on which a latent matters.
        written: Activations summed over CLS-like tokens and over patches, float64 [d_sae, 2], per token.
    """

    def __init__(self, d_sae: int, n_top: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.d_sae = d_sae
        self.keys: list[str] = []
        self.labels: list[str | None] = []
        self.n_tokens = 0
        self.n_fired, self.total, self.written = zeros(d_sae), zeros(d_sae), zeros(d_sae, 2)
        self.likeness = Likeness(d_sae, device)
        self.spread = Spread(d_sae, device)
        self.n_bins = len(BIN_EDGES) - 1
        self.histogram = torch.zeros(d_sae, self.n_bins, dtype=torch.int64, device=device)
        self.top = torch.full((d_sae, n_top), -1, dtype=torch.int64, device=device)
        self.top_activation = torch.zeros(d_sae, n_top, device=device)
        self.by_class: dict[str, Tensor] = {}

    def add(self, acts: Tensor, embeds: Tensor, chunk: Sequence[Example], *, n_cls: int) -> None:
        """Take in pictures: acts [batch, pos, d_sae], and embeddings [batch, d_embed], normalized, by any encoder."""
        first = len(self.keys)
        self.keys += [example.key for example in chunk]
        self.labels += [example.label for example in chunk]
        self.n_tokens += acts.shape[0] * acts.shape[1]
        self._add_histogram(acts)
        self.n_fired += (acts > 0).sum((0, 1))
        self.total += acts.sum((0, 1), dtype=torch.float64)
        for place, tokens in enumerate((acts[:, :n_cls], acts[:, n_cls:])):
            self.written[:, place] += tokens.sum((0, 1), dtype=torch.float64)
        self.spread.add(acts, n_cls=n_cls)
        largest = acts.amax(1).double()  # [batch, d_sae]
        self.likeness.add(largest, embeds)
        numbers = torch.arange(first, len(self.keys), device=acts.device).expand(self.d_sae, -1)
        self._keep_top(largest.T.float(), numbers)
        for row, example in enumerate(chunk):
            if example.label is not None:
                sofar = self.by_class.setdefault(example.label, torch.zeros_like(self.total))
                sofar += largest[row]

    def _add_histogram(self, acts: Tensor) -> None:
        latent = torch.arange(self.d_sae, device=acts.device)
        for part in acts.flatten(0, 1).split(max(1, NUMBERS_AT_ONCE // self.d_sae)):
            fires = part > 0
            bins = torch.bucketize(part[fires], torch.tensor(BIN_EDGES[1:-1], device=acts.device), right=True)
            flat = latent.expand_as(part)[fires] * self.n_bins + bins
            self.histogram += torch.bincount(flat, minlength=self.histogram.numel()).view_as(self.histogram)

    def _keep_top(self, largest: Tensor, numbers: Tensor) -> None:
        """Merge activations [d_sae, batch] of pictures into the best so far.

        Of equal ones the first stays: a picture without activation never takes the place of a -1.
        """
        activation = torch.cat([self.top_activation, largest], 1)
        picture = torch.cat([self.top, numbers], 1)
        order = activation.argsort(dim=1, descending=True, stable=True)[:, : self.top.shape[1]]
        self.top_activation, self.top = activation.gather(1, order), picture.gather(1, order)

    @property
    def fires(self) -> Tensor:
        """Which latents fired at all, bool [d_sae]."""
        return self.n_fired > 0

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns that follow from the sums, float64 [d_sae]; NaN where they mean nothing."""
        found = {
            "frequency": self.n_fired / self.n_tokens,
            "mean_activation": self.total / self.n_fired,
            "largest_activation": self.top_activation[:, 0],
            "monosemanticity": self.likeness.scores(),
        }
        if self.by_class:
            by_class = torch.stack(list(self.by_class.values()))
            share = by_class / by_class.sum(0)
            found["class_entropy"] = torch.special.entr(share).sum(0)
            found["n_classes"] = (by_class > 0).sum(0)
        return {name: column.double().cpu().numpy() for name, column in found.items()}
