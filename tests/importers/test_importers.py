"""Published SAE formats: files made to their description, against the arithmetic of their projects in plain numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from typer.testing import CliRunner

from defense import importers
from defense.cli import app
from defense.errors import CheckpointError
from defense.importers import common
from defense.store import checkpoint

from .arithmetic import residuals
from .published import ALL, CASES
from .published_vision import prisma_json


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


# --- from the hub -----------------------------------------------------------------------------------------------------


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
