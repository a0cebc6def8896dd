"""What single attention heads write to the CLS token, read and replaced. For ViTs of open_clip's own and of timm.

The attention of a block adds to the CLS token, with p the softmax of CLS's queries over all tokens,

    attn(x)[cls]  =  b_O  +  sum over heads h of  write_h,     write_h = (sum over tokens t of p[h, t] v[h, t]) W_O[h]

torch computes that in one fused call, which shows no head, so the CLS row alone is computed anew beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defense.benchmarks.methods.base import NotApplicableError
from defense.hosts.families import tower_of
from defense.hosts.tower import VisionTower

_AT_ONCE = 100
"""Pictures whose tokens are attended to in one go."""

Head = tuple[int, int]
"""Block and head, both from 0."""


def vision_with_heads(model: nn.Module, who: str) -> VisionTower:
    """Return the vision tower of a model.

    Raises:
        NotApplicableError: `who` cannot work with it: it has another attention than ViTs of open_clip's own and of
            timm, or its embedding is not read from the CLS token alone.
    """
    tower = tower_of(model)
    attention = getattr(tower.blocks[0], "attn", None)
    if not (isinstance(attention, nn.MultiheadAttention) or _is_plain(attention)):
        raise NotApplicableError(
            f"{who} reads the heads of torch's MultiheadAttention, as in open_clip's own ViTs, and of timm's plain "
            f"Attention; this tower has {type(attention).__name__}. Use another one, e.g. ViT-B-32"
        )
    if not tower.pools_cls:
        raise NotApplicableError(
            f"{who} edits what heads write to the CLS token, and this tower's embedding is not read from that token"
        )
    return tower


def _is_plain(attention: Any) -> bool:
    """Whether this is timm's attention without norms or gates inside."""
    inside = (getattr(attention, name, None) for name in ("q_norm", "k_norm", "norm"))
    is_like_timm = all(isinstance(getattr(attention, name, None), nn.Linear) for name in ("qkv", "proj"))
    return is_like_timm and all(isinstance(each, nn.Identity) for each in inside) and attention.gate is None


def embeds_from(tower: VisionTower, resid: Tensor, hook_point: str) -> np.ndarray:
    """Return the embeddings [n, d_embed] that residuals [n, pos, d_model] at a hook point lead to, part by part."""
    parts = [tower.embeds_from(part, hook_point).cpu().numpy() for part in resid.split(_AT_ONCE)]
    return np.concatenate(parts)


@dataclass(frozen=True)
class HeadWeights:
    """The weights of an attention, by head.

    Attributes:
        qkv: Of queries, keys and values, [3, n_heads, d_head, d_model].
        bias: Of these, [3, n_heads, d_head].
        out: Of the output, [d_model, n_heads, d_head].
    """

    qkv: Tensor
    bias: Tensor
    out: Tensor

    @classmethod
    def of(cls, attention: Any) -> HeadWeights:
        """Return the weights of an attention that `vision_with_heads` accepts."""
        if isinstance(attention, nn.MultiheadAttention):
            qkv, bias, out = attention.in_proj_weight, attention.in_proj_bias, attention.out_proj.weight
        else:
            qkv, bias, out = attention.qkv.weight, attention.qkv.bias, attention.proj.weight
        n_heads, d_model = attention.num_heads, qkv.shape[1]
        bias = qkv.new_zeros(len(qkv)) if bias is None else bias
        return cls(
            qkv.view(3, n_heads, -1, d_model), bias.view(3, n_heads, -1), out.view(out.shape[0], n_heads, -1)
        )  # fmt: skip


def attention_of(tower: VisionTower, block: int) -> Any:
    """Return the attention of a block."""
    return tower.blocks[block].attn


def layer_scale_of(tower: VisionTower, block: int) -> Any:
    """Return what scales what the attention of a block writes; the identity in most ViTs."""
    module = tower.blocks[block]
    return module.ls_1 if hasattr(module, "ls_1") else module.ls1


