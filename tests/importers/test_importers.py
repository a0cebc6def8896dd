"""Published SAE formats: files made to their description, against the arithmetic of their projects in plain numpy."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from defense import importers
from defense.cli import app
from defense.errors import CheckpointError, ConfigError, HookPointError, NonFiniteError, ShapeError
from defense.importers import common, pickles
from defense.store import checkpoint

D, M, K, N = 12, 36, 5, 64
BLOCK = "blocks.7.hook_resid_post"
STATED = {"hook_point": BLOCK, "tokens": "all"}


class Case(NamedTuple):
    """A file, how its project computes acts and reconstruction, and what the caller has to state."""

    path: Path
    forward: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]
    stated: dict[str, Any]
    expected: dict[str, Any]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape) * 101 + len(shape))
    return torch.randn(*shape, generator=generator)


def numpied(state: dict[str, Any]) -> dict[str, np.ndarray]:
    return {key: value.double().numpy() for key, value in state.items() if isinstance(value, torch.Tensor)}


def residuals() -> np.ndarray:
    """Rows with a mean, so that a bias or a centering that is left out shows."""
    return rand(N, D, seed=3).double().numpy() * 2 + 1.5


def relu(h: np.ndarray) -> np.ndarray:
    return np.maximum(h, 0)


def largest(h: np.ndarray, k: int = K) -> np.ndarray:
    """The k largest entries of each row, as they are."""
    kept = np.zeros_like(h)
    rows = np.arange(len(h))[:, None]
    ids = np.argsort(h, axis=1)[:, -k:]
    kept[rows, ids] = h[rows, ids]
    return kept


def layer_norm(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, std = x.mean(1, keepdims=True), x.std(1, keepdims=True, ddof=1)
    return (x - mean) / (std + 1e-5), mean, std


def our_orientation(seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        "W_enc": rand(D, M, seed=seed + 1) / D**0.5,
        "b_enc": rand(M, seed=seed + 2) * 0.3,
        "W_dec": rand(M, D, seed=seed + 3),
        "b_dec": rand(D, seed=seed + 4),
    }


@contextmanager
def pickled_class(module: str, name: str):
    """A class that can be pickled by a name whose module is gone when the file is read."""
    packages = [module[:end] for end in (i for i, c in enumerate(module + ".") if c == ".")]
    made = type(name, (), {"__module__": module})
    sys.modules |= {package: ModuleType(package) for package in packages}
    setattr(sys.modules[module], name, made)
    try:
        yield made
    finally:
        for package in packages:
            del sys.modules[package]


def with_fields(made: type, fields: dict[str, Any]) -> Any:
    config = made()
    vars(config).update(fields)
    return config


# --- the formats ------------------------------------------------------------------------------------------------------

PRISMA = {
    "model_class_name": "HookedViT",
    "model_name": "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K",
    "hook_point_layer": 7,
    "layer_subtype": "hook_resid_post",
    "context_size": 50,
    "d_in": D,
    "expansion_factor": M // D,
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": "layer_norm",
    "cls_token_only": False,
    "use_patches_only": False,
    "architecture": "standard",
    "is_transcoder": False,
    "_device": "cuda",
    "_dtype": "float32",
}


def prisma_forward(state, act, norm="layer_norm"):
    p = numpied(state)

    def forward(x):
        if norm == "layer_norm":
            z, mean, std = layer_norm(x)
        elif norm == "constant_norm_rescale":
            z = x * D**0.5 / np.linalg.norm(x, axis=1, keepdims=True)
            mean, std = 0, np.linalg.norm(x, axis=1, keepdims=True) / D**0.5
        else:
            z, mean, std = x, 0, 1
        f = act((z - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        return f, (f @ p["W_dec"] + p["b_dec"]) * std + mean

    return forward


def prisma(folder: Path, norm: str = "layer_norm", **fields) -> Case:
    """A configuration object of a class that is not installed, beside the tensors."""
    state = our_orientation()
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        config = (
            PRISMA | {"device": torch.device("cpu"), "dtype": torch.float32, "normalize_activations": norm} | fields
        )
        config["cached_activations_path"] = Path("activations")
        torch.save({"cfg": with_fields(made, config), "state_dict": state}, folder / "n_images_2600058.pt")
    torch.save({"log": rand(M)}, folder / "n_images_2600058_log_feature_sparsity.pt")
    act = (lambda h: relu(largest(h))) if fields.get("activation_fn_str") == "topk" else relu
    expected = {"hook_point": BLOCK, "norm": norm, "tokens": "all", "quick_gelu": False}
    return Case(folder, prisma_forward(state, act, norm), {}, expected | {"host_model": PRISMA["model_name"]})


def prisma_topk(folder: Path) -> Case:
    case = prisma(folder, activation_fn_str="topk", activation_fn_kwargs={"k": K}, cls_token_only=True)
    return case._replace(expected=case.expected | {"tokens": "cls", "act": "topk", "k": K, "topk_relu": "after"})


def prisma_constant_norm(folder: Path) -> Case:
    case = prisma(folder, "constant_norm_rescale", use_patches_only=True)
    return case._replace(expected=case.expected | {"tokens": "patch"})


def prisma_json(folder: Path) -> Case:
    """A bare state dict beside the configuration in JSON, whose older form names the hook point itself."""
    state = our_orientation(seed=5)
    fields = PRISMA | {"hook_point": BLOCK, "device": {"__type__": "torch.device", "value": "cuda:0"}}
    for gone in ("layer_subtype", "is_transcoder", "activation_fn_kwargs", "architecture"):
        del fields[gone]
    (folder / "config.json").write_text(json.dumps(fields))
    torch.save(state, folder / "weights.pt")
    return Case(folder / "weights.pt", prisma_forward(state, relu), {}, {"hook_point": BLOCK, "norm": "layer_norm"})


def prisma_gated(folder: Path) -> Case:
    state = our_orientation(seed=6) | {"b_gate": rand(M, seed=7) * 0.3, "r_mag": rand(M, seed=8) * 0.2}
    state["b_mag"] = rand(M, seed=9) * 0.3
    (folder / "config.json").write_text(json.dumps(PRISMA | {"architecture": "gated"}))
    torch.save(state, folder / "weights.pt")
    p = numpied(state)

    def forward(x):
        z, mean, std = layer_norm(x)
        z = z - p["b_dec"]
        f = relu(z @ (p["W_enc"] * np.exp(p["r_mag"])) + p["b_mag"]) * (z @ p["W_enc"] + p["b_gate"] > 0)
        return f, (f @ p["W_dec"] + p["b_dec"]) * std + mean

    return Case(folder, forward, {}, {"act": "gated"})


def prisma_pkl_gz(folder: Path) -> Case:
    """A plain pickle, compressed: torch's reader cannot read it."""
    state = our_orientation(seed=10)
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        saved = {"cfg": with_fields(made, PRISMA), "state_dict": {k: torch.nn.Parameter(v) for k, v in state.items()}}
        with gzip.open(folder / "sae.pkl.gz", "wb") as file:
            pickle.dump(saved, file)
    return Case(folder / "sae.pkl.gz", prisma_forward(state, relu), {}, {"hook_point": BLOCK})


