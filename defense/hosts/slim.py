"""Slim defenses: of each SAE only the latents that are edited, and the whole SAE put back where something needs it.

A rule by which each latent decides alone needs the columns and rows of S and nothing else, and gives bit for bit the
same embeddings from them. What a slim defense lacks is every other latent: none can be steered, mapped or drawn as a
control until `restored` has put the SAE back.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from defense.core.latents import LatentSet
from defense.core.sae import SparseAutoencoder, part_of
from defense.errors import ConfigError

from .defense import Defense, Part, Site


def slim(defense: Defense) -> Defense:
    """Return a defense that holds just the latents it edits, at each site whose rule lets it; it answers as before.

    Golden answers stay: they are the same. Sites with a TopK rule stay whole, since their latents compete.
    """
    return replace(defense, sites=tuple(slim_site(site) for site in defense.sites))


def slim_site(site: Site) -> Site:
    """Return a site that holds just the latents of its sets, or the same site where it is slim or its latents compete.

    The threshold of all other latents becomes the median of theirs, where the rule has thresholds.
    """
    if site.part is not None or site.sae_config.couples_latents:
        return site
    sae = SparseAutoencoder(site.sae_config, dict(site.parameters), copy=False)
    return site_of(site.hook_point, sae, site.sets)


def site_of(hook_point: str, sae: SparseAutoencoder, sets: tuple[LatentSet, ...]) -> Site:
    """Return the site of an SAE and its latent sets: slim, or whole where the latents compete.

    Args:
        hook_point: Where.
        sae: The whole SAE; a whole site shares its memory.
        sets: What is edited there.
    """
    if sae.config.couples_latents:
        return Site(hook_point, sae.config, sae.parameters_numpy(copy=False), sets)
    latents = sorted({latent for latent_set in sets for latent in latent_set.latents})
    config, parameters, held = part_of(sae, latents)
    elsewhere = None
    if "threshold" in parameters:
        others = np.delete(sae.threshold.cpu().numpy(), latents)
        elsewhere = float(np.median(others)) if len(others) else 0.0
    return Site(hook_point, config, parameters, sets, Part(held, sae.hashes, elsewhere))


def restored(defense: Defense, saes: Iterable[SparseAutoencoder], *, own_rule: bool = False) -> Defense:
    """Return a defense whose slim sites hold the whole SAE again; it answers as before.

    Args:
        defense: Slim or not; sites that are whole stay as they are.
        saes: The SAEs that it was fitted with, and others if you like.
        own_rule: Let each SAE decide by the rule that it was trained with, where calibrated thresholds stand in for
            that: what a control or another method should start from. Then the defense answers a little differently.

    Raises:
        ConfigError: The SAE of a site is not among them.
    """
    found = tuple(saes)
    if all(site.part is None for site in defense.sites):
        return defense
    sites = tuple(_restored(site, found, own_rule) for site in defense.sites)
    return replace(defense, sites=sites, golden=None if own_rule else defense.golden)


def _restored(site: Site, saes: tuple[SparseAutoencoder, ...], own_rule: bool) -> Site:
    if site.part is None:
        return site
    for sae in saes:
        if set(sae.hashes) & set(site.part.hashes):
            whole = Site(site.hook_point, sae.config, sae.parameters_numpy(), site.sets)
            return whole if own_rule else _with_thresholds_of(site, whole)
    raise ConfigError(
        f"the SAE of the slim site at {site.hook_point} (sha256 {site.part.hashes[0][:16]}...) is not among the "
        f"{len(saes)} that were given; give the one that the defense was fitted with"
    )


def _with_thresholds_of(site: Site, whole: Site) -> Site:
    """Return a whole site with the rule of a slim one, whose thresholds stand in for a TopK rule's competition."""
    assert site.part is not None
    rule = site.sae_config
    config = replace(whole.sae_config, act=rule.act, k=rule.k, topk_relu=rule.topk_relu)
    parameters = dict(whole.parameters)
    if "threshold" in site.parameters:
        elsewhere = np.full(config.d_sae, site.part.elsewhere, np.float32)
        threshold = whole.parameters.get("threshold", elsewhere).astype(np.float32)
        threshold[list(site.part.latents)] = site.parameters["threshold"]
        parameters["threshold"] = threshold
    return replace(whole, sae_config=config, parameters=parameters)
