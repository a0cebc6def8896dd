"""saev: one file, a line of JSON and then a state dict.

    f = act(z @ W_enc + b_enc),  x^ = f @ W_dec + b_dec      schema 2 and later: z = x
    z = (x - act_mean) / scalar - b_dec                      before: no schema, or schema 1

Tensors have our orientation. The older code subtracted b_dec and was trained on centered and scaled residuals, but the
file stores neither the mean nor the scalar; today's code loads it without any of this, and without an error. Files of
that age are therefore read only with `act_mean` and `scalar`, which are folded into the weights. Two generations of the
code wrote schema 1, so there the caller states `subtract_b_dec` too.

TopK has no ReLU: a negative h among the k largest counts. BatchTopK counts what exceeds `activation.threshold`. Layers
are counted in two ways within the project, so that the caller states the hook point.

Source: github.com/OSU-NLP-Group/saev, src/saev/nn/modeling.py at 3d73f1f, 00d07b7 and earlier.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from defense.core.config import SAEConfig
from defense.errors import CheckpointError

from .common import Given, Imported, Source, fold, numpy_of, unsupported


def detect(source: Source) -> bool:
    """Whether the file begins with a line of JSON."""
    return source.header is not None and "W_dec" in source.keys


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of saev's."""
    header = source.header
    if header is None:
        raise CheckpointError(f"{source} does not begin with a line of JSON, as every file of saev does")
    schema = header.get("schema", 0)
    config = header.get("cfg", {}) if schema else header
    extra = ("activation.threshold",) if "activation.threshold" in source.keys else ()
    tensors = source.tensors(source.payload, ("W_enc", "b_enc", "W_dec", "b_dec", *extra))
    threshold = tensors.pop("activation.threshold", None)
    d_model, d_sae = source.check_sizes(
        tensors["W_dec"], config.get("d_model", config.get("d_vit")), _stated_d_sae(config)
    )
    subtract_b_dec = {0: True, 1: None}.get(schema, False)
    subtract_b_dec = given.value("subtract_b_dec", subtract_b_dec)
    if schema < 2:
        mean, scalar = source.check_vector("act_mean", given.value("act_mean"), d_model), given.value("scalar")
        tensors = fold(tensors, subtract_b_dec=subtract_b_dec, mean=mean, scale=1 / scalar)
    name, params = _activation(header, config)
    act, k = "relu", None
    if name == "TopK":
        act, k = "topk", given.value("k", params.get("top_k", params.get("k")))
    elif name == "BatchTopK":
        act = "batchtopk"
        value = given.value("threshold", None if threshold is None else float(threshold))
        if value < 0:
            raise unsupported(source, f"a BatchTopK SAE with the negative threshold {value}")
        tensors["threshold"] = torch.full((d_sae,), float(value))
    elif name != "Relu":
        raise unsupported(source, f"an SAE with {name}")
    return Imported(
        SAEConfig(
            d_model,
            d_sae,
            act,  # type: ignore[arg-type]
            k,
            topk_relu="none" if act == "topk" else "before",
            subtract_b_dec=subtract_b_dec,
            tokens=given.value("tokens"),
        ),
        numpy_of(tensors),
    )


def _stated_d_sae(config: Mapping[str, Any]) -> int | None:
    stated: int | None = config.get("d_sae")
    if stated is not None:
        return stated
    d_model, factor = config.get("d_model", config.get("d_vit")), config.get("exp_factor")
    return d_model * factor if isinstance(d_model, int) and isinstance(factor, int) else None


def _activation(header: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name of the rule and its settings, from wherever a schema has them."""
    activation = config.get("activation")
    if isinstance(activation, Mapping):
        return activation.get("cls", "Relu"), activation.get("params", {})
    if header.get("cls") in ("TopK", "BatchTopK"):
        return header["cls"], config
    return "Relu", {}