def prisma_oldest(folder: Path) -> Case:
    state = our_orientation(seed=11)
    torch.save({"config": PRISMA, "autoencoder": {"state_dict": state}}, folder / "tiny.pt")
    return Case(folder / "tiny.pt", prisma_forward(state, relu), {}, {"hook_point": BLOCK})


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


def sae_for_vlm(folder: Path) -> Case:
    """The class is misspelled, the layer is in the name of the run."""
    run = folder / "random_k_2/train_activations_clip-vit-large-patch14-336_7_post_mlp_residual_matroyshka_20_x8"
    state = our_orientation(seed=15) | {"k": torch.tensor(K), "threshold": torch.tensor(0.4)}
    state["group_sizes"] = torch.tensor([M // 4, M - M // 4])
    p = numpied(state)

    def forward(x):
        f = relu((x - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        f = f * (f > p["threshold"])
        return f, f @ p["W_dec"] + p["b_dec"]

    path = dictionary(run, state, "MatroyshkaBatchTopKSAE", "trainer_0/checkpoints/ae_100000.pt")
    return Case(path, forward, {"tokens": "cls"}, {"hook_point": BLOCK, "act": "batchtopk"})


def patchsae(folder: Path) -> Case:
    """A pickled configuration; layers are counted from the end."""
    state = our_orientation(seed=16)
    fields = {"block_layer": -2, "module_name": "resid", "class_token": True, "d_in": D, "gated_sae": False}
    fields["model_name"] = "openai/clip-vit-base-patch16"
    with pickled_class("src.sae_training.config", "ViTSAERunnerConfig") as made:
        torch.save({"cfg": with_fields(made, fields), "state_dict": state}, folder / "out.pt")
    expected = {"hook_point": "blocks.10.hook_resid_post", "tokens": "cls", "quick_gelu": True, "norm": "none"}
    return Case(folder / "out.pt", prisma_forward(state, relu, "none"), {}, expected)


def conceptscope(folder: Path) -> Case:
    """A plain configuration under another key, a large model."""
    state = our_orientation(seed=17)
    fields = {"block_layer": -2, "class_token": False, "d_in": D, "model_name": "openai/clip-vit-large-patch14"}
    torch.save({"config": fields, "state_dict": state}, folder / "clip-vit-large-patch14_-2_resid_36.pt")
    expected = {"hook_point": "blocks.22.hook_resid_post", "tokens": "all"}
    return Case(folder, prisma_forward(state, relu, "none"), {}, expected)


def saev_file(path: Path, header: dict[str, Any], state: dict[str, torch.Tensor]) -> Path:
    with path.open("wb") as file:
        file.write(json.dumps(header).encode() + b"\n")
        torch.save(state, file)
    return path


def saev_legacy(folder: Path) -> Case:
    """No schema: centered and scaled residuals, b_dec subtracted, neither of which the file says."""
    state = our_orientation(seed=18)
    mean, scalar = rand(D, seed=19), 1.7
    path = saev_file(folder / "sae.pt", {"d_vit": D, "l1_coeff": 0.1, "sparsity_coeff": 4e-4}, state)
    p = numpied(state)

    def forward(x):
        z = (x - mean.double().numpy()) / scalar
        f = relu((z - p["b_dec"]) @ p["W_enc"] + p["b_enc"])
        return f, (f @ p["W_dec"] + p["b_dec"]) * scalar + mean.double().numpy()

    return Case(path, forward, STATED | {"act_mean": mean.numpy(), "scalar": scalar}, {"subtract_b_dec": True})


def saev_schema_1(folder: Path) -> Case:
    """The caller says that b_dec is not subtracted, so that the mean goes into b_enc."""
    case = saev_legacy(folder)
    state = our_orientation(seed=18)
    path = saev_file(folder / "sae.pt", {"schema": 1, "cls": "Relu", "cfg": {"d_vit": D}}, state)
    mean, scalar, p = case.stated["act_mean"].astype(float), case.stated["scalar"], numpied(state)

    def forward(x):
        f = relu((x - mean) / scalar @ p["W_enc"] + p["b_enc"])
        return f, (f @ p["W_dec"] + p["b_dec"]) * scalar + mean

    return Case(path, forward, case.stated | {"subtract_b_dec": False}, {"subtract_b_dec": False})


def saev_topk(folder: Path) -> Case:
    """Without a ReLU: a negative number among the k largest counts."""
    state = our_orientation(seed=20)
    state["b_enc"] = state["b_enc"] - 4
    config = {"d_vit": D, "activation": {"cls": "TopK", "params": {"top_k": K}}}
    path = saev_file(folder / "sae.pt", {"schema": 2, "cfg": config, "commit": "00d07b7", "lib": "0.1"}, state)
    p = numpied(state)

    def forward(x):
        f = largest(x @ p["W_enc"] + p["b_enc"])
        assert (f < 0).any()
        return f, f @ p["W_dec"] + p["b_dec"]

    return Case(path, forward, STATED, {"act": "topk", "k": K, "topk_relu": "none", "subtract_b_dec": False})


def saev_batchtopk(folder: Path) -> Case:
    state = our_orientation(seed=21) | {"activation.threshold": torch.tensor(0.6)}
    config = {"d_model": D, "d_sae": M, "activation": {"cls": "BatchTopK", "params": {"top_k": K}}}
    path = saev_file(folder / "sae.pt", {"schema": 5, "cfg": config}, state)
    p = numpied(state)

    def forward(x):
        h = x @ p["W_enc"] + p["b_enc"]
        f = h * (h > p["activation.threshold"])
        return f, f @ p["W_dec"] + p["b_dec"]

    return Case(path, forward, STATED, {"act": "batchtopk"})


def clipscope(folder: Path) -> Case:
    (folder / "7_resid").mkdir()
    state = {"pre_b": rand(D), "enc": rand(D, M), "dec": rand(M, D)}
    path = folder / "7_resid" / "1200013184.pt"
    torch.save({"k": 30, "n_features": M, "d_in": D, "model_state_dict": state}, path)
    p = numpied(state)

    def forward(x):
        f = largest((x - p["pre_b"]) @ p["enc"], 30)
        assert (f < 0).any()
        return f, f @ p["dec"] + p["pre_b"]

    return Case(path, forward, {"tokens": "all"}, {"hook_point": BLOCK, "k": 30, "topk_relu": "none"})


def clipscope_relu(folder: Path) -> Case:
    state = {"pre_b": rand(D), "enc": rand(D, M), "dec": rand(M, D)}
    torch.save(state, folder / "sae.pt")
    p = numpied(state)

    def forward(x):
        f = relu((x - p["pre_b"]) @ p["enc"])
        return f, f @ p["dec"] + p["pre_b"]

    return Case(folder / "sae.pt", forward, STATED | {"act": "relu"}, {"act": "relu"})


def msae(folder: Path, name: str = f"{M}_{D}_TopKReLU_{K}_False_False_0.0_cc3m.pth", tied: bool = False) -> Case:
    state = {"encoder": rand(D, M), "latent_bias": rand(M) * 0.3, "pre_bias": rand(D)}
    if not tied:
        state["decoder"] = rand(M, D)
    mean, scale = rand(D, seed=22), 3.5
    stored = state | {"latents_activation_frequency": torch.zeros(M, dtype=torch.int64)}
    torch.save({"model": stored, "mean_center": mean, "scaling_factor": scale, "target_norm": 1.0}, folder / name)
    p = numpied(state)

    def forward(x):
        z = (x - mean.double().numpy()) * scale
        f = relu(largest((z - p["pre_bias"]) @ p["encoder"] + p["latent_bias"]))
        x_hat = f @ (p["encoder"].T if tied else p["decoder"]) + p["pre_bias"]
        return f, x_hat / scale + mean.double().numpy()

    return Case(folder / name, forward, {}, {"hook_point": "pooled", "k": K, "topk_relu": "after"})


def msae_tied(folder: Path) -> Case:
    return msae(folder, f"{M}_{D}_TopKReLU_{K}_UW_True_False_0_cc3m.pth", tied=True)


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


CASES = {
    "prisma": [
        prisma, prisma_topk, prisma_constant_norm, prisma_json, prisma_gated, prisma_pkl_gz, prisma_oldest
    ],
    "saelens": [saelens_before_6, saelens_finetuned],
    "sparsify": [sparsify],
    "dictionary_learning": [
        dictionary_topk, dictionary_batchtopk, dictionary_backup, dictionary_never_set_threshold, dictionary_jumprelu
    ],
    "patchsae": [patchsae, conceptscope],
    "sae-for-vlm": [sae_for_vlm],
    "overcomplete": [overcomplete_topk],
    "saev": [saev_legacy, saev_schema_1, saev_topk, saev_batchtopk],
    "clipscope": [clipscope, clipscope_relu],
    "msae": [msae, msae_tied],
    "openai": [openai, openai_relu, openai_tied_identity],
}  # fmt: skip
ALL = [pytest.param(name, make, id=make.__name__) for name, makers in CASES.items() for make in makers]


def test_every_format_has_a_case() -> None:
    assert set(CASES) == set(importers.FORMATS)


@pytest.mark.parametrize(("name", "make"), ALL)
def test_acts_and_reconstructions_are_those_of_the_project(name: str, make, tmp_path: Path) -> None:
    case = make(tmp_path)
    read = importers.read(case.path, **case.stated)
    assert read.provenance["format"] == name
    found = read.sae.config.to_dict() | {key: getattr(read, key) for key in ("hook_point", "host_model", "quick_gelu")}
    assert {key: found[key] for key in case.expected} == case.expected
    x = residuals()
    acts, reconstruction = case.forward(x)
    resid = torch.from_numpy(x).float()
    assert (acts != 0).any()
    torch.testing.assert_close(read.sae.encode(resid), torch.from_numpy(acts).float(), rtol=1e-4, atol=2e-5)
    got = read.sae.decode(read.sae.encode(resid), resid)
    torch.testing.assert_close(got, torch.from_numpy(reconstruction).float(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "make"), ALL)
def test_what_is_saved_comes_back_with_its_meaning(name: str, make, tmp_path: Path) -> None:
    case = make(tmp_path)
    read = importers.read(case.path, name, license="MIT", **case.stated)
    again = checkpoint.load(checkpoint.save(read, tmp_path / "converted"))
    assert again.sae.config == read.sae.config
    for key in ("hook_point", "host_model", "quick_gelu", "license", "provenance"):
        assert getattr(again, key) == getattr(read, key)
    for key, array in read.sae.parameters_numpy().items():
        np.testing.assert_array_equal(again.sae.parameters_numpy()[key], array)


@pytest.mark.parametrize(("name", "make"), ALL)
def test_whatever_the_caller_had_to_state_is_asked_for_by_name(name: str, make, tmp_path: Path) -> None:
    case = make(tmp_path)
    for missing in case.stated:
        rest = {key: value for key, value in case.stated.items() if key != missing}
        with pytest.raises(CheckpointError) as caught:
            importers.read(case.path, name, **rest)
        assert f"does not say {missing} " in str(caught.value)
        assert f"pass {common.flag(missing)}" in str(caught.value)


# --- what is ambiguous, contradictory or unsupported ------------------------------------------------------------------


@pytest.mark.parametrize(("name", "make"), ALL)
def test_what_comes_from_the_hub_is_what_the_same_files_give_here(name: str, make, hub, tmp_path: Path) -> None:
    """The hub's cache holds links to files without a name: what paths say must not be read from where they lead."""
    folder = tmp_path / "files"
    folder.mkdir()
    case = make(folder)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = hub.add("org/repo", files)
    here = importers.read(case.path, name, **case.stated)
    file = f"/{case.path.relative_to(folder).as_posix()}".removesuffix("/.")
    for source in ("org/repo", f"hf://org/repo{file}@{commit}"):
        fetched = importers.read(source, **case.stated)
        assert fetched.provenance.pop("hub").startswith("hf://org/repo")
        for key in ("hook_point", "host_model", "quick_gelu", "provenance"):
            assert getattr(fetched, key) == getattr(here, key), key
        assert fetched.sae.config == here.sae.config
        for key, tensor in here.sae.parameters_numpy().items():
            np.testing.assert_array_equal(fetched.sae.parameters_numpy()[key], tensor)


def test_the_import_command_takes_the_hub_and_says_what_it_fetches(hub, tmp_path: Path) -> None:
    case = prisma_json(tmp_path)
    hub.add("org/repo", {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()})
    out = tmp_path / "sae"
    options = [word for key, value in case.stated.items() for word in (f"--{key.replace('_', '-')}", str(value))]
    result = CliRunner().invoke(app, ["import", "org/repo", str(out), *options])
    assert result.exit_code == 0, result.output
    assert f"fetching org/repo/{case.path.name}, " in result.stderr
    commit = hub.repos["org/repo"].main
    assert checkpoint.load(out).provenance["hub"] == f"hf://org/repo@{commit}"
    hub.add("org/empty", {"README.md": b"soon"})
    result = CliRunner().invoke(app, ["import", "org/empty", str(tmp_path / "other")])
    assert result.exit_code == 5
    assert "error: hf://org/empty has no weights" in result.stderr
    assert not (tmp_path / "other").exists()


def test_an_sae_of_ours_comes_from_the_hub(hub, tmp_path: Path) -> None:
    case = prisma_json(tmp_path)
    folder = checkpoint.save(importers.read(case.path, **case.stated), tmp_path / "sae")
    hub.add("org/repo", {path.name: path.read_bytes() for path in folder.iterdir()} | {"README.md": b"a card"})
    assert checkpoint.find("org/repo").provenance == checkpoint.load(folder).provenance
    hub.add("org/published", {"weights.pt": b"", "config.json": b"{}"})
    with pytest.raises(CheckpointError, match=r"`defense import hf://org/published/weights\.pt DIR` converts it once"):
        checkpoint.find("org/published")


def test_dictionaries_without_configuration_need_the_rule(tmp_path: Path) -> None:
    state = linear_dictionary(k=torch.tensor(K), threshold=torch.tensor(0.5))
    path = dictionary(tmp_path, state, None)
    with pytest.raises(CheckpointError, match=r"does not say act .*pass --act"):
        importers.read(path, **STATED)
    assert importers.read(path, act="topk", **STATED).sae.config.k == K
    assert importers.read(path, act="batchtopk", **STATED).sae.config.act == "batchtopk"
    with pytest.raises(ConfigError, match="jumprelu"):
        importers.read(path, act="jumprelu", **STATED)


def test_saelens_without_its_scaling_factor_is_refused(tmp_path: Path) -> None:
    norm = {"normalize_activations": "expected_average_only_in", "hook_name": BLOCK}
    saelens(tmp_path, our_orientation(), SAELENS | norm)
    with pytest.raises(CheckpointError, match=r"does not say scaling_factor .*pass --scaling-factor"):
        importers.read(tmp_path, tokens="all")


def test_overcomplete_batchtopk_without_its_threshold_is_refused(tmp_path: Path) -> None:
    path = overcomplete_topk(tmp_path).path
    with pytest.raises(CheckpointError, match=r"does not say threshold .*pass --threshold"):
        importers.read(path, act="batchtopk", **STATED)


def test_saev_without_schema_needs_the_mean_of_the_right_width(tmp_path: Path) -> None:
    case = saev_legacy(tmp_path)
    with pytest.raises(ShapeError, match=rf"act_mean is \[{D + 1}\].* needs \[{D}\]"):
        importers.read(case.path, **case.stated | {"act_mean": np.zeros(D + 1)})


def test_a_negative_threshold_is_refused(tmp_path: Path) -> None:
    state = our_orientation() | {"activation.threshold": torch.tensor(-0.2)}
    config = {"d_model": D, "activation": {"cls": "BatchTopK", "params": {}}}
    path = saev_file(tmp_path / "sae.pt", {"schema": 5, "cfg": config}, state)
    with pytest.raises(ConfigError, match="negative threshold"):
        importers.read(path, **STATED)


def test_a_renamed_msae_file_is_refused(tmp_path: Path) -> None:
    path = msae(tmp_path).path
    with pytest.raises(CheckpointError, match="name it was published under"):
        importers.read(path.rename(tmp_path / "sae.pth"))


@pytest.mark.parametrize(
    "name",
    [
        f"{M}_{D}_TopKReLU_{K}_False_True_0.0_cc3m.pth",
        f"{M}_{D}_TopKReLU_{K}_False_False_30.0_cc3m.pth",
        f"{M}_{D}_BatchTopKReLU_{K}_False_False_0.0_cc3m.pth",
        f"{M}_{D}_ELU1p_False_False_0.0_cc3m.pth",
    ],
)
def test_msae_files_with_other_arithmetic_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="not supported"):
        importers.read(msae(tmp_path, name).path)


def test_what_contradicts_the_file_is_refused(tmp_path: Path) -> None:
    case = clipscope(tmp_path)
    with pytest.raises(ConfigError, match="says k=30, --k says 7"):
        importers.read(case.path, k=7, **case.stated)
    with pytest.raises(ConfigError, match=r"says hook_point='blocks.7.*--hook-point says 'blocks.3"):
        importers.read(case.path, hook_point="blocks.3.hook_resid_post", **case.stated)


def test_what_means_nothing_to_the_file_is_refused(tmp_path: Path) -> None:
    case = clipscope(tmp_path)
    with pytest.raises(ConfigError, match="--scalar means nothing"):
        importers.read(case.path, scalar=2.0, **case.stated)
    with pytest.raises(ConfigError, match="no option layer"):
        importers.read(case.path, layer=2, **case.stated)


@pytest.mark.parametrize("hook_point", ["blocks.7.hook_mlp_out", "7", "blocks.-2.hook_resid_post"])
def test_a_hook_point_that_is_none_is_refused(tmp_path: Path, hook_point: str) -> None:
    case = saev_topk(tmp_path)
    with pytest.raises(HookPointError, match=hook_point):
        importers.read(case.path, tokens="all", hook_point=hook_point)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"is_transcoder": True}, ConfigError, "a transcoder"),
        ({"activation_fn_str": "tanh-relu"}, ConfigError, "tanh-relu"),
        ({"activation_fn_str": "leaky_relu"}, ConfigError, "leaky_relu"),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {}}, CheckpointError, "pass --k"),
        ({"architecture": "jumprelu"}, ConfigError, "'jumprelu'"),
        ({"normalize_activations": "batch_norm"}, ConfigError, "batch_norm"),
        ({"layer_subtype": "hook_mlp_out"}, HookPointError, "hook_mlp_out"),
        ({"d_in": 768}, ShapeError, f"d_model=768.*d_model={D}"),
        ({"expansion_factor": 64}, ShapeError, f"d_sae={64 * D}.*d_sae={M}"),
    ],
)
def test_prisma_files_that_cannot_be_read_are_refused(tmp_path: Path, fields, error, message) -> None:
    case = prisma(tmp_path, **fields)
    with pytest.raises(error, match=message):
        importers.read(case.path)


