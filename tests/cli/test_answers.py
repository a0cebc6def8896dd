"""How `classify` prints the answers of many pictures: under which name, and where a reason stands in place of one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
from PIL import Image

from ..command import run


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder with two pictures of one name, each in a folder of its class, and a file that is no picture."""
    for seed, folder in enumerate(("cats", "dogs")):
        (tmp_path / folder).mkdir()
        pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / folder / "1.png")
    (tmp_path / "dogs" / "2.png").write_bytes(b"<html>not found</html>")
    return tmp_path


@pytest.mark.parametrize("options", [[], ["--plain"]], ids=["both", "plain"])
def test_pictures_of_one_name_in_two_folders_are_told_apart(defense_folder: Path, pictures: Path, options) -> None:
    code, out, _ = run("classify", pictures, "--labels", "dog,cat", "--defense", defense_folder, *options)
    assert code == 4
    names = [line for line in out.splitlines() if line.startswith(str(pictures))]
    assert names == [str(pictures / folder / "1.png") for folder in ("cats", "dogs")]


def test_a_reason_stands_among_the_answers_in_their_form(defense_folder: Path, pictures: Path) -> None:
    arguments = ("classify", pictures, "--labels", "dog,cat", "--defense", defense_folder, "--on-error")
    code, out, err = run(*arguments, "return")
    assert code == 4
    assert "{" not in out
    (line,) = (each for each in out.splitlines() if each.startswith(str(pictures / "dogs" / "2.png")))
    assert "not_an_image" in line
    assert "not_an_image" not in err
    _, out, err = run(*arguments, "skip")
    assert "not_an_image" not in out
    assert "not_an_image" in err
