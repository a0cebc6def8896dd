"""Defenses that are ready for a CLIP: by the fingerprint of its vision tower, whatever it was loaded by.

<cache>/defenses/<fingerprint>/     what `defense protect` made for that CLIP, or fetched and checked
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from defense.errors import CheckpointError, ConfigError, NonFiniteError
from defense.hosts.defense import ClipId, Defense

from . import defenses, folders
from .cache import cache_folder
from .hub import Hub, HubSource
from .registry import DefenseRow, HostRow, row_of

log = logging.getLogger(__name__)


def cached_defense(sha256: str) -> Defense | None:
    """Return the defense that was made here for a fingerprint; None where there is none, or a damaged one.

    What is damaged is passed over, and that is logged.
    """
    folder = _folder_of(sha256)
    if not folder.is_dir():
        return None
    try:
        defense = defenses.load(folder)
    except (CheckpointError, NonFiniteError) as error:
        log.warning("the defense in the cache cannot be used, so it is passed over: %s", error)
        return None
    return defense


def keep(defense: Defense) -> Path:
    """Write a defense into the cache, in place of another one for the same CLIP, and return its folder."""
    folder = _folder_of(defense.clip.sha256)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        defenses.check_target(folder)
    except ConfigError:  # damaged: nothing but a defense belongs there
        shutil.rmtree(folder)
    return defenses.save(defense, folder)


def listed_defense(clip: ClipId, rows: Sequence[HostRow], hub: Hub) -> Defense | None:
    """Return the defense that a registry has for a CLIP, fetched; None where it has none.

    Raises:
        CheckpointError: It cannot be fetched, is another one than the registry says, or is of another CLIP.
    """
    row = row_of(rows, clip.model, clip.pretrained, clip.sha256)
    if row is None or row.defense is None:
        return None
    defense = _fetched(row.defense, hub)
    if defense.clip.sha256 != clip.sha256:
        raise CheckpointError(
            f"the registry has {row.defense.repo} for {row.name}, but that is a defense of weights "
            f"{defense.clip.sha256[:16]}..., and these are {clip.sha256[:16]}...; correct the registry"
        )
    return defense


def _fetched(row: DefenseRow, hub: Hub) -> Defense:
    if row.repo is None:
        raise CheckpointError("the registry has a defense without a repository; correct it")
    source = HubSource(row.repo, row.file, row.revision)
    folder = hub.fetch_folder(source, defenses.MANIFEST, "a defense")
    got = folders.sha256_of(folder / defenses.MANIFEST)
    if row.sha256 not in (None, got):
        raise CheckpointError(
            f"the manifest of {source} has sha256 {got}, the registry says {row.sha256}: it is another defense than "
            "the one that was checked. Correct the registry, or ask who wrote it"
        )
    return defenses.load(folder)


def _folder_of(sha256: str) -> Path:
    return cache_folder() / "defenses" / sha256