def test_prisma_takes_the_configuration_that_the_caller_names(tmp_path: Path) -> None:
    case = prisma_json(tmp_path)
    (tmp_path / "config.json").rename(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match="no format that is recognized"):
        importers.read(case.path)
    assert importers.read(case.path, config=tmp_path / "elsewhere.json").hook_point == BLOCK
    with pytest.raises(CheckpointError, match=r"nowhere.json is not a file"):
        importers.read(case.path, config=tmp_path / "nowhere.json")


def test_prisma_without_configuration_needs_what_it_would_say(tmp_path: Path) -> None:
    case = prisma_json(tmp_path)
    (tmp_path / "config.json").unlink()
    stated = STATED | {"act": "relu", "norm": "layer_norm"}
    x = residuals()
    read = importers.read(case.path, "prisma", **stated)
    torch.testing.assert_close(
        read.sae.encode(torch.from_numpy(x).float()), torch.from_numpy(case.forward(x)[0]).float(), rtol=1e-4, atol=2e-5
    )
    for missing in stated:
        with pytest.raises(CheckpointError, match=f"does not say {missing} "):
            importers.read(case.path, "prisma", **{key: value for key, value in stated.items() if key != missing})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation": "groupmax"}, "groupmax"),
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "W_skip"),
        ({"signed": True}, "signed"),
    ],
)
def test_sparse_coders_that_are_no_topk_sae_are_refused(tmp_path: Path, fields, message) -> None:
    case = sparsify(tmp_path)
    config = case.path / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | fields))
    with pytest.raises(ConfigError, match=message):
        importers.read(case.path, **case.stated)


