"""Files as the projects on vision models publish them, each with its project's arithmetic."""

from __future__ import annotations

import gzip
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from .arithmetic import (
    BLOCK,
    STATED,
    Case,
    D,
    K,
    M,
    largest,
    layer_norm,
    numpied,
    our_orientation,
    pickled_class,
    rand,
    relu,
    with_fields,
)
from .published_text import dictionary

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
