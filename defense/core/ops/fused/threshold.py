# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""The edit `scale` of rules that do not couple latents, in one kernel."""

import triton
import triton.language as tl
from torch import Tensor

from . import launching
from .edit import Edit
from .shared import inverse_scale, norm_stats, pre_acts, row_ptrs

_THRESHOLD_COLUMNS = 128


@triton.jit
def _removed_acts(
    x_rows, stride_x_d, shift, inverse, W_ptr, b_ptr, threshold_ptr, removal_ptr, in_scope, start, n_set,
    D_MODEL: tl.constexpr, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """f_i * removal_i of BLOCK_N latents of S, 0 outside the scope, [BLOCK_M, BLOCK_N]."""
    offs_n = start + tl.arange(0, BLOCK_N)
    h = pre_acts(
        x_rows, stride_x_d, shift, inverse, W_ptr, n_set, b_ptr, offs_n, n_set,
        D_MODEL, NORM, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # Asked this way around, NaN is an activation, as it is after torch's relu.
    is_idle = (h <= 0) | ~in_scope[:, None] | (offs_n >= n_set)[None, :]
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + offs_n, mask=offs_n < n_set, other=0.0)
        is_idle = is_idle | (h <= threshold.to(tl.float32)[None, :])
    removal = tl.load(removal_ptr + offs_n, mask=offs_n < n_set, other=0.0)
    return tl.where(is_idle, 0.0, h) * removal.to(tl.float32)[None, :]


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
    x_rows = row_ptrs(x_ptr, row, n_pos, stride_x_batch, stride_x_pos)
    edited_rows = row_ptrs(edited_ptr, row, n_pos, stride_edited_batch, stride_edited_pos)
    out_rows = row_ptrs(out_ptr, row, n_pos, stride_out_batch, stride_out_pos)
    shift = tl.zeros([BLOCK_M], tl.float32)
    scale = shift
    inverse = shift
    if NORM != "none":
        shift, scale = norm_stats(x_rows, stride_x_d, D_MODEL, NORM, BLOCK_M, BLOCK_K)
        inverse = inverse_scale(scale, NORM)
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
            delta *= tl.where(in_scope, scale, 0.0)[:, None]  # where it is inf, 0 * scale would be NaN
        mask = mask_m[:, None] & mask_d[None, :]
        x = tl.load(edited_rows[:, None] + offs_d[None, :] * stride_edited_d, mask=mask, other=0.0)
        tl.store(out_rows[:, None] + offs_d[None, :] * stride_out_d, x.to(tl.float32) - delta, mask=mask)


def subtract(edit: Edit, out: Tensor, threshold_S: Tensor | None) -> None:
    """Write into `out` what the edit leaves.

    Args:
        edit: What is edited.
        out: [batch, pos, d_model].
        threshold_S: f = h where h > threshold, [n]; None for relu.
    """
    edited, resid, n_set = edit.edited, edit.resid, edit.n_set
    batch, n_pos, d_model = resid.shape
    tile = launching.set_tile(edit.W_S.dtype)
    launching.launch(
        _threshold_kernel, (triton.cdiv(batch * n_pos, tile.m),),
        edited, resid, out, edit.W_S, edit.b_S, threshold_S, edit.W_dec_S, edit.removal,
        batch * n_pos, n_pos, edit.first, edit.last, n_set, *edited.stride(), *resid.stride(), *out.stride(),
        D_MODEL=d_model, NORM=edit.norm, FITS=n_set <= tile.n, BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k,
        BLOCK_D=_THRESHOLD_COLUMNS, num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
