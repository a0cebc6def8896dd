"""What of an attached defense is active for one call."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from defense.core.latents import Edit, LatentSet
from defense.errors import ConfigError

if TYPE_CHECKING:
    from defense.core.sae import SparseAutoencoder

    from .attach import AttachedDefense
    from .clip import Clip
    from .defense import Defense, Site


__all__ = ["Controls"]

STEERED = "(steered)"
"""What steered latents have for the name of a set."""

LatentKey = tuple[str, int]
"""(hook_point, latent)"""


@dataclass(frozen=True)
class Controls:
    """What of a defense is active, for one call. By default all of it, as it is attached.

    Attributes:
        strength: Factor on what the defense removes, in [0, 1], on top of `AttachedDefense.set_strength`. Steering is
            not scaled.
        edit: "scale" or "project" in place of each set's own.
        sets: Names of the latent active sets; all by default.
        off: (hook_point, latent) that the defense leaves alone, as if no set named them.
        steer: (hook_point, latent) -> activation that it is set to, on every token that the SAE was made for. Any
            latent of that site's SAE (of a slim site, any that it holds); one that is in a set too is steered, not
            removed.
        strengths: (hook_point, latent) -> factor on what the defense removes of it, in [0, 1], on top of `strength`; 1
            for those that are not named.

    Raises:
        ConfigError: A value that is not one of these.
    """

    strength: float = 1.0
    edit: Edit | None = None
    sets: tuple[str, ...] | None = None
    off: frozenset[LatentKey] = frozenset()
    steer: Mapping[LatentKey, float] = field(default_factory=dict)
    strengths: Mapping[LatentKey, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not isinstance(self.strength, Real) or not 0 <= self.strength <= 1:
            raise ConfigError(f"strength={self.strength}; it must lie in [0, 1]: 0 is stock CLIP, 1 the full edit")
        if self.edit not in (None, "scale", "project"):
            raise ConfigError(f"edit={self.edit!r}; it must be 'scale', 'project', or None for each set's own")
        if self.sets is not None:
            if isinstance(self.sets, str):
                raise ConfigError(f"sets={self.sets!r}; want a tuple of names: ({self.sets!r},)")
            object.__setattr__(self, "sets", tuple(self.sets))
        object.__setattr__(self, "off", frozenset(_latent_key(each) for each in self.off))
        for name in ("steer", "strengths"):
            object.__setattr__(self, name, {_latent_key(each): value for each, value in getattr(self, name).items()})
        for key, value in self.strengths.items():
            if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= value <= 1:
                raise ConfigError(f"strengths[{key}] is {value!r}; it must lie in [0, 1]: 0 leaves the latent alone")
        object.__setattr__(self, "strengths", {key: float(value) for key, value in self.strengths.items()})

    def applied_to(self, defense: Defense) -> list[tuple[Site, tuple[LatentSet, ...]]]:
        """Return the sites of a defense, each with the sets that are active there: a steered one first.

        Raises:
            ConfigError: A set or a hook point that the defense does not have, or a number to steer to that is none.
        """
        for name in self.sets or ():
            if name not in defense.sets:
                raise ConfigError(f"this defense has no set {name!r}; it has {', '.join(defense.sets) or 'none'}")
        hook_points = [site.hook_point for site in defense.sites]
        for hook_point, latent in (*self.off, *self.steer, *self.strengths):
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
        if self.strengths:
            factors = (self.strengths.get((hook_point, latent), 1.0) for latent in kept.latents)
            gains = (1 - (1 - gain) * factor for gain, factor in zip(kept.gains, factors, strict=True))
            kept = replace(kept, gains=tuple(gains))
        return kept if self.edit is None else replace(kept, edit=self.edit, values=())

    def _steered(self, site: Site) -> list[LatentSet]:
        values = {latent: value for (point, latent), value in self.steer.items() if point == site.hook_point}
        if not values:
            return []
        scope = site.sae_config.tokens
        return [LatentSet(STEERED, tuple(values), edit="set", scope=scope, values=tuple(values.values()))]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "strength": self.strength,
            "edit": self.edit,
            "sets": None if self.sets is None else list(self.sets),
            "off": [list(key) for key in sorted(self.off)],
            "steer": [[*key, value] for key, value in self.steer.items()],
            "strengths": [[*key, value] for key, value in self.strengths.items()],
        }


def _latent_key(key: Any) -> LatentKey:
    match key:
        case (str(hook_point), Integral() as latent):
            return hook_point, int(latent)
    raise ConfigError(f"a latent is named {key!r}; want (hook_point, latent)")


@contextmanager
def applied(
    clip: Clip, defense: Defense, controls: Controls | None, sae_at: Callable[[Site], SparseAutoencoder]
) -> Iterator[AttachedDefense]:
    """Let a CLIP's defense act as `controls` say, for as long as the context lasts. Not while another thread uses it.

    Args:
        clip: A CLIP to which the defense is attached.
        defense: That defense.
        controls: What of it is active; None for all of it.
        sae_at: Gives the whole SAE of a site, on the CLIP's device.

    Raises:
        ConfigError: See `Controls.applied_to`; or the model is compiled.
        HookPointError: A latent is steered where it means nothing.
        BackendError: The defense's backend is "fused", and there is no kernel for what was asked.
    """
    from .attach import attached, check_switchable, suppressors_of

    check_switchable(clip.model)
    attachment = attached(clip.model)
    if controls is None or controls == Controls():
        yield attachment
        return
    strengths = {
        (block.hook_point, part.latent_set.name): controls.strength * float(part.strength)
        for block in attachment.edited_blocks()
        for part in block.parts()
    }
    sites = [(site.hook_point, sae_at(site), sets) for site, sets in controls.applied_to(defense)]
    suppressors = suppressors_of(clip.tower, sites, attachment.backend)
    for hook_point, parts in suppressors.items():
        for part in parts:
            part.to(clip.tower.device, clip.tower.edit_dtype)
            part.set_strength(strengths.get((hook_point, part.latent_set.name), 1.0))  # 1 for the steered
    with attachment.adjusted(suppressors):
        yield attachment
