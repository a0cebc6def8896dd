"""Train a TopK SAE on residuals that are held in memory.

The recipe is Gao et al. 2024 (arXiv:2406.04093): reconstruct from the k largest latents, unit-norm decoder rows,
b_dec from the geometric median, encoder tied to the decoder at the start, and an auxiliary loss that lets latents
which have not fired for a while explain what is left over (AuxK).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ConfigError, ShapeError
from .sae import SAEConfig, SparseAutoencoder

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        d_sae: Number of latents.
        k: Latents kept per token.
        steps: Optimiser steps.
        batch: Tokens per step.
        lr: Peak learning rate; 2e-4 / sqrt(d_sae / 2**14) where None (Gao et al., appendix A.3).
        aux_k: Dead latents that explain the residue.
        aux_weight: Weight of that loss.
        dead_after: A latent is dead after so many tokens without firing.
        seed: Of the initial weights and the order of tokens.
    """

    d_sae: int
    k: int
    steps: int
    batch: int = 2048
    lr: float | None = None
    aux_k: int = 128
    aux_weight: float = 1 / 32
    dead_after: int = 200_000
    seed: int = 0

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.d_sae / 2**14)


@dataclass(frozen=True)
class Quality:
    """How good an SAE is on held-out tokens.

    Attributes:
        explained_variance: 1 - squared error / variance of the residuals around their mean.
        l0: Latents that fire per token, on average.
        alive: Fraction of latents that fire at least once.
    """

    explained_variance: float
    l0: float
    alive: float


def geometric_median(points: Tensor, iterations: int = 50) -> Tensor:
    """Return the point of least summed distance to points [n, d], by Weiszfeld's iteration."""
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=1).clamp(min=1e-6)
        median = (points * weights[:, None]).sum(0) / weights.sum()
    return median


class _Trainee(nn.Module):
    """The parameters under training. The decoder has unit rows, kept so by `normalise_decoder`."""

    def __init__(self, d_model: int, config: TrainConfig, b_dec: Tensor) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        rows = functional.normalize(torch.randn(config.d_sae, d_model, generator=generator), dim=1)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(b_dec.clone())
        self.k = config.k

    def pre_acts(self, resid: Tensor) -> Tensor:
        return ((resid - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def decode(self, values: Tensor, indices: Tensor, d_sae: int) -> Tensor:
        acts = values.new_zeros(len(values), d_sae).scatter(1, indices, values)
        return acts @ self.W_dec

    @torch.no_grad()
    def normalise_decoder(self) -> None:
        self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def keep_gradient_tangent(self) -> None:
        assert self.W_dec.grad is not None
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec


def train_topk(resid: Tensor, config: TrainConfig, *, tokens: str = "all") -> SparseAutoencoder:
    """Return a TopK SAE of residuals [n, d_model].

    Args:
        resid: Float tensor; drawn with replacement, by the seed alone.
        config: How to train.
        tokens: Which tokens these are: "cls", "patch" or "all"; recorded in the SAE.

    Raises:
        ShapeError: `resid` is not two-dimensional.
        ConfigError: Fewer tokens than one batch, or k above d_sae.
    """
    if resid.ndim != 2:
        raise ShapeError(f"resid is {list(resid.shape)}; it must be [n, d_model], one row per token")
    if len(resid) < config.batch or config.k > config.d_sae:
        raise ConfigError(
            f"{len(resid)} tokens, batch={config.batch}, k={config.k}, d_sae={config.d_sae}; it takes at least one "
            "batch of tokens, and k of at most d_sae"
        )
    d_model = resid.shape[1]
    generator = torch.Generator().manual_seed(config.seed)
    sample = resid[torch.randperm(len(resid), generator=generator)[:8192]].float()
    # Trained at unit mean squared entry, so that one learning rate serves every host; undone at the end.
    scale = float((sample - sample.mean(0)).square().mean().sqrt())
    trainee = _Trainee(d_model, config, geometric_median(sample / scale))
    optimizer = torch.optim.Adam(trainee.parameters(), lr=config.peak_lr, betas=(0.9, 0.999), fused=True)
    silent_for = torch.zeros(config.d_sae, dtype=torch.int64)
    for step in range(config.steps):
        for group in optimizer.param_groups:
            group["lr"] = config.peak_lr * min(1.0, (step + 1) / 100, 5 * (1 - step / config.steps))
        rows = torch.randint(len(resid), (config.batch,), generator=generator)
        loss, fired = _loss(trainee, resid[rows].float() / scale, config, silent_for > config.dead_after)
        optimizer.zero_grad()
        loss.backward()
        trainee.keep_gradient_tangent()
        nn.utils.clip_grad_norm_(trainee.parameters(), 1.0)
        optimizer.step()
        trainee.normalise_decoder()
        silent_for += config.batch
        silent_for[fired] = 0
        if (step + 1) % 250 == 0:
            dead = int((silent_for > config.dead_after).sum())
            log.info("SAE step %d of %d: loss %.4f, %d dead", step + 1, config.steps, loss.item(), dead)
    parameters = {
        "W_enc": trainee.W_enc.detach().numpy(),
        "b_enc": trainee.b_enc.detach().numpy() * scale,
        "W_dec": trainee.W_dec.detach().numpy(),
        "b_dec": trainee.b_dec.detach().numpy() * scale,
    }
    fields: Mapping[str, Any] = {"act": "topk", "k": config.k, "tokens": tokens}
    return SparseAutoencoder(SAEConfig(d_model=d_model, d_sae=config.d_sae, **fields), parameters)


def _loss(trainee: _Trainee, batch: Tensor, config: TrainConfig, dead: Tensor) -> tuple[Tensor, Tensor]:
    """Return the reconstruction loss plus AuxK, and the latents that fired."""
    pre_acts = trainee.pre_acts(batch)
    values, indices = pre_acts.topk(config.k, dim=1, sorted=False)
    residue = batch - trainee.b_dec - trainee.decode(values, indices, config.d_sae)
    variance = (batch - batch.mean(0)).square().sum(1).mean()
    loss = residue.square().sum(1).mean() / variance
    n_dead = int(dead.sum())
    if n_dead:
        candidates = pre_acts.masked_fill(~dead, -torch.inf)
        aux_values, aux_indices = candidates.topk(min(config.aux_k, n_dead), dim=1, sorted=False)
        left = residue.detach() - trainee.decode(aux_values, aux_indices, config.d_sae)
        loss = loss + config.aux_weight * left.square().sum(1).mean() / residue.detach().square().sum(1).mean()
    return loss, indices[values > 0]


@torch.inference_mode()
def measure(sae: SparseAutoencoder, resid: Tensor, *, chunk: int = 4096) -> Quality:
    """Return an SAE's quality on residuals [n, d_model]."""
    mean = resid.float().mean(0)
    error = variance = fired = 0.0
    alive = torch.zeros(sae.config.d_sae, dtype=torch.bool)
    for rows in resid.split(chunk):
        rows = rows.float()
        acts = sae.encode(rows)
        error += float((rows - sae.decode(acts, rows)).square().sum())
        variance += float((rows - mean).square().sum())
        fired += float((acts != 0).sum())
        alive |= (acts != 0).any(0)
    return Quality(1 - error / variance, fired / len(resid), float(alive.float().mean()))
