"""What of an attached defense is active for one call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from defense.core.latents import Edit, LatentSet
from defense.errors import ConfigError

if TYPE_CHECKING:
    from defense.classify.classifier import RobustClassifier

    from .attach import AttachedDefense
    from .defense import Defense, Site


__all__ = ["Controls"]

STEERED = "(steered)"
"""What steered latents have for the name of a set."""

Place = tuple[str, int]
"""(hook_point, latent)"""


@dataclass(frozen=True)
class Controls:
    """What of a defense is in force, for one call. By default all of it, as it is attached.

    Attributes:
        strength: Factor on what the defense removes, in [0, 1], on top of `AttachedDefense.set_strength`. Steering is
            not scaled.
        edit: "scale" or "project" in place of each set's own.
        sets: Names of the latent sets in force; all by default.
        off: (hook_point, latent) that the defense leaves alone, as if no set named them.
        steer: (hook_point, latent) -> activation that it is set to, on every token that the SAE was made for. Any
            latent of that site's SAE; one that is in a set too is steered, not removed.

    Raises:
        ConfigError: A value that is not one of these.
    """

    strength: float = 1.0
    edit: Edit | None = None
    sets: tuple[str, ...] | None = None
    off: frozenset[Place] = frozenset()
    steer: Mapping[Place, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.strength, Real) or not 0 <= self.strength <= 1:
            raise ConfigError(f"strength={self.strength}; it must lie in [0, 1]: 0 is stock CLIP, 1 the full edit")
        if self.edit not in (None, "scale", "project"):
            raise ConfigError(f"edit={self.edit!r}; it must be 'scale', 'project', or None for each set's own")
        if self.sets is not None:
            if isinstance(self.sets, str):
                raise ConfigError(f"sets={self.sets!r}; want a tuple of names: ({self.sets!r},)")
            object.__setattr__(self, "sets", tuple(self.sets))
        object.__setattr__(self, "off", frozenset(_place(each) for each in self.off))
        object.__setattr__(self, "steer", {_place(each): value for each, value in self.steer.items()})

    def applied_to(self, defense: Defense) -> list[tuple[Site, tuple[LatentSet, ...]]]:
        """Return the sites of a defense, each with the sets that are in force there: a steered one first.

        Raises:
            ConfigError: A set or a hook point that the defense does not have, or a number to steer to that is none.
        """
        for name in self.sets or ():
            if name not in defense.sets:
                raise ConfigError(f"this defense has no set {name!r}; it has {', '.join(defense.sets) or 'none'}")
        hook_points = [site.hook_point for site in defense.sites]
        for hook_point, latent in (*self.off, *self.steer):
            if hook_point not in hook_points:
                raise ConfigError(
                    f"latent {latent} at {hook_point!r}: this defense edits {', '.join(dict.fromkeys(hook_points))}"
                )
        applied = []
        for index, site in enumerate(defense.sites):
            kept = [self._changed(each, site.hook_point) for each in site.sets if self._names(each)]
            # Of several sites at one block, the first is steered.
            steered = self._steered(site) if hook_points.index(site.hook_point) == index else []
            applied.append((site, (*steered, *kept)))
        return applied

    def _names(self, latent_set: LatentSet) -> bool:
        return self.sets is None or latent_set.name in self.sets

    def _changed(self, latent_set: LatentSet, hook_point: str) -> LatentSet:
        kept = latent_set.without(frozenset(latent for point, latent in self.off if point == hook_point))
        return kept if self.edit is None else replace(kept, edit=self.edit, values=())

    def _steered(self, site: Site) -> list[LatentSet]:
        values = {latent: value for (point, latent), value in self.steer.items() if point == site.hook_point}
        if not values:
            return []
        scope = site.sae_config["tokens"]
        return [LatentSet(STEERED, tuple(values), edit="set", scope=scope, values=tuple(values.values()))]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "strength": self.strength,
            "edit": self.edit,
            "sets": None if self.sets is None else list(self.sets),
            "off": [list(place) for place in sorted(self.off)],
            "steer": [[*place, value] for place, value in self.steer.items()],
        }


def _place(place: Any) -> Place:
    match place:
        case (str(hook_point), Integral() as latent):
            return hook_point, int(latent)
    raise ConfigError(f"a latent is named {place!r}; want (hook_point, latent)")


def _defense_of(clf: RobustClassifier) -> Defense:
    if clf.defense is None:
        raise ConfigError("this classifier has no defense, so there is nothing to explain")
    return clf.defense


@contextmanager
def in_force(clf: RobustClassifier, controls: Controls | None) -> Iterator[AttachedDefense]:
    """Let a classifier's defense act as `controls` say. For the classifier's own use, which holds its lock.

    Raises:
        ConfigError: The classifier has no defense, or see `Controls.applied_to`.
        HookPointError: A latent is steered where it means nothing.
        BackendError: The classifier's backend is "fused", and there is no kernel for what was asked.
    """
    from .attach import attached, suppressors_of
    from .tower import VisionHost

    its_defense, model = _defense_of(clf), clf.host.model
    defense = attached(model)
    if controls is None or controls == Controls():
        yield defense
        return
    strengths = {
        (block.hook_point, part.latent_set.name): controls.strength * float(part.strength)
        for block in defense.edited_blocks()
        for part in block.parts()
    }
    host = VisionHost.of(model)
    weight = next(host.blocks.parameters())
    sites = [(site.hook_point, clf._sae_of(site), sets) for site, sets in controls.applied_to(its_defense)]
    suppressors = suppressors_of(host, sites, defense.backend)
    for hook_point, parts in suppressors.items():
        for part in parts:
            part.to(weight.device, weight.dtype)
            part.set_strength(strengths.get((hook_point, part.latent_set.name), 1.0))  # 1 for the steered
    with defense.adjusted(suppressors):
        yield defense
