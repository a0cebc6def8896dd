"""Composed pictures: variants that differ in the second thing alone, aimed at what is not shown; measured too."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
from PIL import Image

from defense.benchmarks import confusions
from defense.benchmarks.datasets import READERS, Options, semantic
from defense.benchmarks.datasets.semantic import SideBySide, cases, read_confusions
from defense.core.config import fingerprint
from defense.errors import ConfigError
from defense.hosts.shipped import EMBEDDED, MODELS
from defense.store import checkpoint
from defense.store.checkpoint import Checkpoint
from defense.world import scenes

from ..command import run
from ..conftest import random_sae
from .datasets_made import png

CLASSES = ("dog", "red_fox", "sheep", "tree")
POINT = "blocks.1.hook_resid_post"


def row(shown: str, aimed: str) -> dict:
    return {"latent": 3, "shown": shown, "aimed": aimed, "push": 1.5}


@pytest.fixture
def folder(tmp_path) -> Path:
    """Four classes of three pictures of one color each, and what is confused."""
    root = tmp_path / "semantic"
    for label, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for i in range(3):
            (root / name / f"{i}.png").write_bytes(png(60 * label + i))
    rows = [row("dog", "sheep"), row("tree", "red fox")]
    stored = {"hook_point": POINT, "host": "h", "sae": "s", "confusions": rows}
    (root / "confusions.json").write_text(json.dumps(stored))
    return root


def test_what_a_picture_is_made_of_are_four_classes_and_all_confusions_are_used():
    found = [(1, 2), (3, 4), (5, 0)]
    made = cases(found, [place % 7 for place in range(300)], 7, [(9, place) for place in range(300)])
    for case in made:
        assert len({case.label, case.shown, case.other, case.aimed}) == 4
    assert {(case.shown, case.aimed) for case in made} == set(found)
    assert {case.other for case in made} == set(range(7))
    assert cases(found, [0, 1], 7, [(9, 0), (9, 1)]) == made[:2], "a picture's own seed decides alone"
    with pytest.raises(ConfigError, match="every confusion is of class 1"):
        cases([(1, 2)], [1], 7, [(0,)])


@pytest.mark.usefixtures("small_minis")
def test_drawn_variants_show_the_same_scene_and_differ_in_the_second_thing_alone():
    task = READERS["mini-semantic"].read(Path("nowhere"), Options())
    clean, other, attacked = task.tests
    assert [test.variant for test in task.tests] == list(semantic.VARIANTS)
    assert [test.is_attacked for test in task.tests] == [False, True, True]
    names, emoji = clean.class_names, list(scenes.OBJECTS.values())
    confused = {(names[s], names[a]) for s, a in read_confusions(semantic.DRAWN, names)[0]}
    for one, two, three in zip(clean.examples, other.examples, attacked.examples, strict=True):
        assert one.label == two.label == three.label
        assert (one.word, two.word) == (None, three.word)
        assert one.picture.scene == two.picture.scene == three.picture.scene
        assert one.picture.scene.subject.emoji == emoji[one.label]
        shown = [names[emoji.index(each.picture.beside.emoji)] for each in (two, three)]
        assert (shown[1], names[three.word]) in confused
        assert len({*shown, names[one.label], names[three.word]}) == 4
        pixels = [np.asarray(each.picture.load()) for each in (one, two, three)]
        assert not np.array_equal(pixels[0], pixels[1])
        assert not np.array_equal(pixels[1], pixels[2])
        assert len({each.picture.digest() for each in (one, two, three)}) == 3
    again = READERS["mini-semantic"].read(Path("nowhere"), Options())
    assert again.tests == task.tests
    assert READERS["mini-semantic"].read(Path("nowhere"), Options(seed=1)).tests != task.tests


def test_photographs_stand_side_by_side(folder):
    clean, other, attacked = READERS["semantic"].read(folder, Options()).tests
    for one, two, three in zip(clean.examples, other.examples, attacked.examples, strict=True):
        alone, beside, composed = (np.asarray(each.picture.load()) for each in (one, two, three))
        assert composed.shape == (224, 224, 3)
        assert np.array_equal(alone[:, :112], composed[:, :112])
        assert (alone[:, 112:] == 128).all()
        # The colors that `folder` gives the classes: red is 60 times the class, and the picture's number.
        shown = [int(pixels[0, 150, 0]) // 60 for pixels in (beside, composed)]
        assert (clean.class_names[shown[1]], clean.class_names[three.word]) in {("dog", "sheep"), ("tree", "red fox")}
        assert len({*shown, one.label, three.word}) == 4
    assert clean.facts["confusions_sha256"]


def test_half_a_picture_is_the_middle_of_its_square(tmp_path):
    striped = np.zeros((224, 224, 3), np.uint8)
    striped[:, :, 0] = np.arange(224)
    Image.fromarray(striped).save(tmp_path / "a.png")
    from defense.benchmarks.datasets import File

    got = np.asarray(SideBySide(File(tmp_path / "a.png"), File(tmp_path / "a.png")).load())
    assert np.array_equal(got[:, :112], striped[:, 56:168])
    assert np.array_equal(got[:, 112:], striped[:, 56:168])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no file of confusions"),
        ("[]", "is no file of confusions"),
        (json.dumps({"hook_point": POINT, "host": "h", "sae": "s", "confusions": [{"shown": "dog"}]}), "no file of"),
        (json.dumps({"hook_point": POINT, "host": "h", "sae": "s", "confusions": []}), "holds no confusions"),
        (json.dumps({"hook_point": POINT, "host": "h", "sae": "s", "confusions": [row("dog", "emu")]}), "names 'emu'"),
        (None, "confusions.json"),
    ],
    ids=["json", "list", "fields", "empty", "stranger", "missing"],
)
def test_a_file_of_confusions_that_cannot_be_used_is_refused(folder, text, message):
    (folder / "confusions.json").unlink()
    if text is not None:
        (folder / "confusions.json").write_text(text)
    with pytest.raises(ConfigError, match=message):
        READERS["semantic"].read(folder, Options())


def test_three_classes_are_too_few(folder):
    for each in (folder / "tree").iterdir():
        each.unlink()
    (folder / "tree").rmdir()
    with pytest.raises(ConfigError, match="it takes four"):
        READERS["semantic"].read(folder, Options())


def test_confusions_of_a_folder_are_found_and_the_attack_is_measured(folder, tmp_path, tiny_folder, defense):
    pytest.importorskip("scipy")
    pytest.importorskip("matplotlib")
    (folder / "confusions.json").unlink()
    checkpoint.save(Checkpoint(random_sae(), POINT), tmp_path / "sae")
    arguments = [tmp_path / "sae", "--pictures", folder, "--model", f"local-dir:{tiny_folder}"]
    assert confusions.main([*map(str, arguments), "--out", str(folder / "confusions.json")]) == 0
    stored = json.loads((folder / "confusions.json").read_text())
    assert stored["sae"] == fingerprint(random_sae().parameters_numpy())
    assert {each["shown"] for each in stored["confusions"]} <= {name.replace("_", " ") for name in CLASSES}
    code, out, err = run(
        "bench", "semantic", "--data", tmp_path, "--defense", tmp_path / "defense", "--out", tmp_path / "out"
    )
    assert code == 0, err
    assert "attack success" in out
    results = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")]
    assert {each["robust"]["variant"] for each in results} == set(semantic.VARIANTS)
    assert all("attack_success" in r["robust"]["figures"] for r in results if r["robust"]["variant"] != "clean")


def test_an_sae_without_pictures_is_a_usage_error(tmp_path):
    with pytest.raises(SystemExit) as stopped:
        confusions.main([str(tmp_path / "sae"), "--out", str(tmp_path / "c.json")])
    assert stopped.value.code == 2
    assert not (tmp_path / "c.json").exists()


def test_what_is_stored_is_of_the_model_that_ships():
    stored = json.loads(semantic.DRAWN.read_text())
    shipped = checkpoint.shipped_saes(MODELS[EMBEDDED])[-1]
    assert (stored["hook_point"], stored["sae"]) == (shipped.hook_point, fingerprint(shipped.sae.parameters_numpy()))
    assert len(stored["confusions"]) == 50


@pytest.mark.slow
def test_what_is_stored_is_what_is_found(tmp_path):
    assert confusions.main(["--out", str(tmp_path / "c.json")]) == 0
    found, stored = (json.loads(path.read_text()) for path in (tmp_path / "c.json", semantic.DRAWN))
    same = [a["latent"] == b["latent"] for a, b in zip(found["confusions"], stored["confusions"], strict=True)]
    assert sum(same) >= 45, "other machines round differently"
