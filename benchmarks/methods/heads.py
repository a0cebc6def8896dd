"""What single attention heads write to the CLS token, read and replaced. For the native ViTs of open_clip.

The attention of a block adds to the CLS token, with p the softmax of CLS's queries over all tokens,

    attn(x)[cls]  =  b_O  +  sum over heads h of  write_h,     write_h = (sum over tokens t of p[h, t] v[h, t]) W_O[h]

torch computes that in one fused call, which shows no head, so the CLS row alone is computed anew beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense.benchmarks.methods.base import NotApplicableError
from defense.hosts.families import tower_of
from defense.hosts.tower import VisionTower

Head = tuple[int, int]
"""Block and head, both from 0."""


def vision_with_heads(model: nn.Module, who: str) -> VisionTower:
    """Return the vision tower of a model.

    Raises:
        NotApplicableError: `who` cannot work with it: it is no native ViT of open_clip, it has another attention, or
            its embedding is not read from the CLS token alone.
    """
    tower = tower_of(model)
    attention = getattr(tower.blocks[0], "attn", None)
    if not isinstance(attention, nn.MultiheadAttention):
        raise NotApplicableError(
            f"{who} reads the heads of torch's MultiheadAttention, as in open_clip's own ViTs; this tower has "
            f"{type(attention).__name__}. Use a native one, e.g. ViT-B-32"
        )
    if not tower.pools_cls:
        raise NotApplicableError(
            f"{who} edits what heads write to the CLS token, and this tower's embedding is not read from that token"
        )
    return tower


def attention_of(tower: VisionTower, block: int) -> Any:
    """Return the attention of a block."""
    return tower.blocks[block].attn


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


def cls_attention(attention: nn.MultiheadAttention, x: Tensor, heads: Sequence[int] | None = None) -> ClsAttention:
    """Return what some heads of a block (all by default) do for the CLS token.

    Args:
        attention: Of the block.
        x: Its input, after ln_1, [batch, pos, d_model].
        heads: Which.
    """
    n_heads, d_head, d_model = attention.num_heads, attention.head_dim, attention.embed_dim
    chosen = torch.tensor(range(n_heads) if heads is None else heads, device=x.device)
    W = attention.in_proj_weight.view(3, n_heads, d_head, d_model)[:, chosen]
    b = attention.in_proj_bias.view(3, n_heads, d_head)[:, chosen]
    query = torch.einsum("bd,hed->bhe", x[:, 0], W[0]) + b[0]
    key = torch.einsum("bpd,hed->bhpe", x, W[1]) + b[1][:, None]
    value = torch.einsum("bpd,hed->bhpe", x, W[2]) + b[2][:, None]
    pattern = (torch.einsum("bhe,bhpe->bhp", query, key) * d_head**-0.5).softmax(-1)
    mixed = torch.einsum("bhp,bhpe->bhe", pattern, value)
    W_O = attention.out_proj.weight.view(d_model, n_heads, d_head)[:, chosen]
    return ClsAttention(pattern, torch.einsum("bhe,dhe->bhd", mixed, W_O))


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

    def hook_for(block: int) -> Callable[..., tuple[Tensor, None] | None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, None]) -> Any:
            x, written = tower.to_batch_first(inputs[0]), tower.to_batch_first(output[0])
            replaced = see(block, x, written[:, 0])
            if replaced is None:
                return None
            written = torch.cat([replaced[:, None], written[:, 1:]], dim=1)
            return tower.to_batch_first(written), output[1]

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
