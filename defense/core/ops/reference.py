"""The definition of correct: the formula's terms in plain PyTorch.

    resid' = resid - s * sum over i in S of (1 - gain_i) * f_i(z) * W_dec[i]

Everything works on rows, [tokens, d_model], and does as little as exactness allows: only the |S| columns of the
encoder are computed for every token. A TopK rule couples latents, so there the whole encoder is computed too, but
only for tokens on which a latent of S is positive: where none is, none can be among the k largest and count.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

_RIDGE = 1e-9
_CHUNK_ELEMENTS = 2**24
"""Pre-activations held at once for tokens that need the whole encoder (64 MiB in float32)."""
_CHUNK_ROWS_CPU = 512
"""Tokens of them, at most, on a CPU, whose caches rank no more of them well."""


class Encoder(NamedTuple):
    """The encoder parts needed for the activations of the n latents in S."""

    W_S: Tensor
    """Columns of W_enc, [d_model, n]."""
    b_S: Tensor
    """Folded bias, [n]."""
    threshold_S: Tensor | None
    """JumpReLU and BatchTopK: f = h where h > threshold, [n]."""
    W_mag_S: Tensor | None
    """Gated: encoder of the magnitudes, [d_model, n]."""
    b_mag_S: Tensor | None
    """Gated: folded bias of the magnitudes, [n]."""
    W_enc: Tensor | None
    """TopK: the whole encoder, [d_model, d_sae]."""
    b: Tensor | None
    """TopK: the whole folded bias, [d_sae]."""
    latents: Tensor | None
    """TopK: indices of S, int64 [n]."""
    k: int = 0
    """TopK: how many latents count at a token."""
    negative_counts: bool = False
    """TopK without a ReLU: a negative latent among the k largest counts too."""
    b_others: Tensor | None = None
    """TopK, read by the kernels alone: `b` with -inf for the latents of S, so that none of them is above another."""


def acts_of_set(z: Tensor, encoder: Encoder) -> Tensor:
    """Return f_i for i in S, [tokens, n], exactly as encoding all latents would.

    Args:
        z: Normalized residual, [tokens, d_model].
        encoder: The parts of the SAE.
    """
    pre_acts = z @ encoder.W_S + encoder.b_S
    if encoder.W_enc is not None:
        assert encoder.b is not None
        assert encoder.latents is not None
        of_whole = encoder.W_enc, encoder.b, encoder.latents, encoder.k, encoder.negative_counts
        return (_opaque_topk_acts if _is_traced() else _topk_acts)(z, pre_acts, *of_whole)
    if encoder.W_mag_S is not None and encoder.b_mag_S is not None:
        return (z @ encoder.W_mag_S + encoder.b_mag_S).relu() * (pre_acts > 0)
    acts = pre_acts.relu()
    return acts if encoder.threshold_S is None else acts * (pre_acts > encoder.threshold_S)


def _topk_acts(
    z: Tensor, pre_acts: Tensor, W_enc: Tensor, b: Tensor, latents: Tensor, k: int, negative_counts: bool
) -> Tensor:
    """Keep pre_acts [tokens, n] of latents among the k largest of their token."""
    values = pre_acts if negative_counts else pre_acts.relu()
    rows = torch.arange(len(z), device=z.device) if negative_counts else (values > 0).any(1).nonzero()[:, 0]
    acts = torch.zeros_like(values)
    if len(rows) == 0:
        return acts
    for chunk in rows.split(_rows_at_once(W_enc)):
        everything = torch.addmm(b, z[chunk], W_enc)
        # i is among the k largest iff fewer than k are larger, which is iff it is not below the k-th largest.
        kth_largest = everything.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
        # Compared within one product: the same latent computed in `pre_acts` may differ in its last bit.
        survives = everything[:, latents] >= kth_largest
        acts[chunk] = values[chunk] * survives
    return acts


def _rows_at_once(W_enc: Tensor) -> int:
    """Return how many tokens get the whole encoder at once."""
    rows = max(1, _CHUNK_ELEMENTS // W_enc.shape[1])
    return min(rows, _CHUNK_ROWS_CPU) if W_enc.device.type == "cpu" else rows


def encode_topk(z: Tensor, W_enc: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return acts and indices of the k largest latents of each token after ReLU, both [tokens, k], in no set order.

    Args:
        z: Normalized residual, [tokens, d_model].
        W_enc: [d_model, d_sae].
        b: Folded bias, [d_sae].
        k: Latents per token.
    """
    acts, indices = [], []
    for chunk in z.split(_rows_at_once(W_enc)):
        largest = torch.addmm(b, chunk, W_enc).relu().topk(k, dim=1, sorted=False)
        acts.append(largest.values)
        indices.append(largest.indices)
    return torch.cat(acts), torch.cat(indices)


