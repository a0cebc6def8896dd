"""Random latents in place of the chosen: as many, at the same blocks, of like activity on the training pictures.

The control: what an edit of that size does, whichever latents it edits. The number after "@" is the seed, as in
"random-latents@3".
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, Record
from defense.benchmarks.methods.defended import Defended, defended, exact
from defense.benchmarks.methods.material import picked, pixel_batches, training_split
from defense.benchmarks.tables import RANDOM
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense

DRAWS = (RANDOM, *(f"{RANDOM}@{seed}" for seed in (1, 2)))
"""The draws that "all" methods hold: one says little."""

_N_PICTURES = 200


@dataclass
class RandomLatents:
    """A defense with random latents.

    Attributes:
        name: In tables.
        chosen: The defense that is imitated.
        seed: Of the draw.
    """

    record: ClassVar[Record] = Record(
        "a control",
        "",
        "As many latents as the defense edits, at the same blocks and of like activity, drawn at random.",
    )
    name: str
    chosen: Defended
    seed: int = 0
    _control: Defense | None = field(default=None, init=False)

    @classmethod
    def of(cls, name: str, defense: Defense | None, seed: float | None) -> RandomLatents:
        """Return the method for a name.

        Raises:
            ConfigError: What stands after "@" is no seed.
        """
        if seed is not None and not (seed >= 0 and seed.is_integer()):
            raise ConfigError(f"{name!r}: after @ comes a seed, a whole number, e.g. random-latents@3")
        return cls(name, Defended.of(name, defense, None), int(seed or 0))

    def settings(self) -> Mapping[str, Any]:
        """Return which defense is imitated, the seed, and the latents at each block."""
        assert self._control is not None, "fit() comes first"
        latents = {site.hook_point: [list(s.latents) for s in site.sets] for site in self._control.sites}
        return {**self.chosen.settings(), "seed": self.seed, "latents": latents}

    def fitted_before(self) -> Mapping[str, Any]:
        """Return what the defense says of its fit; the exact rule acts here, so no thresholds could disagree."""
        return {**self.chosen.fitted_before(), "agreement": None}

    def fit(self, clip: Clip, task: Task) -> None:
        """Draw the latents.

        Raises:
            NotApplicableError: The task has no training split; or see `exact`.
        """
        from defense.fit.control import activity_of, random_control

        train = training_split(task, self.name)
        examples = [train.examples[row] for row in picked(train, _N_PICTURES)]
        rng = np.random.default_rng(self.seed)
        defense = exact(self.name, self.chosen.defense)
        sites = tuple(
            random_control(site, activity_of(clip, site, pixel_batches(clip, examples)), rng) for site in defense.sites
        )
        self._control = replace(defense, sites=sites, golden=None)

    def apply(self, clip: Clip) -> AbstractContextManager[Encoder]:
        """Put the control in."""
        assert self._control is not None, "fit() comes first"
        return defended(clip, self._control)
