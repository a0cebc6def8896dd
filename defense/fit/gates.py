"""What a fit has to show before it becomes a defense. Each gate that does not open says what to do."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from defense.core.coding import CodingSums
from defense.core.sae import SparseAutoencoder
from defense.errors import GateError

from .chunks import COPIES, chunks
from .trial import fits_budget
from .validation import CrossValidation

_TOKENS = 8192
"""That the explained variance is measured on, at most; spread over all pictures."""


@dataclass(frozen=True)
class Gates:
    """The least that a fit has to show.

    Attributes:
        least_explained: Explained variance of each SAE on these pictures. An SAE of another CLIP explains nothing, and
            mostly less than nothing; published ones explain 0.6 and more of their own.
        least_fooled: Pictures that plain CLIP gets wrong with the cue: fewer say nothing on which latents are to blame.
    """

    least_explained: float = 0.3
    least_fooled: int = 10

    def check_explained(self, hook_point: str, explained: float) -> None:
        """Raise `GateError` where an SAE explains too little of these pictures."""
        if explained >= self.least_explained:
            return
        raise GateError(
            f"the SAE at {hook_point} explains {100 * explained:.0f} % of the variance of these pictures' residuals, "
            f"less than {100 * self.least_explained:.0f} %: it was trained on another CLIP, another block or other "
            "kinds of pictures. Give an SAE of this CLIP (`defense train`), or check its block and its normalization"
        )

    def check_fooled(self, n_fooled: int, n: int) -> None:
        """Raise `GateError` where too few of `n` pictures fool plain CLIP."""
        if n_fooled >= self.least_fooled:
            return
        raise GateError(
            f"plain CLIP is wrong on {n_fooled} of {n} pictures with the cue, and it takes {self.least_fooled} to see "
            "which latents are to blame: either this CLIP needs no defense here, or give more pictures, or labels that "
            "are harder to tell apart"
        )

    def check_validation(self, validation: CrossValidation, clean_budget: float) -> None:
        """Raise `GateError` where the gain could be chance, or more is lost than the budget allows."""
        where = "held-out pictures" if validation.is_held_out else "the pictures that it was fitted on"
        low, high = validation.gain_interval
        figures = (
            f"{100 * validation.gain:+.1f} points gained (95 % interval {100 * low:+.1f} to {100 * high:+.1f}) and "
            f"{100 * validation.loss:.1f} lost on {where}"
        )
        if low <= 0:
            raise GateError(
                f"no gain that could not be chance: {figures}, so there is no defense. Give more pictures, an SAE of "
                "another block or with more latents, or a larger clean budget"
            )
        if not fits_budget(validation.loss, clean_budget):
            raise GateError(
                f"the defense costs more than its clean budget of {100 * clean_budget:.1f} points: {figures}, so it is "
                "not written. Give more pictures, or a larger budget; what was learned is kept, so only the choice by "
                "the budget is made again"
            )


GATES = Gates()


@torch.no_grad()
def explained_variance(sae: SparseAutoencoder, resid: Tensor) -> float:
    """Return 1 - squared error / variance of an SAE's reconstruction; at most 1, and below 0 where it makes it worse.

    Args:
        sae: The SAE, whole.
        resid: Residuals of the tokens that it was trained on, [n, d_model], n >= 2.
    """
    rows = resid[torch.linspace(0, len(resid) - 1, min(_TOKENS, len(resid))).long()].float()
    sums = CodingSums(sae.config.d_model, sae.config.d_sae, rows.device)
    for part in chunks(len(rows), 4 * COPIES * sae.config.d_sae):
        sums.add(sae, rows[part], sae.encode(rows[part]))
    found = sums.result().explained_variance
    return math.nan if found is None else found
