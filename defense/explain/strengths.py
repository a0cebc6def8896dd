"""The least change of strengths that changes stock CLIP's answer for one picture: many latents, each removed in part.

`counterfactual.py` finds the fewest latents, each removed in full. Here every latent that fires may go by a part of its
own, 0 to 1, and the Euclidean length of these parts is to be small:

    s' = argmin |s|    so that    margin(s_0) - slopes . (s - s_0) = 0,   0 <= s_i <= 1

which is solved anew from where it led, with slopes that are measured there. That is the search for the nearest point of
a limit state in reliability analysis (Hasofer and Lind 1974; Rackwitz and Fiessler 1978), and DeepFool's
(arXiv:1511.04599) with strengths in place of pixels and one more condition, the bounds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.hosts.controls import Controls, LatentKey

from .counterfactual import Search

if TYPE_CHECKING:
    from defense.classify.answers import Prediction
    from defense.classify.classifier import RobustClassifier


__all__ = ["LeastStrengths", "least_strengths"]

_STEPS = 3
"""Times that slopes are measured: what is found later is hardly shorter."""
_PROBE = 0.2
"""Of a strength, by which a slope is measured."""
_OVERSHOOT = 1.2
"""Times as far is gone where a step does not change the answer, as slopes flatten."""
_HALVINGS = 8
"""Of the way to where the answer changes, which is found to one in 256 of it."""


@dataclass(frozen=True)
class LeastStrengths:
    """How little of the latents has to go so that stock CLIP says something else of a picture.

    Attributes:
        plain: The stock CLIP's answer.
        strengths: (hook_point, latent) of S -> the part of it that is removed, in (0, 1], the largest first; empty
            where nothing changes the answer.
        flipped: The answer then; None where nothing changes it.
        controls: With which `RobustClassifier.explain` shows where that is.
        n_tried: Passes that it took.
    """

    plain: Prediction
    strengths: dict[LatentKey, float]
    flipped: Prediction | None
    controls: Controls
    n_tried: int

    @property
    def length(self) -> float:
        """Euclidean length of the strengths; n latents removed in full have the square root of n."""
        return float(np.linalg.norm(list(self.strengths.values())))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        strengths = [[*key, strength] for key, strength in self.strengths.items()]
        return {
            "plain": self.plain, "strengths": strengths, "length": self.length, "flipped": self.flipped,
            "n_tried": self.n_tried,
        }  # fmt: skip


def least_strengths(clf: RobustClassifier, image: Any, *, controls: Controls | None = None) -> LeastStrengths:
    """Find by how little the latents of S, each by a part of its own, change the stock CLIP's best label.

    A shorter change may be found by none of the steps, as the network is not linear; that what is found changes the
    answer, and a few percent less of it does not, was tried. Costs at most 3 passes for each latent that fires, and 40.

    Args:
        clf: With a defense, and labels set.
        image: See `images.decode`.
        controls: What of the defense may be used, and how it edits.

    Raises:
        ConfigError: There is no defense, fewer than two labels, or a latent is steered.
    """
    search = Search(clf, image, controls)
    keys = search.firing()

    def at(strengths: np.ndarray) -> dict[LatentKey, float]:
        return dict(zip(keys, strengths.tolist(), strict=True))

    def flips(strengths: np.ndarray) -> bool:
        return search.margin_at(at(strengths)) < 0

    found: list[np.ndarray] = []
    strengths = np.zeros(len(keys))
    for _ in range(_STEPS):
        slopes, fall = _linearized(search, keys, strengths)
        strengths, is_found = _least_along(slopes, fall, flips)
        if is_found:
            found.append(strengths)
    plain = search.prediction([])
    if not found:
        return LeastStrengths(plain, {}, None, search.controls_of({}), search.n_tried)
    least = at(min(found, key=lambda each: float(np.linalg.norm(each))))
    parts = {key: part for key, part in sorted(least.items(), key=lambda item: -item[1]) if part > 0}
    return LeastStrengths(plain, parts, search.prediction_at(parts), search.controls_of(parts), search.n_tried)


def _linearized(search: Search, keys: list[LatentKey], strengths: np.ndarray) -> tuple[np.ndarray, float]:
    """Return how fast the margin falls with each strength, 0 where it rises, [n], and how far it is to fall from 0 on.

    As if margins were linear around `strengths`, [n].
    """
    margin = search.margin_at(dict(zip(keys, strengths.tolist(), strict=True)))
    slopes = np.zeros(len(keys))
    for place, strength in enumerate(strengths):
        there = strengths.copy()
        there[place] = strength + _PROBE if strength + _PROBE <= 1 else strength - _PROBE
        moved = search.margin_at(dict(zip(keys, there.tolist(), strict=True)))
        slopes[place] = (margin - moved) / (there[place] - strength)
    slopes = slopes.clip(min=0)
    return slopes, max(0.0, margin + float(slopes @ strengths))


def _least_along(slopes: np.ndarray, fall: float, flips: Callable[[np.ndarray], bool]) -> tuple[np.ndarray, bool]:
    """Return the least of the shortest strengths for these slopes that change the answer, and whether there are such.

    Args:
        slopes: [n], none below 0.
        fall: At which, if margins were linear, it would change; it is sought nearby first, as they are not.
        flips: Whether some strengths change it.
    """
    for most in (fall, _OVERSHOOT * fall, float(slopes.sum())):
        if flips(_shortest(slopes, most)):
            break
    else:
        return _shortest(slopes, most), False
    least = 0.0
    for _ in range(_HALVINGS):
        middle = (least + most) / 2
        least, most = (least, middle) if flips(_shortest(slopes, middle)) else (middle, most)
    return _shortest(slopes, most), True


def _shortest(slopes: np.ndarray, fall: float) -> np.ndarray:
    """Return the shortest s, 0 <= s_i <= 1, with slopes . s = fall, [n]; 1 wherever a slope is, where none reaches it.

    It is clip(c * slopes, 0, 1) for some c: those at the bound first have the largest slopes.

    Args:
        slopes: [n], none below 0.
        fall: At least 0.
    """
    order = np.argsort(-slopes, kind="stable")
    left = fall
    for n_full in range(int((slopes > 0).sum())):
        rest = order[n_full:]
        factor = left / float(np.square(slopes[rest]).sum())
        if factor * slopes[order[n_full]] <= 1:
            found = np.zeros(len(slopes))
            found[order[:n_full]] = 1
            found[rest] = factor * slopes[rest]
            return found
        left -= float(slopes[order[n_full]])
    return (slopes > 0).astype(float)
