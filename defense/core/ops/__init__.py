"""The numerical operations behind the Suppressor, and the choice between two implementations of them.

`reference.py`, in plain PyTorch, defines what is correct and runs everywhere. `fused/` holds the Triton kernels: they
run on CUDA devices, for inference, and are imported on first use.

| backend | runs |
|---|---|
| "auto" | the kernels where they can, else the reference; on a GPU the reason is logged, once |
| "fused" | the kernels; raises where they cannot |
| "reference" | the reference |

Arguments are checked here and nowhere below.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from defense.errors import BackendError, ConfigError, ShapeError

from . import reference
from .reference import Encoder

log = logging.getLogger(__name__)

Backend = Literal["auto", "fused", "reference"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_logged: set[str] = set()
_unable: dict[str, str] = {}
"""Why "auto" leaves the kernels alone on a device where one could not be launched."""
_Result = TypeVar("_Result")


def check_backend(backend: str, encoder: Encoder, edit: str) -> None:
    """Refuse a backend that does not exist, or that has no kernel for an SAE or edit.

    Raises:
        ConfigError: `backend` is not one of the three.
        BackendError: It is "fused", and there is no kernel for this SAE or edit.
    """
    if backend not in get_args(Backend):
        raise ConfigError(f"backend={backend!r}; it must be one of {', '.join(get_args(Backend))}")
    if backend == "fused" and (missing := _missing_kernel(encoder, edit)):
        _fall_back(backend, missing)


def runs_fused(backend: Backend, resid: Tensor, encoder: Encoder, edit: str) -> bool:
    """Return whether the kernels (else the reference) will remove what S writes into `resid`.

    Raises:
        BackendError: `backend` is "fused" and they cannot.
    """
    return _chosen(backend, resid, encoder.W_S, _missing_kernel(encoder, edit))


def fused_suppress(
    edited: Tensor,
    resid: Tensor,
    tokens: slice,
    norm: str,
    encoder: Encoder,
    W_dec_S: Tensor,
    removal: Tensor,
    *,
    backend: Backend = "fused",
) -> Tensor | None:
    """Return `edited` less what the latents of S write into some positions of `resid`; call `runs_fused` first.

    None where `backend` is "auto" and a kernel cannot be launched: the reference has to do it.

    Args:
        edited: [batch, pos, d_model]; `resid` itself, or what other sets left of it.
        resid: What the SAE reads, [batch, pos, d_model].
        tokens: The positions.
        norm: The SAE's input normalization.
        encoder: The parts of the SAE.
        W_dec_S: Decoder rows of S, [n, d_model].
        removal: 1 - gain_i, [n].
        backend: "fused" or "auto".

    Raises:
        BackendError: `backend` is "fused", and a kernel cannot be launched.
    """
    from . import fused

    first, last, _ = tokens.indices(resid.shape[1])
    of_set = edited, resid, first, max(first, last), norm, encoder.W_S.contiguous(), encoder.b_S.contiguous()
    W_enc = None if encoder.W_enc is None else encoder.W_enc.contiguous()
    of_rule = encoder.threshold_S, W_enc, encoder.b_others, encoder.k
    return _launched(backend, resid.device, lambda: fused.suppress(*of_set, W_dec_S.contiguous(), removal, *of_rule))


def encode_topk(z: Tensor, W_enc: Tensor, b: Tensor, k: int, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Return acts and indices of the k largest latents of each token after ReLU, both [tokens, k].

    Their order is unspecified, as are which of several tied latents is there, and the indices of activations 0. The
    [tokens, d_sae] matrix is never held at once.

    Args:
        z: Normalized residual, [tokens, d_model].
        W_enc: [d_model, d_sae].
        b: Folded bias, [d_sae].
        k: Latents per token.
        backend: See the module.

    Raises:
        ShapeError: Widths that do not fit.
        ConfigError: k lies outside [1, d_sae].
        BackendError: `backend` is "fused" and the kernels cannot run.
    """
    d_model, d_sae = W_enc.shape
    if z.ndim != 2 or z.shape[1] != d_model or b.shape != (d_sae,):
        raise ShapeError(
            f"z is {list(z.shape)} and b {list(b.shape)}; an encoder [{d_model}, {d_sae}] takes z [tokens, {d_model}] "
            f"and b [{d_sae}]"
        )
    if not 1 <= k <= d_sae:
        raise ConfigError(f"k={k}; it must lie between 1 and d_sae={d_sae}")
    z = z.to(W_enc.dtype)
    if _chosen(backend, z, W_enc, None):
        from . import fused

        if fused.n_selected_among(d_sae, k) <= fused.MAX_SELECT:
            tensors = z, W_enc.contiguous(), b.contiguous(), k
            largest: tuple[Tensor, Tensor] | None = _launched(backend, z.device, lambda: fused.encode_topk(*tensors))
            if largest is not None:
                return largest
        else:
            _fall_back(backend, f"k={k} of {d_sae} latents are too many for a program to select")
    return reference.encode_topk(z, W_enc, b, k)


