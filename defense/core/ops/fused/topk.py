# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""`topk_suppress`: the edit `scale` of a TopK SAE; the package says how."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .shared import inverse_scale, norm_stats, pre_acts, row_ptrs

_ORDER_ELEMENTS = 1024
_SUBTRACT_ROWS, _SUBTRACT_COLUMNS = 8, 256


@triton.jit(do_not_specialize=["n_tokens", "n_pos"])
def _candidates_kernel(
    x_ptr, W_ptr, b_ptr,
    acts_ptr, places_ptr, n_slots_ptr, firing_ptr, n_firing_ptr, shift_ptr, scale_ptr,
    n_tokens, n_pos, stride_x_batch, stride_x_pos, stride_x_d, n_set,
    D_MODEL: tl.constexpr, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """List, at each token, the latents of S with h > 0: (acts, places), n_slots of them. List the tokens with any."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_tokens
    token = tl.minimum(offs_m, n_tokens - 1)
    x_rows = row_ptrs(x_ptr, token, n_pos, stride_x_batch, stride_x_pos)
    shift = tl.zeros([BLOCK_M], tl.float32)
    inverse = shift
    if NORM != "none":
        shift, scale = norm_stats(x_rows, stride_x_d, D_MODEL, NORM, BLOCK_M, BLOCK_K)
        tl.store(shift_ptr + token, shift, mask=mask_m)
        tl.store(scale_ptr + token, scale, mask=mask_m)
        inverse = inverse_scale(scale, NORM)

    n_slots = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n_set, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        h = pre_acts(
            x_rows, stride_x_d, shift, inverse, W_ptr, n_set, b_ptr, offs_n, n_set,
            D_MODEL, NORM, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        fires = (h > 0) & mask_m[:, None]
        slot = n_slots[:, None] + tl.cumsum(fires.to(tl.int32), 1) - 1
        entry = token[:, None].to(tl.int64) * n_set + slot
        tl.store(acts_ptr + entry, h, mask=fires)
        tl.store(places_ptr + entry, tl.broadcast_to(offs_n[None, :], [BLOCK_M, BLOCK_N]), mask=fires)
        n_slots += tl.sum(fires.to(tl.int32), 1)
    tl.store(n_slots_ptr + token, n_slots, mask=mask_m)

    is_firing = (n_slots > 0).to(tl.int32)
    first = tl.atomic_add(n_firing_ptr, tl.sum(is_firing, 0))
    tl.store(firing_ptr + first + tl.cumsum(is_firing, 0) - 1, token, mask=is_firing > 0)


@triton.jit
def _order_kernel(
    acts_ptr, places_ptr, counts_ptr, n_slots_ptr, firing_ptr, n_firing_ptr, n_set,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Put the list of each firing token in rising order of acts, and set its counts to 0. BLOCK_N holds all of S."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < tl.load(n_firing_ptr)
    token = tl.load(firing_ptr + offs_m, mask=mask_m, other=0)
    n_slots = tl.load(n_slots_ptr + token, mask=mask_m, other=0)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n[None, :] < n_slots[:, None]
    first = token.to(tl.int64) * n_set
    entry = first[:, None] + offs_n[None, :]
    acts = tl.load(acts_ptr + entry, mask=mask, other=0.0)
    places = tl.load(places_ptr + entry, mask=mask, other=0)
    rank = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    for slot in range(tl.max(n_slots, 0)):
        act = tl.load(acts_ptr + first + slot, mask=slot < n_slots, other=float("inf"))[:, None]
        is_behind = (acts > act) | ((acts == act) & (offs_n > slot)[None, :])
        rank += is_behind.to(tl.int32)
    tl.debug_barrier()  # every thread has read the lists before any writes over them
    entry = first[:, None] + rank
    tl.store(acts_ptr + entry, acts, mask=mask)
    tl.store(places_ptr + entry, places, mask=mask)
    tl.store(counts_ptr + entry, tl.zeros([BLOCK_M, BLOCK_N], tl.int32), mask=mask)


@triton.jit(do_not_specialize=["n_pos"])
def _count_kernel(
    x_ptr, W_ptr, b_ptr, latents_ptr,
    acts_ptr, places_ptr, counts_ptr, n_slots_ptr, firing_ptr, n_firing_ptr, shift_ptr, scale_ptr,
    n_pos, stride_x_batch, stride_x_pos, stride_x_d, n_set,
    D_MODEL: tl.constexpr, D_SAE: tl.constexpr, NORM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to each candidate's count the latents of all d_sae, except itself, that are larger."""
    n_firing = tl.load(n_firing_ptr)
    token_tiles = tl.cdiv(n_firing, BLOCK_M)
    # Token tiles vary fastest: programs that run at the same time read the same columns of the encoder.
    for tile in range(tl.program_id(0), token_tiles * tl.cdiv(D_SAE, BLOCK_N), tl.num_programs(0)):
        offs_m = tile % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile // token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < n_firing
        token = tl.load(firing_ptr + offs_m, mask=mask_m, other=0)
        n_slots = tl.load(n_slots_ptr + token, mask=mask_m, other=0)
        x_rows = row_ptrs(x_ptr, token, n_pos, stride_x_batch, stride_x_pos)
        shift = tl.zeros([BLOCK_M], tl.float32)
        inverse = shift
        if NORM != "none":
            shift = tl.load(shift_ptr + token)
            inverse = inverse_scale(tl.load(scale_ptr + token), NORM)
        h = pre_acts(
            x_rows, stride_x_d, shift, inverse, W_ptr, D_SAE, b_ptr, offs_n, D_SAE,
            D_MODEL, NORM, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        highest = tl.max(h, 1)
        entry = token.to(tl.int64) * n_set
        slot = 0
        act = tl.load(acts_ptr + entry, mask=n_slots > 0, other=float("inf"))
        while tl.max((highest > act).to(tl.int32), 0) > 0:
            next_act = tl.load(acts_ptr + entry + 1, mask=slot + 1 < n_slots, other=float("inf"))
            place = tl.load(places_ptr + entry, mask=slot < n_slots, other=0)
            larger = tl.sum(tl.where(h > act[:, None], 1.0, 0.0), 1)
            own = tl.load(latents_ptr + place) - tile // token_tiles * BLOCK_N
            if tl.max(((own >= 0) & (own < BLOCK_N)).to(tl.int32), 0) > 0:
                is_own = own[:, None] == tl.arange(0, BLOCK_N)[None, :]
                larger -= tl.where(tl.sum(tl.where(is_own, h, 0.0), 1) > act, 1.0, 0.0)
            tl.atomic_add(counts_ptr + entry, larger.to(tl.int32), mask=(slot < n_slots) & (larger > 0), sem="relaxed")
            act = next_act
            entry += 1
            slot += 1


@triton.jit(do_not_specialize=["n_rows", "n_pos", "first", "last", "k"])
def _subtract_kernel(
    edited_ptr, out_ptr, acts_ptr, places_ptr, counts_ptr, n_slots_ptr, scale_ptr, W_dec_ptr, removal_ptr,
    n_rows, n_pos, first, last, n_set, k,
    stride_edited_batch, stride_edited_pos, stride_edited_d, stride_out_batch, stride_out_pos, stride_out_d,
    D_MODEL: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write out = edited - scale * sum over the kept candidates of act * removal * W_dec_S, [BLOCK_M, BLOCK_D]."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D_MODEL
    pos = offs_m % n_pos
    in_scope = (offs_m < n_rows) & (pos >= first) & (pos < last)
    token = offs_m // n_pos * (last - first) + pos - first
    n_slots = tl.load(n_slots_ptr + token, mask=in_scope, other=0)
    delta = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for slot in range(tl.max(n_slots, 0)):
        entry = token.to(tl.int64) * n_set + slot
        is_kept = tl.load(counts_ptr + entry, mask=slot < n_slots, other=k) < k
        act = tl.load(acts_ptr + entry, mask=is_kept, other=0.0)
        place = tl.load(places_ptr + entry, mask=is_kept, other=0)
        removal = tl.load(removal_ptr + place).to(tl.float32)
        rows = W_dec_ptr + place[:, None].to(tl.int64) * D_MODEL + offs_d[None, :]
        W_dec = tl.load(rows, mask=is_kept[:, None] & mask_d[None, :], other=0.0)
        delta += (act * removal)[:, None] * W_dec.to(tl.float32)
    if NORM != "none":
        delta *= tl.load(scale_ptr + token, mask=in_scope, other=0.0)[:, None]
    mask = (offs_m < n_rows)[:, None] & mask_d[None, :]
    edited = row_ptrs(edited_ptr, offs_m, n_pos, stride_edited_batch, stride_edited_pos)
    out = row_ptrs(out_ptr, offs_m, n_pos, stride_out_batch, stride_out_pos)
    x = tl.load(edited[:, None] + offs_d[None, :] * stride_edited_d, mask=mask, other=0.0)
    tl.store(out[:, None] + offs_d[None, :] * stride_out_d, x.to(tl.float32) - delta, mask=mask)


# Longer than functions here are: four launches share their scratch memory, and each takes a dozen arguments.
@torch.library.custom_op("clip_defense::topk_suppress", mutates_args=())
def topk_suppress(
    edited: Tensor,
    resid: Tensor,
    first: int,
    last: int,
    norm: str,
    W_S: Tensor,
    b_S: Tensor,
    W_dec_S: Tensor,
    removal: Tensor,
    W_enc: Tensor,
    b: Tensor,
    latents: Tensor,
    k: int,
) -> Tensor:
    """Return `edited` less what a TopK SAE's latents of S write into positions first to last - 1 of `resid`.

    Args:
        edited: [batch, pos, d_model], of any strides; `resid` itself, or what another set left of it.
        resid: What the SAE reads, [batch, pos, d_model], of any strides.
        first: First position that is edited.
        last: One past the last position that is edited.
        norm: The SAE's input normalization.
        W_S: Columns of W_enc, [d_model, n].
        b_S: Folded bias, [n].
        W_dec_S: Decoder rows, [n, d_model].
        removal: 1 - gain_i, [n].
        W_enc: [d_model, d_sae].
        b: Folded bias, [d_sae].
        latents: Indices of S, int64 [n].
        k: How many latents count at a token.
    """
    out = torch.empty_like(edited)
    batch, n_pos, d_model = resid.shape
    scoped = resid[:, first:last]
    n_tokens, n_set = batch * (last - first), len(latents)

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=resid.device)

    acts, scale, shift = (
        scratch(*shape, dtype=torch.float32) for shape in ((n_tokens, n_set), (n_tokens,), (n_tokens,))
    )
    places, counts = scratch(n_tokens, n_set), scratch(n_tokens, n_set)
    n_slots, firing = scratch(n_tokens), scratch(n_tokens)
    n_firing = torch.zeros(1, dtype=torch.int32, device=resid.device)
    with torch.cuda.device_of(resid):
        tile = launching.SET_FLOAT32 if W_S.dtype == torch.float32 else launching.SET
        launching.launch(
            _candidates_kernel, (triton.cdiv(n_tokens, tile.m),), scoped, W_S, b_S,
            acts, places, n_slots, firing, n_firing, shift, scale,
            n_tokens, last - first, *scoped.stride(), n_set, D_MODEL=d_model, NORM=norm,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        block = triton.next_power_of_2(n_set)
        rows = max(1, _ORDER_ELEMENTS // block)
        launching.launch(
            _order_kernel, (triton.cdiv(n_tokens, rows),), acts, places, counts, n_slots, firing, n_firing, n_set,
            BLOCK_M=rows, BLOCK_N=block, num_warps=4,
        )  # fmt: skip
        tile = launching.stream_tile(resid.device, W_enc.dtype)
        launching.launch(
            _count_kernel, (launching.n_programs(resid.device, tile.per_sm),), scoped, W_enc, b, latents,
            acts, places, counts, n_slots, firing, n_firing, shift, scale,
            last - first, *scoped.stride(), n_set, D_MODEL=d_model, D_SAE=W_enc.shape[1], NORM=norm,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        launching.launch(
            _subtract_kernel, (triton.cdiv(batch * n_pos, _SUBTRACT_ROWS), triton.cdiv(d_model, _SUBTRACT_COLUMNS)),
            edited, out, acts, places, counts, n_slots, scale, W_dec_S, removal,
            batch * n_pos, n_pos, first, last, n_set, k, *edited.stride(), *out.stride(),
            D_MODEL=d_model, NORM=norm, BLOCK_M=_SUBTRACT_ROWS, BLOCK_D=_SUBTRACT_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


@topk_suppress.register_fake
def _(edited: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(edited)