def sparse_decode(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Return b_dec plus the sum of acts times their decoder rows, [tokens, d_model].

    Args:
        acts: [tokens, k].
        indices: Which latents, int64 [tokens, k].
        W_dec: [d_sae, d_model].
        b_dec: [d_model].
    """
    return torch.nn.functional.embedding_bag(indices, W_dec, per_sample_weights=acts, mode="sum") + b_dec


def scaled(acts: Tensor, removal: Tensor, W_dec_S: Tensor) -> Tensor:
    """Return what the edit `scale` subtracts from z, [tokens, d_model].

    Args:
        acts: f_i, [tokens, n].
        removal: 1 - gain_i, [n].
        W_dec_S: Decoder rows of S, [n, d_model].
    """
    return (acts * removal) @ W_dec_S


def steered(acts: Tensor, removal: Tensor, W_dec_S: Tensor, values: Tensor) -> Tensor:
    """Return what the edit `set` subtracts from z, [tokens, d_model]: f_i goes to values_i, on every token."""
    return ((acts - values) * removal) @ W_dec_S


def projected(acts: Tensor, removal: Tensor, W_dec_S: Tensor, centered: Tensor) -> Tensor:
    """Return what the edit `project` subtracts from z, [tokens, d_model].

    At each token the component of `centered` in the span of the decoder rows of the latents that fire there, written in
    coordinates of those rows, so that each latent gives up its own share (1 - gain_i). With every gain 0 it is the
    orthogonal projection.

    Args:
        acts: f_i, [tokens, n]; a latent fires where its activation is not zero.
        removal: 1 - gain_i, [n].
        W_dec_S: Decoder rows of S, [n, d_model].
        centered: z minus what the SAE reconstructs from no latents at all (b_dec), [tokens, d_model].
    """
    return (_opaque_projected if _is_traced() else _projected)(acts, removal, W_dec_S, centered)


def _projected(acts: Tensor, removal: Tensor, W_dec_S: Tensor, centered: Tensor) -> Tensor:
    delta = torch.zeros_like(centered)
    tokens = (acts != 0).any(1).nonzero()[:, 0]
    if len(tokens):
        # In float64: rows of similar latents are nearly parallel, and a rounded Gram matrix is then singular.
        rows = W_dec_S.double()
        shares = _solved(acts[tokens] != 0, rows, centered[tokens].double() @ rows.T)
        delta[tokens] = ((shares * removal) @ rows).to(delta.dtype)
    return delta


def _solved(fires: Tensor, rows: Tensor, dots: Tensor) -> Tensor:
    """Return coordinates in the rows that fire, from products with these rows, both [tokens, n]; 0 for the others."""
    n_active = int(fires.sum(1).max())
    active = fires.to(torch.int8).topk(n_active, dim=1).indices  # the firing latents first, then idle ones
    mask = fires.gather(1, active).double()
    gram = rows @ rows.T
    system = gram[active[:, :, None], active[:, None, :]] * mask[:, :, None] * mask[:, None, :]
    # Idle latents get a row of the identity; the ridge keeps equal rows solvable.
    system = system + torch.diag_embed(1 - mask + _RIDGE)
    coordinates = torch.linalg.solve(system, (dots.gather(1, active) * mask)[..., None])[..., 0]
    return torch.zeros(fires.shape, dtype=rows.dtype, device=rows.device).scatter(1, active, coordinates * mask)


# --- for torch.compile, torch.export and torch.jit.trace -------------------------------------------------------------
#
# Which tokens need the whole encoder depends on the data, and so would the graph: traced on pictures on which nothing
# fires, it would be that of stock CLIP. As operators of their own, these functions stay whole in a graph.


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]  # no types


@torch.library.custom_op("clip_defense::topk_acts", mutates_args=())
def _opaque_topk_acts(
    z: Tensor, pre_acts: Tensor, W_enc: Tensor, b: Tensor, latents: Tensor, k: int, negative_counts: bool
) -> Tensor:
    return _topk_acts(z, pre_acts, W_enc, b, latents, k, negative_counts)


@_opaque_topk_acts.register_fake
def _(z: Tensor, pre_acts: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(pre_acts)


def _keep_acts(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(output)


def _grad_of_topk_acts(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    (acts,) = ctx.saved_tensors
    return None, grad * (acts != 0), None, None, None, None, None


_opaque_topk_acts.register_autograd(_grad_of_topk_acts, setup_context=_keep_acts)


@torch.library.custom_op("clip_defense::projected", mutates_args=())
def _opaque_projected(acts: Tensor, removal: Tensor, W_dec_S: Tensor, centered: Tensor) -> Tensor:
    return _projected(acts, removal, W_dec_S, centered)


@_opaque_projected.register_fake
def _(acts: Tensor, removal: Tensor, W_dec_S: Tensor, centered: Tensor) -> Tensor:
    return torch.empty_like(centered)


def _keep_all_but_centered(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


@torch.library.custom_op("clip_defense::projected_grad", mutates_args=())
def _opaque_projected_grad(acts: Tensor, removal: Tensor, W_dec_S: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient of `_projected` by `centered`, in which it is linear: its adjoint, applied to `grad`."""
    found = torch.zeros_like(grad)
    tokens = (acts != 0).any(1).nonzero()[:, 0]
    if len(tokens):
        rows = W_dec_S.double()
        shares = _solved(acts[tokens] != 0, rows, grad[tokens].double() @ rows.T * removal)
        found[tokens] = (shares @ rows).to(found.dtype)
    return found


@_opaque_projected_grad.register_fake
def _(acts: Tensor, removal: Tensor, W_dec_S: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(grad)


def _grad_of_projected(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    return None, None, None, _opaque_projected_grad(*ctx.saved_tensors, grad)


_opaque_projected.register_autograd(_grad_of_projected, setup_context=_keep_all_but_centered)
