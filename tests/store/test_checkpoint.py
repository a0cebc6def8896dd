"""An SAE on disk: what is written comes back with its meaning, and nothing else is accepted."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.numpy import load_file, save_file

from defense.core.sae import SparseAutoencoder
from defense.errors import (
    CheckpointError,
    ConfigError,
    HookPointError,
    IntegrityError,
    NonFiniteError,
    NotThereError,
    ShapeError,
)
from defense.store import checkpoint, folders
from defense.store.checkpoint import MANIFEST, POOLED, Checkpoint, load, save

from ..conftest import D_MODEL, D_SAE, random_parameters, random_sae

BLOCK = "blocks.1.hook_resid_post"
KINDS: dict[str, dict[str, Any]] = {
    "relu": {"act": "relu"},
    "layer_norm": {"act": "relu", "norm": "layer_norm"},
    "constant_norm": {"act": "relu", "norm": "constant_norm_rescale", "subtract_b_dec": False},
    "jumprelu": {"act": "jumprelu"},
    "batchtopk": {"act": "batchtopk", "tokens": "cls"},
    "topk": {"act": "topk", "k": 8},
    "all of them": {"act": "topk", "k": D_SAE, "topk_relu": "none"},
    "gated": {"act": "gated"},
}
every_kind = pytest.mark.parametrize("fields", KINDS.values(), ids=KINDS)


def saved(folder: Path, **fields: Any) -> Path:
    return save(Checkpoint(random_sae(**fields), BLOCK, "ViT-B-32", False, "MIT", {"by": "Łukasz"}), folder / "sae")


def everything_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change sae.json, which no hash protects."""
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def rewrite(folder: Path, name: str, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Change a file of tensors, and its entry with it."""
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)
    edit(folder, lambda manifest: manifest["files"].update({name: folders.file_entry(folder / name)}))


@every_kind
def test_what_is_written_comes_back(tmp_path: Path, fields: dict[str, Any]) -> None:
    sae = random_sae(**fields)
    read = load(save(Checkpoint(sae, BLOCK, "ViT-B-32", False, "MIT", {"by": "Łukasz"}), tmp_path / "sae"))
    assert read.sae.config == sae.config
    assert (read.hook_point, read.host_model, read.quick_gelu) == (BLOCK, "ViT-B-32", False)
    assert (read.license, read.provenance) == ("MIT", {"by": "Łukasz"})
    resid = torch.randn(5, D_MODEL)
    torch.testing.assert_close(read.sae.encode(resid), sae.encode(resid), rtol=0, atol=0)


@every_kind
def test_golden_rows_make_latents_fire_and_are_what_the_sae_computes(tmp_path: Path, fields: dict[str, Any]) -> None:
    golden = load_file(saved(tmp_path, **fields) / "golden.safetensors")
    assert {name: array.shape[1] for name, array in golden.items()} == {
        "resid": D_MODEL, "acts": D_SAE, "reconstruction": D_MODEL,
    }  # fmt: skip
    assert (golden["acts"] != 0).any(1).mean() > 0.5
    sae = random_sae(**fields)
    resid = torch.from_numpy(golden["resid"])
    np.testing.assert_allclose(sae.encode(resid).numpy(), golden["acts"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "fields", [KINDS["jumprelu"], KINDS["topk"], KINDS["gated"]], ids=["jumprelu", "topk", "gated"]
)
def test_golden_rows_lie_farther_from_the_edges_of_the_rule_than_others(fields: dict[str, Any]) -> None:
    sae = random_sae(**fields)
    chosen = torch.from_numpy(checkpoint._golden(sae)["resid"])
    others = torch.randn(1000, D_MODEL, generator=torch.Generator().manual_seed(0)) * 4
    assert checkpoint._margin(sae, chosen).min() > checkpoint._margin(sae, others).median()


@every_kind
def test_rounding_does_not_fail_the_golden_triple_and_damage_does(tmp_path: Path, fields: dict[str, Any]) -> None:
    sae = random_sae(**fields)
    golden = checkpoint._golden(sae)

    def shaken(size: float) -> SparseAutoencoder:
        rng = np.random.default_rng(0)
        noisy = {
            name: array * (1 + size * rng.normal(size=array.shape)) for name, array in sae.parameters_numpy().items()
        }
        return SparseAutoencoder(sae.config, noisy)

    checkpoint._check_golden(shaken(1e-6), golden, tmp_path)
    with pytest.raises(CheckpointError, match="golden acts come out differently"):
        checkpoint._check_golden(shaken(1e-2), golden, tmp_path)


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"act": "relu"}, {"subtract_b_dec": False}),
        ({"act": "relu"}, {"norm": "layer_norm"}),
        ({"act": "relu", "norm": "layer_norm"}, {"norm": "constant_norm_rescale"}),
        ({"act": "topk", "k": 8}, {"k": 9}),
        ({"act": "topk", "k": D_SAE, "topk_relu": "none"}, {"topk_relu": "after"}),
    ],
)
def test_fault_57_an_edited_meaning_is_noticed_by_the_golden_triple(tmp_path: Path, fields, changed) -> None:
    folder = saved(tmp_path, **fields)
    load(folder)
    edit(folder, lambda manifest: manifest["sae"].update(changed))
    with pytest.raises(CheckpointError, match=r"golden .* come out differently"):
        load(folder)


def test_fault_57_a_reconstruction_that_differs_is_noticed(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite(folder, "sae.safetensors", lambda tensors: tensors["W_dec"].__imul__(1.01))
    with pytest.raises(CheckpointError, match="golden reconstruction come out differently"):
        load(folder)


def test_fault_57_a_dead_sae_is_not_written(tmp_path: Path) -> None:
    sae = random_sae()
    parameters = sae.parameters_numpy() | {"W_enc": np.zeros((D_MODEL, D_SAE)), "b_enc": -np.ones(D_SAE)}
    with pytest.raises(CheckpointError, match="no latent of this SAE fires"):
        save(Checkpoint(SparseAutoencoder(sae.config, parameters), BLOCK), tmp_path / "sae")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["sae.safetensors", "golden.safetensors"])
def test_fault_52_a_flipped_byte_is_noticed(tmp_path: Path, name: str) -> None:
    path = saved(tmp_path) / name
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        load(path.parent)
    assert caught.value.file == str(path)


def test_fault_51_a_missing_file_is_named_and_one_more_is_not_read(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    (folder / "extra.bin").write_bytes(b"x")
    load(folder)
    (folder / "golden.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"golden\.safetensors is missing"):
        load(folder)
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"sae\.json is missing; an SAE is a folder that `defense import`"):
        load(folder)
    with pytest.raises(NotThereError, match=r"nowhere is not there; check the path"):
        load(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(schema=2), "has schema 2; this version reads up to 1"),
        (lambda m: m.pop("schema"), "not the manifest of an SAE"),
        (lambda m: m.pop("licence"), "has the keys"),
        (lambda m: m.update(hook_point=7), "hook_point is 7; want str"),
        (lambda m: m.update(hook_point="blocks.1.hook_mlp_out"), "hook_mlp_out"),
        (lambda m: m["sae"].update(act="tanh"), "act='tanh'"),
        (
            lambda m: m["sae"].update(d_model=D_MODEL + 1),
            rf"W_dec is \[{D_SAE}, {D_MODEL}\]; its config says \[{D_SAE}, {D_MODEL + 1}\]",
        ),
        (lambda m: m["sae"].pop("norm"), r"sae has the keys"),
        (lambda m: m["sae"].update(norms=1), r"sae has the keys"),
        (lambda m: m["host"].update(quick_gelu="yes"), "quick_gelu is 'yes'"),
        (lambda m: m["files"].pop("golden.safetensors"), "lists the files"),
        (lambda m: m["files"].update({"../x": {}}), "lists the files"),
    ],
)
def test_fault_51_a_manifest_that_cannot_be_is_refused(tmp_path: Path, change, message: str) -> None:
    folder = saved(tmp_path, norm="layer_norm")
    edit(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1, "schema": 1}', '{"schema": NaN}'])
def test_fault_51_a_manifest_that_is_no_json_is_refused(tmp_path: Path, text: str) -> None:
    folder = saved(tmp_path)
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"sae\.json"):
        load(folder)


def test_fault_54_a_pickle_in_the_place_of_safetensors_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    path = folder / "sae.safetensors"
    path.write_bytes(pickle.dumps({"W_enc": [1.0]}))
    edit(folder, lambda manifest: manifest["files"].update({path.name: folders.file_entry(path)}))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(folder)


def test_fault_55_a_number_that_is_none_is_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    rewrite(folder, "sae.safetensors", lambda tensors: tensors["b_enc"].__setitem__(3, np.inf))
    with pytest.raises(NonFiniteError, match="b_enc"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("golden.safetensors", lambda tensors: tensors.pop("acts")),
        ("golden.safetensors", lambda tensors: tensors.update(resid=tensors["resid"][:3].copy())),
        ("golden.safetensors", lambda tensors: tensors.update(acts=tensors["acts"][:, :-1].copy())),
        ("sae.safetensors", lambda tensors: tensors.pop("b_dec")),
    ],
)
def test_fault_51_tensors_of_another_number_or_shape_are_refused(tmp_path: Path, name: str, change) -> None:
    folder = saved(tmp_path)
    rewrite(folder, name, change)
    with pytest.raises(CheckpointError, match=r"holds|missing"):
        load(folder)


def test_an_sae_replaces_an_sae_and_nothing_else(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    saved(tmp_path, act="gated")
    assert load(folder).sae.config.act == "gated"
    (folder / "notes.md").write_text("mine")
    before = everything_below(tmp_path)
    with pytest.raises(ConfigError, match="exists and is no SAE, or holds other files too"):
        saved(tmp_path)
    assert everything_below(tmp_path) == before


@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"]
)
def test_fault_75_a_failure_while_writing_leaves_the_old_sae_and_no_debris(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder = saved(tmp_path)
    before = everything_below(tmp_path)

    def fail(*_: Any) -> None:
        raise error

    monkeypatch.setattr(checkpoint, "load", fail)
    with pytest.raises(type(error)):
        saved(tmp_path, act="gated")
    assert everything_below(tmp_path) == before
    assert list(tmp_path.iterdir()) == [folder]


def test_provenance_that_is_no_json_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the SAE cannot be written as JSON"):
        save(Checkpoint(random_sae(), BLOCK, provenance={"folder": tmp_path}), tmp_path / "sae")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("hook_point", ["blocks.1.hook_resid_pre", "1", "blocks.-1.hook_resid_post", ""])
def test_a_hook_point_that_is_none_is_refused(hook_point: str) -> None:
    with pytest.raises(HookPointError):
        Checkpoint(random_sae(), hook_point)


def test_fault_56_an_sae_that_does_not_fit_a_host_is_refused(tiny_clip) -> None:
    from defense.core.config import SAEConfig
    from defense.hosts.families import tower_of

    tower = tower_of(tiny_clip)
    Checkpoint(random_sae(), BLOCK).check_clip(tower)
    Checkpoint(random_sae(), BLOCK, quick_gelu=False).check_clip(tower)
    with pytest.raises(HookPointError, match=r"blocks 0 to 2"):
        Checkpoint(random_sae(), "blocks.3.hook_resid_post").check_clip(tower)
    with pytest.raises(HookPointError, match="pooled image embeddings"):
        Checkpoint(random_sae(), POOLED).check_clip(tower)
    config = SAEConfig(D_MODEL + 1, D_SAE, "relu")
    with pytest.raises(ShapeError, match=f"d_model={D_MODEL + 1}.*{D_MODEL} wide"):
        Checkpoint(SparseAutoencoder(config, random_parameters(config)), BLOCK).check_clip(tower)


def test_fault_59_an_sae_of_the_other_gelu_is_refused(tiny_clip) -> None:
    from defense.hosts.families import tower_of

    tower = tower_of(tiny_clip)
    mismatched = Checkpoint(random_sae(), BLOCK, quick_gelu=True)
    with pytest.raises(ConfigError, match="quick_gelu=True, this tower has quick_gelu=False"):
        mismatched.check_clip(tower)
    mismatched.check_clip(tower, allow_mismatch=True)
