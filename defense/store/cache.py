"""Where things are kept that could be made or fetched again."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "CLIP_DEFENSE_CACHE"
"""Environment variable that names the folder."""


def cache_folder() -> Path:
    """Return the user's cache of this package, which need not be there yet.

    $CLIP_DEFENSE_CACHE, else "clip-defense" in $XDG_CACHE_HOME, else in ~/.cache.
    """
    if named := os.environ.get(VARIABLE):
        return Path(named)
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "clip-defense"
