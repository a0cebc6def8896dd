"""Models of transformers: CLIP, SigLIP, SigLIP 2 and DINOv2, whole or their vision tower alone, also in a LLaVA.

A tower is known by the name of its class, so that nothing here imports transformers. What a language model reads of its
tower is in the configuration of the whole: a block's output, mostly without the CLS token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor, nn

from defense.core.latents import Scope
from defense.errors import HookPointError

from . import open_clip_native, timm_vit
from .text import TextTower
from .tower import VisionTower
from .transformers_weights import clip_weights, dinov2_weights, siglip_weights

_CLIP = {"CLIPVisionModel"}
_SIGLIP = {"SiglipVisionModel", "Siglip2VisionModel"}
_DINOV2 = {"Dinov2Model"}
_WHOLE = {"CLIPModel", "CLIPVisionModelWithProjection", "SiglipModel", "Siglip2Model"}
"""Classes that have nothing behind their vision tower but a projection."""


def find(model: nn.Module) -> VisionTower | None:
    """Return the vision tower of a model of this family, else None.

    Raises:
        HookPointError: The model reads its tower before the first block.
    """
    if _is_one_of(model, _CLIP | _SIGLIP | _DINOV2):
        return _tower(model, None, "all", None)
    if _is_one_of(model, _WHOLE):
        return _tower(_part(model, "vision_model"), getattr(model, "visual_projection", None), "cls", None)
    inner: Any = getattr(model, "model", model)
    vision = getattr(inner, "vision_tower", None)
    if _is_one_of(vision, _CLIP | _SIGLIP | _DINOV2):
        return _read_by_a_language_model(_part(inner, "vision_tower"), model)
    return None


def find_text(model: nn.Module) -> TextTower | None:
    """Return the text tower of a CLIP of this family, else None."""
    if not (_is_one_of(model, _WHOLE) and hasattr(model, "text_model")):
        return None
    return TextTower(partial(_encode_text, model), _part(model, "text_model").embeddings.token_embedding)


def _encode_text(model: Any, input_ids: Tensor) -> Tensor:
    pooled: Tensor = model.text_model(input_ids=input_ids, return_dict=True).pooler_output
    projection = getattr(model, "text_projection", None)  # SigLIP's is in its text model
    return pooled if projection is None else projection(pooled)


def _is_one_of(module: Any, names: set[str]) -> bool:
    """Return whether a module is of one of these classes of transformers, or of a class derived from one."""
    return any(
        kind.__name__ in names and kind.__module__.split(".")[0] == "transformers" for kind in type(module).__mro__
    )


def _part(module: nn.Module, name: str) -> Any:
    return getattr(module, name)


def _read_by_a_language_model(vision: Any, model: Any) -> VisionTower:
    """Return the tower inside a model that hands its tokens to a language model."""
    config = model.config
    # A tower with n blocks gives n + 1 hidden states: state i is what block i - 1 gives.
    n_states = _n_blocks(vision) + 1
    layers = getattr(config, "vision_feature_layer", getattr(config, "vision_feature_layers", -1))
    states = [layer % n_states for layer in ([layers] if isinstance(layers, int) else layers)]
    n_read = max(states)
    if n_read == 0:
        raise HookPointError(f"{type(model).__name__} reads its vision tower before the first block; nothing to edit")
    drops_cls = getattr(config, "vision_feature_select_strategy", "full") == "default" and not _is_one_of(
        vision, _SIGLIP
    )
    return _tower(vision, None, "patch" if drops_cls else "all", n_read)


def _n_blocks(vision: Any) -> int:
    n_blocks: int = vision.config.num_hidden_layers
    return n_blocks


def _tower(vision: Any, projection: nn.Module | None, reads: Scope, n_read: int | None) -> VisionTower:
    """Return a tower of transformers.

    Args:
        vision: Its module.
        projection: What stands behind it; None without one.
        reads: See `VisionTower`; "cls" means what the tower pools.
        n_read: See `VisionTower`; None where the tower's own pooling is what counts.
    """
    config = vision.config
    is_siglip, is_clip = _is_one_of(vision, _SIGLIP), _is_one_of(vision, _CLIP)
    blocks = vision.encoder.layer if _is_one_of(vision, _DINOV2) else vision.encoder.layers
    n_prefix = 0 if is_siglip else 1
    side = _side(config)
    if is_clip:
        weights: Callable[[], dict[str, Tensor]] = partial(_clip_weights, vision, projection)
    elif is_siglip:
        weights = partial(_siglip_weights, vision)
    else:
        weights = partial(_dinov2_weights, vision)
    encode = partial(_pooled, vision, projection) if n_read is None else partial(_read, vision, n_read, n_prefix, reads)
    return VisionTower(
        parts=(vision,) if projection is None else (vision, projection),
        weights=weights,
        head=open_clip_native.HEAD if is_clip else timm_vit.HEAD,
        is_whole=n_read is None and (getattr(vision, "use_head", False) if is_siglip else projection is not None),
        blocks=blocks,
        encode=encode,
        d_model=config.hidden_size,
        n_prefix=n_prefix,
        has_cls=not is_siglip,
        reads="all" if is_siglip else reads,
        n_read=len(blocks) if n_read is None else n_read,
        batch_first=True,
        quick_gelu=config.hidden_act == "quick_gelu",
        grid_size=(side // config.patch_size,) * 2,
        image_size=(side, side),
    )


def _side(config: Any) -> int:
    """Return height and width of the pictures; SigLIP 2 takes any, and is given those that its table of places fits."""
    n_patches = getattr(config, "num_patches", None)
    side: int = config.image_size if n_patches is None else int(n_patches**0.5) * config.patch_size
    return side


def _clip_weights(vision: nn.Module, projection: Any) -> dict[str, Tensor]:
    return clip_weights(vision.state_dict(), None if projection is None else projection.weight)


def _siglip_weights(vision: Any) -> dict[str, Tensor]:
    return siglip_weights(vision.state_dict(), vision.config.patch_size)


def _dinov2_weights(vision: nn.Module) -> dict[str, Tensor]:
    return dinov2_weights(vision.state_dict())


def _run(vision: Any, pixel_values: Tensor) -> tuple[Tensor, Tensor | None]:
    """Return a tower's last tokens [batch, pos, d_model], and what it pools of them, if it does.

    Args:
        vision: Its module.
        pixel_values: [batch, 3, height, width].
    """
    if not _is_one_of(vision, {"Siglip2VisionModel"}):
        answer = vision(pixel_values=pixel_values, return_dict=True)
        return answer.last_hidden_state, answer.pooler_output
    # SigLIP 2 takes patches of pictures of many shapes, and stretches its table of places to each. Here they have the
    # table's own shape, so none is stretched and none is padded.
    size = vision.config.patch_size
    patches = pixel_values.unflatten(3, (-1, size)).unflatten(2, (-1, size))  # [batch, 3, row, y, column, x]
    patches = patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)  # [batch, n_patches, y * x * 3]
    embeddings = vision.embeddings
    resid = embeddings.patch_embedding(patches) + embeddings.position_embedding.weight
    tokens = vision.post_layernorm(vision.encoder(inputs_embeds=resid).last_hidden_state)
    return tokens, vision.head(tokens) if vision.use_head else None


def _pooled(vision: Any, projection: Any, pixel_values: Tensor) -> Tensor:
    """Return what the tower pools, projected; the mean of its tokens where it does not pool."""
    tokens, pooled = _run(vision, pixel_values)
    embeds = tokens.mean(1) if pooled is None else pooled
    return embeds if projection is None else projection(embeds)


def _read(vision: Any, n_read: int, n_prefix: int, reads: Scope, pixel_values: Tensor) -> Tensor:
    """Return the mean of the tokens that a language model is given, of the last block that it reads.

    Taken behind the block itself, where what is attached to it has been at work: hidden states are recorded by number,
    which blocks that are passed over would shift.
    """
    kept: list[Tensor] = []
    blocks = vision.encoder.layer if _is_one_of(vision, _DINOV2) else vision.encoder.layers
    handle = blocks[n_read - 1].register_forward_hook(lambda _block, _inputs, output: kept.append(output))
    try:
        _run(vision, pixel_values)
    finally:
        handle.remove()
    return kept[0][:, n_prefix if reads == "patch" else 0 :].mean(1)
