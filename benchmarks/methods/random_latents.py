"""Random latents in place of the chosen: as many, at the same blocks, of like activity on the training pictures.

What any edit of that size would do, whatever it edits. The number after "@" is the seed: "random-latents@3".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from defense.benchmarks.datasets import Example, Task
from defense.benchmarks.methods.base import Encoder
from defense.benchmarks.methods.defended import Defended, defended
from defense.benchmarks.methods.material import picked, pixel_batches, training_split
from defense.core.latents import draw_alike
from defense.errors import ConfigError
from defense.hosts.clip import Host
from defense.hosts.defense import Defense, Site

_N_PICTURES = 200


@dataclass
class RandomLatents:
    """A defense with random latents.

    Attributes:
        name: In tables.
        chosen: The defense that is imitated.
        seed: Of the draw.
    """

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

    def fit(self, host: Host, task: Task) -> None:
        """Draw the latents.

        Raises:
            NotApplicableError: The task has no training split.
        """
        train = training_split(task, self.name)
        examples = [train.examples[row] for row in picked(train, _N_PICTURES)]
        rng = np.random.default_rng(self.seed)
        defense = self.chosen.defense
        sites = tuple(_control(site, activity_of(host, site, examples), rng) for site in defense.sites)
        self._control = replace(defense, sites=sites, golden=None)

    def apply(self, host: Host) -> AbstractContextManager[Encoder]:
        """Put the control in."""
        assert self._control is not None, "fit() comes first"
        return defended(host, self._control)


def activity_of(host: Host, site: Site, examples: Sequence[Example]) -> np.ndarray:
    """Return the summed activation of each latent of a site's SAE on some pictures, float64 [d_sae]."""
    import torch

    from defense.hosts.attach import sae_of
    from defense.hosts.tap import Tail

    tail = Tail(host.model, site.hook_point)
    sae = sae_of(site).to(host.model.logit_scale.device)
    total = np.zeros(sae.config.d_sae)
    with torch.inference_mode():
        for pixel_values in pixel_batches(host, examples):
            resid = tail.resid(torch.from_numpy(pixel_values))
            total += sum(sae.encode(picture).sum(0, dtype=torch.float64).cpu().numpy() for picture in resid)
    return total


def _control(site: Site, activity: np.ndarray, rng: np.random.Generator) -> Site:
    """Return a site with every set's latents replaced. Sets draw together, so that none takes another's."""
    chosen = list(dict.fromkeys(latent for latent_set in site.sets for latent in latent_set.latents))
    stand_in = dict(zip(chosen, draw_alike(chosen, activity, rng), strict=True))
    sets = (replace(s, latents=tuple(stand_in[latent] for latent in s.latents), scores={}) for s in site.sets)
    return replace(site, sets=tuple(sets))
