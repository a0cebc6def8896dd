# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""`sparse_decode`: the sum of k decoder rows per token."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import launching

_DECODE_ROWS, _DECODE_COLUMNS = 8, 256


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
        launching.launch(
            _decode_kernel, (n_tokens, triton.cdiv(W_dec.shape[1], _DECODE_COLUMNS)),
            acts, indices, W_dec, b_dec, out, k,
            D_MODEL=W_dec.shape[1], BLOCK_K=_DECODE_ROWS, BLOCK_D=_DECODE_COLUMNS, num_warps=4,
        )  # fmt: skip
    return out


@sparse_decode.register_fake
def _(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    return W_dec.new_empty(len(acts), W_dec.shape[1])
