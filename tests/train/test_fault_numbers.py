"""Numbers that nothing can be computed with, in whatever asks for some before hours of work."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from defense.cli import app
from defense.errors import CheckpointError, ConfigError
from defense.fit.config import FitConfig
from defense.importers.common import Given, Source
from defense.train.trainer import TrainConfig

NOT_NUMBERS = (math.nan, math.inf, -math.inf, -1.0)


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("name", ["lr", "l1", "aux_weight"])
def test_fault_119_a_training_refuses_numbers_that_are_none(name, value) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        TrainConfig(**{"d_sae": 8, "k": 2, "steps": 1, name: value})


@pytest.mark.parametrize("value", NOT_NUMBERS)
@pytest.mark.parametrize("name", ["lr", "sparsity", "worst_rate", "clean_budget"])
def test_fault_119_a_fit_refuses_numbers_that_are_none(name, value) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        FitConfig(**{name: value})


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0])
@pytest.mark.parametrize("name", ["scalar", "scaling_factor"])
def test_fault_119_an_import_refuses_factors_that_nothing_can_be_divided_by(name, value, tmp_path: Path) -> None:
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is "):
        Given(Source(tmp_path / "x.pt"), {name: value})
    with pytest.raises(ConfigError, match="--threshold is nan"):
        Given(Source(tmp_path / "x.pt"), {"threshold": math.nan})


@pytest.mark.parametrize(
    ("option", "value"), [("--lr", "nan"), ("--lr", "0"), ("--l1", "inf"), ("--d-sae", "0"), ("--l1", "-1")]
)
def test_fault_119_the_command_refuses_them_before_it_reads_pictures(option, value, tiny_folder, tmp_path, monkeypatch):
    from PIL import Image

    monkeypatch.setattr("defense.train.runs.train", lambda *_, **__: pytest.fail("it has begun"))
    for index in range(3):
        Image.new("RGB", (40, 40)).save(tmp_path / f"{index}.png")
    arguments = [tmp_path, "--out", tmp_path / "sae", "--block", 0, "--model", f"local-dir:{tiny_folder}"]
    arguments += ["--variant", "relu", option, value]
    result = CliRunner().invoke(app, ["train", *map(str, arguments)])
    assert result.exit_code == 2, result.output
    assert option.removeprefix("--").replace("-", "_") + "=" in result.stderr


def test_fault_127_a_diverged_training_is_never_saved_over_a_sound_one(tmp_path: Path) -> None:
    import torch

    from defense.train.parallel import World
    from defense.train.trainer import SavedState, Trainer

    resid = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
    trainer = Trainer(TrainConfig(d_sae=16, k=2, steps=20, batch=32), 8, torch.device("cpu"), World())
    trainer.start(resid)
    trainer.update(resid)
    trainer.save(tmp_path / "state", {}, {})
    sound = (tmp_path / "state").read_bytes()
    with torch.no_grad():
        trainer.trainee.W_dec[3, 4] = math.nan
    with pytest.raises(ConfigError, match=r"diverged: W_dec is not finite after step 1 of 20.*--lr"):
        trainer.save(tmp_path / "state", {}, {})
    assert (tmp_path / "state").read_bytes() == sound
    saved = SavedState.read(tmp_path / "state", {})
    assert saved is not None
    assert saved.step == 1


def test_fault_127_a_training_that_diverges_ends_there_and_not_at_its_last_step(monkeypatch) -> None:
    import torch

    from defense.train import runs
    from defense.train.trainer import Trainer

    steps, update = [], Trainer.update
    monkeypatch.setattr(runs, "_LOG_EVERY", 10)
    monkeypatch.setattr(Trainer, "update", lambda self, resid: (steps.append(1), update(self, resid))[1])
    resid = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="diverged"):
        runs.train_in_memory(resid, TrainConfig(d_sae=16, k=2, steps=400, batch=32, lr=1e38))
    assert len(steps) < 100


@pytest.mark.parametrize("text", ["[]", "{}", '{"step": 1}', '{"step": 1, "scale": 1, "batches": 1, "made_with": 3}'])
def test_fault_128_a_state_that_says_too_little_is_one_error(text, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    from defense.train.trainer import SavedState

    save_file({"x": torch.zeros(1)}, tmp_path / "state", {"state": text})
    with pytest.raises(CheckpointError, match="no saved training"):
        SavedState.read(tmp_path / "state", {})