def test_a_sparse_coder_of_another_size_is_refused(tmp_path: Path) -> None:
    case = sparsify(tmp_path)
    config = case.path / "cfg.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_latents": 2 * M}))
    with pytest.raises(ShapeError, match=f"d_sae={2 * M}.*d_sae={M}"):
        importers.read(case.path, **case.stated)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"architecture": "transcoder"}, ConfigError, "transcoder"),
        ({"architecture": "matching_pursuit"}, ConfigError, "matching_pursuit"),
        ({"activation_fn": "tanh-relu"}, ConfigError, "tanh-relu"),
        ({"normalize_activations": "unit"}, ConfigError, "unit"),
        ({"normalize_activations": "covariance_whitening"}, CheckpointError, "activation_whitening.safetensors"),
        ({"metadata": {"hook_name": "blocks.7.attn.hook_z"}}, HookPointError, "hook_z"),
        ({"d_sae": M + 1}, ShapeError, f"d_sae={M + 1}"),
    ],
)
def test_saelens_files_that_cannot_be_read_are_refused(tmp_path: Path, fields, error, message) -> None:
    saelens(tmp_path, our_orientation(), SAELENS | {"hook_name": BLOCK} | fields)
    with pytest.raises(error, match=message):
        importers.read(tmp_path, tokens="all")


