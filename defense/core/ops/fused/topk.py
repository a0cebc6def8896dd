# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""The edit `scale` of a TopK SAE; the package says how."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .edit import Edit
from .shared import inverse_scale, norm_stats, pre_acts, row_ptrs

_ORDER_ELEMENTS = 1024
_ORDER_ROWS, _ORDER_COLUMNS = 16, 256
_SUBTRACT_ROWS, _SUBTRACT_COLUMNS = 8, 256
_N_LENGTHS = 64
"""Groups of lists of about the same length: of each length where S has fewer latents than that."""
_CHUNK_ENTRIES = 2**24
"""Pairs of a token and a latent of S for which there is scratch memory at once (192 MiB)."""


@triton.jit(do_not_specialize=["n_tokens", "n_pos"])
def _candidates_kernel(
    x_ptr, W_ptr, b_ptr,
    acts_ptr, places_ptr, n_slots_ptr, rank_ptr, n_of_length_ptr, shift_ptr, scale_ptr,
    n_tokens, n_pos, stride_x_batch, stride_x_pos, stride_x_d, n_set,
    D_MODEL: tl.constexpr, NORM: tl.constexpr, N_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """List, at each token, the latents of S with h > 0: (acts, places), n_slots of them.

    Rank each token with any among those whose lists are about as long, and count these.
    """
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

    length = group_of(n_slots, n_set, N_LENGTHS)
    rank = tl.atomic_add(n_of_length_ptr + length, 1, mask=n_slots > 0, sem="relaxed")
    tl.store(rank_ptr + token, rank, mask=n_slots > 0)


@triton.jit
def group_of(n_slots, n_set, N_LENGTHS: tl.constexpr):
    """The group that a list of n_slots latents belongs to: the longest come first, those of none into the last."""
    return N_LENGTHS - 1 - tl.cdiv(n_slots * (N_LENGTHS - 1), n_set)


@triton.jit(do_not_specialize=["k", "n_tokens", "n_pos"])
def _order_kernel(
    x_ptr, z_ptr, acts_ptr, places_ptr, counts_ptr, begin_ptr, n_slots_ptr, rank_ptr, n_of_length_ptr,
    firing_ptr, n_firing_ptr, shift_ptr, scale_ptr,
    n_tokens, n_pos, stride_x_batch, stride_x_pos, stride_x_d, n_set, k,
    D_MODEL: tl.constexpr, NORM: tl.constexpr, N_LENGTHS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Put each token's list in rising order of acts; list the firing tokens, longest lists first, and their z.

    A candidate's count starts at the candidates of its token that are larger. BLOCK_N holds all of S.
    """
    token = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_slots = tl.load(n_slots_ptr + token, mask=token < n_tokens, other=0)
    mask_m = n_slots > 0
    longest = tl.max(n_slots, 0)
    lengths = tl.arange(0, N_LENGTHS)
    n_of_length = tl.load(n_of_length_ptr + lengths)
    if tl.program_id(0) == 0:
        tl.store(n_firing_ptr, tl.sum(n_of_length, 0))
    is_longer = lengths[None, :] < group_of(n_slots, n_set, N_LENGTHS)[:, None]
    row = tl.sum(tl.where(is_longer, n_of_length[None, :], 0), 1) + tl.load(rank_ptr + token, mask=mask_m, other=0)
    tl.store(firing_ptr + row, token, mask=mask_m)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n[None, :] < n_slots[:, None]
    first = token.to(tl.int64) * n_set
    entry = first[:, None] + offs_n[None, :]
    acts = tl.load(acts_ptr + entry, mask=mask, other=0.0)
    places = tl.load(places_ptr + entry, mask=mask, other=0)
    rank = tl.zeros([BLOCK_M, BLOCK_N], tl.int32)
    n_larger = rank
    for slot in range(longest):
        # Past the end of a list stands NaN, which is neither larger nor smaller nor equal.
        act = tl.load(acts_ptr + first + slot, mask=slot < n_slots, other=float("nan"))[:, None]
        is_behind = (acts > act) | ((acts == act) & (offs_n > slot)[None, :])
        rank += is_behind.to(tl.int32)
        n_larger += (acts < act).to(tl.int32)
    tl.debug_barrier()  # every thread has read the lists before any writes over them
    entry = first[:, None] + rank
    tl.store(acts_ptr + entry, acts, mask=mask)
    tl.store(places_ptr + entry, places, mask=mask)
    tl.store(counts_ptr + entry, n_larger, mask=mask)
    tl.store(begin_ptr + token, tl.sum((mask & (n_larger >= k)).to(tl.int32), 1), mask=mask_m)

    x_rows = row_ptrs(x_ptr, token, n_pos, stride_x_batch, stride_x_pos)
    if NORM != "none":
        shift = tl.load(shift_ptr + token, mask=mask_m, other=0.0)
        inverse = inverse_scale(tl.load(scale_ptr + token, mask=mask_m, other=1.0), NORM)
    for start in range(0, tl.where(longest > 0, D_MODEL, 0), BLOCK_D):
        offs_d = start + tl.arange(0, BLOCK_D)
        mask_z = mask_m[:, None] & (offs_d < D_MODEL)[None, :]
        z = tl.load(x_rows[:, None] + offs_d[None, :] * stride_x_d, mask=mask_z, other=0.0)
        if NORM != "none":
            z = (z.to(tl.float32) - shift[:, None]) * inverse[:, None]
        tl.store(z_ptr + row[:, None].to(tl.int64) * D_MODEL + offs_d[None, :], z, mask=mask_z)


@triton.jit(do_not_specialize=["k"])
def _count_kernel(
    z_ptr, W_ptr, b_ptr, acts_ptr, counts_ptr, begin_ptr, n_slots_ptr, firing_ptr, n_firing_ptr, n_set, k,
    D_MODEL: tl.constexpr, D_SAE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Add to each undecided candidate's count the latents outside of S that are larger; b is -inf for those of S.

    A candidate with k or more above it is out, and so are those below it: `begin` is the first slot that may be in.
    """
    n_firing = tl.load(n_firing_ptr)
    token_tiles = tl.cdiv(n_firing, BLOCK_M)
    # Token tiles vary fastest: programs that run at the same time read the same columns of the encoder.
    for tile in range(tl.program_id(0), token_tiles * tl.cdiv(D_SAE, BLOCK_N), tl.num_programs(0)):
        offs_m = tile % token_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
        offs_n = tile // token_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
        mask_m = offs_m < n_firing
        token = tl.load(firing_ptr + offs_m, mask=mask_m, other=0)
        n_slots = tl.load(n_slots_ptr + token, mask=mask_m, other=0)
        # Other programs raise begin and the counts meanwhile. An older value only costs a slot that was decided; from
        # the L1 cache it might stay old. All is loaded before the product, which hides how long that takes.
        begin = tl.load(begin_ptr + token, mask=mask_m, other=0, cache_modifier=".cg")
        slot = begin
        entry = token.to(tl.int64) * n_set + slot
        act = tl.load(acts_ptr + entry, mask=slot < n_slots, other=float("inf"))
        count = tl.load(counts_ptr + entry, mask=slot < n_slots, other=0, cache_modifier=".cg")
        unused = tl.zeros([BLOCK_M], tl.float32)
        h = pre_acts(
            z_ptr + tl.minimum(offs_m, n_firing - 1).to(tl.int64) * D_MODEL, 1, unused, unused,
            W_ptr, D_SAE, b_ptr, offs_n, D_SAE, D_MODEL, "none", BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        highest = tl.max(h, 1)
        while tl.max((highest > act).to(tl.int32), 0) > 0:
            has_next = slot + 1 < n_slots
            next_act = tl.load(acts_ptr + entry + 1, mask=has_next, other=float("inf"))
            next_count = tl.load(counts_ptr + entry + 1, mask=has_next, other=0, cache_modifier=".cg")
            larger = tl.sum(tl.where(h > act[:, None], 1.0, 0.0), 1)
            tl.atomic_add(counts_ptr + entry, larger.to(tl.int32), mask=larger > 0, sem="relaxed")
            slot += 1
            begin = tl.where(count >= k, slot, begin)
            entry += 1
            act = next_act
            count = next_count
        tl.atomic_max(begin_ptr + token, begin, mask=mask_m, sem="relaxed")


@triton.jit(do_not_specialize=["n_rows", "n_pos", "first", "last", "k"])
def _subtract_kernel(
    edited_ptr, out_ptr, acts_ptr, places_ptr, counts_ptr, begin_ptr, n_slots_ptr, scale_ptr, W_dec_ptr, removal_ptr,
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
    begin = tl.load(begin_ptr + token, mask=n_slots > 0, other=0)
    delta = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # From the largest candidate down to the first that is out.
    slot = n_slots - 1
    entry = token.to(tl.int64) * n_set + slot
    count = tl.load(counts_ptr + entry, mask=slot >= begin, other=k)
    while tl.max((count < k).to(tl.int32), 0) > 0:
        is_kept = count < k
        act = tl.load(acts_ptr + entry, mask=is_kept, other=0.0)
        place = tl.load(places_ptr + entry, mask=is_kept, other=0)
        removal = tl.load(removal_ptr + place).to(tl.float32)
        rows = W_dec_ptr + place[:, None].to(tl.int64) * D_MODEL + offs_d[None, :]
        W_dec = tl.load(rows, mask=is_kept[:, None] & mask_d[None, :], other=0.0)
        delta += (act * removal)[:, None] * W_dec.to(tl.float32)
        slot -= 1
        entry -= 1
        count = tl.load(counts_ptr + entry, mask=is_kept & (slot >= begin), other=k)
    if NORM != "none":
        delta *= tl.load(scale_ptr + token, mask=in_scope, other=0.0)[:, None]
    mask = (offs_m < n_rows)[:, None] & mask_d[None, :]
    edited = row_ptrs(edited_ptr, offs_m, n_pos, stride_edited_batch, stride_edited_pos)
    out = row_ptrs(out_ptr, offs_m, n_pos, stride_out_batch, stride_out_pos)
    x = tl.load(edited[:, None] + offs_d[None, :] * stride_edited_d, mask=mask, other=0.0)
    tl.store(out[:, None] + offs_d[None, :] * stride_out_d, x.to(tl.float32) - delta, mask=mask)


def subtract(edit: Edit, out: Tensor, W_enc: Tensor, b_others: Tensor, k: int) -> None:
    """Write into `out` what the edit leaves, so many pictures at a time that the scratch memory stays bounded.

    Args:
        edit: What is edited.
        out: [batch, pos, d_model].
        W_enc: The whole encoder, [d_model, d_sae].
        b_others: Its folded bias, -inf for the latents of S, [d_sae].
        k: How many latents count at a token.
    """
    n_entries = max(1, (edit.last - edit.first) * edit.n_set)
    n_pictures = max(1, _CHUNK_ENTRIES // n_entries)
    for start in range(0, len(out), n_pictures):
        some = slice(start, start + n_pictures)
        of_some = edit._replace(edited=edit.edited[some], resid=edit.resid[some])
        _subtract(of_some, out[some], W_enc, b_others, k)


# Longer than functions here are: four launches share their scratch memory, and each takes a dozen arguments.
def _subtract(edit: Edit, out: Tensor, W_enc: Tensor, b_others: Tensor, k: int) -> None:
    edited, resid, n_set = edit.edited, edit.resid, edit.n_set
    batch, n_pos, d_model = resid.shape
    scoped = resid[:, edit.first : edit.last]
    n_scope = scoped.shape[1]
    n_tokens = batch * n_scope

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=resid.device)

    acts, scale, shift = (
        scratch(*shape, dtype=torch.float32) for shape in ((n_tokens, n_set), (n_tokens,), (n_tokens,))
    )
    places, counts = scratch(n_tokens, n_set), scratch(n_tokens, n_set)
    n_slots, rank, begin, firing = (scratch(n_tokens) for _ in range(4))
    z = scratch(n_tokens, d_model, dtype=W_enc.dtype)
    n_of_length = torch.zeros(_N_LENGTHS, dtype=torch.int32, device=resid.device)
    n_firing = scratch(1)
    tile = launching.set_tile(edit.W_S.dtype)
    launching.launch(
        _candidates_kernel, (triton.cdiv(n_tokens, tile.m),), scoped, edit.W_S, edit.b_S,
        acts, places, n_slots, rank, n_of_length, shift, scale,
        n_tokens, n_scope, *scoped.stride(), n_set, D_MODEL=d_model, NORM=edit.norm, N_LENGTHS=_N_LENGTHS,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    block = triton.next_power_of_2(n_set)
    rows = max(1, min(_ORDER_ROWS, _ORDER_ELEMENTS // block))
    launching.launch(
        _order_kernel, (triton.cdiv(n_tokens, rows),),
        scoped, z, acts, places, counts, begin, n_slots, rank, n_of_length, firing, n_firing, shift, scale,
        n_tokens, n_scope, *scoped.stride(), n_set, k,
        D_MODEL=d_model, NORM=edit.norm, N_LENGTHS=_N_LENGTHS,
        BLOCK_M=rows, BLOCK_N=block, BLOCK_D=_ORDER_COLUMNS, num_warps=4,
    )  # fmt: skip
    tile = launching.stream_tile(resid.device, W_enc.dtype)
    launching.launch(
        _count_kernel, (launching.n_programs(resid.device, tile.per_sm),),
        z, W_enc, b_others, acts, counts, begin, n_slots, firing, n_firing, n_set, k,
        D_MODEL=d_model, D_SAE=W_enc.shape[1], BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        num_warps=tile.num_warps, num_stages=tile.num_stages, maxnreg=tile.max_registers,
    )  # fmt: skip
    launching.launch(
        _subtract_kernel, (triton.cdiv(batch * n_pos, _SUBTRACT_ROWS), triton.cdiv(d_model, _SUBTRACT_COLUMNS)),
        edited, out, acts, places, counts, begin, n_slots, scale, edit.W_dec_S, edit.removal,
        batch * n_pos, n_pos, edit.first, edit.last, n_set, k, *edited.stride(), *out.stride(),
        D_MODEL=d_model, NORM=edit.norm, BLOCK_M=_SUBTRACT_ROWS, BLOCK_D=_SUBTRACT_COLUMNS, num_warps=4,
    )  # fmt: skip
