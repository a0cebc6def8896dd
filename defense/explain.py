"""What a defense did to one picture: which latents it removed, where, and what that changed.

    Controls          what of a defense is in force for one call: strength, edit, sets, single latents, steering
    Explanation       both answers, and what was removed: by latent and patch
    counterfactual    the latents whose removal is enough to change stock CLIP's answer

Two sums are told apart throughout. What was removed in all is measured on the residual itself: `Explanation.heatmap`
and `fraction` hold the difference that the edits made. What a latent wrote is its activation times its decoder row:
`Removed.energy` and `Removed.map`. Decoder rows are not orthogonal, so squared norms of the parts do not add up to that
of the whole; and the edit "project" removes more than the parts, namely everything in the span of the rows that fire.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import ConfigError
from .heat import Box, heat, overlay
from .latents import Edit, LatentSet
from .report import report_html, report_png

if TYPE_CHECKING:
    from torch import Tensor

    from .artefact import Defense, Site
    from .attach import AttachedDefense
    from .classifier import Prediction, RobustClassifier
    from .suppress import Suppressor

__all__ = [
    "Controls",
    "Counterfactual",
    "Explanation",
    "Removed",
    "counterfactual",
    "heat",
    "overlay",
    "report_html",
    "report_png",
]

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


@dataclass(frozen=True)
class Removed:
    """One latent that was suppressed in a picture.

    Attributes:
        hook_point: Where.
        set_name: The latent set it belongs to, e.g. "text"; "(steered)" for one that was steered.
        latent: Its index in the SAE.
        energy: Squared norm of what it had written there, times what the edit takes of it, summed over tokens. (For a
            latent that is set to a value, of the change.)
        share: That energy as a fraction of all latents' energy: of the sum of the parts, not of what was removed in
            all, which the module tells apart.
        activation: Its largest activation over the tokens that are edited.
        map: The same energy at each patch, float32 [rows, columns]. It sums to `energy` less what was written to the
            tokens before the patches (CLS).
    """

    hook_point: str
    set_name: str
    latent: int
    energy: float
    share: float
    activation: float
    map: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self), "map": self.map.tolist()}


@dataclass(frozen=True)
class Explanation:
    """What the defense did to one picture.

    Attributes:
        plain: The stock CLIP's answer.
        robust: The defended one's.
        removed: The latents that were suppressed, by falling energy.
        heatmap: Squared norm of the difference that all edits made at each patch, summed over the edited blocks,
            float32 [rows, columns].
        fraction: Norm of that difference over the norm of the residual, over all tokens of the edited blocks.
        warnings: What the decoder had to say about the file.
        plain_ms: Time that the image tower took without the defense, in milliseconds.
        robust_ms: The same with it.
        box: The part of the picture that the model saw and the maps cover: left, upper, right and lower edge in
            pixels of the upright picture. Beyond the picture where that was padded.
        controls: What was in force.
    """

    plain: Prediction
    robust: Prediction
    removed: tuple[Removed, ...]
    heatmap: np.ndarray
    fraction: float
    warnings: tuple[str, ...]
    plain_ms: float
    robust_ms: float
    box: Box
    controls: Controls

    @property
    def changed(self) -> bool:
        """Whether the defense changed the answer."""
        return bool(self.plain[0]["label"] != self.robust[0]["label"])

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {
            "plain": self.plain,
            "robust": self.robust,
            "changed": self.changed,
            "removed": [item.to_dict() for item in self.removed],
            "heatmap": self.heatmap.tolist(),
            "fraction": self.fraction,
            "warnings": list(self.warnings),
            "plain_ms": self.plain_ms,
            "robust_ms": self.robust_ms,
            "box": list(self.box),
            "controls": self.controls.to_dict(),
        }


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
    from .hosts import VisionHost

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


def account(defense: AttachedDefense) -> tuple[tuple[Removed, ...], np.ndarray, float]:
    """Add up what a recorded pass over one picture removed: by latent, by patch, and over the residual's norm."""
    from .suppress import suppress

    written: list[Removed] = []
    heatmap = np.zeros(defense.grid_size, np.float32)
    lost = held = 0.0
    for block in defense.edited_blocks():
        assert block.seen is not None
        delta = block.seen.float() - suppress(block.seen, block.in_force(), block.n_prefix).float()
        per_token = delta[0].square().sum(-1)
        lost += float(per_token.sum())
        held += float(block.seen.float().square().sum())
        heatmap += per_token[block.n_prefix :].reshape(defense.grid_size).cpu().numpy()
        for part in block.in_force():
            written += _written(block.hook_point, part, block.seen, block.n_prefix, defense.grid_size)
    total = sum(item.energy for item in written)
    ranked = sorted((item for item in written if item.energy > 0), key=lambda item: -item.energy)
    removed = tuple(replace(item, share=item.energy / total) for item in ranked)
    return removed, heatmap, math.sqrt(lost / held) if held else 0.0


def _written(hook_point: str, part: Suppressor, seen: Tensor, n_prefix: int, grid: tuple[int, int]) -> list[Removed]:
    """Return what each latent of one suppressor wrote into a residual [1, pos, d_model]; shares are not known yet."""
    tokens = part.token_slice(n_prefix)
    n_pos, n = seen.shape[1], len(part.latents)
    energies, activations = np.zeros((n_pos, n), np.float32), np.zeros((n_pos, n), np.float32)
    energies[tokens] = part.energy(seen[:, tokens])[0].cpu().numpy()
    activations[tokens] = part.acts(seen[:, tokens])[0].float().cpu().numpy()
    maps = energies[n_prefix:].T.reshape(n, *grid)
    return [
        Removed(hook_point, part.latent_set.name, latent, float(energy), 0.0, float(activation), map)
        for latent, energy, activation, map in zip(
            part.latents.tolist(), energies.sum(0), _largest(activations), maps, strict=True
        )
    ]