@pytest.mark.parametrize("name", ["cfg.json", "config.json"])
def test_a_configuration_that_is_no_json_is_named(tmp_path: Path, name: str) -> None:
    case = sparsify(tmp_path) if name == "cfg.json" else prisma_json(tmp_path)
    (case.path if case.path.is_dir() else case.path.parent).joinpath(name).write_text("{")
    with pytest.raises(CheckpointError, match=f"{name} is not JSON"):
        importers.read(case.path, **case.stated)


def test_a_gated_patchsae_is_refused(tmp_path: Path) -> None:
    state = our_orientation() | {"r_mag": rand(M), "b_mag": rand(M)}
    torch.save({"cfg": {"block_layer": 3, "class_token": True}, "state_dict": state}, tmp_path / "out.pt")
    with pytest.raises(ConfigError, match="gated"):
        importers.read(tmp_path)


def test_a_layer_counted_from_the_end_of_an_unknown_model_is_asked_for(tmp_path: Path) -> None:
    config = {"block_layer": -2, "class_token": True, "model_name": "someone/own-vit"}
    torch.save({"cfg": config, "state_dict": our_orientation()}, tmp_path / "out.pt")
    with pytest.raises(CheckpointError, match="pass --hook-point"):
        importers.read(tmp_path)
    assert importers.read(tmp_path, hook_point=BLOCK).hook_point == BLOCK


