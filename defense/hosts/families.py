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
_ADVICE = (
    "pass a model of open_clip.create_model (it has OpenAI's weights too: pretrained='openai'), a ViT of timm, or "
    "CLIP, SigLIP, SigLIP 2, DINOv2 or a LLaVA-type model of transformers"
)

TEXT_FAMILIES = (open_clip_native, transformers_vision)
"""Each has `find_text(model)`, which returns a `TextTower`, or None where the model has none of that family."""


def tower_of(model: nn.Module) -> VisionTower:
    """Return the vision tower of a model.

    Raises:
        ConfigError: `model` is no module, has no vision tower that is known here, or one that is laid out otherwise.
        HookPointError: Its vision tower has no transformer blocks (ResNet, ConvNeXt), or none that the rest of the
            model reads.
    """
    check_module(model)
    for family in FAMILIES:
        try:
            tower: VisionTower | None = family.find(model)
        except AttributeError as error:  # as OpenAI's own package, which calls some parts by the same names
            raise ConfigError(
                f"the vision tower of this {type(model).__module__}.{type(model).__name__} is not laid out as "
                f"open_clip's ({error}); {_ADVICE}"
            ) from error
        if tower is not None:
            return tower
    visual: Any = getattr(model, "visual", None)
    if not isinstance(visual, nn.Module):
        inner = "; if it is one in a box, hand over its .module" if hasattr(model, "module") else ""
        raise ConfigError(f"{type(model).__name__} has no vision tower that is known here; {_ADVICE}{inner}")
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


def check_module(model: object) -> None:
    """Raise `ConfigError` where something is no model at all."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model is {model!r:.80} of type {type(model).__name__}; {_ADVICE}")
