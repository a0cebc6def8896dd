# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""`encode_topk`: the k largest latents of every token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .shared import pre_acts

_CHUNK_ELEMENTS = 2**26
"""Pre-activations that `encode_topk` holds at once (128 MiB in half precision)."""
MAX_SELECT = 2**14
"""Values among which one program of `_select_kernel` selects."""


@triton.jit(do_not_specialize=["n_tokens"])
def _encode_kernel(
    z_ptr, W_ptr, b_ptr, pre_acts_ptr, maxima_ptr, n_tokens, stride_z_row, stride_z_d,
    D_MODEL: tl.constexpr, D_SAE: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """relu(z @ W_enc + b), and its maximum over each GROUP of neighboring latents."""
    token_tiles = tl.cdiv(n_tokens, BLOCK_M)
    offs_m = tl.program_id(0) % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    latent_tile = tl.program_id(0) // token_tiles
    offs_n = latent_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_m = offs_m < n_tokens
    row = tl.minimum(offs_m, n_tokens - 1).to(tl.int64)
    unused = tl.zeros([BLOCK_M], tl.float32)
    h = pre_acts(
        z_ptr + row * stride_z_row, stride_z_d, unused, unused, W_ptr, D_SAE, b_ptr, offs_n, D_SAE,
        D_MODEL, "none", BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # `_select_kernel` compares bits: never -0.0, and NaN, which ranks first as in torch, without its sign.
    h = tl.where(h > 0, h, tl.where(h == h, 0.0, float("nan")))
    h = tl.where((offs_n < D_SAE)[None, :], h, 0.0)
    mask = mask_m[:, None] & (offs_n < D_SAE)[None, :]
    tl.store(pre_acts_ptr + row[:, None] * D_SAE + offs_n[None, :], h, mask=mask)
    n_groups: tl.constexpr = (D_SAE + GROUP - 1) // GROUP
    offs_g = latent_tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    bits = tl.reshape(h.to(tl.int32, bitcast=True), [BLOCK_M, BLOCK_N // GROUP, GROUP])
    maxima = tl.max(bits, 2).to(tl.float32, bitcast=True)  # as floats, NaN would get lost
    mask = mask_m[:, None] & (offs_g < n_groups)[None, :]
    tl.store(maxima_ptr + row[:, None] * n_groups + offs_g[None, :], maxima, mask=mask)


@triton.jit(do_not_specialize=["k", "n_picked"])
def _select_kernel(
    values_ptr, groups_ptr, kept_ptr, columns_ptr, k, n_picked, N_COLUMNS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write the k largest of a row's values, none of them negative, and their columns, in no particular order.

    Looks at the n_picked groups of GROUP columns that are listed for the row, or at all columns where no list is given.
    """
    row = tl.program_id(0).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    if groups_ptr is None:
        column = offs
        mask = offs < N_COLUMNS
    else:
        listed = offs < n_picked * GROUP
        group = tl.load(groups_ptr + row * n_picked + offs // GROUP, mask=listed, other=0)
        column = group * GROUP + offs % GROUP
        mask = listed & (column < N_COLUMNS)
    value = tl.load(values_ptr + row * N_COLUMNS + column, mask=mask, other=0.0)

    # Of floating-point numbers that are not negative, the larger has the larger bits. The k-th largest, bit by bit:
    n_bits: tl.constexpr = value.dtype.primitive_bitwidth
    integer: tl.constexpr = tl.int16 if n_bits == 16 else tl.int32
    bits = value.to(integer, bitcast=True).to(tl.int32)
    bits = tl.where(mask, bits, -1)
    kth = 0
    for step in range(n_bits - 1):
        raised = kth | (1 << (n_bits - 2 - step))
        kth = tl.where(tl.sum((bits >= raised).to(tl.int32), 0) >= k, raised, kth)
    larger = bits > kth
    ties = bits == kth
    n_ties = k - tl.sum(larger.to(tl.int32), 0)
    kept = larger | (ties & (tl.cumsum(ties.to(tl.int32), 0) <= n_ties))
    slot = row * k + tl.cumsum(kept.to(tl.int32), 0) - 1
    if kept_ptr is not None:
        tl.store(kept_ptr + slot, value, mask=kept)
    tl.store(columns_ptr + slot, column, mask=kept)


def group_size(d_sae: int, k: int) -> int:
    """Return how many latents `encode_topk` puts in a group: about sqrt(d_sae / k), which balances the two selections.

    The first selects among d_sae / group maxima, the second among k * group latents.
    """
    group = 1
    while group * group * k < d_sae and group < 64:
        group *= 2
    return group


def n_selected_among(d_sae: int, k: int) -> int:
    """Return among how many values `encode_topk` selects at most, at once."""
    group = group_size(d_sae, k)
    n_groups: int = triton.cdiv(d_sae, group)
    return max(n_groups, min(k, n_groups) * group)


def _select(values: Tensor, groups: Tensor | None, kept: Tensor | None, columns: Tensor, group: int) -> None:
    n_columns, n_picked = values.shape[1], 0 if groups is None else groups.shape[1]
    block = triton.next_power_of_2(n_columns if groups is None else n_picked * group)
    launching.launch(
        _select_kernel, (len(values),), values, groups, kept, columns, columns.shape[1], n_picked,
        N_COLUMNS=n_columns, GROUP=group, BLOCK=block, num_warps=min(max(block // 512, 4), 16),
    )  # fmt: skip


@torch.library.custom_op("clip_defense::encode_topk", mutates_args=())
def encode_topk(z: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest latents of each token after ReLU, in no particular order: acts and indices, [tokens, k].

    Args:
        z: Normalized residual, [tokens, d_model], of any strides.
        W_enc: [d_model, d_sae].
        b: Folded bias, [d_sae].
        k: Latents per token.
    """
    n_tokens, (d_model, d_sae) = len(z), W_enc.shape
    acts = torch.empty(n_tokens, k, dtype=W_enc.dtype, device=z.device)
    indices = torch.empty(n_tokens, k, dtype=torch.int64, device=z.device)
    tile, group = launching.stream_tile(z.device, W_enc.dtype), group_size(d_sae, k)
    n_groups: int = triton.cdiv(d_sae, group)
    n_chunk = max(1, min(n_tokens, _CHUNK_ELEMENTS // d_sae))
    pre_acts = torch.empty(n_chunk, d_sae, dtype=W_enc.dtype, device=z.device)
    maxima = torch.empty(n_chunk, n_groups, dtype=W_enc.dtype, device=z.device)
    picked = torch.empty(n_chunk, min(k, n_groups), dtype=torch.int32, device=z.device)
    with torch.cuda.device_of(z):
        for start in range(0, n_tokens, n_chunk):
            chunk = z[start : start + n_chunk]
            n = len(chunk)
            launching.launch(
                _encode_kernel, (triton.cdiv(n, tile.m) * triton.cdiv(d_sae, tile.n),),
                chunk, W_enc, b, pre_acts, maxima, n, *chunk.stride(), D_MODEL=d_model, D_SAE=d_sae, GROUP=group,
                BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            _select(maxima[:n], None, None, picked[:n], 1)
            _select(pre_acts[:n], picked[:n], acts[start : start + n], indices[start : start + n], group)
    return acts, indices


@encode_topk.register_fake
def _(z: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return W_enc.new_empty(len(z), k), W_enc.new_empty(len(z), k, dtype=torch.int64)
