"""The ways of choosing S that the benchmark of latents compares: rules, ablations of ours, and other candidates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np

from defense.core.latents import draw_alike
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.fit.config import FitConfig
from defense.fit.selecting import LEAST_REMOVAL, Ranking, TextFit, Trial, within_budget

RULES = ("ours", "contrast x causal", "causal", "contrast", "steerability", "random")
"""By which latents are ranked; each is compared with as many latents as ours, and with its own stop."""
ABLATIONS = (
    "contrast", "causal effect", "joint step", "learnt gains", "moving weights", "sparsity", "budget",
    "most candidates", "most candidates and contrast", "most candidates and causal effect",
)  # fmt: skip
"""What is taken out of ours. Stored results hold these words, so their spelling stays."""
CANDIDATES = ("random latents", "a random dictionary")
"""What ours chooses from in place of the latents that it ranks highest. Each goes through the joint step and the budget
as ours does, so that a gain that they reach too is due to these steps and not to what the SAE has learned."""
_FEW = 32
"""Candidates in the ablations "most candidates": with so few it matters which they are."""


@dataclass(frozen=True)
class Choice:
    """A set S, and how much of each latent goes.

    Attributes:
        latents: Its latents.
        gains: The part of each that is kept, 0 to 1, in the same order; empty where each is removed in full.
        sae: Whose latents they are; None for those of the SAE that ours are of.
    """

    latents: tuple[int, ...]
    gains: tuple[float, ...] = ()
    sae: SparseAutoencoder | None = field(default=None, compare=False)


def random_dictionary(sae: SparseAutoencoder, seed: int) -> SparseAutoencoder:
    """Return an SAE of the same size, center and k that has learned nothing.

    Each latent reads and writes one direction, drawn at random; the k that lie nearest to a token fire.

    Args:
        sae: With a TopK rule.
        seed: Of the directions.

    Raises:
        ConfigError: Another rule, whose thresholds would mean nothing for other directions.
    """
    if sae.config.act != "topk":
        raise ConfigError(
            f"a random dictionary fires by rank, and this SAE has act={sae.config.act!r}; give a TopK SAE"
        )
    rows = np.random.default_rng([seed, 2]).normal(size=sae.W_dec.shape).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    parameters = sae.parameters_numpy()
    parameters |= {"W_enc": rows.T.copy(), "W_dec": rows, "b_enc": np.zeros_like(parameters["b_enc"])}
    return SparseAutoencoder(sae.config, parameters)


class Chooser:
    """Chooses S in every way that is compared, on the same pictures.

    Args:
        fit: The pictures and the SAE.
        config: How ours chooses.
        steerability: float [d_sae]; NaN where there is none.
        seed: Of what is random.
        fit_with: From another SAE to the same pictures with it.
    """

    def __init__(
        self,
        fit: TextFit,
        config: FitConfig,
        steerability: np.ndarray,
        seed: int,
        fit_with: Callable[[SparseAutoencoder], TextFit],
    ) -> None:
        self.fit, self.config, self.steerability = fit, replace(config, seed=seed), steerability
        self.seed, self.fit_with = seed, fit_with
        self._learned: dict[tuple[FitConfig, tuple[int, ...]], tuple[Trial, np.ndarray]] = {}

    @cached_property
    def ranking(self) -> Ranking:
        """Contrast and causal effect of all latents."""
        return self.fit.rank()

    @cached_property
    def ours(self) -> Choice:
        """What `fit.choose` picks."""
        return self._chosen(self.ranking.order(), self.config)

    # --- rules ---

    def order(self, rule: str) -> np.ndarray:
        """Return the latents that a rule would take, best first."""
        contrast, effect = self.ranking.contrast, self.ranking.effect
        if rule == "random":
            return self._random_order()
        score = {
            "contrast x causal": np.where((contrast > 0) & (effect > 0), contrast * effect, 0),
            "causal": effect,
            "contrast": contrast,
            "steerability": np.where(contrast > 0, np.nan_to_num(self.steerability), 0),
        }[rule]
        ranked = np.argsort(-score, kind="stable")
        return ranked[score[ranked] > 0]

    def _random_order(self) -> np.ndarray:
        """Return latents at random: first one of like activity for each of ours, then any that fire."""
        rng = np.random.default_rng([self.seed, 1])  # anew each time: an interrupted run must draw the same
        activity = self.fit._activity("attacked").cpu().numpy()
        like = draw_alike(self.ours.latents, activity, rng)
        rest = np.setdiff1d(np.flatnonzero(activity), [*self.ours.latents, *like])
        return np.array([*like, *rng.permutation(rest)], dtype=int)

    def as_many(self, rule: str) -> Choice:
        """Return a rule's best latents, as many as ours."""
        return Choice(tuple(self.order(rule)[: len(self.ours.latents)].tolist()))

    def own_stop(self, rule: str) -> Choice:
        """Return as many of a rule's best latents as clean pictures bear, at most `n_candidates`, removed in full."""
        return self._in_full(self.order(rule))

    # --- other candidates ---

    def among(self, candidates: str) -> Choice:
        """Return what ours chooses from other candidates, one of `CANDIDATES`."""
        if candidates == "random latents":
            fires = np.flatnonzero(self.fit._activity("attacked").cpu().numpy())
            return self._chosen(np.random.default_rng([self.seed, 3]).permutation(fires), self.config)
        dictionary = random_dictionary(self.fit.sae, self.seed)
        other = Chooser(self.fit_with(dictionary), self.config, self.steerability, self.seed, self.fit_with)
        return replace(other.ours, sae=dictionary)

    # --- ablations ---

    def without(self, ingredient: str) -> Choice:
        """Return what is chosen without one ingredient of ours."""
        ranking, config = self.ranking, self.config
        if ingredient.startswith("most candidates"):
            config = replace(config, n_candidates=_FEW)
            ingredient = ingredient.removeprefix("most candidates").removeprefix(" and ")
        order = ranking.order()
        if not ingredient:
            return self._chosen(order, config)
        if ingredient == "contrast":
            return self._chosen(replace(ranking, contrast=np.ones_like(ranking.contrast)).order(), config)
        if ingredient == "causal effect":
            return self._chosen(self.order("contrast"), config)
        if ingredient == "joint step":
            return self._in_full(order)
        if ingredient == "learnt gains":
            trial, ranked, _ = self._joint(order, config)
            return self._stopped(trial, ranked, np.ones(len(trial.latents)))
        changed = {
            "moving weights": replace(config, worst_rate=0.0),
            "sparsity": replace(config, sparsity=0.0),
            "budget": replace(config, clean_budget=1.0),
        }
        return self._chosen(order, changed[ingredient])

    def _chosen(self, order: np.ndarray, config: FitConfig) -> Choice:
        """Return what `fit.choose` would; the joint step is not repeated for the same candidates."""
        trial, ranked, removal = self._joint(order, config)
        return self._stopped(trial, ranked, removal, config.clean_budget)

    def _in_full(self, order: np.ndarray) -> Choice:
        """Return the first of a ranking, as many as clean pictures bear, removed in full: without the joint step."""
        trial = Trial(self.fit, order[: self.config.n_candidates], self.config)
        return self._stopped(trial, np.arange(len(trial.latents)), np.ones(len(trial.latents)))

    def _joint(self, order: np.ndarray, config: FitConfig) -> tuple[Trial, np.ndarray, np.ndarray]:
        """Return the candidates, their columns, most removed first, and how much of each is removed."""
        order = order[: config.n_candidates]
        key = replace(config, clean_budget=0.0), tuple(order.tolist())  # this step does not depend on the budget
        if key not in self._learned:
            trial = Trial(self.fit, order, config)
            self._learned[key] = trial, self.fit.learn_removal(trial, config)
        trial, removal = self._learned[key]
        ranked = np.argsort(-removal, kind="stable")
        return trial, ranked[removal[ranked] >= LEAST_REMOVAL], removal

    def _stopped(
        self, trial: Trial, ranked: np.ndarray, removal: np.ndarray, clean_budget: float | None = None
    ) -> Choice:
        """Return the first candidates in the order `ranked`, as many as the budget on clean pictures bears."""
        budget = self.config.clean_budget if clean_budget is None else clean_budget
        selection = within_budget(trial, ranked, removal, budget)
        return Choice(selection.latents, selection.gains)


def variants() -> dict[str, Callable[[Chooser], Choice]]:
    """Return every way of choosing, by name. Ours comes before those that take its number of latents."""
    found: dict[str, Callable[[Chooser], Choice]] = {"plain": lambda _: Choice(()), "ours": lambda c: c.ours}
    for rule in RULES[1:]:
        found[f"{rule}, as many"] = partial(Chooser.as_many, rule=rule)
        found[f"{rule}, own stop"] = partial(Chooser.own_stop, rule=rule)
    for candidates in CANDIDATES:
        found[f"ours, from {candidates}"] = partial(Chooser.among, candidates=candidates)
    for ingredient in ABLATIONS:
        found[f"without {ingredient}"] = partial(Chooser.without, ingredient=ingredient)
    return found
