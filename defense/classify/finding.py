"""Which CLIP and which defense a name stands for: that of a defense, or that of a CLIP with a defense that is ready."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from defense.errors import CheckpointError, ConfigError, NotThereError
from defense.hosts import shipped
from defense.hosts.clip import Clip, load_clip
from defense.hosts.defense import ClipId, Defense
from defense.hosts.golden import check_golden
from defense.hosts.naming import load_clip_of, names_clip
from defense.store import registry
from defense.store.defenses import find_defense
from defense.store.hub import Hub, hub_source
from defense.store.ready import cached_defense, keep, listed_defense

if TYPE_CHECKING:
    import torch


def clip_and_defense(
    source: str | os.PathLike[str],
    model: str | None,
    pretrained: str | None,
    *,
    device: str | int | torch.device,
    revision: str | None,
    hub: Hub,
) -> tuple[Clip, Defense]:
    """Return a CLIP, undefended, and the defense for it; see `RobustClassifier.from_pretrained` for the names.

    Args:
        source: Name of a defense, or of a CLIP.
        model: Name of a CLIP in place of the one that the defense names.
        pretrained: open_clip's tag of the weights of `model`, or of `source` where that names a CLIP.
        device: See `resolve_device`.
        revision: Commit of the defense's repository on the hub.
        hub: How the hub is asked.

    Raises:
        ConfigError, CheckpointError: See `RobustClassifier.from_pretrained`.
    """
    if model is None and _is_clip(source, pretrained):
        if pretrained is None and ":" not in str(source):
            raise NotThereError(
                f"{source} is not there: neither a folder nor a defense has that name. If the CLIP is meant, say with "
                "which weights: pretrained=, on the command line --pretrained"
            )
        clip = load_clip(str(source), pretrained, device=device)
        return clip, _ready(clip, clip.id_as(str(source), pretrained), hub)
    check_named(model, pretrained)
    shipped.check_own_model(source, model, pretrained)
    defense = find_defense(
        source,
        revision=revision,
        cache_dir=hub.cache_dir,
        local_files_only=hub.local_files_only,
        token=hub.token,
    )
    if model is None:
        return load_clip_of(defense.clip, device=device), defense
    return load_clip(model, pretrained, device=device), defense


def check_named(model: str | None, pretrained: str | None) -> None:
    """Raise `ConfigError` where weights are given and no model that they are of."""
    if model is None and pretrained is not None:
        raise ConfigError(
            f"pretrained={pretrained!r} says which weights a model has, and there is no model=; give both, e.g. "
            "model='ViT-B-32', or neither for the CLIP that the defense names"
        )


def _is_clip(source: str | os.PathLike[str], pretrained: str | None) -> bool:
    """Return whether a source is the name of a CLIP: of a folder of that name, only where weights are named."""
    name = str(source)
    if shipped.find(source) is not None:
        return False
    if pretrained is None and (Path(name).exists() or hub_source(name) is not None):
        return False
    return names_clip(name)


def _ready(clip: Clip, clip_id: ClipId, hub: Hub) -> Defense:
    """Return the defense that is ready for a CLIP; one from the registry is held against its golden answers."""
    defense = cached_defense(clip_id.sha256)
    if defense is not None:
        return defense
    defense = None if hub.local_files_only else listed_defense(clip_id, registry.rows(), hub)
    if defense is None:
        tag = "" if clip_id.pretrained is None else f" --pretrained {clip_id.pretrained}"
        raise CheckpointError(
            f"no defense is ready for {clip_id.name} (vision tower {clip_id.sha256[:16]}...); make one: "
            f"defense protect {clip_id.model}{tag}"
        )
    if defense.golden is not None:
        with clip.defended(defense):
            check_golden(clip, defense.golden)
    keep(defense)
    return defense
