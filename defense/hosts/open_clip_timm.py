"""timm's vision transformers inside an open_clip model: `model.visual.trunk.blocks`. SigLIP, EVA02, PE and others."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from .open_clip_native import encode_image
from .tower import VisionTower


def find(model: nn.Module) -> VisionTower | None:
    """Return the vision tower of a model of this family, else None."""
    visual: Any = getattr(model, "visual", None)
    trunk: Any = getattr(visual, "trunk", None)
    if not (hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens")):
        return None
    has_cls = getattr(trunk, "cls_token", None) is not None
    return VisionTower(
        visual=visual,
        blocks=trunk.blocks,
        encode=partial(encode_image, model),
        d_model=trunk.embed_dim,
        n_prefix=trunk.num_prefix_tokens,
        has_cls=has_cls,
        pools_cls=has_cls and trunk.global_pool == "token",
        batch_first=True,
        quick_gelu=any(type(module).__name__ == "QuickGELU" for module in trunk.blocks[0].modules()),
        grid_size=trunk.patch_embed.grid_size,
        image_size=visual.image_size,
    )
