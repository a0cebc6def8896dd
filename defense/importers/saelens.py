"""SAELens: `sae_weights.safetensors` with `cfg.json`, as written before and since version 6.

    z = norm(x), less b_dec where apply_b_dec_to_input
    f = act(z @ W_enc + b_enc)               standard: relu; topk: largest h, then ReLU; jumprelu; gated
    x^ = undo the norm of (f @ W_dec + b_dec)

Tensors have our orientation. In a gated SAE `b_gate` is our b_enc. Folded into the weights, as SAELens does itself:

- `rescale_acts_by_decoder_norm`: h and f are multiplied by the norm of the decoder row, which is divided by it.
- `scaling_factor` [d_sae] of finetuned SAEs multiplies what each latent writes: into W_dec.
- "expected_average_only_in" multiplies x by a factor s that only a training checkpoint's `activation_scaler.json`
  states: W_enc * s, W_dec / s, b_dec / s. Without the factor the file is refused.
- "covariance_whitening" expects (x - mean) @ T, from `activation_whitening.safetensors`: T @ W_enc, W_dec @ T^-1,
  b_dec @ T^-1 + mean, and where b_dec is not subtracted, b_enc - mean @ T @ W_enc.

A BatchTopK SAE is saved as jumprelu with one threshold for all, and read as such.

Source: github.com/jbloomAus/SAELens, sae_lens/saes/*.py and loading/pretrained_sae_loaders.py, 6.54.12.
"""

from __future__ import annotations

from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from defense.core.config import SAEConfig
from defense.errors import CheckpointError

from .common import Given, Imported, Source, fold, numpy_of, unsupported

_RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
_ACTS = {"standard": "relu", "topk": "topk", "jumprelu": "jumprelu", "gated": "gated"}
_EXTRA = {"jumprelu": ("threshold",), "gated": ("r_mag", "b_mag")}


def detect(source: Source) -> bool:
    """Whether W_dec is in a safetensors file beside a `cfg.json` of an SAE, without an encoder of sparsify's."""
    if source.path.suffix != ".safetensors" or not {"W_enc", "W_dec"} <= source.keys:
        return False
    return "d_in" in (source.companion("cfg.json") or {})


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of SAELens'."""
    config = _config(source)
    act = _ACTS[config["architecture"]]
    bias = "b_gate" if act == "gated" else "b_enc"
    tensors = source.tensors(
        source.payload, ("W_enc", bias, "W_dec", "b_dec", *_EXTRA.get(act, ())), ("scaling_factor",)
    )
    tensors["b_enc"] = tensors.pop(bias)
    d_model, d_sae = source.check_sizes(tensors["W_dec"], config.get("d_in"), config.get("d_sae"))
    subtract_b_dec = bool(config.get("apply_b_dec_to_input", True))
    _fold_scaling_factor(source, config, tensors)
    if act == "topk" and config.get("rescale_acts_by_decoder_norm"):
        _fold_decoder_norm(tensors)
    norm = config["normalize_activations"]
    if norm == "expected_average_only_in":
        scaler = source.companion("activation_scaler.json") or {}
        scale = given.value("scaling_factor", scaler.get("scaling_factor"))
        norm, tensors = "none", fold(tensors, subtract_b_dec=subtract_b_dec, scale=scale)
    elif norm == "covariance_whitening":
        norm, tensors = "none", _fold_whitening(source, tensors, subtract_b_dec)
    elif norm not in ("none", "layer_norm", "constant_norm_rescale"):
        raise unsupported(source, f"an SAE with normalize_activations={norm!r}")
    return Imported(
        SAEConfig(
            d_model,
            d_sae,
            act,  # type: ignore[arg-type]  # a value of _ACTS
            given.value("k", config.get("k")) if act == "topk" else None,
            topk_relu="after" if act == "topk" else "before",
            norm=norm,
            subtract_b_dec=subtract_b_dec,
            tokens=given.value("tokens"),
        ),
        numpy_of(tensors),
        source.hook_point_of(config.get("hook_name")),
        config.get("model_name"),
    )


def _config(source: Source) -> dict[str, Any]:
    """Return cfg.json with the names of version 6, its metadata beside them."""
    stated = source.companion("cfg.json")
    if stated is None:
        raise CheckpointError(f"{source} has no cfg.json beside it; put it there, or pass --config")
    config = {_RENAMED.get(key, key): value for key, value in stated.items()}
    config |= config.get("metadata") or {}
    config.setdefault("architecture", "standard")
    if config["architecture"] == "standard" and (act := config.get("activation_fn", "relu")) != "relu":
        if act != "topk":
            raise unsupported(source, f"an SAE with {act}")
        config["architecture"] = "topk"
        config.setdefault("k", (config.get("activation_fn_kwargs") or {}).get("k"))
    if config["architecture"] not in _ACTS:
        raise unsupported(source, f"an SAE of architecture {config['architecture']!r}")
    norm = config.get("normalize_activations")
    if isinstance(norm, bool):  # before 0.4 of its training code
        norm = "expected_average_only_in" if norm else "none"
    config["normalize_activations"] = norm or "none"
    return config


def _fold_scaling_factor(source: Source, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    factor = source.payload.get("scaling_factor")
    if factor is None or torch.allclose(factor.float(), torch.ones(())):
        return
    if not config.get("finetuning_scaling_factor"):
        raise CheckpointError(f"{source} has a scaling_factor, but its cfg.json does not say that it is to be used")
    tensors["W_dec"] = tensors["W_dec"] * factor.float()[:, None]


def _fold_decoder_norm(tensors: dict[str, Tensor]) -> None:
    norms = tensors["W_dec"].norm(dim=1).clamp(min=1e-8)
    tensors["W_enc"] = tensors["W_enc"] * norms
    tensors["b_enc"] = tensors["b_enc"] * norms
    tensors["W_dec"] = tensors["W_dec"] / norms[:, None]


def _fold_whitening(source: Source, tensors: dict[str, Tensor], subtract_b_dec: bool) -> dict[str, Tensor]:
    path = source.path.with_name("activation_whitening.safetensors")
    try:
        whitening = load_file(path)
        mean, matrix, inverse = (whitening[name] for name in ("mean", "matrix", "inverse_matrix"))
    except (safetensors.SafetensorError, OSError, KeyError) as error:
        raise CheckpointError(
            f"{source} expects whitened residuals; {path.name}, which says how, cannot be read beside it: {error}"
        ) from error
    return fold(tensors, subtract_b_dec=subtract_b_dec, mean=mean, scale=matrix, inverse=inverse)
