"""open_clip's own vision transformers: `model.visual.transformer.resblocks`."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from .text import TextTower
from .tower import VisionTower

HEAD = ("ln_post.", "attn_pool", "proj")
"""How the names begin of the weights that stand behind the last block."""


def encode_image(model: Any, pixel_values: Tensor) -> Tensor:
    """Return what the model's own `encode_image` gives; looked up at each call, since a caller may replace it."""
    found: Tensor = model.encode_image(pixel_values)
    return found


def find(model: nn.Module) -> VisionTower | None:
    """Return the vision tower of a model of this family, else None."""
    visual: Any = getattr(model, "visual", None)
    transformer: Any = getattr(visual, "transformer", None)
    if not hasattr(transformer, "resblocks"):
        return None
    blocks = transformer.resblocks
    pools_cls = getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "tok"
    return VisionTower(
        parts=(visual,),
        weights=visual.state_dict,
        head=HEAD,
        is_whole=True,
        blocks=blocks,
        encode=partial(encode_image, model),
        d_model=transformer.width,
        n_prefix=1,
        has_cls=True,
        reads="cls" if pools_cls else "all",
        n_read=len(blocks),
        # Read, not inferred from shapes: 50 tokens and a batch of 50 look alike. open_clip 4 has no such switch.
        batch_first=getattr(transformer, "batch_first", True),
        quick_gelu=any(type(module).__name__ == "QuickGELU" for module in blocks[0].modules()),
        grid_size=visual.grid_size,
        image_size=visual.image_size,
        embed=getattr(visual, "conv1", None),
    )


def find_text(model: nn.Module) -> TextTower | None:
    """Return the text tower of any model of open_clip, else None."""
    if not hasattr(model, "encode_text"):
        return None
    return TextTower(partial(_encode_text, model), getattr(model, "token_embedding", None))


def _encode_text(model: Any, input_ids: Tensor) -> Tensor:
    embeds: Tensor = model.encode_text(input_ids)
    return embeds
