"""The control of a choice of latents: as many random ones of like activity, with the same gains."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import torch

from defense.core.latents import draw_alike
from defense.hosts.attach import sae_of
from defense.hosts.clip import Clip
from defense.hosts.defense import Site


def activity_of(clip: Clip, site: Site, batches: Iterable[np.ndarray]) -> np.ndarray:
    """Return the summed activation of each latent of a site's SAE on some pictures, float64 [d_sae].

    Args:
        clip: The CLIP.
        site: Where, and which SAE.
        batches: pixel_values, float32 [batch, 3, height, width] each.
    """
    sae = sae_of(site).to(clip.device)
    total = np.zeros(sae.config.d_sae)
    for pixel_values in batches:
        resid = clip.tower.resid(pixel_values, site.hook_point)
        total += sum(sae.encode(picture).sum(0, dtype=torch.float64).cpu().numpy() for picture in resid)
    return total


def random_control(site: Site, activity: np.ndarray, rng: np.random.Generator) -> Site:
    """Return a site with every set's latents replaced by random ones; no latent is drawn for two sets.

    Args:
        site: The site that is imitated.
        activity: Of its SAE's latents; see `activity_of`.
        rng: What draws.

    Raises:
        ConfigError: Too few others fire; see `draw_alike`.
    """
    chosen = list(dict.fromkeys(latent for latent_set in site.sets for latent in latent_set.latents))
    stand_in = dict(zip(chosen, draw_alike(chosen, activity, rng), strict=True))
    sets = (replace(s, latents=tuple(stand_in[latent] for latent in s.latents), scores={}) for s in site.sets)
    return replace(site, sets=tuple(sets))
