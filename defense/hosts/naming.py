"""Which names are of a CLIP, and how the one that a defense names is loaded. Importing this loads no torch."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from defense.errors import ConfigError, MissingDependencyError

from .clip import Clip, load_clip
from .defense import ClipId

if TYPE_CHECKING:
    import torch

_SCHEME = re.compile("(hf-hub|local-dir|transformers|timm):.+")


def names_clip(name: str) -> bool:
    """Return whether a name is one of open_clip's, also as papers write it ("ViT-B/32"), or an address of a CLIP.

    Raises:
        MissingDependencyError: torch or open_clip is not installed.
    """
    if _SCHEME.fullmatch(name):
        return True
    try:
        import open_clip

        from .open_clip_names import spelled
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "torch") from error
    return spelled(name) in open_clip.list_models()


def load_clip_of(clip_id: ClipId, *, device: str | int | torch.device = "cpu") -> Clip:
    """Load the CLIP that a defense names, by what it was loaded by when the defense was made.

    Raises:
        MissingDependencyError: See `load_clip`.
        ConfigError: There is none of that name here; the message says which one will do.
    """
    try:
        return load_clip(clip_id.model, clip_id.pretrained, device=device)
    except ConfigError as error:
        raise ConfigError(
            f"this defense was made with a CLIP called {clip_id.name}, which cannot be loaded here. Give model= (and "
            f"pretrained=) of any with the same vision tower (sha256 {clip_id.sha256[:16]}...). {error}"
        ) from error
