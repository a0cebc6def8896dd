"""What a way to fit does to pictures that it was not fitted on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.tower import BATCH, block_of

from .encoded import Encoded
from .material import Groups, Material, Pairs
from .saves import Saves
from .sites import FittedSite, SitePlan, fit_sites

_N_DRAWS = 2000
"""Of the bootstrap."""


# --- measuring ----------------------------------------------------------------------------------------------------


def measure(clip: Clip, data: Pairs | Groups, text_embeds: Tensor) -> dict[str, float]:
    """Return what a CLIP answers as it is now, as fractions of the pictures.

    Pairs: the accuracy on "clean", "neutral" and "attacked" pictures, and "attack_success", how often the written
    label is the answer. Groups: the accuracy of each group ("y-a"), their "average", the average "weighted" by the
    share of each (see `Groups`), and the "worst".

    Args:
        clip: The CLIP, with whatever is attached to it.
        data: The pictures.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
    """
    image_embeds = {
        kind: torch.cat([clip.image_embeds(part) for part in pixel_values.split(BATCH)])
        for kind, pixel_values in data.pictures().items()
    }
    return accuracies(data, image_embeds, text_embeds)


def accuracies(data: Pairs | Groups, image_embeds: Mapping[str, Tensor], text_embeds: Tensor) -> dict[str, float]:
    """Return what `measure` does, from image_embeds [n, d_embed] by kind of picture."""
    return shares(data, answers_of(image_embeds, text_embeds))


def answers_of(image_embeds: Mapping[str, Tensor], text_embeds: Tensor) -> dict[str, np.ndarray]:
    """Return the index of the nearest text, int64 [n], by kind of picture."""
    return {
        kind: (embeds @ text_embeds.to(embeds.device).T).argmax(1).cpu().numpy()
        for kind, embeds in image_embeds.items()
    }


def shares(data: Pairs | Groups, answers: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Return what `measure` does, from answers int64 [n] by kind of picture."""
    if isinstance(data, Pairs):
        label, word = data.label.numpy(), data.word.numpy()
        found = {kind: float((answer == label).mean()) for kind, answer in answers.items()}
        return {**found, "attack_success": float((answers["attacked"] == word).mean())}
    right = _right(data, answers)
    groups = {name: float(hits.mean()) for name, hits in right.items()}
    weights = [data.share(*map(int, name.split("-"))) for name in groups]
    return {
        "average": float(np.mean(list(groups.values()))),
        "weighted": float(np.average(list(groups.values()), weights=weights)),
        "worst": min(groups.values()),
        **groups,
    }


