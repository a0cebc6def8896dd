"""Train an SAE on residuals: TopK, BatchTopK, Matryoshka BatchTopK, or ReLU with an L1 penalty.

What all share is the recipe of Gao et al. 2024 (arXiv:2406.04093): unit-norm decoder rows, b_dec from the geometric
median, the encoder tied to the decoder at the start, and an auxiliary loss that lets latents which have not fired for
a while explain what is left over (AuxK). They differ in which pre_acts count:

    topk         the k largest of each token
    batchtopk    the k * batch largest of a batch (arXiv:2412.06410); a threshold once training is over, so that what a
                 token gives does not depend on its neighbors
    matryoshka   the same, where also the first 1/16, 3/16 and 7/16 of the latents must reconstruct (arXiv:2503.17547)
    relu         all that are positive; their sum is penalized (arXiv:2309.08600)

A training can be stopped at any time and goes on from its last saved state, bit for bit as if it had not been. Several
processes (torchrun) share each batch; the sums of the loss run over all of them, so that the result is that of one
process but for the order of additions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, get_args

import numpy as np
import safetensors
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from defense.core.config import SAEConfig, Tokens, Variant
from defense.core.sae import SparseAutoencoder
from defense.errors import CheckpointError, ConfigError
from defense.store.folders import replacing, write_tensors

from .parallel import World

PREFIXES = (1 / 16, 3 / 16, 7 / 16, 1.0)
"""Shares of the latents that must reconstruct by themselves ("matryoshka")."""
_N_THRESHOLD_BATCHES = 32


@dataclass(frozen=True)
class TrainConfig:
    """How to train.

    Attributes:
        d_sae: Number of latents.
        k: Latents kept per token, on average over a batch for "batchtopk" and "matryoshka"; None for "relu".
        steps: Optimizer steps.
        batch: Tokens per step, over all processes.
        lr: Peak learning rate; 2e-4 / sqrt(d_sae / 2**14) where None (Gao et al., appendix A.3).
        aux_k: Dead latents that explain the residue.
        aux_weight: Weight of that loss. "relu" has none: there a dead latent has no gradient.
        dead_after: A latent is dead after so many tokens without firing.
        seed: Of the initial weights and the order of tokens.
        variant: "topk", "batchtopk", "matryoshka" or "relu".
        l1: Weight of the penalty of "relu": on the sum of a token's acts over sqrt(d_model), in units in which the
            residual's entries have mean square 1. It grows from 0 over the first tenth of the steps.

    Raises:
        ConfigError: A value that is not one of these.
    """

    d_sae: int
    k: int | None
    steps: int
    batch: int = 2048
    lr: float | None = None
    aux_k: int = 128
    aux_weight: float = 1 / 32
    dead_after: int = 200_000
    seed: int = 0
    variant: Variant = "topk"
    l1: float = 0.01

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ConfigError(f"variant={self.variant!r}; it must be one of {', '.join(get_args(Variant))}")
        for name in ("d_sae", "steps", "batch", "aux_k"):
            if not getattr(self, name) >= 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1")
        for name, value in (("lr", self.lr), ("l1", self.l1), ("aux_weight", self.aux_weight)):
            if value is not None and not (math.isfinite(value) and value >= 0 and (value > 0 or name != "lr")):
                least = "above 0" if name == "lr" else "0 or more"
                raise ConfigError(f"{name}={value}; it must be finite, and {least}")
        if (self.k is None) != (self.variant == "relu"):
            raise ConfigError(f"k={self.k} with variant={self.variant!r}; 'relu' has no k, the others need one")
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise ConfigError(f"k={self.k}, d_sae={self.d_sae}; k must lie between 1 and d_sae")

    @property
    def peak_lr(self) -> float:
        """The learning rate that is used."""
        return self.lr if self.lr is not None else 2e-4 / math.sqrt(self.d_sae / 2**14)


@dataclass(frozen=True)
class Progress:
    """How far a training is.

    Attributes:
        step: Steps that are done.
        loss: Squared error over variance, plus the auxiliary loss or the penalty.
        n_dead: Latents that have not fired for a while.
    """

    step: int
    loss: float
    n_dead: int


def geometric_median(points: Tensor, iterations: int = 50) -> Tensor:
    """Return the geometric median of points [n, d]: the point of least summed distance, by Weiszfeld's iteration."""
    median = points.mean(0)
    for _ in range(iterations):
        weights = 1 / (points - median).norm(dim=1).clamp(min=1e-6)
        median = (points * weights[:, None]).sum(0) / weights.sum()
    return median


