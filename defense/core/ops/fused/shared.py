# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""What several kernels do alike: rows of tokens, the norm of each, and a tile of pre-activations."""

import triton
import triton.language as tl


@triton.jit
def row_ptrs(x_ptr, token, n_pos, stride_batch, stride_pos):
    """Pointers to the rows of tokens counted through [batch, n_pos]."""
    return x_ptr + (token // n_pos).to(tl.int64) * stride_batch + (token % n_pos).to(tl.int64) * stride_pos


@triton.jit
def norm_stats(
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
        scale = tl.sqrt(square / D_MODEL)
        tiny = 1.1754943508222875e-38
        scale = tl.where(scale < tiny, tiny, scale)  # a zero token stays zero; unlike a maximum, this keeps NaN
    return shift, scale


@triton.jit
def inverse_scale(scale, NORM: tl.constexpr):
    """What z = (x - shift) / (scale + eps) multiplies by."""
    if NORM == "layer_norm":
        return 1.0 / (scale + 1e-5)
    else:
        return 1.0 / scale


@triton.jit
def pre_acts(
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
