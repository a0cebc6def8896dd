"""Fit a whole defense: one block after the other, cross-validated, over layers and scopes.

| | |
|---|---|
| `fit_sites` | each block in turn, with the ones before it at work |
| `cross_validate` | the same on a part of the pictures, measured on the rest, for each fold |
| `sweep`, `best` | that for each block alone and for all together, with each scope; the best of them |
| `fit_defense` | all of it: choose the placement, fit it on all pictures |
"""

from __future__ import annotations

import logging
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import artefact
from .artefact import Defense, HostSpec, Site
from .attach import detach, wrap
from .checkpoint import Checkpoint
from .classifier import Host, RobustClassifier, make_golden
from .embedded import scenes
from .errors import ConfigError
from .fit import FitConfig, GroupFit, Groups, Pairs, Ranking, Selection, TextFit
from .fit_data import Material
from .hosts import VisionHost, block_of
from .latents import Scope
from .sae import SparseAutoencoder

log = logging.getLogger(__name__)

SCOPES: tuple[Scope, ...] = ("cls", "patch", "all")
_BATCH = 200
_GOLDEN_SEED = 7


@dataclass(frozen=True)
class SitePlan:
    """A block to edit: where, with which SAE, and how to choose."""

    hook_point: str
    sae: SparseAutoencoder
    config: FitConfig


def plan_sites(
    host: Host, checkpoints: Sequence[Checkpoint], config: FitConfig, scope: Scope | None = None
) -> list[SitePlan]:
    """Return where SAEs go into a host, after holding each against it.

    Args:
        host: The CLIP.
        checkpoints: SAEs with their blocks.
        config: How to choose, the same for all.
        scope: Tokens to edit; by default those that each SAE was trained on.

    Raises:
        ConfigError: An SAE was trained on other weights or tokens.
        ShapeError, HookPointError: See `Checkpoint.check_host`, and `VisionHost.effective_scope`.
    """
    vision = VisionHost.of(host.model)
    plans = []
    for checkpoint in checkpoints:
        checkpoint.check_host(vision)
        tokens = checkpoint.sae.config.tokens
        if scope is not None and tokens not in ("all", scope):
            raise ConfigError(
                f"the SAE at {checkpoint.hook_point} was trained on {tokens} tokens, and scope={scope!r} edits others; "
                f"use scope={tokens!r}, or an SAE of all tokens"
            )
        chosen = scope or tokens
        vision.effective_scope(checkpoint.hook_point, chosen)
        plans.append(SitePlan(checkpoint.hook_point, checkpoint.sae, replace(config, scope=chosen)))
    return plans


@dataclass(frozen=True)
class FittedSite:
    """A block that was fitted: what goes into the artefact, and how it came about."""

    site: Site
    ranking: Ranking
    selection: Selection


def fit_sites(
    host: Host,
    spec: HostSpec,
    plans: Sequence[SitePlan],
    data: Pairs | Groups,
    text_embeds: Tensor,
    *,
    name: str,
    dtype: type[np.floating] = np.float32,
    report: Callable[[str], None] = log.info,
) -> list[FittedSite]:
    """Choose the latents of each block in turn, with the defense of the blocks before it at work.

    Args:
        host: The CLIP, undefended; it is so again afterwards.
        spec: What identifies it.
        plans: The blocks, each once, in the order of fitting.
        data: What to fit on.
        text_embeds: Of all answers, [n_labels, d_embed], normalised.
        name: Of the latent sets.
        dtype: Float type in which the SAEs will be stored; later blocks are fitted on what earlier ones do in it.
        report: Called with a line of progress.

    Raises:
        ConfigError: A block comes twice; see also `TextFit` and `GroupFit`.
        ShapeError: An SAE has another width than the host.
    """
    points = [plan.hook_point for plan in plans]
    if len(set(points)) < len(points):
        raise ConfigError(f"the SAEs are at {', '.join(points)}; give one SAE per block")
    fitted: list[FittedSite] = []
    for plan in plans:
        with attached_sites(host, spec, [each.site for each in fitted]):
            fit: TextFit | GroupFit
            if isinstance(data, Pairs):
                fit = TextFit(host.model, plan.hook_point, plan.sae, data, text_embeds)
            else:
                fit = GroupFit(host.model, plan.hook_point, plan.sae, data, text_embeds)
            ranking = fit.rank(plan.config.scope)
            selection = fit.choose(ranking.order(), plan.config)
        latent_set = fit.latent_set(selection, ranking, plan.config, name)
        parameters = {key: t.astype(dtype).astype(np.float32) for key, t in plan.sae.parameters_numpy().items()}
        site = Site(plan.hook_point, plan.sae.config.to_dict(), parameters, (latent_set,))
        fitted.append(FittedSite(site, ranking, selection))
        report(f"{plan.hook_point}: {len(selection.latents)} latents of {len(ranking.order())} candidates")
    return fitted


