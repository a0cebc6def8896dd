"""Paths at which there is nothing: a usage error for every option of every command that reads one."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("open_clip")

from defense.cli import app

from ..conftest import random_sae

NOPE = "/nope/nothing-here"
TINY = ["--model", "local-dir:{tiny}"]

DESCRIBE = ["{sae}", "--pictures", "{folder}", "--words", "{words}", "--out", "{out}"]

# (command, parameter) -> a command line that is right but for that parameter, which is the path NOPE.
READ = {
    ("classify", "labels_file"): ["{picture}", "--labels-file", NOPE],
    ("classify", "defense"): ["{picture}", "--labels", "dog,cat", "--defense", NOPE],
    ("explain", "labels_file"): ["{picture}", "--out", "{out}.png", "--labels-file", NOPE],
    ("explain", "defense"): ["{picture}", "--out", "{out}.png", "--labels", "dog,cat", "--defense", NOPE],
    ("explain", "nearest"): ["{picture}", "--out", "{out}.png", "--labels", "dog,cat", "--nearest", NOPE],
    ("export", "labels_file"): ["{out}", "--labels-file", NOPE],
    ("export", "defense"): ["{out}", "--labels", "dog,cat", "--defense", NOPE],
    ("info", "source"): [NOPE],
    ("import", "file"): [NOPE, "{out}"],
    ("import", "config"): ["{picture}", "{out}", "--config", NOPE],
    ("import", "act_mean"): ["{picture}", "{out}", "--act-mean", NOPE],
    ("train", "pictures"): [NOPE, "--out", "{out}", "--block", "0", *TINY],
    ("train", "labels_file"): ["{folder}", "--out", "{out}", "--block", "0", "--labels-file", NOPE, *TINY],
    ("describe", "sae"): [NOPE, "--pictures", "{folder}", "--words", "{words}", "--out", "{out}", *TINY],
    ("describe", "pictures"): ["{sae}", "--pictures", NOPE, "--words", "{words}", "--out", "{out}", *TINY],
    ("describe", "words"): ["{sae}", "--pictures", "{folder}", "--words", NOPE, "--out", "{out}", *TINY],
    ("describe", "embeds"): [*DESCRIBE, "--embeds", NOPE, *TINY],
    ("describe", "classes"): [*DESCRIBE, "--classes", NOPE, *TINY],
    ("describe", "phrases"): [*DESCRIBE, "--phrases", NOPE, *TINY],
    ("describe", "tree"): [*DESCRIBE, "--classes", "{words}", "--tree", NOPE, *TINY],
    ("fit", "pictures"): ["{out}", NOPE, "--sae", "{sae}", "--labels", "dog,cat", *TINY],
    ("fit", "sae"): ["{out}", "{folder}", "--sae", NOPE, "--labels", "dog,cat", *TINY],
    ("fit", "labels_file"): ["{out}", "{folder}", "--sae", "{sae}", "--labels-file", NOPE, *TINY],
    ("fit", "metadata"): ["{out}", "--sae", "{sae}", "--task", "group", "--classes", "a,b", "--metadata", NOPE, *TINY],
    ("protect", "pictures"): ["local-dir:{tiny}", "--pictures", NOPE, "--train"],
    ("protect", "labels_file"): ["local-dir:{tiny}", "--labels-file", NOPE],
    ("protect", "registry"): ["local-dir:{tiny}", "--registry", NOPE],
    ("push", "folder"): [NOPE, "org/repo"],
    ("bench", "data"): ["typographic", "--data", NOPE, *TINY],
    ("bench", "defense"): ["mini", "--defense", NOPE, "--out", "{out}", *TINY],
    ("bench", "font"): ["mini", "--font", NOPE, "--out", "{out}"],
    ("demo", "bundle"): ["--bundle", NOPE],
    ("demo", "defense"): ["--defense", NOPE],
    ("demo", "labels_file"): ["--labels-file", NOPE],
}
WRITTEN = {
    *[(command, "out") for command in ("bench", "describe", "explain", "export", "fit", "import", "protect", "train")],
    ("fit", "report"),
    ("train", "shards"),
}
# (command, parameter) -> a command line that is right but for that parameter, which is a link to itself.
LOOPED = {
    ("bench", "out"): ["mini", "--out", "{loop}"],
    ("describe", "out"): ["{sae}", "--pictures", "{folder}", "--words", "{words}", "--out", "{loop}", *TINY],
    ("explain", "out"): ["{picture}", "--labels", "dog,cat", "--out", "{loop}.png"],
    ("export", "out"): ["{loop}", "--labels", "dog,cat"],
    ("fit", "out"): ["{loop}", "{folder}", "--sae", "{sae}", "--labels", "dog,cat", *TINY],
    ("fit", "report"): ["{out}", "{folder}", "--report", "{loop}", "--sae", "{sae}", "--labels", "dog,cat", *TINY],
    ("import", "out"): ["{picture}", "{loop}"],
    ("protect", "out"): ["local-dir:{tiny}", "--out", "{loop}"],
    ("train", "out"): ["{folder}", "--out", "{loop}", "--block", "0", *TINY],
    ("train", "shards"): ["{folder}", "--out", "{out}", "--shards", "{loop}", "--block", "0", *TINY],
}
PICTURES = {("classify", "pictures"), ("explain", "picture")}
"""A picture that is not there is one that cannot be read: the others are still answered."""


@pytest.fixture
def places(tmp_path: Path, tiny_folder: Path) -> dict[str, Path]:
    """Inputs that are there, and where to write."""
    from defense.store import checkpoint
    from defense.store.checkpoint import Checkpoint

    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(4):
        Image.new("RGB", (40, 40), (60 * index, 90, 30)).save(folder / f"{index}.png")
    (tmp_path / "words.txt").write_text("dog\ncat")
    checkpoint.save(Checkpoint(random_sae(), "blocks.1.hook_resid_post"), tmp_path / "sae")
    return {
        "picture": folder / "0.png",
        "folder": folder,
        "words": tmp_path / "words.txt",
        "sae": tmp_path / "sae",
        "out": tmp_path / "out",
        "tiny": tiny_folder,
    }


@pytest.mark.parametrize(("command", "parameter"), READ, ids=[" ".join(key) for key in READ])
def test_fault_112_a_path_at_which_there_is_nothing_is_a_usage_error(command, parameter, places) -> None:
    arguments = [each.format(**places) for each in READ[command, parameter]]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 2, result.output
    assert NOPE in result.stderr.replace("\n", "")
    assert any(words in result.stderr.replace("\n", " ") for words in ("not there", "No such file", "no folder"))
    assert not places["out"].exists()


def test_fault_112_every_path_of_every_command_is_tried() -> None:
    names = {"defense", "source", "file", "registry", "sae"}  # may be names of other things than paths, too
    commands = {each.name or each.callback.__name__: each.callback for each in app.registered_commands if each.callback}
    paths = {
        (command, name)
        for command, callback in commands.items()
        for name, kind in get_type_hints(callback).items()
        if name in names or "Path" in str(kind)
    }
    assert paths == READ.keys() | WRITTEN | PICTURES


def test_fault_112_a_defense_that_the_embedded_model_lacks_is_a_usage_error() -> None:
    result = CliRunner().invoke(app, ["info", "embedded:nothing"])
    assert result.exit_code == 2
    assert "has no defense 'nothing'" in result.stderr.replace("\n", " ")


@pytest.mark.parametrize(("command", "parameter"), LOOPED, ids=[" ".join(key) for key in LOOPED])
def test_fault_120_a_link_to_itself_is_no_place_to_write_to(command, parameter, places, tmp_path) -> None:
    for name in ("loop", "loop.png"):
        (tmp_path / name).symlink_to(name)
    arguments = [each.format(**places, loop=tmp_path / "loop") for each in LOOPED[command, parameter]]
    result = CliRunner().invoke(app, [command, *arguments])
    assert result.exit_code == 2, result.output
    assert "a link that leads back to itself" in " ".join(result.stderr.split())
    assert not places["out"].exists()


def test_fault_120_every_place_that_is_written_is_tried() -> None:
    assert LOOPED.keys() == WRITTEN
