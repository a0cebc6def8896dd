"""How much of S is due to the pictures that it was chosen on: the fit again and again, on pictures drawn anew.

A latent that most runs choose is a property of the CLIP and its SAE; one that few choose stood in for others, or for
chance. Two runs may differ much and still defend alike: latents that write the same direction take each other's place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.errors import ConfigError

from .encoded import Encoded
from .material import Material
from .saves import Saves
from .sites import FittedSite, SitePlan, fit_sites

COLUMN = "stability"
"""Of the scores of a latent set: the share of runs that chose each latent."""
STABLE = 0.8
"""Share of the runs from which on a latent is called stable."""


@dataclass(frozen=True)
class Stability:
    """What the runs chose.

    Attributes:
        chosen: Hook point -> the latents of each run, one set per run.
    """

    chosen: Mapping[str, tuple[frozenset[int], ...]]

    @property
    def n(self) -> int:
        """How many runs there were."""
        return len(next(iter(self.chosen.values())))

    def share(self, hook_point: str, latent: int) -> float:
        """Return the share of the runs that chose a latent."""
        return sum(latent in run for run in self.chosen[hook_point]) / self.n

    def agreement(self, hook_point: str) -> float:
        """Return the mean over pairs of runs of what both chose, as a share of what either did; 1 where none chose."""
        pairs = list(combinations(self.chosen[hook_point], 2))
        return float(np.mean([len(a & b) / len(a | b) if a | b else 1.0 for a, b in pairs]))

    def scored(self, fitted: FittedSite) -> FittedSite:
        """Return a site whose latents have the share of the runs that chose them among their scores."""
        point = fitted.site.hook_point
        sets = tuple(
            replace(each, scores={**each.scores, COLUMN: tuple(self.share(point, latent) for latent in each.latents)})
            for each in fitted.site.sets
        )
        return replace(fitted, site=replace(fitted.site, sets=sets))

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values: of each site the agreement, and [latent, share] of all that any run chose."""
        sites = {}
        for point, runs in self.chosen.items():
            shares = [[latent, self.share(point, latent)] for latent in sorted(frozenset().union(*runs))]
            sites[point] = {
                "agreement": round(self.agreement(point), 4),
                "latents": sorted(shares, key=lambda pair: (-pair[1], pair[0])),
            }
        return {"n": self.n, "sites": sites}


def bootstrap(
    encoded: Encoded,
    plans: Sequence[SitePlan],
    material: Material,
    text_embeds: Tensor,
    *,
    n: int,
    seed: int,
    saves: Saves | None = None,
) -> Stability:
    """Choose S n times, each time on as many pictures, drawn with replacement from each group (Efron 1979).

    Takes n more fits: what the latents do on the pictures is known for the first block, and made anew behind an edit. A
    picture that is drawn twice may be learned from and looked at to see when to stop, so runs stop a little late.

    Args:
        encoded: The pictures of `material`, and the CLIP.
        plans: See `fit_sites`.
        material: Says which pictures are of one group.
        text_embeds: See `fit_sites`.
        n: Runs, 2 or more.
        seed: Of the drawing.
        saves: Keeps what each stage came to.

    Raises:
        ConfigError: Fewer than two runs.
    """
    if n < 2:
        raise ConfigError(f"{n} bootstrap runs; it takes two or more to see what they agree on")
    runs: dict[str, list[frozenset[int]]] = {plan.hook_point: [] for plan in plans}
    for index in range(n):
        rows = drawn_anew(material.strata, np.random.default_rng([seed, index]))
        label = f"run {index + 1} of {n}, "
        for each in fit_sites(encoded.take(rows), plans, text_embeds, name="run", saves=saves, label=label):
            runs[each.site.hook_point].append(frozenset(each.selection.latents))
    return Stability({point: tuple(sets) for point, sets in runs.items()})


def drawn_anew(strata: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Return as many pictures of each group as it has, drawn with replacement, by index, int64 [n], in rising order.

    Args:
        strata: Group of each picture, int64 [n].
        rng: Draws.
    """
    groups = [np.flatnonzero(strata == group) for group in np.unique(strata)]
    return torch.from_numpy(np.sort(np.concatenate([rng.choice(rows, len(rows)) for rows in groups])))


def words_on(stability: Mapping[str, Any], hook_point: str, latents: Sequence[int]) -> str:
    """Return a sentence on how stable the latents of a site are.

    Args:
        stability: As `Stability.to_dict` gives it.
        hook_point: Of the site.
        latents: Its S.
    """
    site = stability["sites"][hook_point]
    shares = dict(map(tuple, site["latents"]))
    n_stable = sum(shares.get(latent, 0) >= STABLE for latent in latents)
    return (
        f"{n_stable} of {len(latents)} latents are chosen in at least {100 * STABLE:.0f} % of {stability['n']} runs on "
        f"pictures drawn anew; two runs have {100 * site['agreement']:.0f} % of their latents in common"
    )
