"""Who computes what the benchmark of the kernels times: the kernels, the reference, eager PyTorch, sparsify."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from defense.benchmarks.kernel_workloads import Workload
from defense.core import ops
from defense.core.latents import token_slice
from defense.core.ops import reference

Edit = Callable[[Workload], Tensor]
"""From a workload to its edited residual, [batch, pos, d_model]."""


def kernels(workload: Workload) -> Tensor:
    """Return the edited residual, by the kernels of `ops.fused`."""
    resid, encoder, W_dec_S = workload.resid, workload.encoder, workload.W_dec_S
    everywhere = token_slice("all", 1)
    edited = ops.fused_suppress(resid, resid, everywhere, workload.norm, encoder, W_dec_S, workload.removal)
    assert edited is not None
    return edited


def plain_reference(workload: Workload) -> Tensor:
    """Return the edited residual, by `ops.reference`."""
    acts = reference.acts_of_set(workload.rows, workload.encoder)
    return (workload.rows - reference.scaled(acts, workload.removal, workload.W_dec_S)).view(workload.resid.shape)


def encode(workload: Workload) -> tuple[Tensor, Tensor]:
    """Return the k largest activations of each token and their latents, [tokens, k] each, by eager PyTorch."""
    encoder = workload.encoder
    assert encoder.W_enc is not None
    assert encoder.b is not None
    pre_acts = torch.addmm(encoder.b, workload.rows, encoder.W_enc).relu()
    acts, indices = pre_acts.topk(encoder.k, dim=1, sorted=False)
    return acts, indices


def eager_dense(workload: Workload) -> Tensor:
    """Return the edited residual: all latents encoded, ranked, scattered into a dense matrix and decoded."""
    acts, indices = encode(workload)
    removal = workload.removal.new_zeros(workload.case.d_sae).index_copy(0, workload.latents, workload.removal)
    removed = acts.new_zeros(workload.case.n_tokens, workload.case.d_sae).scatter(1, indices, acts) * removal
    return (workload.rows - removed @ workload.W_dec).view(workload.resid.shape)


def eager_sparse(workload: Workload) -> Tensor:
    """Return the edited residual: all latents encoded and ranked, the decoder rows of the members of S summed."""
    acts, indices = encode(workload)
    removal = workload.removal.new_zeros(workload.case.d_sae).index_copy(0, workload.latents, workload.removal)
    weights = acts * removal[indices]
    removed = torch.nn.functional.embedding_bag(indices, workload.W_dec, per_sample_weights=weights, mode="sum")
    return (workload.rows - removed).view(workload.resid.shape)


class Peer(NamedTuple):
    """sparsify's encoder, and its decoder."""

    encode: Callable[..., Any]
    decode: Callable[..., Any]


def sparsify() -> Peer | None:
    """Return the encoder and decoder of sparsify; None, and a line on stderr, where it cannot be imported."""
    try:
        from sparsify.fused_encoder import fused_encoder
        from sparsify.utils import decoder_impl
    except ImportError as error:
        print(f"sparsify's variants are left out: {error}", file=sys.stderr)
        return None
    return Peer(fused_encoder, decoder_impl)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function under torch.compile, for static shapes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)
