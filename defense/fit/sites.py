"""Choose the latents of each block in turn, with the defense of the blocks before it at work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from defense.core.latents import Scope
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Site
from defense.hosts.slim import site_of
from defense.store.checkpoint import Checkpoint

from .config import FitConfig
from .encoded import Encoded
from .joint import JointState
from .material import Pairs
from .saves import Arrays, Saves
from .selecting import GroupFit, Ranking, TextFit
from .trial import Selection, Trial, Tried


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
    saves: Saves | None = None,
    label: str = "",
) -> list[FittedSite]:
    """Choose the latents of each block in turn, with the defense of the blocks before it at work.

    Args:
        encoded: What to fit on, and the CLIP, undefended; it is so again afterwards.
        plans: The blocks, each once, in the order of fitting.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
        name: Of the latent sets.
        dtype: Float type in which the SAEs will be stored; later blocks are fitted on what earlier ones do in it.
        saves: Keeps what each stage came to.
        label: In front of what progress is told.

    Raises:
        ConfigError: A block comes twice; see also `TextFit` and `GroupFit`.
        ShapeError: An SAE has another width than the CLIP.
    """
    points = [plan.hook_point for plan in plans]
    if len(set(points)) < len(points):
        raise ConfigError(f"the SAEs are at {', '.join(points)}; give one SAE per block")
    fitted: list[FittedSite] = []
    for plan in plans:
        sites = [each.site for each in fitted]
        with encoded.clip.edited(sites):
            turn = _Turn(encoded, plan, text_embeds, sites, saves or Saves(), label)
            ranking = turn.ranking()
            selection = turn.selection(ranking)
            latent_set = turn.fit.latent_set(selection, ranking, plan.config, name)
        site = site_of(plan.hook_point, plan.sae.rounded(dtype), (latent_set,))
        fitted.append(FittedSite(site, ranking, selection))
        encoded.progress.line(
            f"{label}{plan.hook_point}: {len(selection.latents)} latents of {len(ranking.order())} candidates"
        )
    return fitted


class _Turn:
    """One block's turn: its stages, each of which is computed once and then kept."""

    def __init__(
        self,
        encoded: Encoded,
        plan: SitePlan,
        text_embeds: Tensor,
        before: Sequence[Site],
        saves: Saves,
        label: str,
    ) -> None:
        self.plan, self.saves = plan, saves
        data = encoded.data
        seen = encoded.seen(
            plan.hook_point, plan.sae, text_embeds, [site.hook_point for site in before],
            spares_high_norm=plan.config.spares_high_norm,
        )  # fmt: skip
        progress = encoded.progress.within(label)
        self.fit: TextFit | GroupFit
        if isinstance(data, Pairs):
            self.fit = TextFit(encoded.clip, plan.hook_point, plan.sae, data, text_embeds, seen=seen, progress=progress)
        else:
            self.fit = GroupFit(
                encoded.clip, plan.hook_point, plan.sae, data, text_embeds, seen=seen, progress=progress
            )
        self._basis = {
            "hook_point": plan.hook_point,
            "sae": plan.sae.hashes[0],
            "rows": encoded.rows.tolist(),
            "before": [(site.hook_point, [each.to_dict() for each in site.sets]) for site in before],
        }
        self._trial: Trial | None = None

    def ranking(self) -> Ranking:
        """Return the scores of all latents."""
        scope = self.plan.config.scope
        key: dict[str, Any] = {**self._basis, "stage": "ranking", "scope": scope}
        if self.plan.config.spares_high_norm:
            key["spares_high_norm"] = True
        return Ranking(**self.saves.memo(key, lambda: vars(self.fit.rank(scope))))

    def selection(self, ranking: Ranking) -> Selection:
        """Return what is chosen."""
        key = {**self._basis, "stage": "selection", "config": asdict(self.plan.config)}

        def choose() -> dict[str, np.ndarray]:
            removal = self._removal(ranking)
            with self.fit.progress.stage("clean budget", 1):
                return _packed(self.fit.within_budget(self._tried(ranking), removal, self.plan.config))

        return _unpacked(self.saves.memo(key, choose))

    def _removal(self, ranking: Ranking) -> np.ndarray:
        """Return what the joint step came to; it goes on from where it stood when it was killed."""
        config = asdict(self.plan.config)
        # On these it does not depend, so another budget finds it done.
        key = {**self._basis, "config": {k: v for k, v in config.items() if k not in ("clean_budget", "edit")}}
        done, halfway = {**key, "stage": "joint"}, {**key, "stage": "joint, halfway"}
        state = JointState(self.saves.get(halfway) or {}, lambda arrays: self.saves.put(halfway, arrays))
        found = self.saves.memo(
            done, lambda: {"removal": self.fit.learn_removal(self._tried(ranking), self.plan.config, state)}
        )
        self.saves.drop(halfway)
        return found["removal"]

    def _tried(self, ranking: Ranking) -> Trial:
        if self._trial is None:
            config = self.plan.config
            self._trial = Trial(self.fit, ranking.order()[: config.n_candidates], config)
        return self._trial


def _packed(selection: Selection) -> dict[str, np.ndarray]:
    return {
        "latents": np.array(selection.latents, np.int64),
        "gains": np.array(selection.gains, np.float64),
        "tried": np.array([[each.n, each.kept_accuracy, each.fooled_loss] for each in selection.tried], np.float64),
    }


def _unpacked(arrays: Arrays) -> Selection:
    tried = tuple(Tried(int(n), accuracy, loss) for n, accuracy, loss in arrays["tried"].tolist())
    return Selection(tuple(arrays["latents"].tolist()), tuple(arrays["gains"].tolist()), tried)
