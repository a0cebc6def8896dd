"""The CLIP with a defense of this package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import Encoder, NotApplicableError, Record, needed
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense


@dataclass(frozen=True)
class Defended:
    """A defense from disk, in full or in part.

    Attributes:
        name: In tables.
        defense: What is attached.
        strength: Part of what it removes that is removed, in [0, 1].

    Raises:
        ConfigError: The strength is outside of [0, 1], or the defense was not read from disk, where its hash is taken.
    """

    record: ClassVar[Record] = Record(
        "this package",
    )
    name: str
    defense: Defense
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.strength <= 1:
            raise ConfigError(f"{self.name!r} has strength {self.strength}; it must lie in [0, 1]")
        if self.defense.manifest_sha256 is None:
            raise ConfigError("this defense was not read from disk, so no result could name it; save and load it first")

    @classmethod
    def of(cls, name: str, defense: Defense | None, strength: float | None) -> Defended:
        """Return the method for a name."""
        return cls(name, needed(defense), 1.0 if strength is None else strength)

    def settings(self) -> Mapping[str, Any]:
        """Return which defense, and how much of it."""
        return {"defense_sha256": self.defense.manifest_sha256, "strength": self.strength}

    def fitted_before(self) -> Mapping[str, Any]:
        """Return what the defense says of its fit."""
        return fit_of(self.defense)

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn nothing: the defense was fitted before, on other pictures."""

    def apply(self, clip: Clip) -> AbstractContextManager[Encoder]:
        """Put the defense in."""
        return defended(clip, self.defense, self.strength)


def fit_of(defense: Defense) -> dict[str, Any]:
    """Return what a defense says of its fit, as JSON values.

    Returns:
        `n_pictures` of each kind or group that its latents were chosen on, and the `agreement` of its thresholds with
        the exact rule, in [0, 1]; None where it has none.
    """
    n_pictures: dict[str, int] = {}
    for site in defense.sites:
        for latent_set in site.sets:
            for kind, n in latent_set.provenance.get("n_pictures", {}).items():
                n_pictures[kind] = max(n, n_pictures.get(kind, 0))
    return {"n_pictures": n_pictures, "agreement": defense.provenance.get("calibration", {}).get("agreement")}


def exact(name: str, defense: Defense) -> Defense:
    """Return a defense whose sites hold the whole SAE and its own rule: what controls and other edits start from.

    Args:
        name: Of the method that needs it.
        defense: Whole, or slim and fitted with an SAE that ships.

    Raises:
        NotApplicableError: It is slim, and its SAE does not ship.
    """
    if all(site.part is None for site in defense.sites):
        return defense
    from defense.hosts.shipped import find_model
    from defense.hosts.slim import restored
    from defense.store.checkpoint import shipped_saes

    own = find_model(defense.clip.model)
    saes = [] if own is None else [each.sae for each in shipped_saes(own)]
    try:
        return restored(defense, saes, own_rule=True)
    except ConfigError as error:
        raise NotApplicableError(f"{name!r} needs every latent, and this defense is slim: {error}") from error


@contextmanager
def defended(clip: Clip, defense: Defense, strength: float = 1.0) -> Iterator[Encoder]:
    """Yield the embeddings of a CLIP with a defense in it, at a strength in [0, 1]."""
    with clip.defended(defense) as attachment:
        attachment.set_strength(strength)
        yield Encoder(clip)
