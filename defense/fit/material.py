"""Pictures to fit on, held in memory: `Pairs` for text, `Groups` for an attribute, `Material` around either."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.errors import ConfigError


@dataclass(frozen=True)
class Material:
    """Pictures to fit on.

    Attributes:
        data: The pictures themselves.
        strata: Which group each belongs to, int64 [n]; folds hold the same share of each.
        unreadable: Names of the pictures that were left out.
        provenance: Where they came from, as JSON values.
    """

    data: Pairs | Groups
    strata: np.ndarray
    unreadable: tuple[str, ...]
    provenance: Mapping[str, Any]

    def folds(self, n: int, seed: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return `n` splits into pictures to fit on and pictures held out, each by index, int64.

        Raises:
            ConfigError: A group has fewer pictures than there are folds.
        """
        rng = np.random.default_rng([seed, n])
        fold_of = np.empty(len(self.strata), dtype=np.int64)
        for group in np.unique(self.strata):
            rows = rng.permutation(np.flatnonzero(self.strata == group))
            if len(rows) < n:
                raise ConfigError(
                    f"{len(rows)} pictures (of one group, where there are groups) cannot be split into {n} folds; give "
                    "more pictures or fewer --folds"
                )
            fold_of[rows] = np.arange(len(rows)) % n
        splits = [(np.flatnonzero(fold_of != fold), np.flatnonzero(fold_of == fold)) for fold in range(n)]
        return [(torch.from_numpy(fitted), torch.from_numpy(held_out)) for fitted, held_out in splits]


@dataclass(frozen=True)
class Pairs:
    """Pictures with a word on them, and their twins. All pixel_values are float32 [n, 3, height, width].

    Fitting holds, for each picture and each of its three twins, 4 bytes times 3 * height * width (pixels) + pos *
    d_model (residual) + pos * n_candidates (activations): 0.9 MB a picture for the embedded model, 2.5 MB for a
    ViT-B/32, 7 MB for a ViT-L/14. What is computed on top of that goes in chunks and does not grow with n.

    Attributes:
        clean: Without the writing.
        neutral: With the plate only.
        attacked: With the word.
        label: Index of the right answer, int64 [n].
        word: Index of the answer that is written, int64 [n].
    """

    clean: Tensor
    neutral: Tensor
    attacked: Tensor
    label: Tensor
    word: Tensor

    @property
    def n(self) -> int:
        """How many pictures; each has two twins."""
        return len(self.label)

    def without_pixels(self, rows: Tensor) -> Pairs:
        """Return some of the pictures, by their index, int64 [m], but not what they show: pixel_values [m, 0]."""
        nothing = torch.empty(len(rows), 0)
        return Pairs(nothing, nothing, nothing, self.label[rows], self.word[rows])

    def pictures(self) -> dict[str, Tensor]:
        """Return pixel_values [n, 3, height, width] by kind: "clean", "neutral" and "attacked"."""
        return {"clean": self.clean, "neutral": self.neutral, "attacked": self.attacked}

    def twins(self) -> tuple[Tensor, ...]:
        """Return the pictures with and those without the word, each [n, 3, height, width]."""
        return self.attacked, self.clean


@dataclass(frozen=True)
class Groups:
    """Pictures whose right answer goes with an attribute that should not count.

    Fitting holds a third of what it does for `Pairs`, per picture.

    Attributes:
        pixel_values: float32 [n, 3, height, width].
        y: Index of the right answer, int64 [n].
        a: The attribute, int64 [n].
        shares: Of each group (y, a) among all pictures that could have been taken; None where these were taken as they
            came, so that theirs stand for them. Pictures are balanced over groups, the world is not.
    """

    pixel_values: Tensor
    y: Tensor
    a: Tensor
    shares: Mapping[tuple[int, int], float] | None = None

    @property
    def n(self) -> int:
        """How many pictures."""
        return len(self.y)

    def without_pixels(self, rows: Tensor) -> Groups:
        """Return some of the pictures, by their index, int64 [m], but not what they show: pixel_values [m, 0]."""
        return Groups(torch.empty(len(rows), 0), self.y[rows], self.a[rows], self.shares)

    def share(self, y: int, a: int) -> float:
        """Return the share of a group among all pictures, or among these where no other is known."""
        if self.shares is not None:
            return self.shares[y, a]
        return float(((self.y == y) & (self.a == a)).double().mean())

    def pictures(self) -> dict[str, Tensor]:
        """Return pixel_values [n, 3, height, width] by kind; all are of one kind, "picture"."""
        return {"picture": self.pixel_values}

    def twins(self) -> tuple[Tensor, ...]:
        """Return the pictures, [n, 3, height, width]: none has a twin."""
        return (self.pixel_values,)
