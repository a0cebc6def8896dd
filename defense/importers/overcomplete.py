"""Overcomplete: a state dict, `torch.save(sae.state_dict(), FILE)`.

    f = act(relu(x @ encoder.final_block.0.weight.T + bias))
    x^ = f @ D,     D = _weights / (norm of its rows + 1e-8) * exp(multiplier)

There is no b_dec: it is zero, and nothing is subtracted. `encoder.final_block.0.weight` (or `encoder.weight` after
`untied()`) is [d_sae, d_model] and is transposed; an encoder that is tied is D.T. The decoder is normalized and scaled
as above, which is what the library computes in `eval` for its default normalization, "l2".

JumpSAE stores `thresholds` as logarithms. The state dicts of the other classes do not say which they are, nor k, nor
the running threshold of BatchTopK (a plain attribute): the caller states them. Only the library's default encoder, one
linear layer with ReLU, is read; and if inputs were standardized outside the library, the file does not know.

Source: github.com/KempnerInstitute/overcomplete, overcomplete/sae/*.py, 0.3.0.
"""

from __future__ import annotations

import torch

from defense.core.config import SAEConfig

from .common import Given, Imported, Source, numpy_of, unsupported

_DICTIONARY = ("dictionary._weights", "dictionary.multiplier")
_TIED = ("encoder.tied_to._weights", "encoder.tied_to.multiplier")


def detect(source: Source) -> bool:
    """Whether a dictionary layer of the library is in the file."""
    return set(_DICTIONARY) <= source.keys


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a state dict of Overcomplete's."""
    keys = source.keys
    tied = set(_TIED) <= keys
    if odd := sorted(key for key in keys if key.startswith(("encoder.mlp_blocks", "encoder.final_block.1"))):
        raise unsupported(source, f"an SAE with a deep or normalizing encoder ({odd[0]})")
    prefix = "encoder." if tied or "encoder.weight" in keys else "encoder.final_block.0."
    wanted = {*_DICTIONARY, *({f"{prefix}bias"} & keys), *(() if tied else (f"{prefix}weight",))}
    tensors = source.tensors(source.payload, wanted | ({"thresholds"} & keys), _TIED)
    weights = tensors["dictionary._weights"]
    d_model, d_sae = source.check_sizes(weights)
    W_dec = weights / (weights.norm(dim=1, keepdim=True) + 1e-8) * tensors["dictionary.multiplier"].exp()
    parameters = {
        "W_enc": (W_dec if tied else tensors[f"{prefix}weight"]).T,
        "b_enc": tensors.get(f"{prefix}bias", torch.zeros(d_sae)),
        "W_dec": W_dec,
        "b_dec": torch.zeros(d_model),
    }
    act = given.value("act", "jumprelu" if "thresholds" in tensors else None)
    if act == "jumprelu":
        parameters["threshold"] = tensors["thresholds"].exp()
    elif act == "batchtopk":
        parameters["threshold"] = torch.full((d_sae,), float(given.value("threshold")))
    elif act not in ("relu", "topk"):
        raise unsupported(source, f"an SAE with {act}")
    k = given.value("k") if act == "topk" else None
    return Imported(
        SAEConfig(d_model, d_sae, act, k, subtract_b_dec=False, tokens=given.value("tokens")),
        numpy_of(parameters),
    )