# --- one step -------------------------------------------------------------------------------------


class _Trainee(nn.Module):
    """The parameters under training. The decoder has unit rows, kept so by `normalize_decoder`."""

    def __init__(self, d_model: int, config: TrainConfig) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(config.seed)
        rows = functional.normalize(torch.randn(config.d_sae, d_model, generator=generator), dim=1)
        self.W_dec = nn.Parameter(rows)
        self.W_enc = nn.Parameter(rows.T.contiguous())
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.b_dec = nn.Parameter(torch.zeros(d_model))

    def pre_acts(self, resid: Tensor) -> Tensor:
        # Not (resid - b_dec) @ W_enc: its gradient would take one more product of the size of the batch.
        return torch.addmm(self.b_enc - self.b_dec @ self.W_enc, resid, self.W_enc).relu()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        self.W_dec.copy_(functional.normalize(self.W_dec, dim=1))

    @torch.no_grad()
    def keep_gradient_tangent(self) -> None:
        assert self.W_dec.grad is not None
        self.W_dec.grad -= (self.W_dec.grad * self.W_dec).sum(1, keepdim=True) * self.W_dec

    @torch.no_grad()
    def normalize_gradient(self) -> None:
        """Bring the gradient to norm 1. It falls tenfold in the first steps, which Adam would go on dividing by."""
        gradients = [parameter.grad for parameter in self.parameters() if parameter.grad is not None]
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm().clamp(min=1e-12)
        for gradient in gradients:
            gradient /= norm