def test_a_switch_sae_is_refused(tmp_path: Path) -> None:
    state = {"pre_b": rand(D), "enc": rand(2, D, M), "dec": rand(2, M, D), "router": rand(D, 2), "router_b": rand(D)}
    torch.save({"k": K, "model_state_dict": state}, tmp_path / "sae.pt")
    with pytest.raises(ConfigError, match="several experts"):
        importers.read(tmp_path, **STATED)


def test_a_deep_encoder_of_overcomplete_is_refused(tmp_path: Path) -> None:
    path = overcomplete_topk(tmp_path).path
    state = torch.load(path, weights_only=True) | {"encoder.final_block.1.weight": rand(M)}
    torch.save(state, path)
    with pytest.raises(ConfigError, match="normalizing encoder"):
        importers.read(path, act="topk", k=K, **STATED)


def test_pooled_runs_of_sae_for_vlm_have_no_block(tmp_path: Path) -> None:
    case = sae_for_vlm(tmp_path)
    run = case.path.parents[2]
    moved = run.rename(run.with_name(run.name.replace("7_post_mlp_residual", "-1_post_projection")))
    path = moved / "trainer_0/checkpoints/ae_100000.pt"
    assert importers.read(path, **case.stated).hook_point == "pooled"


def test_files_of_no_format_are_refused(tmp_path: Path) -> None:
    torch.save(our_orientation(), tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match="no format that is recognized; pass --format"):
        importers.read(tmp_path)
    with pytest.raises(ConfigError, match="no format 'gguf'"):
        importers.read(tmp_path, "gguf")
    torch.save([1, 2], tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match="no format that is recognized"):
        importers.read(tmp_path)


@pytest.mark.parametrize("name", importers.FORMATS)
def test_a_format_that_the_file_does_not_have_is_refused(tmp_path: Path, name: str) -> None:
    torch.save({"weight": rand(3)}, tmp_path / "sae.pt")
    with pytest.raises((CheckpointError, ConfigError)):
        importers.read(tmp_path, name, **STATED, act="relu", norm="none")