def _right(data: Pairs | Groups, answers: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return which pictures with the cue are answered rightly, bool [n], by group; pairs are one group."""
    if isinstance(data, Pairs):
        return {"attacked": answers["attacked"] == data.label.numpy()}
    y, a = data.y.numpy(), data.a.numpy()
    names = sorted(set(zip(y.tolist(), a.tolist(), strict=True)))
    return {f"{i}-{j}": answers["picture"][(y == i) & (a == j)] == i for i, j in names}


def n_fooled(data: Pairs | Groups, answers: Mapping[str, np.ndarray]) -> int:
    """Return how many pictures with the cue are answered wrongly."""
    return sum(int((~hits).sum()) for hits in _right(data, answers).values())


@dataclass(frozen=True)
class CrossValidation:
    """What a way to fit does to pictures that it was not fitted on.

    Attributes:
        plain: What `measure` gives without a defense, per fold.
        defended: The same with the defense that was fitted on the other folds.
        n_latents: How many it edits.
        gain_interval: Of `gain`, 95 %, from the pictures of all folds drawn anew.
        is_held_out: False where nothing was held out: these are the pictures that it was fitted on.
    """

    plain: tuple[Mapping[str, float], ...]
    defended: tuple[Mapping[str, float], ...]
    n_latents: tuple[int, ...]
    gain_interval: tuple[float, float]
    is_held_out: bool = True

    def summary(self) -> dict[str, dict[str, float]]:
        """Return each measure's mean without ("plain") and with the defense, and its spread over folds.

        "spread" is the standard deviation of the defended folds, "change" the mean change, "change_spread" its
        standard deviation; both are 0 where there is one.
        """
        rows = {}
        ddof = min(1, len(self.plain) - 1)
        for key in self.plain[0]:
            plain, defended = (np.array([fold[key] for fold in arm]) for arm in (self.plain, self.defended))
            change = defended - plain
            rows[key] = {
                "plain": float(plain.mean()),
                "defended": float(defended.mean()),
                "spread": float(defended.std(ddof=ddof)),
                "change": float(change.mean()),
                "change_spread": float(change.std(ddof=ddof)),
            }
        return rows

    @property
    def folds(self) -> int:
        """How many; 0 where nothing was held out."""
        return len(self.plain) if self.is_held_out else 0

    @property
    def gain_key(self) -> str:
        """The measure that the defense is to raise."""
        return "attacked" if "attacked" in self.plain[0] else "worst"

    @property
    def loss_key(self) -> str:
        """The measure that the clean budget is on."""
        return "clean" if "clean" in self.plain[0] else "weighted"

    @property
    def gain(self) -> float:
        """The mean change of what the defense is for: accuracy on attacked pictures, or of the worst group."""
        return self.summary()[self.gain_key]["change"]

    @property
    def loss(self) -> float:
        """The mean fall of what the clean budget is on: accuracy on clean pictures, or over groups by their shares."""
        return -self.summary()[self.loss_key]["change"]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        what = "held_out" if self.is_held_out else "fitted_on"
        interval = list(self.gain_interval)
        return {"folds": self.folds, "n_latents": list(self.n_latents), "gain_interval": interval, what: self.summary()}


def gain_interval(pairs: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the gain of the worst group, from the pictures of each group drawn anew.

    Args:
        pairs: Of each group, which pictures were right without the defense and with it, bool [n] each; n >= 1.
        seed: Of the drawing.

    Source: the paired bootstrap by percentiles (Efron 1979).
    """
    rng = np.random.default_rng(seed)
    drawn = []
    for plain, defended in pairs:
        rows = rng.integers(len(plain), size=(_N_DRAWS, len(plain)))
        drawn.append((plain[rows].mean(1), defended[rows].mean(1)))
    before, after = (np.min(arm, axis=0) for arm in zip(*drawn, strict=True))
    low, high = np.quantile(after - before, [0.025, 0.975])
    return float(low), float(high)


def cross_validate(
    encoded: Encoded,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    folds: int,
    seed: int,
    saves: Saves | None = None,
    label: str = "",
) -> CrossValidation:
    """Fit on all folds but one, measure on that one, for each.

    Args:
        encoded: The pictures of `material`, and the CLIP.
        plans: See `fit_sites`.
        material: Says what the folds are.
        text_embeds: See `fit_sites`.
        folds: How many, 2 or more.
        seed: Decides which pictures are in which.
        saves: Keeps what each stage came to.
        label: In front of what progress is told.

    Raises:
        ConfigError: There are fewer than two folds, or too few pictures for them.
    """
    if folds < 2:
        raise ConfigError(f"folds={folds}; it takes two or more to hold pictures out")
    results = []
    for index, (fitted_on, held_out) in enumerate(material.folds(folds, seed), start=1):
        name = f"{label}fold {index} of {folds}, "
        fitted = fit_sites(encoded.take(fitted_on), plans, text_embeds, name="fold", saves=saves, label=name)
        results.append(_measured(encoded.take(held_out), fitted, text_embeds, name))
    return _validation(results, is_held_out=True)


def on_fitted(encoded: Encoded, fitted: Sequence[FittedSite], text_embeds: Tensor, label: str = "") -> CrossValidation:
    """Return what sites do to the pictures that they were fitted on, which flatters them."""
    return _validation([_measured(encoded, fitted, text_embeds, label)], is_held_out=False)


@dataclass(frozen=True)
class _Measured:
    """Answers without and with a defense, by kind of picture."""

    data: Pairs | Groups
    plain: Mapping[str, np.ndarray]
    defended: Mapping[str, np.ndarray]
    n_latents: int


def _measured(encoded: Encoded, fitted: Sequence[FittedSite], text_embeds: Tensor, label: str) -> _Measured:
    first = min((each.site.hook_point for each in fitted), key=block_of)
    with encoded.progress.stage(f"{label}measuring", 2) as advance:
        plain = answers_of(encoded.image_embeds(first), text_embeds)
        advance(1)
        with encoded.clip.edited([each.site for each in fitted if each.selection.latents]):
            defended = answers_of(encoded.image_embeds(first), text_embeds)
        advance(1)
    return _Measured(encoded.data, plain, defended, sum(len(each.selection.latents) for each in fitted))


def _validation(results: Sequence[_Measured], *, is_held_out: bool) -> CrossValidation:
    right: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    for each in results:
        plain, defended = _right(each.data, each.plain), _right(each.data, each.defended)
        for name in plain:
            right.setdefault(name, []).append((plain[name], defended[name]))
    pooled = [
        (np.concatenate([plain for plain, _ in of_folds]), np.concatenate([defended for _, defended in of_folds]))
        for of_folds in right.values()
    ]
    return CrossValidation(
        tuple(shares(each.data, each.plain) for each in results),
        tuple(shares(each.data, each.defended) for each in results),
        tuple(each.n_latents for each in results),
        gain_interval(pooled),
        is_held_out,
    )