def _largest(activations: np.ndarray) -> np.ndarray:
    """Return the value of largest magnitude of each column: a TopK SAE without ReLU has negative activations."""
    rows = np.abs(activations).argmax(0)
    return activations[rows, np.arange(activations.shape[1])]


@dataclass(frozen=True)
class Counterfactual:
    """The latents whose removal, and no other's, is enough to change what stock CLIP says of a picture.

    Attributes:
        plain: The stock CLIP's answer.
        latents: (hook_point, latent) of S, the first found to matter first; empty where no removal changed the answer.
        flipped: The answer with these removed; None where none changed it.
        n_tried: Subsets of S that were tried.
    """

    plain: Prediction
    latents: tuple[Place, ...]
    flipped: Prediction | None
    n_tried: int

    @property
    def found(self) -> bool:
        """Whether there is such a set."""
        return self.flipped is not None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**vars(self), "latents": [list(place) for place in self.latents]}


def counterfactual(clf: RobustClassifier, image: Any, *, controls: Controls | None = None) -> Counterfactual:
    """Find a small set of latents of S whose removal alone changes the stock CLIP's best label.

    Greedy: of the latents that fire, the one whose removal on top of the others takes most from the margin of that
    label over the next is added, until the answer changes. Then those without which it stays changed are put back, the
    last found first, until there is no such latent. So none of the result can be left out; that no other set is smaller
    is certain only where it holds one latent.

    Args:
        clf: With a defense, and labels set.
        image: See `images.decode`.
        controls: What of the defense may be used, and how it edits.

    Raises:
        ConfigError: There is no defense, fewer than two labels, or a latent is steered.
    """
    controls = controls or Controls()
    if controls.steer:
        raise ConfigError("a counterfactual only removes latents; leave `steer` empty")
    search = _Search(clf, image, controls)
    found: list[Place] = []
    rest = search.firing()
    while rest and not search.flips(found):
        best = min(rest, key=lambda place: search.margin([*found, place]))
        if search.margin([*found, best]) >= search.margin(found):
            break
        found.append(best)
        rest.remove(best)
    if not search.flips(found):
        return Counterfactual(search.prediction([]), (), None, search.n_tried)
    while (spare := _spare(search, found)) is not None:
        found.remove(spare)
    return Counterfactual(search.prediction([]), tuple(found), search.prediction(found), search.n_tried)


def _spare(search: _Search, found: list[Place]) -> Place | None:
    """Return the last of some latents without which the answer stays changed, or None."""
    for place in reversed(found):
        if search.flips(each for each in found if each != place):
            return place
    return None


class _Search:
    """Answers for one picture with only some latents of S removed, each computed once."""

    def __init__(self, clf: RobustClassifier, image: Any, controls: Controls) -> None:
        self.clf, self.controls = clf, controls
        self.latents = frozenset(
            (site.hook_point, latent)
            for site, sets in controls.applied_to(_defense_of(clf))
            for latent_set in sets
            for latent in latent_set.latents
        )
        prompts = clf._chosen()
        self.names = prompts.labels
        if len(self.names) < 2:
            raise ConfigError(f"{self.names[0]!r} is the only label, so no other can be the answer; set at least two")
        self.text_embeds = clf._embeds_of(prompts)
        self.pixel_values = clf._prepare(image)[None]
        self._scores: dict[frozenset[Place], np.ndarray] = {}
        self.plain = int(self.scores([]).argmax())

    @property
    def n_tried(self) -> int:
        """How many subsets were tried, the empty one not counted."""
        return len(self._scores) - 1

    def scores(self, removed: Iterable[Place]) -> np.ndarray:
        """Return scores [n_labels] with just these latents removed."""
        key = frozenset(removed)
        if key not in self._scores:
            controls = replace(self.controls, off=self.controls.off | (self.latents - key))
            image_embeds = self.clf._encode_image(self.pixel_values, controls=controls)
            self._scores[key] = self.clf.scores(image_embeds, self.text_embeds)[0]
        return self._scores[key]

    def margin(self, removed: Iterable[Place]) -> float:
        """Return how many nats plain's label is ahead of the best other; below 0 where the answer changed."""
        scores = np.log(self.scores(removed).clip(np.finfo(np.float32).tiny))
        return float(scores[self.plain] - np.delete(scores, self.plain).max())

    def flips(self, removed: Iterable[Place]) -> bool:
        """Return whether the answer is another than plain's."""
        return int(self.scores(removed).argmax()) != self.plain

    def prediction(self, removed: Iterable[Place]) -> Prediction:
        """Return the answer as a classifier gives it."""
        scores = self.scores(removed)
        return [{"label": self.names[i], "score": float(scores[i])} for i in np.argsort(-scores, kind="stable")]

    def firing(self) -> list[Place]:
        """Return the latents of S that act on the picture, with nothing removed or with all of them."""
        places: dict[Place, None] = {}
        for strength in (0.0, self.controls.strength):
            controls = replace(self.controls, strength=strength)
            with self.clf._lock, in_force(self.clf, controls) as defense, defense.recording():
                self.clf._encode_image(self.pixel_values)
                for block in defense.edited_blocks():
                    assert block.seen is not None
                    for part in block.in_force():
                        tokens = part.token_slice(block.n_prefix)
                        acts = part.acts(block.seen[:, tokens])[0]
                        fires = (acts != 0).any(0) | (part.values is not None)
                        places |= dict.fromkeys((block.hook_point, latent) for latent in part.latents[fires].tolist())
        return list(places)
