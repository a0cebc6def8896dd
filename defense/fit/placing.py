"""Fit a whole defense: one block after the other, cross-validated, over layers and scopes.

| | |
|---|---|
| `fit_sites` | each block in turn, with the ones before it at work |
| `cross_validate` | the same on a part of the pictures, measured on the rest, for each fold |
| `sweep`, `best` | that for each block alone and for all together, with each scope; the best of them |
| `fit_defense` | all of it: choose the placement, fit it on all pictures |
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.core.latents import Scope
from defense.core.norms import HighNormSums
from defense.data.progress import SILENT, Progress
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import ClipId, Defense, Site
from defense.hosts.golden import make_golden
from defense.hosts.tower import VisionTower, block_of
from defense.store import folders
from defense.world import draws, scenes

from .encoded import Encoded
from .gates import GATES, Gates, explained_variance
from .material import Material
from .saves import Saves, digest
from .sites import FittedSite, SitePlan, fit_sites
from .stability import bootstrap
from .validation import CrossValidation, answers_of, cross_validate, n_fooled, on_fitted

SCOPES: tuple[Scope, ...] = ("cls", "patch", "all")
_GOLDEN_SEED = 7
_LOOKED_AT = 100
"""Pictures that the explained variance is measured on, at most."""


# --- layers and scopes --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Option:
    """One way to place a defense, and what it does to pictures that it was not fitted on."""

    plans: tuple[SitePlan, ...]
    result: CrossValidation

    @property
    def name(self) -> str:
        """Which blocks and tokens, e.g. "blocks 2 + 3, all"."""
        blocks = " + ".join(str(block_of(plan.hook_point)) for plan in self.plans)
        return f"block{'s' * (len(self.plans) > 1)} {blocks}, {self.plans[0].config.scope}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        scopes = {plan.hook_point: plan.config.scope for plan in self.plans}
        return {"sites": scopes, "gain": self.result.gain, "loss": self.result.loss, **self.result.to_dict()}


def placements(tower: VisionTower, plans: Sequence[SitePlan]) -> list[tuple[SitePlan, ...]]:
    """Return each block alone, and all of them where there are several, with each scope that means something there.

    A scope goes no further than the tokens that the SAE was trained on. The clean budget of a block that stands alone
    is that of all.
    """
    total = sum(plan.config.clean_budget for plan in plans)
    groups = [[replace(plan, config=replace(plan.config, clean_budget=total))] for plan in plans]
    if len(plans) > 1:
        groups.append(list(plans))
    found = []
    for group in groups:
        for scope in SCOPES:
            if all(_means_something(tower, plan, scope) for plan in group):
                found.append(tuple(replace(plan, config=replace(plan.config, scope=scope)) for plan in group))
    return found


def _means_something(tower: VisionTower, plan: SitePlan, scope: Scope) -> bool:
    """Whether the SAE knows these tokens and no narrower scope gives the same edit."""
    is_last = block_of(plan.hook_point) == len(tower.blocks) - 1 and tower.pools_cls
    if not tower.has_cls:
        return scope == "all"  # which is "patch", too
    return plan.sae.config.tokens in ("all", scope) and not (is_last and scope != "cls")


def sweep(
    encoded: Encoded,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    folds: int,
    seed: int,
    saves: Saves | None = None,
) -> list[Option]:
    """Cross-validate every placement; see `cross_validate`."""
    options = []
    groups = placements(encoded.clip.tower, plans)
    for index, group in enumerate(groups, start=1):
        result = cross_validate(
            encoded, group, material, text_embeds, folds=folds, seed=seed, saves=saves,
            label=f"placement {index} of {len(groups)}, ",
        )  # fmt: skip
        options.append(Option(group, result))
        encoded.progress.line(f"{options[-1].name}: gain {100 * result.gain:+.1f}, loss {100 * result.loss:.1f} points")
    return options


def best(options: Sequence[Option], clean_budget: float) -> Option:
    """Return the option that gains most where its loss stays within the budget.

    Raises:
        ConfigError: None gains anything within the budget.
    """
    fitting = [option for option in options if option.result.gain > 0 and option.result.loss <= clean_budget]
    if not fitting:
        tried = "; ".join(
            f"{each.name}: {100 * each.result.gain:+.1f} for {100 * each.result.loss:.1f}" for each in options
        )
        raise ConfigError(
            f"no layer or scope gains anything on held-out pictures within a clean budget of {100 * clean_budget:.1f} "
            f"points (points gained, for points lost: {tried}). Give more pictures, other SAEs, or a larger budget"
        )
    return max(fitting, key=lambda option: option.result.gain)


# --- the whole ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fitted:
    """A defense, and how it came about.

    Attributes:
        defense: Without golden vectors yet.
        sites: Its blocks, and those at which nothing was chosen.
        validation: What this way to fit does to pictures that it was not fitted on. After a sweep these have chosen
            the placement, so the figures flatter it a little.
        options: What was tried; empty without a sweep.
        forget: Deletes what was kept of the stages; to be called when the defense is written.
    """

    defense: Defense
    sites: tuple[FittedSite, ...]
    validation: CrossValidation
    options: tuple[Option, ...] = ()
    forget: Callable[[], None] = lambda: None


def fit_defense(
    clip: Clip,
    spec: ClipId,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    name: str,
    folds: int = 3,
    seed: int = 0,
    is_swept: bool = False,
    n_bootstraps: int = 0,
    license: str = "not stated",
    provenance: Mapping[str, Any] = MappingProxyType({}),
    gates: Gates = GATES,
    explained: Mapping[str, float] = MappingProxyType({}),
    cache: Path | None = None,
    progress: Progress = SILENT,
) -> Fitted:
    """Fit a defense on all pictures, and say by cross-validation what it does to others.

    Args:
        clip: The CLIP, undefended; it is so again afterwards.
        spec: What identifies it.
        plans: The blocks, in the order of fitting.
        material: What to fit on.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
        name: Of the latent sets.
        folds: Of the cross-validation, 2 or more; 0 for none: then what is reported, and held against the gates, is
            measured on the pictures that it was fitted on.
        seed: Decides the folds.
        is_swept: Try each block alone and all together with every scope, and take what does best on held-out pictures.
        n_bootstraps: Choose S as many times more on pictures drawn anew, and give each latent the share of these runs
            that chose it, as the score "stability" (see `stability.bootstrap`); 2 or more, 0 for none.
        license: Of the defense.
        provenance: What else its `provenance` shall hold, as JSON values.
        gates: What it has to show.
        explained: By hook point, the explained variance (at most 1) of an SAE that was measured before; the others are
            measured here.
        cache: Folder for residuals, which other fits find too, and for what the stages came to: the same call, after it
            was killed, goes on from there and ends in the same bytes. `Fitted.forget` deletes what only this fit needs.
            None to keep nothing.
        progress: Told of stages.

    Raises:
        GateError: A gate is closed; see `Gates`.
        ConfigError: Nothing helps, or see `fit_sites`, `cross_validate` and `best`.
    """
    if folds == 0 and is_swept:
        raise ConfigError("a sweep compares on held-out pictures, and folds=0 holds none out; give two or more")
    if n_bootstraps == 1:
        raise ConfigError("n_bootstraps=1; it takes two or more runs to see what they agree on, or 0 for none")
    if folds:
        material.folds(folds, seed)  # raises where there are too few pictures for them
    encoded = Encoded(clip, material.data, None if cache is None else cache / "residuals", progress)
    saves = _saves_of(clip, material, text_embeds, cache)
    budget = sum(plan.config.clean_budget for plan in plans)
    shown, high_norm = _opened(encoded, plans, text_embeds, gates, explained)
    options: list[Option] = []
    validation: CrossValidation | None = None
    if is_swept:
        options = sweep(encoded, plans, material, text_embeds, folds=folds, seed=seed, saves=saves)
        chosen = best(options, budget)
        plans, validation = chosen.plans, chosen.result
        progress.line(f"chosen: {chosen.name}")
    elif folds:
        validation = cross_validate(encoded, plans, material, text_embeds, folds=folds, seed=seed, saves=saves)
    if validation is not None:
        gates.check_validation(validation, budget)
    fitted = fit_sites(encoded, plans, text_embeds, name=name, saves=saves, label="all pictures, ")
    _helping(fitted)
    if validation is None:
        validation = on_fitted(encoded, fitted, text_embeds, "all pictures, ")
        gates.check_validation(validation, budget)
    stability: dict[str, Any] = {}
    if n_bootstraps:
        runs = bootstrap(encoded, plans, material, text_embeds, n=n_bootstraps, seed=seed, saves=saves)
        fitted, stability = [runs.scored(each) for each in fitted], {"stability": runs.to_dict()}
    encoded.kept.trim()
    record = {
        **provenance, "pictures": dict(material.provenance), "seed": seed, "gates": {**asdict(gates), **shown},
        "high_norm": high_norm, "cross_validation": validation.to_dict(),
        "sweep": [option.to_dict() for option in options], **stability, "versions": versions(),
    }  # fmt: skip
    defense = Defense(spec, clip.preprocess, _helping(fitted), None, license, record)
    return Fitted(defense, tuple(fitted), validation, tuple(options), saves.clear)


def _saves_of(clip: Clip, material: Material, text_embeds: Tensor, cache: Path | None) -> Saves:
    """Return what keeps the stages of a fit of these pictures; the key of a stage says the rest of what decides it."""
    if cache is None:
        return Saves()
    columns = {key: digest(value.numpy()) for key, value in vars(material.data).items() if isinstance(value, Tensor)}
    shares = getattr(material.data, "shares", None)
    basis = {
        "clip": clip.tower.fingerprint(),
        "data": columns,
        "shares": None if shares is None else sorted([*group, share] for group, share in shares.items()),
        "text_embeds": digest(text_embeds.numpy()),
        "logit_scale": clip.logit_scale,
        "device": str(clip.device),
        "versions": versions(),
    }
    return Saves(cache / "fits", basis)


def _opened(
    encoded: Encoded, plans: Sequence[SitePlan], text_embeds: Tensor, gates: Gates, explained: Mapping[str, float]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Hold SAEs and pictures against the gates before anything long starts.

    Returns:
        What they show, and by hook point which patches stand out by their norm, as JSON values.
    """
    tower = encoded.clip.tower
    shown: dict[str, float] = {}
    high_norm: dict[str, Any] = {}
    first = min((plan.hook_point for plan in plans), key=block_of)
    resid = next(iter(encoded.resid(first).values()))
    sample = resid[torch.linspace(0, len(resid) - 1, min(_LOOKED_AT, len(resid))).long()]
    for plan in plans:
        there = sample if plan.hook_point == first else tower.resid_from(sample, first, plan.hook_point)
        sums = HighNormSums()
        sums.add(there[:, tower.n_prefix :])
        if (high := sums.result()) is not None:
            high_norm[plan.hook_point] = asdict(high)
            encoded.progress.line(f"{plan.hook_point}: {high.words()}")
        if plan.hook_point in explained:
            share = explained[plan.hook_point]
        else:
            tokens = there[:, tower.positions(plan.hook_point, plan.sae.config.tokens)].flatten(0, 1)
            share = explained_variance(plan.sae.to(encoded.clip.device), tokens)
        gates.check_explained(plan.hook_point, share)
        shown[plan.hook_point] = share
        encoded.progress.line(f"{plan.hook_point}: the SAE explains {100 * share:.0f} % of the variance here")
    fooled = n_fooled(encoded.data, answers_of(encoded.image_embeds(first), text_embeds))
    gates.check_fooled(fooled, encoded.data.n)
    encoded.progress.line(f"plain CLIP is wrong on {fooled} of {encoded.data.n} pictures with the cue")
    return {"explained_variance": shown, "n_fooled": fooled}, high_norm


def _helping(fitted: Sequence[FittedSite]) -> tuple[Site, ...]:
    """Return the sites at which anything was chosen; refuse a defense without any."""
    sites = tuple(each.site for each in fitted if each.selection.latents)
    if not sites:
        tried = ", ".join(f"{len(each.ranking.order())} candidates at {each.site.hook_point}" for each in fitted)
        raise ConfigError(
            f"nothing helps: no latent lowers the loss of the fooled pictures within the clean budget ({tried}), so "
            "there is no defense. Give more pictures, an SAE of another block or with more latents, or a larger budget"
        )
    return sites


def with_golden(clip: Clip, defense: Defense) -> Defense:
    """Return a defense with golden vectors, of three drawn pictures, so that nobody's photographs get into it."""
    side = max(clip.preprocess.size)
    drawn = [np.asarray(scenes.render(case.scene, side)) for case in draws.typographic(3, _GOLDEN_SEED)]
    with clip.defended(defense):
        return replace(defense, golden=make_golden(clip, np.stack(drawn)))


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers."""
    packages = {name: version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow")}
    return {"clip-defense": folders.package_version(), "python": platform.python_version(), **packages}
