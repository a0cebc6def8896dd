"""What a way to fit does to pictures that it was not fitted on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.tower import BATCH, block_of

from .encoded import Encoded
from .material import Groups, Material, Pairs
from .sites import SitePlan, fit_sites

log = logging.getLogger(__name__)


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(clip: Clip, data: Pairs | Groups, text_embeds: Tensor) -> dict[str, float]:
    """Return what a CLIP answers as it is now, as fractions of the pictures.

    Pairs: the accuracy on "clean", "neutral" and "attacked" pictures, and "attack_success", how often the written
    label is the answer. Groups: the accuracy of each group ("y-a"), their "average", and the "worst".

    Args:
        clip: The CLIP, with whatever is attached to it.
        data: The pictures.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
    """
    image_embeds = {
        kind: torch.cat([clip.image_embeds(part) for part in pixel_values.split(BATCH)])
        for kind, pixel_values in data.pictures().items()
    }
    return accuracies(data, image_embeds, text_embeds)


def accuracies(data: Pairs | Groups, image_embeds: Mapping[str, Tensor], text_embeds: Tensor) -> dict[str, float]:
    """Return what `measure` does, from image_embeds [n, d_embed] by kind of picture."""
    answers = {
        kind: (embeds @ text_embeds.to(embeds.device).T).argmax(1).cpu() for kind, embeds in image_embeds.items()
    }

    def share(hits: Tensor) -> float:
        return float(hits.double().mean())

    if isinstance(data, Pairs):
        found = {kind: share(answer == data.label) for kind, answer in answers.items()}
        return {**found, "attack_success": share(answers["attacked"] == data.word)}
    groups = {}
    for y in sorted(set(data.y.tolist())):
        for a in sorted(set(data.a.tolist())):
            rows = (data.y == y) & (data.a == a)
            if rows.any():
                groups[f"{y}-{a}"] = share(answers["picture"][rows] == y)
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
    encoded: Encoded,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    folds: int,
    seed: int,
    report: Callable[[str], None] = log.info,
) -> CrossValidation:
    """Fit on all folds but one, measure on that one, for each.

    Args:
        encoded: The pictures of `material`, and the CLIP.
        plans: See `fit_sites`.
        material: Says what the folds are.
        text_embeds: See `fit_sites`.
        folds: How many, 2 or more.
        seed: Decides which pictures are in which.
        report: Called with a line of progress.

    Raises:
        ConfigError: There are fewer than two folds, or too few pictures for them.
    """
    if folds < 2:
        raise ConfigError(f"folds={folds}; it takes two or more to hold pictures out")
    plain, defended, n_latents = [], [], []
    first = min((plan.hook_point for plan in plans), key=block_of)
    for index, (fitted_on, held_out) in enumerate(material.folds(folds, seed), start=1):
        report(f"fold {index} of {folds}")
        fitted = fit_sites(encoded.take(fitted_on), plans, text_embeds, name="fold", report=report)
        rest = encoded.take(held_out)
        plain.append(accuracies(rest.data, rest.image_embeds(first), text_embeds))
        with encoded.clip.edited([each.site for each in fitted]):
            defended.append(accuracies(rest.data, rest.image_embeds(first), text_embeds))
        n_latents.append(sum(len(each.selection.latents) for each in fitted))
    return CrossValidation(tuple(plain), tuple(defended), tuple(n_latents))
