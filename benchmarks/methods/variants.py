"""The defense with one thing about it changed: what is done to the chosen latents, or how their activation is decided.

    defense-scale      takes away what the latents write
    defense-project    takes away the whole span of the decoder rows of those that fire
    defense-delta      fires above a threshold of each latent's own, in place of the exact rule of TopK

The latents are the same. Whatever the defense does itself is its own row, "defense", and refused here.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, NotApplicableError, Record, needed
from defense.benchmarks.methods.defended import Defended, defended, exact
from defense.benchmarks.methods.material import class_embeds_of, digest_of, picked, pixel_batches, training_split
from defense.core.latents import Edit
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense

_N_CALIBRATION = 300
"""Pictures of each kind that thresholds are set on."""


@dataclass(frozen=True)
class OtherEdit(Defended):
    """A defense with another edit of the same latents.

    Attributes:
        edit: In place of the defense's own.
    """

    record: ClassVar[Record] = Record(
        "this package",
        "",
        "The latents of the defense under another edit: scale takes away what they write, project the whole span "
        "of the decoder rows of those that fire.",
    )
    edit: Edit = "scale"

    @classmethod
    def of(cls, name: str, defense: Defense | None, strength: float | None, *, edit: Edit = "scale") -> OtherEdit:
        """Return the method for a name."""
        return cls(name, needed(defense), 1.0 if strength is None else strength, edit)

    def settings(self) -> Mapping[str, Any]:
        """Return which defense, how much of it, and the edit."""
        return {**super().settings(), "edit": self.edit}

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn nothing.

        Raises:
            NotApplicableError: This is what the defense does anyway.
        """
        if all(latent_set.edit == self.edit for site in self.defense.sites for latent_set in site.sets):
            raise NotApplicableError(f"{self.name!r}: the defense has this edit anyway; it is the row of the defense")

    def apply(self, clip: Clip) -> AbstractContextManager[Encoder]:
        """Put the changed defense in."""
        return defended(clip, with_edit(self.defense, self.edit), self.strength)


def with_edit(defense: Defense, edit: Edit) -> Defense:
    """Return a defense with another edit ("scale" or "project") of the same latents."""
    sites = (
        replace(site, sets=tuple(replace(latent_set, edit=edit, values=()) for latent_set in site.sets))
        for site in defense.sites
    )
    return replace(defense, sites=tuple(sites), golden=None)


@dataclass
class Delta:
    """A defense whose TopK rule is replaced by thresholds, set on the training pictures.

    Attributes:
        name: In tables.
        exact: The defense as it is.
    """

    record: ClassVar[Record] = Record(
        "this package",
        "",
        "The defense with thresholds in place of its TopK rule, set on the task's training pictures.",
    )
    name: str
    exact: Defended
    _calibrated: Defense | None = field(default=None, init=False)

    @classmethod
    def of(cls, name: str, defense: Defense | None, strength: float | None) -> Delta:
        """Return the method for a name."""
        return cls(name, Defended.of(name, defense, strength))

    def settings(self) -> Mapping[str, Any]:
        """Return which defense, how much of it, and a hash of the thresholds."""
        assert self._calibrated is not None, "fit() comes first"
        sites = self._calibrated.sites
        thresholds = [site.parameters["threshold"] for site in sites if "threshold" in site.parameters]
        calibration = self._calibrated.provenance["calibration"]
        return {
            **self.exact.settings(),
            "thresholds_sha256": digest_of(*thresholds),
            "n_train": calibration["n_fitted"],
            "agreement": calibration["agreement"],
        }

    def fitted_before(self) -> Mapping[str, Any]:
        """Return what the defense says of its fit."""
        return self.exact.fitted_before()

    def fit(self, clip: Clip, task: Task) -> None:
        """Set the thresholds. How often the answer is that of the exact rule is recorded; no agreement is too low here.

        Raises:
            NotApplicableError: The task has no training split, or the rule is none that thresholds could replace, or
                see `exact`.
        """
        import torch

        from defense.fit.calibrate import calibrated

        train = training_split(task, self.name)
        kinds = [train] if task.train_clean is None else [train, task.train_clean]
        examples = [kind.examples[row] for kind in kinds for row in picked(kind, _N_CALIBRATION)]
        pixel_values = torch.from_numpy(np.concatenate(list(pixel_batches(clip, examples))))
        class_embeds = class_embeds_of(clip, train)
        twins = np.arange(len(examples)) % (len(examples) // len(kinds))
        try:
            self._calibrated, _ = calibrated(
                clip,
                exact(self.name, self.exact.defense),
                pixel_values,
                least_agreement=0,
                text_embeds=class_embeds,
                groups=twins,
            )
        except ConfigError as error:
            raise NotApplicableError(f"{self.name!r}: {error}") from error

    def apply(self, clip: Clip) -> AbstractContextManager[Encoder]:
        """Put the calibrated defense in."""
        assert self._calibrated is not None, "fit() comes first"
        return defended(clip, self._calibrated, self.exact.strength)