def test_a_folder_with_several_files_is_refused(tmp_path: Path) -> None:
    prisma(tmp_path)
    torch.save({}, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=r"several files .*n_images_2600058.pt, weights.pt"):
        importers.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing.pt is not there"):
        importers.read(tmp_path / "missing.pt")


# --- damaged and hostile files ----------------------------------------------------------------------------------------


def test_fault_57_a_transposed_encoder_is_refused(tmp_path: Path) -> None:
    state = our_orientation()
    state["W_enc"] = state["W_enc"].T.contiguous()
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(ShapeError, match=rf"W_enc is \[{M}, {D}\]; its config says \[{D}, {M}\]"):
        importers.read(tmp_path)


@pytest.mark.parametrize("broken", ["b_dec", "W_dec"])
def test_fault_57_a_missing_tensor_is_named(tmp_path: Path, broken: str) -> None:
    state = our_orientation()
    del state[broken]
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match=rf"missing \['{broken}'\]"):
        importers.read(tmp_path, "prisma")


def test_fault_57_a_zero_decoder_row_is_refused(tmp_path: Path) -> None:
    state = our_orientation()
    state["W_dec"][3] = 0
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(CheckpointError, match="decoder row 3 is zero"):
        importers.read(tmp_path)


def test_fault_55_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    state = our_orientation()
    state["b_enc"][2] = float("nan")
    (tmp_path / "config.json").write_text(json.dumps(PRISMA))
    torch.save(state, tmp_path / "weights.pt")
    with pytest.raises(NonFiniteError, match="b_enc"):
        importers.read(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_any_float_type_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    case = sparsify(tmp_path)
    from safetensors.torch import load_file

    state = {key: value.to(dtype) for key, value in load_file(case.path / "sae.safetensors").items()}
    save_file(state, case.path / "sae.safetensors")
    read = importers.read(case.path, **case.stated)
    torch.testing.assert_close(read.sae.W_dec, state["W_dec"].float(), rtol=0, atol=0)


class Malicious:
    """Creates a file when it is unpickled by a reader that runs what it reads."""

    def __init__(self, target: Path, function: Callable = os.system) -> None:
        self.target, self.function = target, function

    def __reduce__(self):
        return (self.function, (f"touch {self.target}",) if self.function is os.system else (str(self.target),))


class MaliciousConfig:
    """The same behind the name of a class that a stand-in is made for."""

    def __init__(self, target: Path) -> None:
        self.inner = Malicious(target)


def write_zip(payload: Any, path: Path) -> None:
    torch.save(payload, path)


def write_legacy(payload: Any, path: Path) -> None:
    torch.save(payload, path, _use_new_zipfile_serialization=False)


def write_pickle(payload: Any, path: Path) -> None:
    path.write_bytes(pickle.dumps(payload))


def write_gzip(payload: Any, path: Path) -> None:
    path.write_bytes(gzip.compress(pickle.dumps(payload)))


def write_saev(payload: Any, path: Path) -> None:
    with path.open("wb") as file:
        file.write(b'{"schema": 2}\n')
        torch.save(payload, file)


@pytest.mark.parametrize("write", [write_zip, write_legacy, write_pickle, write_gzip, write_saev])
@pytest.mark.parametrize("function", [os.system, os.mkdir, exec], ids=["os.system", "os.mkdir", "exec"])
def test_fault_62_a_malicious_pickle_is_refused_and_not_run(tmp_path: Path, write, function) -> None:
    target = tmp_path / "created"
    path = tmp_path / "sae.pt"
    write({"cfg": Malicious(target, function), "state_dict": our_orientation()}, path)
    with pytest.raises(CheckpointError):
        importers.read(path, "prisma", **STATED, act="relu", norm="none")
    assert not target.exists()
    assert path.exists()


def test_fault_62_the_malicious_pickle_of_these_tests_does_harm_elsewhere(tmp_path: Path) -> None:
    target = tmp_path / "created"
    pickle.loads(pickle.dumps(Malicious(target)))
    assert target.exists()


def test_fault_62_a_stand_in_does_not_open_the_door_to_others(tmp_path: Path) -> None:
    target = tmp_path / "created"
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        config = with_fields(made, PRISMA | {"device": Malicious(target)})
        torch.save({"cfg": config, "state_dict": our_orientation()}, tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"needs (posix|nt)\.system"):
        importers.read(tmp_path)
    assert not target.exists()


def test_fault_62_names_below_a_known_package_are_stand_ins_too(tmp_path: Path) -> None:
    """A file may claim that a function of a known package is to be called: nothing is imported, nothing runs."""
    target = tmp_path / "created"
    module = tmp_path / "sae_training.py"
    module.write_text(f"import pathlib; pathlib.Path({str(target)!r}).touch()\ndef harm(*args): pass\n")
    payload = b"\x80\x02csae_training\nharm\n(X\x01\x00\x00\x00at\x85R."
    code = (
        "import io, sys; sys.path.insert(0, sys.argv[1])\n"
        "from defense.importers import pickles\n"
        "assert isinstance(pickles.load(io.BytesIO(bytes.fromhex(sys.argv[2])), 'x'), pickles.Inert)\n"
        "assert 'sae_training' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), payload.hex()], check=True, cwd=Path(__file__).parents[2]
    )
    assert not target.exists()


def test_fault_62_a_whole_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "sae.pt")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear .*model\.state_dict\(\)"):
        importers.read(tmp_path)


