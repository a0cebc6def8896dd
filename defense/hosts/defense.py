"""A defense in memory: which CLIP it belongs to, which blocks it edits, and how. Needs numpy alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from defense.core.config import SAEConfig, fingerprint
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError


@dataclass(frozen=True)
class ClipId:
    """The CLIP that a defense was fitted on.

    Attributes:
        model: What `load_clip` takes, e.g. "ViT-B-32", "hf-hub:...", "transformers:..." or "photo".
        pretrained: open_clip's tag; None where the name says it all.
        sha256: Fingerprint of the vision tower's weights (`VisionTower.fingerprint`).
        quick_gelu: Whether its MLPs use QuickGELU.
        d_model: Width of its residual stream.
        n_layers: Number of its blocks.
        stream_sha256: Fingerprint of the weights that make its residual stream alone, by which a tower is known that
            is held without its projection; None for a defense of before there was one.
    """

    model: str
    pretrained: str | None
    sha256: str
    quick_gelu: bool
    d_model: int
    n_layers: int
    stream_sha256: str | None = None

    @property
    def name(self) -> str:
        """What it was loaded by, in one line."""
        return self.model if self.pretrained is None else f"{self.model}, {self.pretrained}"


@dataclass(frozen=True)
class Part:
    """Which part of an SAE a slim site holds; see `hosts.slim`.

    Attributes:
        latents: Those that it holds, in rising order: the columns and rows of its tensors.
        hashes: `Site.hashes` of the whole SAE.
        elsewhere: Threshold of all other latents, where the rule has thresholds.
    """

    latents: tuple[int, ...]
    hashes: tuple[str, str]
    elsewhere: float | None = None


@dataclass(frozen=True)
class Site:
    """One block that is edited.

    Attributes:
        hook_point: "blocks.{L}.hook_resid_post".
        sae_config: What the SAE's numbers mean. Of a slim site too, `d_sae` counts all latents of the SAE.
        parameters: The SAE's tensors; of a slim site those of the latents that it holds.
        sets: What is edited there.
        part: What a slim site holds; None where it holds the whole SAE.
    """

    hook_point: str
    sae_config: SAEConfig
    parameters: Mapping[str, np.ndarray]
    sets: tuple[LatentSet, ...]
    part: Part | None = None

    @property
    def hashes(self) -> tuple[str, str]:
        """sha256 of the whole SAE's tensors, and of all but its thresholds, which calibrating changes."""
        if self.part is not None:
            return self.part.hashes
        without = {name: tensor for name, tensor in self.parameters.items() if name != "threshold"}
        return fingerprint(self.parameters), fingerprint(without)


@dataclass(frozen=True)
class Golden:
    """What the CLIP must answer: three pictures and their normalized embeddings.

    Attributes:
        pictures: uint8 [3, height, width, 3].
        plain: Embeddings without the defense, float32 [3, d_embed].
        defended: Embeddings with it, float32 [3, d_embed].
    """

    pictures: np.ndarray
    plain: np.ndarray
    defended: np.ndarray


@dataclass(frozen=True)
class Defense:
    """Everything that turns a stock CLIP into a defended one.

    Attributes:
        clip: The CLIP it was fitted on.
        preprocess: How that CLIP's pictures are prepared.
        sites: The blocks that are edited.
        golden: Reference answers; None before they were computed.
        license: SPDX identifier, or a sentence.
        provenance: How it was made, and what was measured.
        manifest_sha256: Of the manifest that it was read from, which names it. None for one made in memory: also for
            what `only`, `join` or `dataclasses.replace` make of one that was read.
    """

    clip: ClipId
    preprocess: Preprocess
    sites: tuple[Site, ...]
    golden: Golden | None = None
    license: str = "MIT"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    manifest_sha256: str | None = field(default=None, init=False, compare=False)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of all latent sets, in order of their first appearance."""
        return tuple(dict.fromkeys(latent_set.name for site in self.sites for latent_set in site.sets))

    def only(self, *names: str) -> Defense:
        """Return the defense with just the named sets.

        Raises:
            ConfigError: There is no such set.
        """
        for name in names:
            if name not in self.sets:
                raise ConfigError(f"this defense has no set {name!r}; it has {', '.join(self.sets) or 'none'}")
        kept = [(site, tuple(s for s in site.sets if s.name in names)) for site in self.sites]
        sites = tuple(replace(site, sets=sets) for site, sets in kept if sets)
        return Defense(self.clip, self.preprocess, sites, None, self.license, self.provenance)


def join(defenses: Sequence[Defense]) -> Defense:
    """Return one defense with the sites of several for the same CLIP, without their golden answers and provenance.

    A latent that several of them edit is edited once, as the first does.

    Raises:
        ConfigError: There is none, or they are for different hosts or preparations of pictures, or two have a set of
            the same name.
    """
    if not defenses:
        raise ConfigError("no defenses to join; give at least one")
    first = defenses[0]
    for other in defenses[1:]:
        if (other.clip, other.preprocess) != (first.clip, first.preprocess):
            raise ConfigError(
                f"these defenses are for different hosts: {first.clip.model} and {other.clip.model}, weights "
                f"{first.clip.sha256[:16]} and {other.clip.sha256[:16]}"
            )
    names = [name for defense in defenses for name in defense.sets]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"several of these defenses have a set {repeated[0]!r}, so its name would mean two things")
    sites: list[Site] = []
    for site in (site for defense in defenses for site in defense.sites):
        place = next((i for i, there in enumerate(sites) if _has_same_sae(there, site)), None)
        if place is None:
            sites.append(site)
        else:  # one site, where a latent of several sets is edited once
            sites[place] = _together(sites[place], site)
    license = ", ".join(dict.fromkeys(defense.license for defense in defenses))
    return Defense(first.clip, first.preprocess, tuple(sites), license=license)


def _has_same_sae(a: Site, b: Site) -> bool:
    if (a.hook_point, a.sae_config, a.parameters.keys()) != (b.hook_point, b.sae_config, b.parameters.keys()):
        return False
    if a.part is not None and b.part is not None:
        return a.part.hashes[1] == b.part.hashes[1]
    return a.part is b.part and all(np.array_equal(a.parameters[name], b.parameters[name]) for name in a.parameters)


def _together(a: Site, b: Site) -> Site:
    """Return one site with the sets of two that have the same SAE; where both hold a latent, with the first's."""
    sets = a.sets + b.sets
    if a.part is None or b.part is None:
        return replace(a, sets=sets)
    latents = sorted({*a.part.latents, *b.part.latents})
    both_latents = [*a.part.latents, *b.part.latents]
    columns = [both_latents.index(latent) for latent in latents]

    def merged(name: str) -> np.ndarray:
        axis = {"W_enc": 1, "b_dec": None}.get(name, 0)
        if axis is None:
            return a.parameters[name]
        both = np.concatenate([a.parameters[name], b.parameters[name]], axis)
        return np.ascontiguousarray(both.take(columns, axis))

    parameters = {name: merged(name) for name in a.parameters}
    return replace(a, parameters=parameters, sets=sets, part=replace(a.part, latents=tuple(latents)))
