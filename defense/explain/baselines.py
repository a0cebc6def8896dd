"""What the numbers of a catalogue are worth: the same ones of neurons, channels and random directions.

A number that random directions reach as often says nothing about latents. So steerability is measured for a sample of
each kind of unit over a sweep of strengths, and the catalogue's column is made at the strength that tells latents from
random directions best; monosemanticity is added up for all units of each kind in the same pass over the pictures.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.core.intervals import Z, wilson
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.hosts.neurons import Neurons, unit_rows
from defense.hosts.tower import VisionTower

from .likeness import Likeness
from .steering import Steering

STRENGTHS = (0.5, 0.7, 1.0, 1.4, 2.0)
"""Of the sweep, as multiples of the mean norm of what the encoder sees."""
STEERABLE = 0.1
"""S above which a unit counts as steerable, and S_c above which it reaches a word. Source: arXiv:2504.08729."""


# --- what else there is in a stream -----------------------------------------------------------------------------------


class Others:
    """The units that latents are compared with: neurons of the block before, channels, random directions.

    Args:
        tower: The tower.
        hook_point: Where the SAE reads.
        seed: Of as many random directions as the stream is wide.

    Attributes:
        neurons: None where the block has no MLP that is known; see `why_no_neurons`.
        likeness: Sums of each kind, for monosemanticity.
    """

    def __init__(self, tower: VisionTower, hook_point: str, seed: int) -> None:
        self.why_no_neurons: str | None = None
        self.neurons: Neurons | None = None
        try:
            self.neurons = Neurons(tower, hook_point)
        except ConfigError as error:
            self.why_no_neurons = str(error)
        self.d_model = tower.d_model
        generator = torch.Generator().manual_seed(seed)
        directions = torch.randn(self.d_model, self.d_model, generator=generator)
        self.random = unit_rows(directions)[0].to(tower.device)
        counts = {} if self.neurons is None else {"neurons": len(self.neurons.rows)}
        counts |= {"channels": self.d_model, "random": len(self.random)}
        self.likeness = {kind: Likeness(n, tower.device) for kind, n in counts.items()}

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Yield a list that gets the neurons' values of each pass, [batch, pos, n_neurons]; none without neurons."""
        if self.neurons is None:
            yield []
            return
        with self.neurons.watched() as seen:
            yield seen

    def values(self, resid: Tensor, hidden: Tensor | None) -> dict[str, Tensor]:
        """Return the value of every unit of each kind at each token, [batch, pos, n_units].

        Args:
            resid: [batch, pos, d_model].
            hidden: Of the neurons there, [batch, pos, n_neurons]; None without neurons.
        """
        found = {} if hidden is None else {"neurons": hidden}
        return found | {"channels": resid, "random": resid @ self.random.T}

    def add(self, resid: Tensor, hidden: Tensor | None, embeds: Tensor, tokens: slice) -> None:
        """Take in pictures; see `Likeness.add`.

        Args:
            resid: [batch, pos, d_model].
            hidden: See `values`.
            embeds: [batch, d_embed], normalized.
            tokens: Those that the SAE reads.
        """
        part = None if hidden is None else hidden[:, tokens]
        for kind, values in self.values(resid[:, tokens], part).items():
            self.likeness[kind].add(values.amax(1), embeds)

    def units(self, steering: Steering, hidden: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the units of each kind, ready to steer: unit rows [n_units, d_model], and values along them.

        Args:
            steering: On which pictures.
            hidden: Of the neurons at the tokens that are steered, [n, n_tokens, n_neurons]; None without neurons.
        """
        z = steering.read if steering.scale is None else steering.read / steering.scale
        eye = torch.eye(self.d_model, device=z.device)
        found = {"channels": (eye, z), "random": (self.random, z @ self.random.T)}
        if self.neurons is None or hidden is None:
            return found
        rows, lengths = unit_rows(self.neurons.rows)
        values = hidden * lengths
        return {"neurons": (rows, values if steering.scale is None else values / steering.scale)} | found


# --- steerability, swept ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    """How many units of each kind can be steered, at each strength.

    Attributes:
        strengths: See `STRENGTHS`.
        n: Kind -> units that were steered.
        n_steerable: Kind -> how many of them have S above `STEERABLE`, per strength.
        n_reached: Kind -> words c that one of them or more makes likelier by S_c above `STEERABLE`, per strength.
        n_words: Of how many.
    """

    strengths: tuple[float, ...]
    n: Mapping[str, int]
    n_steerable: Mapping[str, tuple[int, ...]]
    n_reached: Mapping[str, tuple[int, ...]]
    n_words: int

    def share(self, kind: str, place: int) -> tuple[float, float, float]:
        """Return the share of a kind's units that are steerable, and its 95 % interval (Wilson), at one strength."""
        return wilson(self.n_steerable[kind][place], self.n[kind])

    @property
    def place(self) -> int:
        """Index of the strength at which latents are ahead of random directions by most; the least of equal ones."""
        shares = [
            [self.share(kind, place)[0] for kind in ("latents", "random")] for place in range(len(self.strengths))
        ]
        return int(np.argmax([round(latents - random, 9) for latents, random in shares]))

    @property
    def strength(self) -> float:
        """The strength at that place."""
        return self.strengths[self.place]

    @property
    def separates(self) -> bool:
        """Whether the interval of latents lies above that of random directions there."""
        return self.share("latents", self.place)[1] > self.share("random", self.place)[2]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        places = range(len(self.strengths))
        kinds = {
            kind: {
                "n": n,
                **{
                    name: [round(self.share(kind, place)[index], 4) for place in places]
                    for index, name in enumerate(("share", "low", "high"))
                },
                "n_words_reached": list(self.n_reached[kind]),
            }
            for kind, n in self.n.items()
        }
        return {
            "strengths": list(self.strengths),
            "threshold": STEERABLE,
            "n_words": self.n_words,
            "kinds": kinds,
            "strength": self.strength,
            "separates": self.separates,
        }


def sweep(
    steering: Steering,
    units: Mapping[str, tuple[Tensor, Tensor]],
    n: int,
    seed: int,
    strengths: Sequence[float] = STRENGTHS,
) -> Sweep:
    """Return how many units of each kind can be steered, over a sweep of strengths.

    Costs a pass through the rest of the network for each picture, unit and strength.

    Args:
        steering: On which pictures.
        units: Kind -> rows [n_units, d_model] and values [n_pictures, n_tokens, n_units]; "latents" and "random" too.
        n: Units drawn of each kind, at most.
        seed: Of the drawing.
        strengths: To sweep.
    """
    rng = np.random.default_rng(seed)
    counts: dict[str, int] = {}
    steerable: dict[str, tuple[int, ...]] = {}
    reached: dict[str, tuple[int, ...]] = {}
    for kind, (rows, values) in units.items():
        drawn = torch.from_numpy(np.sort(rng.permutation(len(rows))[:n])).to(rows.device)
        counts[kind] = len(drawn)
        found = [_counted(steering, rows[drawn], values[..., drawn], strength) for strength in strengths]
        steerable[kind], reached[kind] = zip(*found, strict=True)
    return Sweep(tuple(strengths), counts, steerable, reached, len(steering.text_embeds))


def _counted(steering: Steering, rows: Tensor, values: Tensor, strength: float) -> tuple[int, int]:
    """Return how many units are steerable, and how many words some unit makes likelier."""
    n_steerable = 0
    is_reached = torch.zeros(len(steering.text_embeds), dtype=torch.bool, device=rows.device)
    for _, squares, mean in steering.moves(rows, values, strength):
        n_steerable += int((squares.sum(1) > STEERABLE).sum())
        is_reached |= ((squares > STEERABLE) & (mean > 0)).any(0)
    return n_steerable, int(is_reached.sum())


def latent_units(sae: SparseAutoencoder, steering: Steering, fires: Tensor) -> tuple[Tensor, Tensor]:
    """Return the latents that fire, ready to steer; see `Others.units`.

    Args:
        sae: The SAE.
        steering: On which pictures.
        fires: Which latents fire at all, bool [d_sae].
    """
    latents = fires.nonzero()[:, 0]
    return sae.W_dec[latents], sae.encode(steering.read)[..., latents]


# --- figures ----------------------------------------------------------------------------------------------------------


def median_of(scores: np.ndarray) -> dict[str, float | int]:
    """Return how many scores there are, their median and its 95 % interval (by ranks), as JSON values.

    Args:
        scores: float [n]; NaN are left out.
    """
    known = np.sort(scores[~np.isnan(scores)])
    if not len(known):
        return {"n": 0}
    half = Z * math.sqrt(len(known)) / 2
    low = max(0, math.floor(len(known) / 2 - half))
    high = min(len(known) - 1, math.ceil(len(known) / 2 + half))
    figures = {"median": np.median(known), "low": known[low], "high": known[high]}
    return {"n": len(known), **{name: round(float(value), 4) for name, value in figures.items()}}
