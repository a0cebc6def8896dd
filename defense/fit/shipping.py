"""The form in which a fitted defense is kept: thresholds in place of a TopK rule where they do, then slim, then golden.

A TopK rule couples latents, so the whole SAE must be stored, and the whole encoder runs on every token on which a
latent of S is positive. Thresholds need the columns and rows of S alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from defense.data.progress import SILENT, Progress
from defense.errors import CalibrationError, ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense
from defense.hosts.slim import slim

from .calibrate import Calibration, calibrated
from .material import Material
from .placing import with_golden

LEAST_AGREEMENT = 0.99
"""Share of held-out pictures whose answer thresholds must leave as the exact rule has it."""


@dataclass(frozen=True)
class Shipped:
    """A defense as it is stored.

    Attributes:
        defense: With golden vectors; slim where its rules let it.
        calibration: How thresholds stand in for a TopK rule; None where none was replaced.
        whole_because: Why a TopK rule stayed, and what that costs; None where there is none.
    """

    defense: Defense
    calibration: Calibration | None
    whole_because: str | None


def ship(
    clip: Clip,
    defense: Defense,
    material: Material,
    text_embeds: np.ndarray,
    *,
    calibrate: bool | None = None,
    progress: Progress = SILENT,
) -> Shipped:
    """Return a fitted defense in the form in which it is stored.

    Args:
        clip: The CLIP that it was fitted on, undefended; it is so again afterwards.
        defense: What `fit_defense` made.
        material: What it was fitted on; half of it sets thresholds, the other half is held out to judge them.
        text_embeds: Of all answers, normalized, [n_labels, d_embed].
        calibrate: Whether thresholds take the place of a TopK rule: None where at least 99 % of the answers stay, True
            at any rate, False never.
        progress: Told of the stage.

    Raises:
        CalibrationError: `calibrate` is True, and fewer answers stay.
        ConfigError: `calibrate` is True, and it cannot be done; see `calibrated`.
    """
    topk = [site for site in defense.sites if site.sae_config.couples_latents]
    if not topk and calibrate is None:
        return Shipped(with_golden(clip, slim(defense)), None, None)
    if calibrate is False:
        return _whole(clip, defense, "no thresholds were asked for")
    twins = material.data.twins()
    groups = np.tile(np.arange(material.data.n), len(twins))
    try:
        with progress.stage("thresholds", 1):
            result, found = calibrated(
                clip, defense, twins, least_agreement=LEAST_AGREEMENT, text_embeds=text_embeds, groups=groups
            )
    except (CalibrationError, ConfigError) as error:
        if calibrate:
            raise
        return _whole(clip, defense, str(error))
    return Shipped(with_golden(clip, slim(result)), found, None)


def _whole(clip: Clip, defense: Defense, why: str) -> Shipped:
    """Return a defense of which TopK sites stay as they are, and record that in it."""
    topk = [site for site in defense.sites if site.sae_config.couples_latents]
    if not topk:
        return Shipped(with_golden(clip, slim(defense)), None, None)
    mib = sum(tensor.nbytes for site in topk for tensor in site.parameters.values()) / 2**20
    because = (
        f"stored whole, with its TopK rule: {why.rstrip('.')}. That takes {mib:,.0f} MiB, and every token on which a "
        "latent of S is positive meets the whole encoder: on a CPU up to 1.6 times the time of plain CLIP"
    )
    record = {**defense.provenance, "stored_whole": because}
    return Shipped(with_golden(clip, replace(slim(defense), provenance=record)), None, because)
