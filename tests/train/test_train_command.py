"""`defense train`: an SAE from a folder of pictures, and what is refused before the training."""

from __future__ import annotations

import errno

import pytest

pytest.importorskip("open_clip")
from typer.testing import CliRunner

from defense.cli import app
from defense.store import checkpoint


def run(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)])


@pytest.fixture
def options(tiny_folder):
    return ["--model", f"local-dir:{tiny_folder}", "--block", 1, "--d-sae", 96, "--k", 4, "--n-tokens", 3000,
            "--batch", 200, "--lr", 3e-3, "--device", "cpu"]  # fmt: skip


def test_the_command_writes_an_sae(folder, tmp_path, options):
    (tmp_path / "names.txt").write_text("ant\nbee\ncow\n")
    result = run(folder, "--out", tmp_path / "sae", "--labels-file", tmp_path / "names.txt", *options)
    assert result.exit_code == 0, result.output
    assert "explained variance" in result.stdout
    assert "zero-shot" in result.stdout
    lines = [line.split() for line in result.stdout.splitlines()]
    by_kind = {line[0]: line[1:] for line in lines if line and line[0] in ("CLS", "patch")}
    made = checkpoint.load(tmp_path / "sae")
    for kind, found in made.provenance["quality"]["by_kind"].items():
        figures = f"{found['explained_variance']:.4f} {found['l0']:.1f} {100 * found['alive']:.1f} %"
        assert by_kind[kind] == figures.split()
    assert by_kind["CLS"] != by_kind["patch"]
    told = CliRunner().invoke(app, ["info", str(tmp_path / "sae")]).stdout
    assert [line.split() for line in told.splitlines() if line.split()[0] == "CLS"] == [["CLS", *by_kind["CLS"]]]
    assert "by_kind" not in told
    sae = made.sae
    assert (sae.config.act, sae.config.d_sae) == ("batchtopk", 96)
    assert {path.name for path in tmp_path.iterdir()} == {"names.txt", "sae"}


def test_fault_a_training_that_cannot_be_written_in_the_end_is_not_lost(folder, tmp_path, options, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "sae")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        result = run(folder, "--out", tmp_path / "sae", *options)
    assert result.exit_code == 6
    assert "No space left on device" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sae.state.safetensors"]
    monkeypatch.setattr("defense.train.trainer.Trainer.update", lambda *_: pytest.fail("it was trained again"))
    assert run(folder, "--out", tmp_path / "sae", *options).exit_code == 0
    assert [path.name for path in tmp_path.iterdir()] == ["sae"]


def test_the_command_says_which_pictures_it_left_out(folder, tmp_path, options):
    (tmp_path / "in").mkdir()
    for i, path in enumerate(sorted(folder.rglob("*.png"))):
        (tmp_path / "in" / f"{i}.png").write_bytes(b"" if i == 7 else path.read_bytes())
    result = run(tmp_path / "in", "--out", tmp_path / "sae", "--variant", "relu", *options)
    assert result.exit_code == 4
    assert "1 pictures could not be read" in result.stderr
    assert checkpoint.load(tmp_path / "sae").sae.config.act == "relu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--block", 7], "blocks 0 to 2"),
        (["--k", 97], "k=97, d_sae=96"),
        (["--tokens", "patch", "--block", 2], "editing patches changes nothing"),
        (["--batch", 4000], "less than a batch of 4000"),
    ],
    ids=["block", "k", "tokens", "batch"],
)
def test_the_command_refuses_what_cannot_work(folder, tmp_path, options, change, message):
    result = run(folder, "--out", tmp_path / "sae", *options, *change)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_the_command_refuses_a_folder_that_it_could_not_write_in_the_end(folder, tmp_path, options):
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "letter.txt").write_text("dear")
    result = run(folder, "--out", tmp_path / "sae", *options)
    assert result.exit_code == 2
    assert "is no SAE" in result.stderr
    assert "training" not in result.output
    result = run(folder, "--out", tmp_path / "no" / "sae", *options)
    assert result.exit_code == 2
    assert "is not there" in result.stderr
    result = run(tmp_path / "none", "--out", tmp_path / "new", *options)
    assert result.exit_code == 2
    assert "none is not there" in result.stderr
