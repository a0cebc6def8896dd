"""Which library a model comes from. Only the modules named here know one; everything else asks the towers."""

from __future__ import annotations

from typing import Any

from torch import nn

from defense.errors import ConfigError, HookPointError

from . import open_clip_native, timm_vit, transformers_vision
from .text import TextTower
from .tower import VisionTower

FAMILIES = (open_clip_native, timm_vit, transformers_vision)
"""Each has `find(model)`, which returns a `VisionTower`, or None where the model is not of that family."""

TEXT_FAMILIES = (open_clip_native, transformers_vision)
"""Each has `find_text(model)`, which returns a `TextTower`, or None where the model has none of that family."""


def tower_of(model: nn.Module) -> VisionTower:
    """Return the vision tower of a model.

    Raises:
        ConfigError: `model` has no vision tower that is known here.
        HookPointError: Its vision tower has no transformer blocks (ResNet, ConvNeXt), or none that the rest of the
            model reads.
    """
    for family in FAMILIES:
        tower: VisionTower | None = family.find(model)
        if tower is not None:
            return tower
    visual: Any = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        raise ConfigError(
            f"{type(model).__name__} has no vision tower that is known here; pass a model of open_clip.create_model, a "
            "ViT of timm, or CLIP, SigLIP, SigLIP 2, DINOv2 or a LLaVA-type model of transformers"
        )
    raise HookPointError(
        f"the vision tower {type(getattr(visual, 'trunk', visual)).__name__} has no transformer blocks to edit; "
        "use a ViT, e.g. 'ViT-B-32'"
    )


def text_tower_of(model: nn.Module) -> TextTower:
    """Return the text tower of a model.

    Raises:
        ConfigError: It has none, so that pictures can be embedded, and not classified.
    """
    for family in TEXT_FAMILIES:
        tower: TextTower | None = family.find_text(model)
        if tower is not None:
            return tower
    raise ConfigError(
        f"{type(model).__name__} has no text tower, so there is nothing to compare pictures with; take embeddings "
        "(transform), or a whole CLIP"
    )
