# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""Triton kernels: what `reference.py` defines, for inference on a GPU. The only file that imports triton.

    topk_suppress        resid - s * sum over i in S of (1 - gain_i) * h_i * [h_i is among the k largest] * W_dec[i]
        _candidates_kernel   h_i for i in S; the positive ones are listed at their token, and their tokens in one list
        _order_kernel        puts each token's list in rising order
        _count_kernel        streams the encoder over the listed tokens and counts the latents above each candidate
        _subtract_kernel     the difference, for the candidates with fewer than k above them
    threshold_suppress   the same for rules that do not couple latents (relu, jumprelu), in one kernel
    encode_topk          the k largest latents of every token
        _encode_kernel       pre_acts, and the maximum of each group of latents
        _select_kernel       the k groups with the largest maxima, which contain the k largest latents; then these
    sparse_decode        sum of k decoder rows per token

Exactness. Every product is accumulated in float32, of float32 operands in float32 ("ieee": tf32 would change which
latents are among the k largest). A candidate's own value was computed in another tile than the one that it is counted
against, and may differ in its last bit: it is left out of the count by its index, never by its value. All latents tied
at rank k are kept, as in the reference. Unlike the reference, nothing is rounded to half precision before it is
compared, so the two may differ on latents that are tied within the rounding of that dtype.

Memory. `topk_suppress` holds 12 bytes per token and latent of S; a tile of the encoder is counted in registers and
dropped. The number of listed tokens stays on the device: `_count_kernel` is launched with a fixed number of programs,
each of which takes every so many-th tile of the work that there is.