def sparse_decode(acts: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return b_dec plus the sum of acts times their decoder rows, [tokens, d_model].

    Args:
        acts: [tokens, k].
        indices: Which latents, int64 [tokens, k], each in [0, d_sae); not checked, as a GPU would have to wait for it.
        W_dec: [d_sae, d_model].
        b_dec: [d_model].
        backend: See the module.

    Raises:
        ShapeError: Sizes that do not fit.
        BackendError: `backend` is "fused" and the kernels cannot run.
    """
    if acts.ndim != 2 or acts.shape != indices.shape or b_dec.shape != W_dec.shape[1:]:
        raise ShapeError(
            f"acts are {list(acts.shape)}, indices {list(indices.shape)}, W_dec {list(W_dec.shape)} and b_dec "
            f"{list(b_dec.shape)}; want [tokens, k] twice, [d_sae, d_model] and [d_model]"
        )
    acts = acts.to(W_dec.dtype)
    if _chosen(backend, acts, W_dec, None):
        from . import fused

        tensors = (acts.contiguous(), indices.contiguous(), W_dec.contiguous(), b_dec.contiguous())
        decoded: Tensor | None = _launched(backend, acts.device, lambda: fused.sparse_decode(*tensors))
        if decoded is not None:
            return decoded
    return reference.sparse_decode(acts, indices, W_dec, b_dec)


def _missing_kernel(encoder: Encoder, edit: str) -> str | None:
    """Return which rule or edit there is no kernel for, if any."""
    if edit != "scale":
        return f"there is no kernel for the edit {edit!r}, only for 'scale'"
    if encoder.W_mag_S is not None:
        return "there is no kernel for gated SAEs"
    if encoder.negative_counts:
        return "there is no kernel for a TopK SAE without ReLU (topk_relu='none')"
    return None


def _chosen(backend: Backend, tensor: Tensor, weight: Tensor, missing: str | None) -> bool:
    """Return whether the kernels run on `tensor`; raise or log where they were wanted and cannot."""
    if backend == "reference" or (backend == "auto" and not tensor.is_cuda):
        return False
    reason = missing or _obstacle(tensor, weight)
    if reason is None and backend == "auto":
        reason = _unable.get(str(tensor.device))
    if reason is None:
        return True
    _fall_back(backend, reason)
    return False


def _launched(backend: Backend, device: torch.device, job: Callable[[], _Result]) -> _Result | None:
    """Return what kernels compute; None where "auto" has to do without them, on this device from now on."""
    try:
        return job()
    except BackendError as error:
        _fall_back(backend, str(error), error)
        _unable[str(device)] = str(error)
    return None


def _fall_back(backend: str, reason: str, cause: Exception | None = None) -> None:
    """Log, once, why the reference runs instead of the kernels; raise where the kernels were demanded."""
    if backend == "fused":
        raise BackendError(f"backend='fused' cannot run: {reason}. Use 'auto' or 'reference'") from cause
    if not torch.compiler.is_compiling() and reason not in _logged:
        _logged.add(reason)
        log.warning("running the reference instead of the fused kernels: %s", reason)


def _obstacle(tensor: Tensor, weight: Tensor) -> str | None:
    """Return what keeps the kernels from running on these tensors, if anything."""
    if tensor.dtype not in _DTYPES or weight.dtype not in _DTYPES:
        return f"the kernels take float32, float16 and bfloat16, not {tensor.dtype} with weights in {weight.dtype}"
    if torch.is_grad_enabled() and (tensor.requires_grad or weight.requires_grad):
        return "the kernels have no gradient; run under torch.inference_mode() or torch.no_grad()"
    if tensor.device != weight.device:
        return f"the residual is on {tensor.device}, the weights on {weight.device}"
    if not tensor.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {tensor.device}; the kernels need a CUDA device"
    try:
        from . import fused
    except Exception as error:  # a broken triton raises anything
        return f"triton cannot be imported ({error})"
    obstacle: str | None = fused.obstacle(str(tensor.device))
    return obstacle