class Trainer:
    """An SAE under training: parameters, optimizer, and what is known of each latent.

    It works at unit mean squared entry, so that one learning rate serves every host; `finish` undoes that.

    Args:
        config: How to train.
        d_model: Width of the residuals.
        device: Where.
        world: The processes that share each batch.
    """

    def __init__(self, config: TrainConfig, d_model: int, device: torch.device, world: World) -> None:
        self.config, self.world = config, world
        self.trainee = _Trainee(d_model, config).to(device)
        self.optimizer = torch.optim.Adam(self.trainee.parameters(), lr=config.peak_lr, betas=(0.9, 0.999), fused=True)
        self.silent_for = torch.zeros(config.d_sae, dtype=torch.int64, device=device)
        self.scale = 1.0
        self.step = 0
        ends = [max(1, round(share * config.d_sae)) for share in PREFIXES]
        self._groups = list(zip([0, *ends], ends, strict=False)) if config.variant == "matryoshka" else [(0, None)]
        self._bound = 0.0

    def start(self, sample: Tensor) -> None:
        """Set the scale and b_dec from a sample of residuals [n, d_model].

        Raises:
            ConfigError: All of them are equal.
        """
        self.scale = float((sample - sample.mean(0)).square().mean().sqrt())
        if self.scale == 0:
            raise ConfigError(f"all {len(sample)} residuals of a sample are equal; there is nothing to learn from them")
        with torch.no_grad():
            self.trainee.b_dec.copy_(geometric_median(sample / self.scale))

    @property
    def dead(self) -> Tensor:
        """Which latents have not fired for `dead_after` tokens, bool [d_sae]."""
        return self.silent_for > self.config.dead_after

    def update(self, resid: Tensor) -> Tensor:
        """Take one step on this process's rows [n_own, d_model] of a batch; return its share of the loss, 0-dim."""
        config, trainee = self.config, self.trainee
        for group in self.optimizer.param_groups:
            group["lr"] = config.peak_lr * min(1.0, (self.step + 1) / 100, 5 * (1 - self.step / config.steps))
        loss, fired = self._loss(resid / self.scale)
        self.optimizer.zero_grad()
        loss.backward()
        for parameter in trainee.parameters():
            assert parameter.grad is not None
            self.world.sum(parameter.grad)
        trainee.keep_gradient_tangent()
        trainee.normalize_gradient()
        self.optimizer.step()
        trainee.normalize_decoder()
        self.silent_for += config.batch
        self.silent_for[self.world.any(fired)] = 0
        self.step += 1
        return loss.detach()

    def _loss(self, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return this process's share of the loss, and which latents fired on its rows, bool [d_sae].

        Every sum over tokens is divided by the size of the whole batch: the shares add up to the loss.
        """
        n, trainee = self.config.batch, self.trainee
        pre_acts = trainee.pre_acts(batch)
        acts = self._activate(pre_acts)
        mean = self.world.sum(batch.sum(0)) / n
        variance = self.world.sum((batch - mean).square().sum(1).sum()) / n
        residue, error = batch - trainee.b_dec, batch.new_zeros(())
        for first, last in self._groups:
            residue = residue - acts[:, first:last] @ trainee.W_dec[first:last]
            error = error + residue.square().sum(1).sum()
        loss = error / len(self._groups) / n / variance
        if self.config.variant == "relu":
            ramp = min(1.0, 10 * self.step / self.config.steps)
            loss = loss + ramp * self.config.l1 * acts.sum() / n / math.sqrt(batch.shape[1])
        elif self.dead.any():
            loss = loss + self._aux_loss(pre_acts, residue.detach())
        return loss, (acts.detach() > 0).any(0)

    def _activate(self, pre_acts: Tensor) -> Tensor:
        """Return acts [n_own, d_sae]."""
        if self.config.variant == "topk":
            assert self.config.k is not None
            values, indices = pre_acts.topk(self.config.k, dim=1, sorted=False)
            return torch.zeros_like(pre_acts).scatter(1, indices, values)
        if self.config.variant == "relu":
            return pre_acts
        return functional.threshold(pre_acts, self._cut(pre_acts), 0.0)

    @torch.no_grad()
    def _cut(self, pre_acts: Tensor) -> float:
        """Return the batch-wide BatchTopK threshold; 0 if fewer than k * batch pre_acts are positive."""
        assert self.config.k is not None
        n_kept = self.config.k * self.config.batch
        for bound in (self._bound, 0.0):  # most are far below the last cut and need not be sorted
            near = pre_acts[pre_acts > bound]
            count = self.world.sum(torch.tensor(len(near), device=near.device))
            if count > n_kept:
                break
        else:
            return 0.0
        largest = near.topk(min(len(near), n_kept + 1), sorted=False).values
        if self.world.size > 1:
            largest = self.world.gather(functional.pad(largest, (0, n_kept + 1 - len(largest)))).flatten()
            largest = largest.topk(n_kept + 1, sorted=False).values
        cut = float(largest.min())
        self._bound = 0.8 * cut
        return cut

    def _aux_loss(self, pre_acts: Tensor, residue: Tensor) -> Tensor:
        """Return AuxK's loss: what the dead latents leave of the residue [n_own, d_model], relative to it."""
        n, dead = self.config.batch, self.dead.nonzero()[:, 0]
        candidates = pre_acts[:, dead]
        values, indices = candidates.topk(min(self.config.aux_k, len(dead)), dim=1, sorted=False)
        left = residue - torch.zeros_like(candidates).scatter(1, indices, values) @ self.trainee.W_dec[dead]
        whole = self.world.sum(residue.square().sum(1).sum()) / n
        return self.config.aux_weight * (left.square().sum(1).sum() / n) / whole

    @torch.no_grad()
    def finish(self, batches: BatchSource, tokens: Tokens) -> SparseAutoencoder:
        """Return the SAE in the residual's own units; "batchtopk" gets its threshold from some more batches."""
        trainee, act = self.trainee, "batchtopk" if self.config.variant == "matryoshka" else self.config.variant
        parameters = {
            "W_enc": trainee.W_enc.detach().cpu().numpy(),
            "b_enc": trainee.b_enc.detach().cpu().numpy() * self.scale,
            "W_dec": trainee.W_dec.detach().cpu().numpy(),
            "b_dec": trainee.b_dec.detach().cpu().numpy() * self.scale,
        }
        if act == "batchtopk":
            device = trainee.W_enc.device
            resids = (batches.next().to(device) for _ in range(_N_THRESHOLD_BATCHES))
            cuts = [self._cut(trainee.pre_acts(resid / self.scale)) for resid in resids]
            threshold = self.scale * sum(cuts) / len(cuts)
            parameters["threshold"] = np.full(self.config.d_sae, threshold, np.float32)
        fields: dict[str, Any] = {"act": act, "k": self.config.k if act == "topk" else None, "tokens": tokens}
        return SparseAutoencoder(SAEConfig(trainee.b_dec.shape[0], self.config.d_sae, **fields), parameters)

    def check_finite(self) -> None:
        """Raise `ConfigError` where the training has diverged: nothing comes of the steps that are left."""
        for name, parameter in self.trainee.named_parameters():
            if not parameter.isfinite().all():
                raise ConfigError(
                    f"the training has diverged: {name} is not finite after step {self.step} of {self.config.steps}; "
                    f"train with a lower learning rate than {self.config.peak_lr:g} (--lr), from the start"
                )

    # --- saved state ---

    def save(self, path: Path, made_with: Mapping[str, Any], batches: Mapping[str, Any]) -> None:
        """Write everything that the next step depends on as one safetensors file.

        Args:
            path: Where to; replaced when the new file is complete.
            made_with: What must be the same for the training to go on, as JSON values.
            batches: Where the next batch is, as JSON values.

        Raises:
            ConfigError: The training has diverged; what was saved before stays.
        """
        self.check_finite()
        tensors = {"silent_for": self.silent_for}
        for name, parameter in self.trainee.named_parameters():
            tensors[name] = parameter.detach()
            tensors |= {f"{name}.{moment}": value for moment, value in self.optimizer.state[parameter].items()}
        numbers = {"step": self.step, "scale": self.scale, "batches": batches, "made_with": made_with}
        whole = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        with replacing(path) as partial:
            write_tensors(whole, partial, save_file, {"state": json.dumps(numbers)})

    def restore(self, saved: SavedState) -> None:
        """Go back to a saved state."""
        tensors = dict(saved.tensors)
        self.silent_for.copy_(tensors.pop("silent_for"))
        self.step, self.scale = saved.step, saved.scale
        with torch.no_grad():
            for name, parameter in self.trainee.named_parameters():
                parameter.copy_(tensors[name])
                moments = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
                # Adam counts its steps on the CPU unless it is told otherwise; fused, on the parameter's device.
                self.optimizer.state[parameter] = {key: t.to(parameter.device) for key, t in moments.items()}


@dataclass(frozen=True)
class SavedState:
    """A training that was stopped, as `Trainer.save` wrote it."""

    step: int
    scale: float
    batches: Mapping[str, Any]
    tensors: Mapping[str, Tensor]

    @classmethod
    def read(cls, path: Path, made_with: Mapping[str, Any]) -> SavedState | None:
        """Return what is saved at a path, or None where nothing is.

        Raises:
            CheckpointError: The file is damaged.
            ConfigError: It was made with something else than `made_with`.
        """
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                numbers = json.loads(file.metadata()["state"])
                made, step, scale = dict(numbers["made_with"]), numbers["step"], numbers["scale"]
                batches = numbers["batches"]
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
        except (safetensors.SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path} is no saved training ({error}); delete it to start anew") from error
        want = json.loads(json.dumps(made_with))
        differing = [key for key in {**want, **made} if want.get(key) != made.get(key)]
        if differing:
            raise ConfigError(
                f"{path} holds a training with other settings ({', '.join(sorted(differing))}); delete it to start "
                "anew, or write elsewhere"
            )
        return cls(step, scale, batches, tensors)


# --- a training -----------------------------------------------------------------------------------


class BatchSource(Protocol):
    """Where batches come from: `residuals.Batches`, or residuals in memory."""

    def next(self) -> Tensor:
        """Return this process's rows of the next batch."""

    def sample(self, n: int) -> Tensor:
        """Return a sample of n rows."""

    def state(self) -> dict[str, Any]:
        """Return where the next batch is."""
