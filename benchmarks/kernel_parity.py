"""The kernels held against float64: the parity gate of their benchmark, before which nothing is timed.

Which latents are among the k largest can hang on a rounding error. Tokens at which it does are counted and left out.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from defense.benchmarks import kernel_cases
from defense.benchmarks.kernel_variants import kernels
from defense.benchmarks.kernel_workloads import Workload, draw
from defense.core import ops
from defense.core.config import Norm
from defense.core.ops.reference import Encoder
from defense.core.sae import normalize

_EXACT_TOKENS = 256
"""Tokens computed in float64 at a time: bounds the memory."""


class Exact(NamedTuple):
    """What a suppression should give, and how far off float arithmetic may be."""

    edited: Tensor
    """float64 [batch, pos, d_model]"""
    allowed: Tensor
    """How far float arithmetic may be from it, float64 [batch, pos, d_model]."""
    is_clear: Tensor
    """Tokens at which rounding does not decide which latents are kept, [batch, pos]."""


def exact_edit(resid: Tensor, norm: Norm, encoder: Encoder, W_dec_S: Tensor, removal: Tensor) -> Exact:
    """Return the edit "scale" of every token, computed in float64.

    Weights are taken as they were rounded to their dtype, and so is the normalized residual, since the kernels multiply
    in that dtype.

    Args:
        resid: [batch, pos, d_model].
        norm: Input normalization.
        encoder: The encoder parts needed for the activations of the n latents in S.
        W_dec_S: Their decoder rows, [n, d_model].
        removal: 1 - gain_i, [n].
    """
    W_S, b_S = encoder.W_S.double(), encoder.b_S.double()
    rows_S = removal.double()[:, None] * W_dec_S.double()
    W_enc = None if encoder.W_enc is None else encoder.W_enc.double()
    eps = max(torch.finfo(resid.dtype).eps, torch.finfo(encoder.W_S.dtype).eps)
    # A z that is rounded before the product may have been rounded the other way.
    unit = 4e-6 if norm == "none" else torch.finfo(encoder.W_S.dtype).eps + 4e-6
    parts = []
    for rows in resid.flatten(0, 1).split(_EXACT_TOKENS):
        z, scale, _ = normalize(rows.double(), norm)
        z = z.to(encoder.W_S.dtype).double()
        h = z @ W_S + b_S
        margin = unit * (z.abs() @ W_S.abs() + 1)
        kept, is_clear = h > 0, torch.ones_like(h, dtype=torch.bool)
        if W_enc is not None and encoder.b is not None:
            kth, following = _around_rank_k(torch.addmm(encoder.b.double(), z, W_enc), encoder.k)
            survives = following <= h - margin  # at most k are larger, one of them itself
            kept &= survives
            is_clear = survives | (kth > h + margin) | (h < margin)
        elif encoder.threshold_S is not None:
            kept &= h > encoder.threshold_S
            is_clear = (h - encoder.threshold_S).abs() > margin
        acts, s = h * kept, 1.0 if scale is None else scale
        allowed = 2 * eps * (rows.double().abs() + s * (acts @ rows_S.abs())) + s * (margin @ rows_S.abs())
        parts.append((rows.double() - s * (acts @ rows_S), allowed, is_clear.all(1)))
    edited, allowed, is_clear = (torch.cat(each).unflatten(0, resid.shape[:2]) for each in zip(*parts, strict=True))
    return Exact(edited, allowed, is_clear)


def _around_rank_k(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k-th largest of each row, and the one after it, [tokens, 1] each; -inf where there is none."""
    largest = pre_acts.topk(min(k + 1, pre_acts.shape[1]), dim=1).values
    missing = torch.full_like(largest[:, :1], -torch.inf)
    return largest[:, k - 1 : k], torch.cat([largest[:, k:], missing], 1)[:, :1]


def n_unequal(got: Tensor, exact: Exact) -> int:
    """Return at how many of the clear tokens `got` is not what it should be."""
    is_equal = ((got.double() - exact.edited).abs() <= exact.allowed).all(-1)
    return int((~is_equal & exact.is_clear).sum())


def gate() -> list[str]:
    """Return where the kernels differ from float64, a line each; an empty list lets them be timed."""
    failures: list[str] = []
    n_tokens = n_clear = 0
    for case, dtype, act, norm in kernel_cases.PARITY:
        workload = draw(case, dtype, min(64, case.d_sae), 0.5, act=act, norm=norm)
        exact = exact_edit(workload.resid, workload.norm, workload.encoder, workload.W_dec_S, workload.removal)
        n_tokens, n_clear = n_tokens + case.n_tokens, n_clear + int(exact.is_clear.sum())
        if wrong := n_unequal(kernels(workload), exact):
            failures.append(f"{act}, {norm}, {dtype}, {case}: {wrong} of {case.n_tokens} tokens are wrong")
        if act == "topk" and norm == "none" and (failure := _gate_encode(workload)):
            failures.append(f"{failure}, {dtype}, {case}")
    print(f"parity: {n_tokens} tokens; at {n_tokens - n_clear} of them rounding decides, and nothing is checked")
    return failures


def _gate_encode(workload: Workload) -> str | None:
    """Return what encode_topk or sparse_decode computes wrongly, against float64; None where nothing."""
    encoder = workload.encoder
    assert encoder.W_enc is not None
    assert encoder.b is not None
    acts, indices = ops.encode_topk(workload.rows, encoder.W_enc, encoder.b, encoder.k, backend="fused")
    everything = torch.addmm(encoder.b.double(), workload.rows.double(), encoder.W_enc.double()).relu()
    is_close = partial(torch.allclose, atol=1e-4, rtol=4 * torch.finfo(acts.dtype).eps)
    want = everything.topk(encoder.k, dim=1).values
    if not is_close(acts.double().sort(descending=True).values, want):
        return "encode_topk: not the k largest activations"
    if not is_close(acts.double(), everything.gather(1, indices)):
        return "encode_topk: indices do not belong to the activations"
    b_dec = torch.zeros_like(workload.W_dec[0])
    got = ops.sparse_decode(acts, indices, workload.W_dec, b_dec, backend="fused")
    dense = torch.zeros_like(everything).scatter(1, indices, acts.double())
    spread = dense @ workload.W_dec.double().abs()
    is_sum = (got.double() - dense @ workload.W_dec.double()).abs() <= 2 * torch.finfo(acts.dtype).eps * spread
    return None if is_sum.all() else "sparse_decode: not the sum of the rows"
