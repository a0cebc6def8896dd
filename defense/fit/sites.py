"""Choose the latents of each block in turn, with the defense of the blocks before it at work."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from torch import Tensor

from defense.core.latents import Scope
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Site
from defense.store.checkpoint import Checkpoint

from .config import FitConfig
from .encoded import Encoded
from .material import Pairs
from .selecting import GroupFit, Ranking, Selection, TextFit

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SitePlan:
    """A block to edit: where, with which SAE, and how to choose."""

    hook_point: str
    sae: SparseAutoencoder
    config: FitConfig


def plan_sites(
    clip: Clip, checkpoints: Sequence[Checkpoint], config: FitConfig, scope: Scope | None = None
) -> list[SitePlan]:
    """Return where SAEs go into a CLIP, after holding each against it.

    Args:
        clip: The CLIP.
        checkpoints: SAEs with their blocks.
        config: How to choose, the same for all.
        scope: Tokens to edit; by default those that each SAE was trained on.

    Raises:
        ConfigError: An SAE was trained on other weights or tokens.
        ShapeError, HookPointError: See `Checkpoint.check_clip`, and `VisionTower.effective_scope`.
    """
    plans = []
    for checkpoint in checkpoints:
        checkpoint.check_clip(clip.tower)
        tokens = checkpoint.sae.config.tokens
        if scope is not None and tokens not in ("all", scope):
            raise ConfigError(
                f"the SAE at {checkpoint.hook_point} was trained on {tokens} tokens, and scope={scope!r} edits others; "
                f"use scope={tokens!r}, or an SAE of all tokens"
            )
        chosen = scope or tokens
        clip.tower.effective_scope(checkpoint.hook_point, chosen)
        plans.append(SitePlan(checkpoint.hook_point, checkpoint.sae, replace(config, scope=chosen)))
    return plans


@dataclass(frozen=True)
class FittedSite:
    """A block that was fitted: what goes into the artifact, and how it came about."""

    site: Site
    ranking: Ranking
    selection: Selection


def fit_sites(
    encoded: Encoded,
    plans: Sequence[SitePlan],
    text_embeds: Tensor,
    *,
    name: str,
    dtype: type[np.floating] = np.float32,
    report: Callable[[str], None] = log.info,
) -> list[FittedSite]:
    """Choose the latents of each block in turn, with the defense of the blocks before it at work.

    Args:
        encoded: What to fit on, and the CLIP, undefended; it is so again afterwards.
        plans: The blocks, each once, in the order of fitting.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
        name: Of the latent sets.
        dtype: Float type in which the SAEs will be stored; later blocks are fitted on what earlier ones do in it.
        report: Called with a line of progress.

    Raises:
        ConfigError: A block comes twice; see also `TextFit` and `GroupFit`.
        ShapeError: An SAE has another width than the CLIP.
    """
    points = [plan.hook_point for plan in plans]
    if len(set(points)) < len(points):
        raise ConfigError(f"the SAEs are at {', '.join(points)}; give one SAE per block")
    clip, data = encoded.clip, encoded.data
    fitted: list[FittedSite] = []
    for plan in plans:
        sites = [each.site for each in fitted]
        with clip.edited(sites):
            resid = encoded.resid(plan.hook_point, [site.hook_point for site in sites])
            fit: TextFit | GroupFit
            if isinstance(data, Pairs):
                fit = TextFit(clip, plan.hook_point, plan.sae, data, text_embeds, resid=resid)
            else:
                fit = GroupFit(clip, plan.hook_point, plan.sae, data, text_embeds, resid=resid)
            ranking = fit.rank(plan.config.scope)
            selection = fit.choose(ranking.order(), plan.config)
        latent_set = fit.latent_set(selection, ranking, plan.config, name)
        parameters = {key: t.astype(dtype).astype(np.float32) for key, t in plan.sae.parameters_numpy().items()}
        site = Site(plan.hook_point, plan.sae.config, parameters, (latent_set,))
        fitted.append(FittedSite(site, ranking, selection))
        report(f"{plan.hook_point}: {len(selection.latents)} latents of {len(ranking.order())} candidates")
    return fitted
