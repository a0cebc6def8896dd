"""`defense import`, from a published file to a folder that loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")

import torch
from safetensors.torch import save_file

from defense import importers
from defense.errors import CheckpointError, install_command
from defense.store import checkpoint

from ..command import run
from .arithmetic import BLOCK, D, rand, residuals
from .published_vision import msae, saev_legacy


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
    assert install_command("torch") in done.stderr
