"""The latents whose removal is enough to change stock CLIP's answer for one picture."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.errors import ConfigError
from defense.hosts.controls import Controls, LatentKey

if TYPE_CHECKING:
    from defense.classify.answers import Prediction
    from defense.classify.classifier import RobustClassifier


__all__ = ["Counterfactual", "counterfactual"]


@dataclass(frozen=True)
class Counterfactual:
    """The latents whose removal, and no other's, is enough to change what stock CLIP says of a picture.

    Attributes:
        plain: The stock CLIP's answer.
        latents: (hook_point, latent) of S, in the order in which they were added; empty where no removal changed the
            answer.
        flipped: The answer with these removed; None where none changed it.
        n_tried: Subsets of S that were tried.
    """

    plain: Prediction
    latents: tuple[LatentKey, ...]
    flipped: Prediction | None
    n_tried: int

    @property
    def found(self) -> bool:
        """Whether there is such a set."""
        return self.flipped is not None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self), "latents": [list(key) for key in self.latents]}


def counterfactual(clf: RobustClassifier, image: Any, *, controls: Controls | None = None) -> Counterfactual:
    """Find a small set of latents of S whose removal alone changes the stock CLIP's best label.

    Greedy: of the latents that fire, the one whose removal on top of the others takes most from the margin of that
    label over the next is added, until the answer changes. Then those without which it stays changed are put back, the
    last found first, until there is no such latent. So none of the result can be left out; that no other set is smaller
    is certain only where it holds one latent.

    Args:
        clf: With a defense, and labels set.
        image: See `images.decode`.
        controls: What of the defense may be used, and how it edits.

    Raises:
        ConfigError: There is no defense, fewer than two labels, or a latent is steered.
    """
    search = Search(clf, image, controls)
    found: list[LatentKey] = []
    rest = search.firing()
    while rest and not search.flips(found):
        best = min(rest, key=lambda key: search.margin([*found, key]))
        if search.margin([*found, best]) >= search.margin(found):
            break
        found.append(best)
        rest.remove(best)
    if not search.flips(found):
        return Counterfactual(search.prediction([]), (), None, search.n_tried)
    while (spare := _spare(search, found)) is not None:
        found.remove(spare)
    return Counterfactual(search.prediction([]), tuple(found), search.prediction(found), search.n_tried)


def _spare(search: Search, found: list[LatentKey]) -> LatentKey | None:
    """Return the last of some latents without which the answer stays changed, or None."""
    for key in reversed(found):
        if search.flips(each for each in found if each != key):
            return key
    return None


class Search:
    """Answers for one picture with only some latents of S removed, in full or in part, each computed once.

    Args:
        clf: With a defense, and labels set.
        image: See `images.decode`.
        controls: What of the defense may be used, and how it edits; None for all of it.

    Raises:
        ConfigError: There is no defense, fewer than two labels, or a latent is steered.
    """

    def __init__(self, clf: RobustClassifier, image: Any, controls: Controls | None) -> None:
        controls = controls or Controls()
        if controls.steer:
            raise ConfigError("a counterfactual only removes latents; leave `steer` empty")
        if clf.defense is None:
            raise ConfigError("this classifier has no defense, so there is nothing to remove")
        self.controls = controls
        self.latents = frozenset(
            (site.hook_point, latent)
            for site, sets in controls.applied_to(clf.defense)
            for latent_set in sets
            for latent in latent_set.latents
        )
        self.probe = clf.probe(image)
        self.names = self.probe.labels
        if len(self.names) < 2:
            raise ConfigError(f"{self.names[0]!r} is the only label, so no other can be the answer; set at least two")
        self._scores: dict[frozenset[tuple[LatentKey, float]], np.ndarray] = {}
        self.plain = int(self.scores([]).argmax())

    @property
    def n_tried(self) -> int:
        """How many ways to remove some of them were tried; to remove none is not counted."""
        return len(self._scores) - 1

    def scores(self, removed: Iterable[LatentKey]) -> np.ndarray:
        """Return scores [n_labels] with just these latents removed."""
        return self.scores_at(dict.fromkeys(removed, 1.0))

    def scores_at(self, strengths: Mapping[LatentKey, float]) -> np.ndarray:
        """Return scores [n_labels] with so much of some latents removed, each 0 to 1, and nothing of the others."""
        used = {latent: strength for latent, strength in strengths.items() if strength > 0}
        key = frozenset(used.items())
        if key not in self._scores:
            self._scores[key] = self.probe.scores(self.controls_of(used))
        return self._scores[key]

    def controls_of(self, strengths: Mapping[LatentKey, float]) -> Controls:
        """Return the controls with which the defense does that."""
        off = self.controls.off | (self.latents - strengths.keys())
        parts = {key: part * self.controls.strengths.get(key, 1.0) for key, part in strengths.items()}
        return replace(self.controls, off=off, strengths={key: part for key, part in parts.items() if part < 1})

    def margin(self, removed: Iterable[LatentKey]) -> float:
        """Return how many nats plain's label is ahead of the best other; below 0 where the answer changed."""
        return self._margin(self.scores(removed))

    def margin_at(self, strengths: Mapping[LatentKey, float]) -> float:
        """Return the same of `scores_at`."""
        return self._margin(self.scores_at(strengths))

    def _margin(self, scores: np.ndarray) -> float:
        logs = np.log(scores.clip(np.finfo(np.float32).tiny))
        return float(logs[self.plain] - np.delete(logs, self.plain).max())

    def flips(self, removed: Iterable[LatentKey]) -> bool:
        """Return whether the answer is another than plain's."""
        return int(self.scores(removed).argmax()) != self.plain

    def prediction(self, removed: Iterable[LatentKey]) -> Prediction:
        """Return the answer as a classifier gives it."""
        return self.prediction_at(dict.fromkeys(removed, 1.0))

    def prediction_at(self, strengths: Mapping[LatentKey, float]) -> Prediction:
        """Return the same of `scores_at`."""
        scores = self.scores_at(strengths)
        return [{"label": self.names[i], "score": float(scores[i])} for i in np.argsort(-scores, kind="stable")]

    def firing(self) -> list[LatentKey]:
        """Return the latents of S that act on the picture, with nothing removed or with all of them."""
        keys: dict[LatentKey, None] = {}
        for strength in (0.0, self.controls.strength):
            told = self.probe.suppressions(replace(self.controls, strength=strength))
            for hook_point, suppression in told.items():
                for part, acts in zip(suppression.suppressors, suppression.acts, strict=True):
                    fires = (acts[0] != 0).any(0) | (part.values is not None)
                    keys |= dict.fromkeys((hook_point, latent) for latent in part.latents[fires].tolist())
        return list(keys)