Time. Counting costs two instructions per candidate and element of a tile. As candidates come in rising order, a tile
is done at the first that no latent in it exceeds. A token stays to the end even where all its candidates are decided
before: a tile could be left out only where that holds for all of its tokens.
"""

from collections import Counter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

launches: Counter[str] = Counter()
"""How often each kernel was launched, by name: tests ask which path ran."""


class Tile(NamedTuple):
    """How a product is cut up."""

    m: int
    """Tokens per program."""
    n: int
    """Latents per program."""
    k: int
    """Steps along d_model."""
    num_warps: int
    num_stages: int
    per_sm: int = 1
    """Programs that share a multiprocessor, where their number is fixed."""


# Half precision on Hopper and newer: 85 operations per byte read keep the tensor cores ahead of the L2 cache, and the
# three stages (144 KiB of shared memory) leave room for one program per multiprocessor.
_STREAM_HOPPER = Tile(128, 256, 64, num_warps=8, num_stages=3)
# Half precision elsewhere: fits the 99 KiB of shared memory of consumer GPUs.
_STREAM_AMPERE = Tile(128, 128, 32, num_warps=8, num_stages=3)
# float32 runs on the general cores, where a larger tile only costs registers.
_STREAM_FLOAT32 = Tile(64, 64, 32, num_warps=8, num_stages=2, per_sm=2)
# The product with the columns of S alone: small, and the lists take registers.
_SET = Tile(64, 64, 64, num_warps=8, num_stages=3)
_SET_FLOAT32 = Tile(32, 32, 32, num_warps=4, num_stages=2)

MAX_SET = 4096
"""Latents of S that `topk_suppress` lists at a token."""
_ORDER_ELEMENTS = 1024
_SUBTRACT_ROWS, _SUBTRACT_COLUMNS = 8, 256
_THRESHOLD_COLUMNS = 128
_DECODE_ROWS, _DECODE_COLUMNS = 8, 256
_CHUNK_ELEMENTS = 2**26
"""Pre-activations that `encode_topk` holds at once (128 MiB in half precision)."""
MAX_SELECT = 2**14
"""Values among which one program of `_select_kernel` selects."""


@torch.compiler.assume_constant_result
def obstacle(device: str) -> str | None:
    """Return what about a device keeps the kernels from running, if anything."""
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def stream_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """Return how the product with the whole encoder is cut up, for weights of `dtype`."""
    if dtype == torch.float32:
        return _STREAM_FLOAT32
    return _STREAM_HOPPER if _capability(device) >= (9, 0) else _STREAM_AMPERE


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def _n_programs(device: torch.device, per_sm: int) -> int:
    """Return how many programs keep a GPU busy; two under the interpreter, so that each takes several tiles."""
    if device.type != "cuda":
        return 2
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def _launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    if 0 not in grid:
        launches[kernel.fn.__name__] += 1
        kernel[grid](*args, **constants, enable_fp_fusion=True)


# --- shared by the kernels --------------------------------------------------------------------------------------------


@triton.jit
def _row_ptrs(x_ptr, token, n_pos, stride_batch, stride_pos):
    """Pointers to the rows of tokens counted through [batch, n_pos]."""
    return x_ptr + (token // n_pos).to(tl.int64) * stride_batch + (token % n_pos).to(tl.int64) * stride_pos


@triton.jit
def _norm_stats(
    x_rows, stride_x_d, D_MODEL: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr
):
    """(shift, scale) of `sae.normalize`, [BLOCK_M] each."""
    offs_d = tl.arange(0, BLOCK_D)
    shift = tl.zeros([BLOCK_M], tl.float32)
    if NORM == "layer_norm":
        for start in range(0, D_MODEL, BLOCK_D):
            mask_d = offs_d < D_MODEL - start
            x = tl.load(x_rows[:, None] + (start + offs_d)[None, :] * stride_x_d, mask=mask_d[None, :], other=0.0)
            shift += tl.sum(x.to(tl.float32), 1)
        shift = shift / D_MODEL
    square = tl.zeros([BLOCK_M], tl.float32)
    for start in range(0, D_MODEL, BLOCK_D):
        mask_d = offs_d < D_MODEL - start
        x = tl.load(x_rows[:, None] + (start + offs_d)[None, :] * stride_x_d, mask=mask_d[None, :], other=0.0)
        centered = tl.where(mask_d[None, :], x.to(tl.float32) - shift[:, None], 0.0)
        square += tl.sum(centered * centered, 1)
    if NORM == "layer_norm":
        scale = tl.sqrt(square / (D_MODEL - 1))
    else:
        scale = tl.maximum(tl.sqrt(square / D_MODEL), 1.1754943508222875e-38)  # a zero token stays zero
    return shift, scale


@triton.jit
def _inverse(scale, NORM: tl.constexpr):
    """What z = (x - shift) / (scale + eps) multiplies by."""
    if NORM == "layer_norm":
        return 1.0 / (scale + 1e-5)
    else:
        return 1.0 / scale


@triton.jit
def _pre_acts(
    x_rows, stride_x_d, shift, inverse, W_ptr, stride_W_d, b_ptr, offs_n, n_columns,
    D_MODEL: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return h = z @ W + b of rows x and columns offs_n, [BLOCK_M, BLOCK_N]; -inf in columns that W does not have."""
    offs_k = tl.arange(0, BLOCK_K)
    mask_n = offs_n < n_columns
    x_ptrs = x_rows[:, None] + offs_k[None, :] * stride_x_d
    W_ptrs = W_ptr + offs_k[:, None].to(tl.int64) * stride_W_d + offs_n[None, :]
    h = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, D_MODEL, BLOCK_K):
        mask_k = offs_k < D_MODEL - start
        x = tl.load(x_ptrs, mask=mask_k[None, :], other=0.0)
        W = tl.load(W_ptrs, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if NORM != "none":
            x = (x.to(tl.float32) - shift[:, None]) * inverse[:, None]
        h = tl.dot(x.to(W.dtype), W, h, input_precision="ieee")
        x_ptrs += BLOCK_K * stride_x_d
        W_ptrs += BLOCK_K * stride_W_d
    b = tl.load(b_ptr + offs_n, mask=mask_n, other=float("-inf"))
    return h + b.to(tl.float32)[None, :]


# --- topk_suppress ----------------------------------------------------------------------------------------------------


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
    x_rows = _row_ptrs(x_ptr, token, n_pos, stride_x_batch, stride_x_pos)
    shift = tl.zeros([BLOCK_M], tl.float32)
    inverse = shift
    if NORM != "none":
        shift, scale = _norm_stats(x_rows, stride_x_d, D_MODEL, NORM, BLOCK_M, BLOCK_K)
        tl.store(shift_ptr + token, shift, mask=mask_m)
        tl.store(scale_ptr + token, scale, mask=mask_m)
        inverse = _inverse(scale, NORM)

    n_slots = tl.zeros([BLOCK_M], tl.int32)
    for start in range(0, n_set, BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        h = _pre_acts(
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
        x_rows = _row_ptrs(x_ptr, token, n_pos, stride_x_batch, stride_x_pos)
        shift = tl.zeros([BLOCK_M], tl.float32)
        inverse = shift
        if NORM != "none":
            shift = tl.load(shift_ptr + token)
            inverse = _inverse(tl.load(scale_ptr + token), NORM)
        h = _pre_acts(
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
    edited = _row_ptrs(edited_ptr, offs_m, n_pos, stride_edited_batch, stride_edited_pos)
    out = _row_ptrs(out_ptr, offs_m, n_pos, stride_out_batch, stride_out_pos)
    x = tl.load(edited[:, None] + offs_d[None, :] * stride_edited_d, mask=mask, other=0.0)
    tl.store(out[:, None] + offs_d[None, :] * stride_out_d, x.to(tl.float32) - delta, mask=mask)


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
        tile = _SET_FLOAT32 if W_S.dtype == torch.float32 else _SET
        _launch(
            _candidates_kernel, (triton.cdiv(n_tokens, tile.m),), scoped, W_S, b_S,
            acts, places, n_slots, firing, n_firing, shift, scale,
            n_tokens, last - first, *scoped.stride(), n_set, D_MODEL=d_model, NORM=norm,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        block = triton.next_power_of_2(n_set)
        rows = max(1, _ORDER_ELEMENTS // block)
        _launch(
            _order_kernel, (triton.cdiv(n_tokens, rows),), acts, places, counts, n_slots, firing, n_firing, n_set,
            BLOCK_M=rows, BLOCK_N=block, num_warps=4,
        )  # fmt: skip
        tile = stream_tile(resid.device, W_enc.dtype)
        _launch(
            _count_kernel, (_n_programs(resid.device, tile.per_sm),), scoped, W_enc, b, latents,
            acts, places, counts, n_slots, firing, n_firing, shift, scale,
            last - first, *scoped.stride(), n_set, D_MODEL=d_model, D_SAE=W_enc.shape[1], NORM=norm,
            BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
        _launch(
            _subtract_kernel, (triton.cdiv(batch * n_pos, _SUBTRACT_ROWS), triton.cdiv(d_model, _SUBTRACT_COLUMNS)),
            edited, out, acts, places, counts, n_slots, scale, W_dec_S, removal,
            batch * n_pos, n_pos, first, last, n_set, k, *edited.stride(), *out.stride(),
            D_MODEL=d_model, NORM=norm, BLOCK_M=_SUBTRACT_ROWS, BLOCK_D=_SUBTRACT_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


@topk_suppress.register_fake
def _(edited: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(edited)


# --- threshold_suppress -----------------------------------------------------------------------------------------------


@triton.jit
def _removed_acts(
    x_rows, stride_x_d, shift, inverse, W_ptr, b_ptr, threshold_ptr, removal_ptr, in_scope, start, n_set,
    D_MODEL: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """f_i * removal_i of BLOCK_N latents of S, 0 outside the scope, [BLOCK_M, BLOCK_N]."""
    offs_n = start + tl.arange(0, BLOCK_N)
    h = _pre_acts(
        x_rows, stride_x_d, shift, inverse, W_ptr, n_set, b_ptr, offs_n, n_set,
        D_MODEL, NORM, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    fires = (h > 0) & in_scope[:, None]
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + offs_n, mask=offs_n < n_set, other=0.0)
        fires = fires & (h > threshold.to(tl.float32)[None, :])
    removal = tl.load(removal_ptr + offs_n, mask=offs_n < n_set, other=0.0)
    return tl.where(fires, h, 0.0) * removal.to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["n_rows", "n_pos", "first", "last"])
def _threshold_kernel(
    edited_ptr, x_ptr, out_ptr, W_ptr, b_ptr, threshold_ptr, W_dec_ptr, removal_ptr,
    n_rows, n_pos, first, last, n_set,
    stride_edited_batch, stride_edited_pos, stride_edited_d, stride_x_batch, stride_x_pos, stride_x_d,
    stride_out_batch, stride_out_pos, stride_out_d,
    D_MODEL: tl.constexpr, NORM: tl.constexpr, FITS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write out = edited - scale * (acts * removal) @ W_dec_S. FITS: S fits in one block, so acts are computed once."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = offs_m < n_rows
    row = tl.minimum(offs_m, n_rows - 1)
    pos = row % n_pos
    in_scope = (pos >= first) & (pos < last)
    x_rows = _row_ptrs(x_ptr, row, n_pos, stride_x_batch, stride_x_pos)
    edited_rows = _row_ptrs(edited_ptr, row, n_pos, stride_edited_batch, stride_edited_pos)
    out_rows = _row_ptrs(out_ptr, row, n_pos, stride_out_batch, stride_out_pos)
    shift = tl.zeros([BLOCK_M], tl.float32)
    scale = shift
    inverse = shift
    if NORM != "none":
        shift, scale = _norm_stats(x_rows, stride_x_d, D_MODEL, NORM, BLOCK_M, BLOCK_K)
        inverse = _inverse(scale, NORM)
    if FITS:
        acts = _removed_acts(
            x_rows, stride_x_d, shift, inverse, W_ptr, b_ptr, threshold_ptr, removal_ptr, in_scope, 0, n_set,
            D_MODEL, NORM, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip

    for start_d in range(0, D_MODEL, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D_MODEL
        delta = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for start in range(0, n_set, BLOCK_N):
            if not FITS:
                acts = _removed_acts(
                    x_rows, stride_x_d, shift, inverse, W_ptr, b_ptr, threshold_ptr, removal_ptr, in_scope, start,
                    n_set, D_MODEL, NORM, BLOCK_M, BLOCK_N, BLOCK_K,
                )  # fmt: skip
            offs_n = start + tl.arange(0, BLOCK_N)
            W_dec_ptrs = W_dec_ptr + offs_n[:, None].to(tl.int64) * D_MODEL + offs_d[None, :]
            W_dec = tl.load(W_dec_ptrs, mask=(offs_n < n_set)[:, None] & mask_d[None, :], other=0.0)
            delta = tl.dot(acts.to(W_dec.dtype), W_dec, delta, input_precision="ieee")
        if NORM != "none":
            delta *= scale[:, None]
        mask = mask_m[:, None] & mask_d[None, :]
        x = tl.load(edited_rows[:, None] + offs_d[None, :] * stride_edited_d, mask=mask, other=0.0)
        tl.store(out_rows[:, None] + offs_d[None, :] * stride_out_d, x.to(tl.float32) - delta, mask=mask)


@torch.library.custom_op("clip_defense::threshold_suppress", mutates_args=())
def threshold_suppress(
    edited: Tensor,
    resid: Tensor,
    first: int,
    last: int,
    norm: str,
    W_S: Tensor,
    b_S: Tensor,
    threshold_S: Tensor | None,
    W_dec_S: Tensor,
    removal: Tensor,
) -> Tensor:
    """Return `edited` less what a relu, jumprelu or batchtopk SAE's latents of S write into a part of `resid`.

    Args:
        edited: See `topk_suppress`, as for all that is not here.
        resid: As above.
        first: As above.
        last: As above.
        norm: As above.
        W_S: As above.
        b_S: As above.
        threshold_S: f = h where h > threshold, [n]; None for relu.
        W_dec_S: As above.
        removal: As above.
    """
    out = torch.empty_like(edited)
    batch, n_pos, d_model = resid.shape
    n_set = len(b_S)
    tile = _SET_FLOAT32 if W_S.dtype == torch.float32 else _SET
    with torch.cuda.device_of(resid):
        _launch(
            _threshold_kernel, (triton.cdiv(batch * n_pos, tile.m),),
            edited, resid, out, W_S, b_S, threshold_S, W_dec_S, removal,
            batch * n_pos, n_pos, first, last, n_set, *edited.stride(), *resid.stride(), *out.stride(),
            D_MODEL=d_model, NORM=norm, FITS=n_set <= tile.n, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
            BLOCK_D=_THRESHOLD_COLUMNS, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


@threshold_suppress.register_fake
def _(edited: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(edited)


# --- encode_topk ------------------------------------------------------------------------------------------------------


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
    h = _pre_acts(
        z_ptr + row * stride_z_row, stride_z_d, unused, unused, W_ptr, D_SAE, b_ptr, offs_n, D_SAE,
        D_MODEL, "none", BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    h = tl.where(h > 0, h, 0.0)  # unlike max(h, 0) never -0.0: `_select_kernel` compares bits
    mask = mask_m[:, None] & (offs_n < D_SAE)[None, :]
    tl.store(pre_acts_ptr + row[:, None] * D_SAE + offs_n[None, :], h, mask=mask)
    n_groups: tl.constexpr = (D_SAE + GROUP - 1) // GROUP
    offs_g = latent_tile * (BLOCK_N // GROUP) + tl.arange(0, BLOCK_N // GROUP)
    maxima = tl.max(tl.reshape(h, [BLOCK_M, BLOCK_N // GROUP, GROUP]), 2)
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
    _launch(
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
    tile, group = stream_tile(z.device, W_enc.dtype), group_size(d_sae, k)
    n_groups = triton.cdiv(d_sae, group)
    n_chunk = max(1, min(n_tokens, _CHUNK_ELEMENTS // d_sae))
    pre_acts = torch.empty(n_chunk, d_sae, dtype=W_enc.dtype, device=z.device)
    maxima = torch.empty(n_chunk, n_groups, dtype=W_enc.dtype, device=z.device)
    picked = torch.empty(n_chunk, min(k, n_groups), dtype=torch.int32, device=z.device)
    with torch.cuda.device_of(z):
        for start in range(0, n_tokens, n_chunk):
            chunk = z[start : start + n_chunk]
            n = len(chunk)
            _launch(
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


# --- sparse_decode ----------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["k"])
def _decode_kernel(
    acts_ptr, indices_ptr, W_dec_ptr, b_dec_ptr, out_ptr, k,
    D_MODEL: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """b_dec + sum of acts * W_dec[indices], BLOCK_D columns of one token, BLOCK_K decoder rows at once."""
    token = tl.program_id(0).to(tl.int64)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D_MODEL
    total = tl.zeros([BLOCK_K, BLOCK_D], tl.float32)
    for start in range(0, k, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        act = tl.load(acts_ptr + token * k + offs_k, mask=offs_k < k, other=0.0).to(tl.float32)
        index = tl.load(indices_ptr + token * k + offs_k, mask=offs_k < k, other=0).to(tl.int64)
        W_dec_ptrs = W_dec_ptr + index[:, None] * D_MODEL + offs_d[None, :]
        W_dec = tl.load(W_dec_ptrs, mask=(act != 0)[:, None] & mask_d[None, :], other=0.0)
        total += act[:, None] * W_dec.to(tl.float32)
    b_dec = tl.load(b_dec_ptr + offs_d, mask=mask_d, other=0.0)
    tl.store(out_ptr + token * D_MODEL + offs_d, tl.sum(total, 0) + b_dec.to(tl.float32), mask=mask_d)


@torch.library.custom_op("clip_defense::sparse_decode", mutates_args=())
def sparse_decode(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Return b_dec plus the sum of acts times their decoder rows, [tokens, d_model].

    Args:
        acts: [tokens, k], contiguous.
        indices: Which latents, int64 [tokens, k], contiguous.
        W_dec: [d_sae, d_model].
        b_dec: [d_model].
    """
    n_tokens, k = acts.shape
    out = torch.empty(n_tokens, W_dec.shape[1], dtype=W_dec.dtype, device=acts.device)
    with torch.cuda.device_of(acts):
        _launch(
            _decode_kernel, (n_tokens, triton.cdiv(W_dec.shape[1], _DECODE_COLUMNS)),
            acts, indices, W_dec, b_dec, out, k,
            D_MODEL=W_dec.shape[1], BLOCK_K=_DECODE_ROWS, BLOCK_D=_DECODE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


@sparse_decode.register_fake
def _(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return W_dec.new_empty(len(acts), W_dec.shape[1])
