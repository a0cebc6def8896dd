"""A CLIP in which it is known what each channel of the residual says."""

from __future__ import annotations

import torch


class PlantedClip:
    """Channels 0 to 4 of the residual are the logits of five words; the others say nothing."""

    logit_scale = 1.0

    @property
    def tower(self) -> PlantedClip:
        return self

    def positions(self, *_: str) -> slice:
        return slice(None)

    def embeds_from(self, resid: torch.Tensor, _hook_point: str) -> torch.Tensor:
        return resid[..., :5].mean(1)
