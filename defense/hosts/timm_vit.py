"""timm's vision transformers: `visual.trunk` of an open_clip model (SigLIP, EVA02, PE and others), or on their own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from defense.data.preprocess import Preprocess
from defense.errors import ConfigError

from .open_clip_native import encode_image
from .tower import VisionTower

TRUNK = "trunk."
HEAD = (*(f"{TRUNK}{name}" for name in ("norm.", "fc_norm.", "attn_pool.", "head.")), "head.")
"""How the names begin of the weights that stand behind the last block, as open_clip names them."""


def find(model: nn.Module) -> VisionTower | None:
    """Return the vision tower of a model of this family, else None."""
    visual: Any = getattr(model, "visual", None)
    if _is_vit(trunk := getattr(visual, "trunk", None)):
        return _tower(visual, trunk, visual.state_dict, partial(encode_image, model), visual.image_size, is_whole=True)
    if _is_vit(model):
        vit: Any = model
        weights, encode = partial(_trunk_weights, vit), partial(_pooled, vit)
        return _tower(vit, vit, weights, encode, vit.patch_embed.img_size, is_whole=False)
    return None


def preprocess_of(vit: Any) -> Preprocess:
    """Return how the pictures of a model of timm are prepared.

    Raises:
        ConfigError: It does not say how, or crops a border, for which there is no `Preprocess`.
    """
    cfg = getattr(vit, "pretrained_cfg", None) or {}
    share, mode = cfg.get("crop_pct"), {"center": "shortest", "squash": "squash"}.get(cfg.get("crop_mode", ""))
    if share != 1.0 or mode is None:
        raise ConfigError(
            f"{type(vit).__name__} crops a share of {share}, {cfg.get('crop_mode')!r}, of its pictures; a Preprocess "
            "resizes to the very frame: pass preprocess="
        )
    size = tuple(vit.patch_embed.img_size)
    return Preprocess(size, tuple(cfg["mean"]), tuple(cfg["std"]), cfg["interpolation"], mode)


def _is_vit(module: Any) -> bool:
    return hasattr(module, "blocks") and hasattr(module, "num_prefix_tokens")


def _trunk_weights(vit: nn.Module) -> dict[str, Tensor]:
    return {f"{TRUNK}{name}": tensor for name, tensor in vit.state_dict().items()}


def _pooled(vit: Any, pixel_values: Tensor) -> Tensor:
    """Return what a classifier on top would be given."""
    pooled: Tensor = vit.forward_head(vit.forward_features(pixel_values), pre_logits=True)
    return pooled


def _tower(
    visual: nn.Module,
    trunk: Any,
    weights: Callable[[], Mapping[str, Tensor]],
    encode: Callable[[Tensor], Tensor],
    image_size: tuple[int, int],
    *,
    is_whole: bool,
) -> VisionTower:
    has_cls = getattr(trunk, "cls_token", None) is not None
    return VisionTower(
        parts=(visual,),
        weights=weights,
        head=HEAD,
        is_whole=is_whole,
        blocks=trunk.blocks,
        encode=encode,
        d_model=trunk.embed_dim,
        n_prefix=trunk.num_prefix_tokens,
        has_cls=has_cls,
        reads="cls" if has_cls and trunk.global_pool == "token" else "all",
        n_read=len(trunk.blocks),
        batch_first=True,
        quick_gelu=any(type(module).__name__ == "QuickGELU" for module in trunk.blocks[0].modules()),
        grid_size=trunk.patch_embed.grid_size,
        image_size=image_size,
        embed=trunk.patch_embed,
        places_in_blocks=_places_in_blocks(trunk),
    )


def _places_in_blocks(trunk: Any) -> bool:
    """Return whether attention adds what it knows of places: rotary embeddings (EVA02, PE) or a table (BEiT)."""
    names = ("rope", "rel_pos", "rel_pos_bias", "relative_position_bias_table")
    return any(getattr(module, name, None) is not None for module in (trunk, *trunk.blocks.modules()) for name in names)
