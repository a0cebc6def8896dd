"""Learn together how much of each candidate's writing is best removed: step 3 of choosing S."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.data.progress import SILENT, Progress

from .chunks import chunks
from .config import FitConfig
from .trial import Trial

log = logging.getLogger(__name__)

LEAST_REMOVAL = 0.05
"""A candidate that gradient descent removes by less than this is dropped; it starts close to it."""

CHECK_EVERY = 10
"""Steps from one look at the pictures that are not learned from to the next."""
PATIENCE = 3
"""Looks without a better one after which it stops."""
_HELD_OUT = 5
"""One picture in so many of each group is not learned from, to see when to stop."""
_LEAST_GROUP = 10
"""A smaller group has none to spare; then all steps are taken, on all pictures."""


@dataclass
class JointState:
    """Where the joint step stands, from `CHECK_EVERY` steps to the next.

    Attributes:
        arrays: What it goes on from; empty at the start.
        save: Called with what it could go on from.
    """

    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)
    save: Callable[[Mapping[str, np.ndarray]], None] = lambda _: None


def learn_removal(trial: Trial, config: FitConfig, state: JointState, progress: Progress = SILENT) -> np.ndarray:
    """Return how much of each candidate's writing is best removed, float64 [n_candidates] in [0, 1].

    Minimizes the loss of the right answer on all groups, plus `sparsity` times the sum of what is removed. So a latent
    is left alone where the right answer needs it. Weight moves step by step to the groups with the larger
    loss (group DRO, arXiv:1911.08731, algorithm 1). It stops where the same loss, on pictures that it does not learn
    from, falls no more, and takes what was best there.

    Args:
        trial: The candidates and the pictures.
        config: Steps, batch and the rest.
        state: Where to go on, and what keeps where it stands.
        progress: Told of the steps.
    """
    if not len(trial.latents):
        return np.zeros(0)
    descent = _Descent(trial, config)
    descent.restore(state.arrays)
    with progress.stage("joint step", config.steps) as advance:
        advance(descent.step)  # done before it was killed
        while descent.step < config.steps and not descent.is_done:
            descent.take_step()
            advance(1)
            if descent.step % CHECK_EVERY == 0:
                descent.look()
                state.save(descent.arrays())
    return descent.best()


class _Descent:
    """Gradient descent on the logits of what is removed, with Adam, and what it needs to stop and to go on."""

    def __init__(self, trial: Trial, config: FitConfig) -> None:
        self.trial, self.config = trial, config
        groups = trial.fit.groups
        start = math.log(LEAST_REMOVAL / (1 - LEAST_REMOVAL))
        device = trial.fit.device
        self.logits = torch.full((len(trial.latents),), start, device=device, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.logits], lr=config.lr)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.weights = dict.fromkeys(groups, 1 / len(groups))
        self.step, self.stale = 0, 0
        self.lowest, self.at_lowest = math.inf, self.logits.detach().clone()
        self.learned, self.held_out = _split({name: len(group.answer) for name, group in groups.items()}, config.seed)

    @property
    def is_done(self) -> bool:
        """Whether more steps would not help on pictures that are not learned from."""
        return self.stale >= PATIENCE

    def take_step(self) -> None:
        """Move once, on a batch of each group."""
        config = self.config
        (gradient,) = torch.autograd.grad(config.sparsity * self.logits.sigmoid().sum(), self.logits)
        losses = {}
        for name in self.trial.fit.groups:
            pool = self.learned[name]
            drawn = torch.randint(len(pool), (min(config.batch, len(pool)),), generator=self.generator)
            losses[name], of_group = self._loss_and_gradient(name, pool[drawn])
            gradient = gradient + self.weights[name] * of_group
        self.logits.grad = gradient
        self.optimizer.step()
        grown = {name: self.weights[name] * math.exp(config.worst_rate * losses[name]) for name in self.weights}
        self.weights = {name: weight / sum(grown.values()) for name, weight in grown.items()}
        self.step += 1

    def _loss_and_gradient(self, name: str, rows: Tensor) -> tuple[float, Tensor]:
        """Return the mean loss of some pictures and its gradient, chunk by chunk: a pass back takes much memory."""
        total, gradient = 0.0, torch.zeros_like(self.logits)
        for part in chunks(len(rows), self.trial.bytes_each):
            loss = self._loss(name, rows[part], self.logits.sigmoid()) / len(rows)
            (of_part,) = torch.autograd.grad(loss, self.logits)
            gradient, total = gradient + of_part, total + loss.item()
        return total, gradient

    def _loss(self, name: str, rows: Tensor, removal: Tensor) -> Tensor:
        """Return the summed loss of the right answer on some pictures of a group."""
        answer = self.trial.fit.groups[name].answer
        rows = rows.to(answer.device)
        with self.trial.fit.tower.fast():
            logits = self.trial.logits(name, removal, rows)
        return functional.cross_entropy(logits.float(), answer[rows], reduction="sum")

    @torch.no_grad()
    def look(self) -> None:
        """Measure on the pictures that are not learned from, and keep what is best there."""
        removal = self.logits.sigmoid()
        if not self.held_out:
            log.info("joint step %d of %d: %.1f removed", self.step, self.config.steps, removal.sum().item())
            return
        losses = []
        for name, rows in self.held_out.items():
            parts = chunks(len(rows), self.trial.bytes_each)
            losses.append(sum(self._loss(name, rows[part], removal).item() for part in parts) / len(rows))
        loss = float(np.mean(losses)) + self.config.sparsity * removal.sum().item()
        log.info("joint step %d of %d: loss held out %.4f", self.step, self.config.steps, loss)
        if loss < self.lowest:
            self.lowest, self.at_lowest, self.stale = loss, self.logits.detach().clone(), 0
        else:
            self.stale += 1

    def best(self) -> np.ndarray:
        """Return what was best where it was looked, else what it came to."""
        logits = self.at_lowest if self.lowest < math.inf else self.logits.detach()
        removal: np.ndarray = logits.sigmoid().double().cpu().numpy()
        return removal

    def arrays(self) -> dict[str, np.ndarray]:
        """Return all that it goes on from."""
        (moments,) = self.optimizer.state_dict()["state"].values()
        tensors = {
            "logits": self.logits.detach(), "at_lowest": self.at_lowest, "generator": self.generator.get_state(),
            "exp_avg": moments["exp_avg"], "exp_avg_sq": moments["exp_avg_sq"],
        }  # fmt: skip
        found = {name: tensor.cpu().numpy().copy() for name, tensor in tensors.items()}
        found["weights"] = np.array(list(self.weights.values()))
        # Infinity is no number that is read back.
        found["numbers"] = np.array([self.step, self.stale, min(self.lowest, np.finfo(np.float64).max)])
        return found

    def restore(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Go on from what `arrays` gave; from the start where that is nothing."""
        if not arrays:
            return
        step, stale, lowest = arrays["numbers"].tolist()
        self.step, self.stale = int(step), int(stale)
        self.lowest = math.inf if lowest == np.finfo(np.float64).max else lowest
        device = self.logits.device
        with torch.no_grad():
            self.logits.copy_(torch.from_numpy(arrays["logits"]))
        self.at_lowest = torch.from_numpy(arrays["at_lowest"]).to(device)
        self.generator.set_state(torch.from_numpy(arrays["generator"]))
        self.weights = dict(zip(self.weights, arrays["weights"].tolist(), strict=True))
        moments = {name: torch.from_numpy(arrays[name]).to(device) for name in ("exp_avg", "exp_avg_sq")}
        held = self.optimizer.state_dict()
        held["state"] = {0: {"step": torch.tensor(float(self.step)), **moments}}
        self.optimizer.load_state_dict(held)


def _split(sizes: Mapping[str, int], seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return which pictures of each group are learned from and which are not, by index; none is spared of few."""
    if min(sizes.values()) < _LEAST_GROUP:
        return {name: torch.arange(n) for name, n in sizes.items()}, {}
    learned, held_out = {}, {}
    for name, n in sizes.items():
        # The same order for each: twins of one picture stay on one side.
        order = torch.from_numpy(np.random.default_rng([seed, n]).permutation(n))
        held_out[name], learned[name] = order[: n // _HELD_OUT].sort().values, order[n // _HELD_OUT :].sort().values
    return learned, held_out
