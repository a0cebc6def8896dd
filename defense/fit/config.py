"""How to choose S."""

from __future__ import annotations

import math
from dataclasses import dataclass

from defense.core.latents import Edit, Scope
from defense.errors import ConfigError


@dataclass(frozen=True)
class FitConfig:
    """How to choose.

    Attributes:
        n_candidates: Latents that reach the joint step, at most.
        steps: Of gradient descent there, at most: it stops where held-out pictures gain no more.
        batch: Pictures of each group that a step sees.
        lr: Learning rate of Adam on the logits of what is removed.
        sparsity: Loss (nats) that each removed latent costs in the joint step.
        worst_rate: How fast the joint step moves its weight to the groups with the larger loss; 0 leaves it as it is.
        clean_budget: Accuracy on the kept groups that may be lost, as a fraction.
        edit: "scale", or "project", which takes out the span of the latents of S that fire at a token and leaves
            tokens alone where none does; the joint step always works with "scale".
        scope: Tokens that are edited.
        spares_high_norm: Whether patches of high norm are left as they are; what latents do there then counts nowhere.
        seed: Of the order of pictures in the joint step.
    """

    n_candidates: int = 256
    steps: int = 200
    batch: int = 24
    lr: float = 0.1
    sparsity: float = 1e-3
    worst_rate: float = 0.01
    clean_budget: float = 0.005
    edit: Edit = "scale"
    scope: Scope = "all"
    spares_high_norm: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.edit not in ("scale", "project"):
            raise ConfigError(f"edit={self.edit!r}; only 'scale' and 'project' can be fitted")
        if self.n_candidates < 1 or self.batch < 1:
            raise ConfigError(f"n_candidates={self.n_candidates}, batch={self.batch}; both must be at least 1")
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps}; it must be at least 1")
        if not 0 <= self.clean_budget < math.inf:
            raise ConfigError(f"clean_budget={self.clean_budget}; it is a fraction of the pictures, 0 or more")
        for name in ("lr", "sparsity", "worst_rate"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be finite, and 0 or more")
