"""Which library a model comes from. Only the modules named here know one; everything else asks the `VisionTower`."""

from __future__ import annotations

from typing import Any

from torch import nn

from defense.errors import ConfigError, HookPointError

from . import open_clip_native, open_clip_timm
from .tower import VisionTower

FAMILIES = (open_clip_native, open_clip_timm)
"""Each has `find(model)`, which returns a `VisionTower`, or None where the model is not of that family."""


def tower_of(model: nn.Module) -> VisionTower:
    """Return the vision tower of a CLIP.

    Raises:
        ConfigError: `model` has no vision tower.
        HookPointError: Its vision tower has no transformer blocks (ResNet, ConvNeXt).
    """
    for family in FAMILIES:
        tower: VisionTower | None = family.find(model)
        if tower is not None:
            return tower
    visual: Any = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        raise ConfigError(f"{type(model).__name__} has no vision tower; pass a model of open_clip.create_model")
    raise HookPointError(
        f"the vision tower {type(getattr(visual, 'trunk', visual)).__name__} has no transformer blocks to edit; "
        "use a ViT, e.g. 'ViT-B-32'"
    )
