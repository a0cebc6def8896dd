"""dictionary_learning: `trainer_i/ae.pt` or `trainer_i/checkpoints/ae_{step}.pt`, with `trainer_i/config.json`.

What was saved is a state dict, whose biases already fit raw residuals; or the rolling backup {"step", "ae",
"optimizer", "config", "norm_factor"} of a run, whose biases (and a threshold that was set) do not yet: they are
multiplied by `norm_factor`.

| class | arithmetic | tensors |
|---|---|---|
| AutoEncoder | relu(encoder(x - bias)) | the decoder's columns are made unit length, as its `from_pretrained` does |
| AutoEncoderNew | relu(encoder(x)) | `decoder.bias` is b_dec, not subtracted |
| AutoEncoderTopK | the k largest of relu(encoder(x - b_dec)) | |
| BatchTopKSAE | relu(encoder(x - b_dec)) where above `threshold`; plain relu where that was never set (-1) | |
| MatryoshkaBatchTopKSAE | the same | W_enc and W_dec have our orientation |
| GatedAutoEncoder | gated | `gate_bias` is b_enc, `mag_bias` is b_mag, `decoder_bias` is b_dec |
| JumpReluAutoEncoder | jumprelu, b_dec not subtracted | W_enc and W_dec have our orientation |

Elsewhere `encoder.weight` [d_sae, d_model] and `decoder.weight` [d_model, d_sae] are transposed. TopK and BatchTopK
have the same tensors: only `dict_class` in the configuration tells them apart. Layer numbers are a language model's, or
empty: the caller states the hook point.

Source: github.com/saprmarks/dictionary_learning, dictionary.py, trainers/*.py and training.py, 0.1.0 and 60ec6bf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from defense.core.config import SAEConfig
from defense.errors import CheckpointError, ConfigError

from .common import Given, Imported, Source, numpy_of, unsupported

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_TENSORS = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*_LINEAR, "b_dec"),
    "BatchTopKSAE": (*_LINEAR, "b_dec"),
    "MatryoshkaBatchTopKSAE": ("W_enc", "b_enc", "W_dec", "b_dec"),
    "GatedAutoEncoder": ("encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"),
    "JumpReluAutoEncoder": ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
}
_OURS = {
    "encoder.bias": "b_enc",
    "gate_bias": "b_enc",
    "mag_bias": "b_mag",
    "bias": "b_dec",
    "decoder.bias": "b_dec",
    "decoder_bias": "b_dec",
}
_BIASES = ("b_enc", "b_mag", "b_dec")
_ALIASES = {"MatroyshkaBatchTopKSAE": "MatryoshkaBatchTopKSAE"}  # as sae-for-vlm spells it
_CLASS_OF_ACT = {"topk": "AutoEncoderTopK", "batchtopk": "BatchTopKSAE"}


def detect(source: Source) -> bool:
    """Whether the tensors are those of one of the classes, and no run of sae-for-vlm's."""
    if source.path.suffix == ".safetensors" or source.header is not None:
        return False
    return _class_by_tensors(_state(source)) is not None and "Matroyshka" not in str(stated_class(source))


def _state(source: Source) -> Mapping[str, Any]:
    payload = source.payload if isinstance(source.payload, Mapping) else {}
    backup = payload.get("ae")
    return backup if isinstance(backup, Mapping) else payload


def stated_class(source: Source) -> str | None:
    """Return `dict_class` of the configuration: in the folder of the weights, above it, or in a backup."""
    config = source.companion("config.json", "../config.json")
    if config is None and isinstance(source.payload, Mapping) and isinstance(source.payload.get("config"), Mapping):
        config = {"trainer": source.payload["config"]}
    trainer = (config or {}).get("trainer")
    return trainer.get("dict_class") if isinstance(trainer, Mapping) else None


def _class_by_tensors(state: Mapping[str, Any]) -> str | None:
    """Return the class that has these tensors; "AutoEncoderTopK" for BatchTopKSAE too, which has the same."""
    settings = {"k", "threshold", "group_sizes"}
    if "group_sizes" not in state and {*_TENSORS["JumpReluAutoEncoder"]} == set(state):
        return "JumpReluAutoEncoder"
    for name, tensors in _TENSORS.items():
        if set(state) - settings == set(tensors) and (name != "MatryoshkaBatchTopKSAE" or "group_sizes" in state):
            return name
    return None


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of dictionary_learning's."""
    state = _state(source)
    name = _class(source, given, state)
    tensors = source.tensors(state, _TENSORS[name], ("k", "threshold", "group_sizes"))
    parameters = {_OURS.get(key, key): tensor for key, tensor in tensors.items()}
    if "encoder.weight" in parameters:
        parameters["W_enc"] = parameters.pop("encoder.weight").T
        parameters["W_dec"] = parameters.pop("decoder.weight").T
    d_model, d_sae = source.check_sizes(parameters["W_dec"])
    factor = _norm_factor(source)
    for bias in _BIASES:
        if bias in parameters:
            parameters[bias] = parameters[bias] * factor
    if name == "AutoEncoder":
        _normalize_decoder(parameters)
    act, k = "relu", None
    if name == "AutoEncoderTopK":
        act, k = "topk", given.value("k", _scalar(source, state, "k"))
    elif name in ("BatchTopKSAE", "MatryoshkaBatchTopKSAE"):
        threshold = _scalar(source, state, "threshold")
        if threshold is None or threshold >= 0:
            threshold = given.value("threshold", None if threshold is None else threshold * factor)
            act, parameters["threshold"] = "batchtopk", torch.full((d_sae,), float(threshold))
    elif name == "JumpReluAutoEncoder":
        act, parameters["threshold"] = "jumprelu", parameters["threshold"] * factor
    elif name == "GatedAutoEncoder":
        act = "gated"
    return Imported(
        SAEConfig(
            d_model,
            d_sae,
            act,  # type: ignore[arg-type]
            k,
            subtract_b_dec=name not in ("AutoEncoderNew", "JumpReluAutoEncoder"),
            tokens=given.value("tokens"),
        ),
        numpy_of(parameters),
    )


def _class(source: Source, given: Given, state: Mapping[str, Any]) -> str:
    stated = stated_class(source)
    name = _ALIASES.get(stated, stated) if stated else _class_by_tensors(state)
    if stated and name not in _TENSORS:
        raise unsupported(source, f"a {stated}")
    if name is None:
        raise CheckpointError(f"{source} has the tensors {sorted(state)}; no class of dictionary_learning has")
    if not stated and name == "AutoEncoderTopK":
        act = given.value("act")  # `dict_class` decides, and is not there
        if act not in _CLASS_OF_ACT:
            raise ConfigError(f"{source} has the tensors of a TopK or a BatchTopK SAE; act must be one, not {act!r}")
        return _CLASS_OF_ACT[act]
    return name


def _norm_factor(source: Source) -> float:
    """Return what the biases still have to be multiplied by: `norm_factor` in the backup of a run, else 1."""
    payload = source.payload
    return float(payload.get("norm_factor", 1.0)) if isinstance(payload.get("ae"), Mapping) else 1.0


def _scalar(source: Source, state: Mapping[str, Any], name: str) -> Any:
    value = state.get(name)
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.numel() != 1:
        raise CheckpointError(f"{source}: {name} is {value!r}; it must be one number")
    return value.item()


def _normalize_decoder(parameters: dict[str, Tensor]) -> None:
    norms = parameters["W_dec"].norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms)):
        parameters["W_dec"] = parameters["W_dec"] / norms[:, None]
        parameters["W_enc"] = parameters["W_enc"] * norms
        parameters["b_enc"] = parameters["b_enc"] * norms
