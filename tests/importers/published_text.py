"""Files as the projects on language models publish them, each with its project's arithmetic."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file

from .arithmetic import BLOCK, STATED, Case, D, K, M, largest, layer_norm, numpied, our_orientation, rand, relu


def sparsify(folder: Path) -> Case:
    """On disk `num_latents` is 0 where the size follows from the factor."""
    folder = folder / "vision_model.encoder.layers.7"
    folder.mkdir()
    state = {"encoder.weight": rand(M, D), "encoder.bias": rand(M), "W_dec": rand(M, D, seed=1), "b_dec": rand(D)}
    save_file(state, folder / "sae.safetensors")
    config = {"activation": "topk", "expansion_factor": M // D, "num_latents": 0, "k": K, "transcode": False, "d_in": D}
    (folder / "cfg.json").write_text(json.dumps(config))
    p = numpied(state)

    def forward(x):
        f = largest(relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]))
        return f, f @ p["W_dec"] + p["b_dec"]

    return Case(folder, forward, {"tokens": "all"}, {"hook_point": BLOCK, "act": "topk", "k": K, "d_sae": M})


SAELENS = {"d_in": D, "d_sae": M, "apply_b_dec_to_input": True, "normalize_activations": "none"}


def saelens(folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    save_file({key: value.contiguous() for key, value in state.items()}, folder / "sae_weights.safetensors")
    (folder / "cfg.json").write_text(json.dumps(config))


def saelens_before_6(folder: Path) -> Case:
    """The names of version 3 and 5, a boolean norm, and a topk that is an `activation_fn` of a standard SAE."""
    state = our_orientation(seed=12) | {"scaling_factor": torch.ones(M)}
    kwargs = {"hook_point": BLOCK, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}
    saelens(folder, state, SAELENS | kwargs | {"normalize_activations": False, "model_name": "vit"})
    p = numpied(state)

    def forward(x):
        f = relu(largest((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"]))
        return f, f @ p["W_dec"] + p["b_dec"]

    expected = {"hook_point": BLOCK, "act": "topk", "k": K, "host_model": "vit"}
    return Case(folder, forward, {"tokens": "cls"}, expected | {"tokens": "cls"})


def saelens_finetuned(folder: Path) -> Case:
    """A factor on what each latent writes."""
    state = our_orientation(seed=13) | {"scaling_factor": rand(M).abs() + 0.5}
    saelens(folder, state, SAELENS | {"finetuning_scaling_factor": True, "hook_point": BLOCK})
    p = numpied(state)

    def forward(x):
        f = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        return f, (f * p["scaling_factor"]) @ p["W_dec"] + p["b_dec"]

    return Case(folder, forward, {"tokens": "all"}, {"act": "relu"})


def dictionary(folder: Path, state: dict[str, Any], dict_class: str | None, name: str = "trainer_0/ae.pt") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path)
    if dict_class:
        config = {"trainer": {"dict_class": dict_class, "layer": "", "lm_name": "", "submodule_name": ""}}
        (folder / "trainer_0/config.json").write_text(json.dumps(config))
    return path


def linear_dictionary(**more: Any) -> dict[str, Any]:
    state = {"encoder.weight": rand(M, D) / D**0.5, "encoder.bias": rand(M) * 0.3, "decoder.weight": rand(D, M)}
    return state | {"b_dec": rand(D)} | more


def dictionary_topk(folder: Path) -> Case:
    state = linear_dictionary(k=torch.tensor(K, dtype=torch.int), threshold=torch.tensor(0.7))
    p = numpied(state)

    def forward(x):
        f = largest(relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"]))
        return f, f @ p["decoder.weight"].T + p["b_dec"]

    return Case(dictionary(folder, state, "AutoEncoderTopK"), forward, STATED, {"act": "topk", "k": K})


def dictionary_batchtopk(folder: Path) -> Case:
    """The same tensors as topk: the configuration decides."""
    state = linear_dictionary(k=torch.tensor(K, dtype=torch.int), threshold=torch.tensor(0.7))
    p = numpied(state)

    def forward(x):
        f = relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
        f = f * (f > p["threshold"])
        return f, f @ p["decoder.weight"].T + p["b_dec"]

    path = dictionary(folder, state, "BatchTopKSAE", "trainer_0/checkpoints/ae_100.pt")
    return Case(path, forward, STATED, {"act": "batchtopk", "k": None})


def dictionary_backup(folder: Path) -> Case:
    """The rolling backup of a run, whose biases do not fit raw residuals yet."""
    state = linear_dictionary(k=torch.tensor(K, dtype=torch.int), threshold=torch.tensor(0.3))
    factor = 2.5
    p = numpied(state)

    def forward(x):  # trained on x / factor, with reconstructions multiplied back
        f = relu((x / factor - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
        f = f * (f > p["threshold"])
        return f * factor, (f @ p["decoder.weight"].T + p["b_dec"]) * factor

    backup = {"step": 3, "ae": state, "optimizer": {}, "config": {"dict_class": "BatchTopKSAE"}, "norm_factor": factor}
    return Case(dictionary(folder, backup, None), forward, STATED, {"act": "batchtopk"})


def dictionary_never_set_threshold(folder: Path) -> Case:
    state = linear_dictionary(k=torch.tensor(K, dtype=torch.int), threshold=torch.tensor(-1.0))
    p = numpied(state)

    def forward(x):
        f = relu((x - p["b_dec"]) @ p["encoder.weight"].T + p["encoder.bias"])
        return f, f @ p["decoder.weight"].T + p["b_dec"]

    return Case(dictionary(folder, state, "BatchTopKSAE"), forward, STATED, {"act": "relu"})


def dictionary_jumprelu(folder: Path) -> Case:
    """b_dec is not subtracted here."""
    state = our_orientation(seed=14) | {"threshold": rand(M).abs()}
    p = numpied(state)

    def forward(x):
        h = x @ p["W_enc"] + p["b_enc"]
        f = relu(h) * (h > p["threshold"])
        return f, f @ p["W_dec"] + p["b_dec"]

    return Case(dictionary(folder, state, "JumpReluAutoEncoder"), forward, STATED, {"subtract_b_dec": False})


def openai(folder: Path, activation: str = "TopK", settings: dict[str, Any] | None = None) -> Case:
    """Layer norm where the activation is TopK."""
    state = {"encoder.weight": rand(M, D), "decoder.weight": rand(D, M), "pre_bias": rand(D), "latent_bias": rand(M)}
    stored = state | {"stats_last_nonzero": torch.zeros(M, dtype=torch.long), "latents_mean_square": torch.zeros(M)}
    stored |= {"latents_activation_frequency": torch.ones(M), "activation": activation}
    stored["activation_state_dict"] = {"k": K, "postact_fn": "ReLU"} if settings is None else settings
    torch.save(stored, folder / "sae.pt")
    p = numpied(state)

    def forward(x):
        z, mean, std = layer_norm(x) if activation == "TopK" else (x, 0, 1)
        h = (z - p["pre_bias"]) @ p["encoder.weight"].T + p["latent_bias"]
        f = relu(largest(h)) if activation == "TopK" else relu(h)
        return f, (f @ p["decoder.weight"].T + p["pre_bias"]) * std + mean

    norm = "layer_norm" if activation == "TopK" else "none"
    return Case(folder / "sae.pt", forward, STATED, {"norm": norm})


def openai_relu(folder: Path) -> Case:
    return openai(folder, "ReLU", {})


def openai_tied_identity(folder: Path) -> Case:
    """A tied decoder, and no ReLU after the selection."""
    state = {"encoder.weight": rand(M, D), "pre_bias": rand(D), "latent_bias": rand(M) - 3}
    stored = state | {"decoder.linear.weight": state["encoder.weight"], "activation": "TopK"}
    stored["activation_state_dict"] = {"k": 30, "postact_fn": "Identity"}
    torch.save(stored, folder / "sae.pt")
    p = numpied(state)

    def forward(x):
        z, mean, std = layer_norm(x)
        f = largest((z - p["pre_bias"]) @ p["encoder.weight"].T + p["latent_bias"], 30)
        return f, (f @ p["encoder.weight"] + p["pre_bias"]) * std + mean

    return Case(folder / "sae.pt", forward, STATED, {"topk_relu": "none", "k": 30})


def overcomplete_topk(folder: Path) -> Case:
    state = {"encoder.final_block.0.weight": rand(M, D), "encoder.final_block.0.bias": rand(M)}
    state |= {"dictionary._weights": rand(M, D, seed=2), "dictionary.multiplier": torch.tensor(0.4)}
    torch.save(state, folder / "sae.pt")
    p = numpied(state)

    def forward(x):
        f = largest(relu(x @ p["encoder.final_block.0.weight"].T + p["encoder.final_block.0.bias"]))
        rows = p["dictionary._weights"]
        return f, f @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)) * np.exp(0.4)

    return Case(folder / "sae.pt", forward, STATED | {"act": "topk", "k": K}, {"subtract_b_dec": False})
