"""Which world this is: a digest of the files that decide what a scene looks like."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from importlib.metadata import version
from pathlib import Path


@cache
def world_sha256() -> str:
    """Return a digest of the files of the world, and of the versions of Pillow and NumPy that draw it."""
    root = Path(str(resources.files(__package__)))
    digest = hashlib.sha256(f"pillow {version('pillow')} numpy {version('numpy')}".encode())
    for path in (root / "scenes.py", root / "draws.py", root / "atlas.webp", *sorted((root / "fonts").iterdir())):
        digest.update(f"{path.name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}".encode())
    return digest.hexdigest()
