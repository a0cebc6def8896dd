"""Measure edits of candidates, and choose as many as a budget bears."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.core.latents import Scope
from defense.core.ops import reference
from defense.core.sae import SparseAutoencoder, normalize
from defense.errors import ConfigError
from defense.hosts.tower import VisionTower

from .chunks import bytes_behind, chunks
from .config import FitConfig
from .seen import Seen

log = logging.getLogger(__name__)

_ROUNDING = 1e-9
"""What sums of floats may be off by: far less than the share of one picture."""


@dataclass(frozen=True)
class Group:
    """Pictures of one kind at the hook point, of which `Seen` knows more.

    Attributes:
        kind: Of picture, as `Seen` has it.
        rows: Which of its pictures, int64 [n].
        resid: Their residuals, [n, pos, d_model].
        answer: What is right, int64 [n].
        rival: What it is mistaken for, int64 [n].
        share: Of the pictures that the clean budget is about.
    """

    kind: str
    rows: Tensor
    resid: Tensor
    answer: Tensor
    rival: Tensor
    share: float


class SiteFit(Protocol):
    """What a trial is of: `TextFit` or `GroupFit` (selecting.py)."""

    tower: VisionTower
    device: torch.device
    hook_point: str
    sae: SparseAutoencoder
    seen: Seen
    groups: dict[str, Group]
    kept: tuple[str, ...]
    fooled: tuple[str, ...]

    def logits(self, resid: Tensor) -> Tensor:
        """Return logits_per_image of residuals at the hook point."""
        ...

    def positions(self, scope: Scope) -> slice:
        """Return the tokens that an edit of a scope touches."""
        ...


@dataclass(frozen=True)
class Tried:
    """What the network does with the first `n` of the candidates removed.

    Attributes:
        n: How many.
        kept_accuracy: Of the kept groups, as a fraction.
        fooled_loss: Of the right answer on the fooled groups, in nats.
    """

    n: int
    kept_accuracy: float
    fooled_loss: float


@dataclass(frozen=True)
class Selection:
    """What is chosen.

    Attributes:
        latents: S, most removed first.
        gains: The part of each that is kept.
        tried: What was measured on the way, from no latents on.
    """

    latents: tuple[int, ...]
    gains: tuple[float, ...]
    tried: tuple[Tried, ...]

    @property
    def before(self) -> Tried:
        """The network as it was."""
        return self.tried[0]

    @property
    def after(self) -> Tried:
        """The network with S removed."""
        return next(each for each in self.tried if each.n == len(self.latents))


def fits_budget(loss: float, clean_budget: float) -> bool:
    """Whether a loss of accuracy is within a budget; fractions both; 1 - 0.99, above 0.01 in floats, is within."""
    return loss <= clean_budget + _ROUNDING


def within_budget(trial: Trial, ranked: np.ndarray, removal: np.ndarray, clean_budget: float) -> Selection:
    """Remove as many candidates (columns of `trial`, best first) as the budget allows: step 4.

    The more is removed, the less is kept, so that halving finds the number; where that is not quite so, what it finds
    still holds to the budget. Nothing is removed where the fooled pictures do not gain by it.
    """
    quarters = {len(ranked) * quarter // 4 for quarter in range(5)}  # for the report's curve
    tried = {n: trial.measure(ranked[:n], removal) for n in quarters}
    before = tried[0].kept_accuracy
    best, n, excess = 0, len(ranked), len(ranked) + 1
    while best < n:
        if n not in tried:
            tried[n] = trial.measure(ranked[:n], removal)
        fits = fits_budget(before - tried[n].kept_accuracy, clean_budget)
        best, excess = (n, excess) if fits else (best, n)
        n = (best + excess) // 2
    if tried[best].fooled_loss >= tried[0].fooled_loss:
        best = 0
    log.info("%d latents: accuracy kept %.4f, loss where fooled %.3f", *asdict(tried[best]).values())
    chosen = ranked[:best]
    return Selection(
        tuple(trial.latents[chosen].tolist()),
        tuple((1 - removal[chosen]).tolist()),
        tuple(tried[n] for n in sorted(tried)),
    )


class Trial:
    """Measures edits. The candidates' activations are computed once; an edit then costs one pass from the block on."""

    def __init__(self, fit: SiteFit, latents: np.ndarray, config: FitConfig) -> None:
        if config.spares_high_norm != fit.seen.spares_high_norm:
            raise ConfigError(
                f"spares_high_norm={config.spares_high_norm}, but the latents were looked at with "
                f"{fit.seen.spares_high_norm}; give both the same"
            )
        self.fit, self.edit, self.latents = fit, config.edit, np.asarray(latents, dtype=np.int64)
        self.positions = fit.positions(config.scope)
        self.acts = {
            name: fit.seen.acts(group.kind, self.positions, self.latents, group.rows)
            for name, group in fit.groups.items()
        }
        self.W_dec_S = fit.sae.W_dec[torch.from_numpy(self.latents).to(fit.device)]
        self.bytes_each = bytes_behind(fit.tower, fit.hook_point, next(iter(fit.groups.values())).resid.shape[1])
        """Of a picture, in a pass from the block on and back."""

    def logits(self, group: str, removal: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return logits_per_image of some pictures with `removal` [n_candidates] of each candidate scaled away."""
        return self._edited(group, rows, lambda acts, _: reference.scaled(acts, removal, self.W_dec_S))

    def _edited(self, group: str, rows: Tensor | slice, delta_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        resid = self.fit.groups[group].resid[rows]
        tokens = resid[:, self.positions]
        z, scale, _ = normalize(tokens.flatten(0, 1), self.fit.sae.config.norm)
        delta = delta_of(self.acts[group][rows].flatten(0, 1), z)
        edited = resid.clone()
        edited[:, self.positions] = tokens - (delta if scale is None else delta * scale).view_as(tokens)
        return self.fit.logits(edited)

    def removed(self, group: str, columns: np.ndarray, removal: np.ndarray) -> Tensor:
        """Return logits_per_image with the candidates of some columns removed as what will ship removes them."""
        part = torch.from_numpy(removal[columns]).float().to(self.fit.device)
        W_dec_S = self.W_dec_S[columns]

        def delta_of(acts: Tensor, z: Tensor) -> Tensor:
            if self.edit == "project":
                return reference.projected(acts[:, columns], part, W_dec_S, z - self.fit.sae.b_dec)
            return reference.scaled(acts[:, columns], part, W_dec_S)

        n = len(self.fit.groups[group].answer)
        if not len(columns):
            passes = [self.fit.logits(self.fit.groups[group].resid[rows]) for rows in chunks(n, self.bytes_each)]
        else:
            passes = [self._edited(group, rows, delta_of) for rows in chunks(n, self.bytes_each)]
        return torch.cat(passes)

    @torch.no_grad()
    def measure(self, columns: np.ndarray, removal: np.ndarray) -> Tried:
        """Return what removing the candidates of some columns does; `removal` [n_candidates] is the part of each.

        Accuracy is a mean over the kept groups by their shares, loss over the fooled ones, each alike.
        """
        accuracies, shares, losses = [], [], []
        for name in dict.fromkeys((*self.fit.kept, *self.fit.fooled)):
            logits, group = self.removed(name, columns, removal), self.fit.groups[name]
            if name in self.fit.kept:
                accuracies.append(float((logits.argmax(1) == group.answer).double().mean()))
                shares.append(group.share)
            if name in self.fit.fooled:
                losses.append(float(functional.cross_entropy(logits, group.answer)))
        return Tried(len(columns), float(np.average(accuracies, weights=shares)), float(np.mean(losses)))