def readout_of(tower: VisionTower) -> tuple[Any, Tensor]:
    """Return the LayerNorm behind the last block and the projection of the CLS token, [d_model, d_embed].

    Raises:
        NotApplicableError: The embedding is more than a projection of that norm.
    """
    visual: Any = tower.visual
    if hasattr(visual, "ln_post"):
        return visual.ln_post, visual.proj
    trunk, projection = getattr(visual, "trunk", None), getattr(getattr(visual, "head", None), "proj", None)
    if not isinstance(projection, nn.Linear) or projection.bias is not None or not isinstance(trunk.norm, nn.LayerNorm):
        raise NotApplicableError(f"the embedding of {type(visual).__name__} is no projection of a LayerNorm")
    return trunk.norm, projection.weight.T


def all_heads(tower: VisionTower, first_block: int = 0) -> list[Head]:
    """Return all heads from a block on."""
    blocks = range(first_block, len(tower.blocks))
    return [(block, head) for block in blocks for head in range(attention_of(tower, block).num_heads)]


@dataclass(frozen=True)
class ClsAttention:
    """One block's attention from CLS, n_heads of them.

    Attributes:
        pattern: Share of each token, [batch, n_heads, pos].
        writes: What each head adds to the CLS token before LayerScale, [batch, n_heads, d_model].
    """

    pattern: Tensor
    writes: Tensor


def cls_attention(attention: Any, x: Tensor, heads: Sequence[int] | None = None) -> ClsAttention:
    """Return what some heads of a block (all by default) do for the CLS token.

    Args:
        attention: Of the block.
        x: Its input, after the norm in front of it, [batch, pos, d_model].
        heads: Which.
    """
    weights = HeadWeights.of(attention)
    chosen = torch.tensor(range(attention.num_heads) if heads is None else heads, device=x.device)
    W, b = weights.qkv[:, chosen], weights.bias[:, chosen]
    query = torch.einsum("bd,hed->bhe", x[:, 0], W[0]) + b[0]
    key = torch.einsum("bpd,hed->bhpe", x, W[1]) + b[1][:, None]
    value = torch.einsum("bpd,hed->bhpe", x, W[2]) + b[2][:, None]
    pattern = (torch.einsum("bhe,bhpe->bhp", query, key) * query.shape[-1] ** -0.5).softmax(-1)
    mixed = torch.einsum("bhp,bhpe->bhe", pattern, value)
    return ClsAttention(pattern, torch.einsum("bhe,dhe->bhd", mixed, weights.out[:, chosen]))


@contextmanager
def watching(
    tower: VisionTower, blocks: Iterable[int], see: Callable[[int, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """Call a function with the attention of some blocks; what it returns replaces the output for the CLS token.

    Args:
        tower: The tower.
        blocks: Which.
        see: From a block, its attention's input [batch, pos, d_model] and its output for CLS [batch, d_model] to None,
            or to what takes that output's place.
    """

    def hook_for(block: int) -> Callable[..., Any]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: Any) -> Any:
            first, *rest = output if isinstance(output, tuple) else (output,)  # torch's gives the pattern, too, or None
            x, written = tower.to_batch_first(inputs[0]), tower.to_batch_first(first)
            replaced = see(block, x, written[:, 0])
            if replaced is None:
                return None
            written = torch.cat([replaced[:, None], written[:, 1:]], dim=1)
            written = tower.to_batch_first(written)
            return (written, *rest) if isinstance(output, tuple) else written

        return hook

    with ExitStack() as hooks:
        for block in blocks:
            handle = attention_of(tower, block).register_forward_hook(hook_for(block))
            hooks.callback(handle.remove)
        yield


@contextmanager
def ablated(tower: VisionTower, heads: Sequence[Head]) -> Iterator[None]:
    """Let some heads write nothing to the CLS token; what they write to other tokens stays."""
    by_block: dict[int, list[int]] = {}
    for block, head in heads:
        by_block.setdefault(block, []).append(head)

    def silence(block: int, x: Tensor, written: Tensor) -> Tensor:
        return written - cls_attention(attention_of(tower, block), x, by_block[block]).writes.sum(1)

    with watching(tower, by_block, silence):
        yield