@pytest.mark.parametrize("write", [write_zip, write_pickle, write_gzip])
def test_fault_54_a_truncated_file_is_refused_at_any_length(tmp_path: Path, write) -> None:
    path = tmp_path / "sae.pt"
    write({"cfg": dict(PRISMA), "state_dict": our_orientation()}, path)
    whole = path.read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 23)):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError):
            importers.read(path, "prisma")


def test_fault_54_a_file_with_flipped_bytes_never_escapes_as_another_exception(tmp_path: Path) -> None:
    path = tmp_path / "sae.pt"
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        write_pickle({"cfg": with_fields(made, PRISMA), "state_dict": {"b_enc": [1.0, 2.0]}}, path)
    whole = bytearray(path.read_bytes())
    for position in range(0, len(whole), 7):
        damaged = bytearray(whole)
        damaged[position] ^= 0x55
        path.write_bytes(damaged)
        with pytest.raises((CheckpointError, ConfigError, HookPointError)):
            importers.read(path, "prisma", **STATED)


@pytest.mark.parametrize("content", [b"", b"hello", b"{not json", b"\x1f\x8bbroken", b"PK\x03\x04broken"])
def test_fault_54_what_is_no_checkpoint_is_refused(tmp_path: Path, content: bytes) -> None:
    for name in ("sae.pt", "sae.safetensors"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            importers.read(tmp_path / name)


def test_a_tensor_beyond_its_storage_is_refused() -> None:
    with pytest.raises(RuntimeError):
        pickles._tensor(torch.zeros(4), 2, (3,), (1,))


def test_tensors_of_configuration_files_share_nothing_and_keep_views(tmp_path: Path) -> None:
    """The unpickler's own way of rebuilding tensors: offsets, strides, empty ones and parameters."""
    base = torch.arange(12.0)
    tensors = {"view": base[2:8].view(2, 3), "transposed": base.view(3, 4).T, "empty": torch.zeros(0, 3)}
    tensors |= {"half": base.half(), "bf16": base.bfloat16(), "ints": torch.arange(3), "bool": base > 3}
    tensors["parameter"] = torch.nn.Parameter(base)
    with pickled_class("vit_prisma.sae.config", "VisionModelSAERunnerConfig") as made:
        for write in (write_zip, write_pickle):
            write({"cfg": made(), **tensors}, tmp_path / "x.pt")
            with (tmp_path / "x.pt").open("rb") as file:
                read = pickles.load(file, "x")
            assert isinstance(read.pop("cfg"), pickles.Inert)
            for name, tensor in tensors.items():
                torch.testing.assert_close(read[name], tensor.data, rtol=0, atol=0)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def test_the_command_writes_a_folder_that_loads(tmp_path: Path) -> None:
    case = saev_legacy(tmp_path)
    np.save(tmp_path / "mean.npy", case.stated["act_mean"])
    code, out, err = run(
        "import", case.path, tmp_path / "out", "--format", "saev", "--hook-point", BLOCK, "--tokens", "patch",
        "--act-mean", tmp_path / "mean.npy", "--scalar", case.stated["scalar"], "--license", "MIT",
        "--host-model", "ViT-B-16", "--no-quick-gelu",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "saev" in out
    assert BLOCK in out
    read = checkpoint.load(tmp_path / "out")
    assert (read.hook_point, read.sae.config.tokens, read.license) == (BLOCK, "patch", "MIT")
    assert (read.host_model, read.quick_gelu) == ("ViT-B-16", False)
    x = residuals()
    torch.testing.assert_close(
        read.sae.encode(torch.from_numpy(x).float()), torch.from_numpy(case.forward(x)[0]).float(), rtol=1e-4, atol=2e-5
    )


def test_the_command_names_the_option_that_is_missing_and_writes_nothing(tmp_path: Path) -> None:
    case = saev_legacy(tmp_path)
    code, out, err = run("import", case.path, tmp_path / "out", "--hook-point", BLOCK)
    assert (code, out) == (5, "")
    assert "--act-mean" in err or "--tokens" in err
    assert not (tmp_path / "out").exists()


def test_the_command_overwrites_an_sae_and_nothing_else(tmp_path: Path) -> None:
    case = msae(tmp_path)
    assert run("import", case.path, tmp_path / "out")[0] == 0
    assert run("import", case.path, tmp_path / "out")[0] == 0
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    code, _, err = run("import", case.path, tmp_path / "out")
    assert code == 2
    assert "holds other files too" in err
    assert (tmp_path / "out" / "thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("name", ["mean.npy", "mean.safetensors"])
def test_vectors_are_read_from_either_form(tmp_path: Path, name: str) -> None:
    mean = rand(D)
    if name.endswith("npy"):
        np.save(tmp_path / name, mean.numpy())
    else:
        save_file({"mean": mean}, tmp_path / name)
    np.testing.assert_array_equal(importers.read_vector(tmp_path / name), mean.numpy())
    (tmp_path / name).write_bytes(b"broken")
    with pytest.raises(CheckpointError):
        importers.read_vector(tmp_path / name)


def test_fault_70_without_torch_the_command_says_what_to_install(tmp_path: Path) -> None:
    code = "import sys; sys.modules['torch'] = None\nfrom defense.cli import app; app(['import', 'x.pt', 'out'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 3
    assert 'pip install "clip-defense[torch]"' in done.stderr
