"""Numbers that nothing can be computed with, in whatever asks for some before hours of work."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

pytest.importorskip("torch")

from typer.testing import CliRunner

from defense.cli import app
from defense.errors import ConfigError
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
