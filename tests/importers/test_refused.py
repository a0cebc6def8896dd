"""What is ambiguous, contradictory or unsupported in a published file is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

from defense import importers
from defense.errors import CheckpointError, ConfigError, HookPointError, ShapeError

from .arithmetic import BLOCK, STATED, D, K, M, our_orientation, rand, residuals
from .published_text import SAELENS, dictionary, linear_dictionary, overcomplete_topk, saelens, sparsify
from .published_vision import clipscope, msae, prisma, prisma_json, sae_for_vlm, saev_file, saev_legacy, saev_topk


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