@contextmanager
def attached_sites(host: Host, spec: HostSpec, sites: Sequence[Site]) -> Iterator[None]:
    """Defend a host by some sites for as long as the context lasts."""
    if not sites:
        yield
        return
    wrap(host.model, Defense(spec, host.preprocess, tuple(sites)), allow_mismatch=True)
    try:
        yield
    finally:
        detach(host.model)


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


def placements(host: VisionHost, plans: Sequence[SitePlan]) -> list[tuple[SitePlan, ...]]:
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
            if all(_means_something(host, plan, scope) for plan in group):
                found.append(tuple(replace(plan, config=replace(plan.config, scope=scope)) for plan in group))
    return found


def _means_something(host: VisionHost, plan: SitePlan, scope: Scope) -> bool:
    """Whether a scope edits tokens that the SAE knows, and others than a narrower scope does."""
    is_last = block_of(plan.hook_point) == len(host.blocks) - 1 and host.pools_cls
    if not host.has_cls:
        return scope == "all"  # which is "patch", too
    return plan.sae.config.tokens in ("all", scope) and not (is_last and scope != "cls")


def sweep(
    host: Host,
    spec: HostSpec,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    folds: int,
    seed: int,
    report: Callable[[str], None] = log.info,
) -> list[Option]:
    """Cross-validate every placement."""
    options = []
    for group in placements(VisionHost.of(host.model), plans):
        result = cross_validate(host, spec, group, material, text_embeds, folds=folds, seed=seed, report=report)
        options.append(Option(group, result))
        report(f"{options[-1].name}: gain {100 * result.gain:+.1f}, loss {100 * result.loss:.1f} points")
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
    """

    defense: Defense
    sites: tuple[FittedSite, ...]
    validation: CrossValidation
    options: tuple[Option, ...] = ()


def fit_defense(
    host: Host,
    spec: HostSpec,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    name: str,
    folds: int = 3,
    seed: int = 0,
    is_swept: bool = False,
    licence: str = "not stated",
    provenance: Mapping[str, Any] = MappingProxyType({}),
    report: Callable[[str], None] = log.info,
) -> Fitted:
    """Fit a defense on all pictures, and say by cross-validation what it does to others.

    Args:
        host: The CLIP, undefended; it is so again afterwards.
        spec: What identifies it.
        plans: The blocks, in the order of fitting.
        material: What to fit on.
        text_embeds: Of all answers, [n_labels, d_embed], normalised.
        name: Of the latent sets.
        folds: Of the cross-validation, 2 or more.
        seed: Decides the folds.
        is_swept: Try each block alone and all together with every scope, and take what does best on held-out pictures.
        licence: Of the defense.
        provenance: What else its `provenance` shall hold, as JSON values.
        report: Called with a line of progress.

    Raises:
        ConfigError: Nothing helps, or see `fit_sites`, `cross_validate` and `best`.
    """
    options: list[Option] = []
    if is_swept:
        options = sweep(host, spec, plans, material, text_embeds, folds=folds, seed=seed, report=report)
        chosen = best(options, sum(plan.config.clean_budget for plan in plans))
        plans, validation = chosen.plans, chosen.result
        report(f"chosen: {chosen.name}")
    else:
        validation = cross_validate(host, spec, plans, material, text_embeds, folds=folds, seed=seed, report=report)
    report("all pictures")
    fitted = fit_sites(host, spec, plans, material.data, text_embeds, name=name, report=report)
    sites = tuple(each.site for each in fitted if each.selection.latents)
    if not sites:
        tried = ", ".join(f"{len(each.ranking.order())} candidates at {each.site.hook_point}" for each in fitted)
        raise ConfigError(
            f"nothing helps: no latent lowers the loss of the fooled pictures within the clean budget ({tried}), so "
            "there is no defense. Give more pictures, an SAE of another block or with more latents, or a larger budget"
        )
    record = {
        **provenance,
        "pictures": dict(material.provenance),
        "seed": seed,
        "cross_validation": validation.to_dict(),
        "sweep": [option.to_dict() for option in options],
        "versions": versions(),
    }
    defense = Defense(spec, host.preprocess, sites, None, licence, record)
    return Fitted(defense, tuple(fitted), validation, tuple(options))


def with_golden(host: Host, defense: Defense) -> Defense:
    """Return a defense with golden vectors, of three drawn pictures: nobody's photographs get into an artefact."""
    side = max(host.preprocess.size)
    drawn = [np.asarray(scenes.render(case.scene, side)) for case in scenes.typographic(3, _GOLDEN_SEED)]
    clf = RobustClassifier(host, defense)
    try:
        return replace(defense, golden=make_golden(clf, np.stack(drawn)))
    finally:
        detach(host.model)


def versions() -> dict[str, str]:
    """Return the versions of what computes the numbers."""
    packages = {name: version(name) for name in ("torch", "open_clip_torch", "numpy", "pillow")}
    return {"clip-defense": artefact.package_version(), "python": platform.python_version(), **packages}
