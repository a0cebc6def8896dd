"""What a way to fit does to pictures that it was not fitted on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.errors import ConfigError
from defense.hosts.attach import attached_sites
from defense.hosts.clip import Host
from defense.hosts.defense import HostSpec

from .material import Groups, Material, Pairs
from .sites import SitePlan, fit_sites

log = logging.getLogger(__name__)
_BATCH = 200


# --- measuring ----------------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure(host: Host, data: Pairs | Groups, text_embeds: Tensor) -> dict[str, float]:
    """Return what a host answers as it stands, as fractions of the pictures.

    Pairs: the accuracy on "clean", "neutral" and "attacked" pictures, and "attack_success", how often the written
    label is the answer. Groups: the accuracy of each group ("y-a"), their "average", and the "worst".
    """
    device = host.model.logit_scale.device
    texts = text_embeds.to(device)

    def share(pixel_values: Tensor, answer: Tensor) -> float:
        parts = [host.model.encode_image(part.to(device)) for part in pixel_values.split(_BATCH)]
        answers = (functional.normalize(torch.cat(parts).float(), dim=-1) @ texts.T).argmax(1).cpu()
        return float((answers == answer).double().mean())

    if isinstance(data, Pairs):
        return {
            "clean": share(data.clean, data.label),
            "neutral": share(data.neutral, data.label),
            "attacked": share(data.attacked, data.label),
            "attack_success": share(data.attacked, data.word),
        }
    groups = {}
    for y in sorted(set(data.y.tolist())):
        for a in sorted(set(data.a.tolist())):
            rows = (data.y == y) & (data.a == a)
            if rows.any():
                groups[f"{y}-{a}"] = share(data.pixel_values[rows], data.y[rows])
    return {"average": float(np.mean(list(groups.values()))), "worst": min(groups.values()), **groups}


@dataclass(frozen=True)
class CrossValidation:
    """What a way to fit does to pictures that it was not fitted on.

    Attributes:
        plain: What `measure` gives without a defense, per fold.
        defended: The same with the defense that was fitted on the other folds.
        n_latents: How many it edits.
    """

    plain: tuple[Mapping[str, float], ...]
    defended: tuple[Mapping[str, float], ...]
    n_latents: tuple[int, ...]

    def summary(self) -> dict[str, dict[str, float]]:
        """Return each measure's mean without ("plain") and with the defense, and its spread over folds.

        "spread" is the standard deviation of the defended folds, "change" the mean change, "change_spread" its
        standard deviation.
        """
        rows = {}
        for key in self.plain[0]:
            plain, defended = (np.array([fold[key] for fold in arm]) for arm in (self.plain, self.defended))
            change = defended - plain
            rows[key] = {
                "plain": float(plain.mean()),
                "defended": float(defended.mean()),
                "spread": float(defended.std(ddof=1)),
                "change": float(change.mean()),
                "change_spread": float(change.std(ddof=1)),
            }
        return rows

    @property
    def gain(self) -> float:
        """The mean change of what the defense is for: accuracy on attacked pictures, or of the worst group."""
        summary = self.summary()
        return summary["attacked" if "attacked" in summary else "worst"]["change"]

    @property
    def loss(self) -> float:
        """The mean fall of what the clean budget is on: accuracy on clean pictures, or over groups."""
        summary = self.summary()
        return -summary["clean" if "clean" in summary else "average"]["change"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {"folds": len(self.plain), "n_latents": list(self.n_latents), "held_out": self.summary()}


def cross_validate(
    host: Host,
    spec: HostSpec,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    folds: int,
    seed: int,
    report: Callable[[str], None] = log.info,
) -> CrossValidation:
    """Fit on all folds but one, measure on that one, for each.

    Raises:
        ConfigError: There are fewer than two folds, or too few pictures for them.
    """
    if folds < 2:
        raise ConfigError(f"folds={folds}; it takes two or more to hold pictures out")
    plain, defended, n_latents = [], [], []
    for index, (fitted_on, held_out) in enumerate(material.folds(folds, seed), start=1):
        report(f"fold {index} of {folds}")
        fitted = fit_sites(host, spec, plans, material.data.take(fitted_on), text_embeds, name="fold", report=report)
        rest = material.data.take(held_out)
        plain.append(measure(host, rest, text_embeds))
        with attached_sites(host, spec, [each.site for each in fitted]):
            defended.append(measure(host, rest, text_embeds))
        n_latents.append(sum(len(each.selection.latents) for each in fitted))
    return CrossValidation(tuple(plain), tuple(defended), tuple(n_latents))
