"""How well an SAE codes tokens, kind by kind: L0, explained variance and alive latents, from sums over a stream."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .sae import SparseAutoencoder

_MOST = 4096
"""Tokens that are encoded and decoded at once."""


@dataclass(frozen=True)
class Coding:
    """How well an SAE codes some tokens.

    Attributes:
        n_tokens: How many.
        explained_variance: 1 - squared error / variance of the residuals around their mean; None where nothing varies,
            as in a single CLS token.
        l0: Latents that fire per token, on average.
        alive: Fraction of latents that fire at least once.
    """

    n_tokens: int
    explained_variance: float | None
    l0: float
    alive: float


class CodingSums:
    """What a stream of tokens of one kind adds up to. It does not matter how the stream is cut.

    Args:
        d_model: Width of the residuals.
        d_sae: Latents.
        device: Where the sums are.
    """

    def __init__(self, d_model: int, d_sae: int, device: torch.device) -> None:
        self.n, self.error, self.square, self.fired = 0, 0.0, 0.0, 0
        self.mean = torch.zeros(d_model, dtype=torch.float64, device=device)
        self.alive = torch.zeros(d_sae, dtype=torch.bool, device=device)

    def add(self, sae: SparseAutoencoder, resid: Tensor, acts: Tensor) -> None:
        """Take in tokens.

        Args:
            sae: The SAE.
            resid: Their residuals, float32 [n, d_model].
            acts: What it encodes them as, [n, d_sae].
        """
        if not len(resid):
            return
        self.error += float((resid - sae.decode(acts, resid)).square().sum(dtype=torch.float64))
        self.fired += int((acts != 0).sum())
        self.alive |= (acts != 0).any(0)
        self._join(len(resid), resid.double().mean(0), float((resid - resid.mean(0)).square().sum(dtype=torch.float64)))

    def _join(self, n: int, mean: Tensor, square: float) -> None:
        """Add n tokens with a mean and a sum of squares around it (Chan et al. 1979), which cancels nothing."""
        apart = mean - self.mean
        total = self.n + n
        self.square += square + float(apart.square().sum()) * self.n * n / total
        self.mean += apart * (n / total)
        self.n = total

    @classmethod
    def of_all(cls, parts: Iterable[CodingSums]) -> CodingSums:
        """Return the sums over all tokens of some kinds, of which there is at least one."""
        parts = list(parts)
        whole = cls(len(parts[0].mean), len(parts[0].alive), parts[0].mean.device)
        for part in parts:
            whole.error += part.error
            whole.fired += part.fired
            whole.alive |= part.alive
            if part.n:
                whole._join(part.n, part.mean, part.square)
        return whole

    def result(self) -> Coding:
        """Return what they come to."""
        explained = 1 - self.error / self.square if self.square > 0 else None
        return Coding(self.n, explained, self.fired / max(1, self.n), float(self.alive.float().mean()))


class CodingByKind:
    """The same for several kinds of tokens of whole pictures.

    Args:
        sae: The SAE.
        kinds: Name -> positions among the tokens that the SAE reads.
        device: Where the sums are.
    """

    def __init__(self, sae: SparseAutoencoder, kinds: Mapping[str, slice], device: torch.device) -> None:
        self.sae, self.kinds = sae, dict(kinds)
        self.sums = {kind: CodingSums(sae.config.d_model, sae.config.d_sae, device) for kind in kinds}

    def add(self, resid: Tensor, acts: Tensor) -> None:
        """Take in pictures: the tokens that the SAE reads [batch, n_tokens, d_model], and their acts [..., d_sae]."""
        for kind, tokens in self.kinds.items():
            rows, row_acts = resid[:, tokens].flatten(0, 1).float(), acts[:, tokens].flatten(0, 1)
            for part, part_acts in zip(rows.split(_MOST), row_acts.split(_MOST), strict=True):
                self.sums[kind].add(self.sae, part, part_acts)

    def encode_and_add(self, resid: Tensor) -> None:
        """Take in pictures, and encode them here, some at a time."""
        for part in resid.split(max(1, _MOST // resid.shape[1])):
            self.add(part, self.sae.encode(part.float()))

    def results(self) -> dict[str, Coding]:
        """Return what each kind comes to."""
        return {kind: sums.result() for kind, sums in self.sums.items()}

    def result(self) -> Coding:
        """Return what all tokens together come to."""
        return CodingSums.of_all(self.sums.values()).result()
