"""The weights of vision towers of transformers, by the names that open_clip and timm have for them.

So a tower has one fingerprint, whatever library it is held in. A weight that no table names keeps its own name, and the
fingerprint is then equal to no other library's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .timm_vit import TRUNK


@dataclass(frozen=True)
class Names:
    """How one library's names become another's.

    Attributes:
        blocks: How the names of blocks begin, before their number.
        twin_blocks: The same in the twin.
        outside: Names outside of the blocks, up to the first dot that is not in them -> the twin's; None for a weight
            that the twin does without.
        inside: Names within a block.
        attention: The names of queries, keys and values within a block: one matrix in the twin.
        twin_attention: Its name, with {} for "weight" or "bias".
    """

    blocks: str
    twin_blocks: str
    outside: Mapping[str, str | None]
    inside: Mapping[str, str]
    attention: tuple[str, str, str]
    twin_attention: str

    def renamed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return a tower's weights by the twin's names."""
        found: dict[str, Tensor] = {}
        threes: dict[str, dict[str, Tensor]] = {}
        for name, tensor in weights.items():
            if name.startswith(self.blocks):
                number, _, rest = name.removeprefix(self.blocks).partition(".")
                part, _, kind = rest.rpartition(".")
                prefix = f"{self.twin_blocks}{number}."
                if part in self.attention:
                    threes.setdefault(prefix + self.twin_attention.format(kind), {})[part] = tensor
                else:
                    found[prefix + _replaced(rest, self.inside)] = tensor
            elif (twin := self._outside(name)) is not None:
                found[twin] = tensor
        for name, three in threes.items():
            found[name] = torch.cat([three[part] for part in self.attention])
        return found

    def _outside(self, name: str) -> str | None:
        for own, twin in self.outside.items():
            if name == own or name.startswith(f"{own}."):
                return None if twin is None else twin + name.removeprefix(own)
        return name


def _replaced(name: str, names: Mapping[str, str]) -> str:
    for own, twin in names.items():
        if name == own or name.startswith(f"{own}."):
            return twin + name.removeprefix(own)
    return name


CLIP = Names(
    blocks="encoder.layers.",
    twin_blocks="transformer.resblocks.",
    outside={
        "embeddings.class_embedding": "class_embedding",
        "embeddings.patch_embedding": "conv1",
        "embeddings.position_embedding.weight": "positional_embedding",
        "pre_layrnorm": "ln_pre",
        "post_layernorm": "ln_post",
    },
    inside={
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    },
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    twin_attention="attn.in_proj_{}",
)

SIGLIP = Names(
    blocks="encoder.layers.",
    twin_blocks=f"{TRUNK}blocks.",
    outside={
        "embeddings.patch_embedding": f"{TRUNK}patch_embed.proj",
        "embeddings.position_embedding.weight": f"{TRUNK}pos_embed",
        "post_layernorm": f"{TRUNK}norm",
        "head.probe": f"{TRUNK}attn_pool.latent",
        "head.attention.out_proj": f"{TRUNK}attn_pool.proj",
        "head.layernorm": f"{TRUNK}attn_pool.norm",
        "head.mlp": f"{TRUNK}attn_pool.mlp",
    },
    inside={"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"},
    attention=("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    twin_attention="attn.qkv.{}",
)

DINOV2 = Names(
    blocks="encoder.layer.",
    twin_blocks=f"{TRUNK}blocks.",
    outside={
        "embeddings.cls_token": f"{TRUNK}cls_token",
        "embeddings.mask_token": None,  # for pretraining alone
        "embeddings.patch_embeddings.projection": f"{TRUNK}patch_embed.proj",
        "embeddings.position_embeddings": f"{TRUNK}pos_embed",
        "layernorm": f"{TRUNK}norm",
    },
    inside={
        "attention.o_proj": "attn.proj",
        "layer_scale1.lambda1": "ls1.gamma",
        "layer_scale2.lambda1": "ls2.gamma",
    },
    attention=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    twin_attention="attn.qkv.{}",
)


_DINOV2_BEFORE = {
    ".attention.attention.query.": ".attention.q_proj.",
    ".attention.attention.key.": ".attention.k_proj.",
    ".attention.attention.value.": ".attention.v_proj.",
    ".attention.output.dense.": ".attention.o_proj.",
}
"""Names in earlier releases of transformers (5.10 has them) -> in later ones (5.24)."""


def dinov2_weights(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights of DINOv2 by the names that timm's have in open_clip.

    Args:
        weights: The tower's state dict.
    """
    found = {}
    for name, tensor in weights.items():
        now = name
        for before, since in _DINOV2_BEFORE.items():
            now = now.replace(before, since)
        found[now] = tensor
    return DINOV2.renamed(found)


def clip_weights(weights: Mapping[str, Tensor], projection: Tensor | None) -> dict[str, Tensor]:
    """Return the weights of CLIP's vision tower by open_clip's names.

    Args:
        weights: The tower's state dict.
        projection: Onto the joint space, [d_embed, d_model]; None without one.
    """
    found = CLIP.renamed(weights)
    return found if projection is None else {**found, "proj": projection.T}


def siglip_weights(weights: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """Return the weights of SigLIP's vision tower by the names of timm's in open_clip.

    Args:
        weights: The tower's state dict; that of SigLIP 2 has a matrix for flattened patches.
        patch_size: Pixels along each side of a patch.
    """
    found = SIGLIP.renamed(weights)
    patches = f"{TRUNK}patch_embed.proj.weight"
    if (flat := found[patches]).ndim == 2:  # [d_model, height * width * channel]
        found[patches] = flat.unflatten(1, (patch_size, patch_size, 3)).permute(0, 3, 1, 2)
    for kind in ("weight", "bias"):
        three = found.pop(f"head.attention.in_proj_{kind}", None)
        if three is not None:
            d_model = len(three) // 3
            found[f"{TRUNK}attn_pool.q.{kind}"] = three[:d_model]
            found[f"{TRUNK}attn_pool.kv.{kind}"] = three[d_model:]
    return found
