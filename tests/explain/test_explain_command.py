"""`defense explain`: the report that it writes, and what it refuses before anything is computed."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from defense.core.config import fingerprint

from ..command import run
from .pages import Page, picture


@pytest.fixture
def apple(tmp_path):
    path = tmp_path / "apple & <b>pear.png"
    picture(60, 40).save(path)
    return path


@pytest.mark.parametrize("name", ["report.html", "report.png", "REPORT.PNG"])
def test_a_report_is_written_and_the_short_answer_is_that_of_classify(defense_folder, apple, tmp_path, name):
    chosen = ("--labels", "dog,cat,red fish", "--defense", defense_folder)
    code, out, err = run("explain", apple, "--out", tmp_path / name, *chosen)
    assert code == 0
    assert out == run("classify", apple, *chosen)[1]
    assert name in err
    if name.endswith("html"):
        page = Page((tmp_path / name).read_text(encoding="utf-8"))
        assert apple.name in page.text
    else:
        with Image.open(tmp_path / name) as image:
            assert (image.format, image.width) == ("PNG", 1200)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")], "nothing else is left"


def test_a_json_file_has_the_explanation_and_what_patches_say_on_both_sides(defense_folder, apple, tmp_path):
    chosen = ("--labels", "dog,cat,red fish", "--defense", defense_folder)
    code, _, err = run("explain", apple, "--out", tmp_path / "r.json", *chosen, "--phrase", "a tree", "--less", "cat")
    assert code == 0, err
    found = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    assert found["picture"] == apple.name
    assert found["patches"]["labels"] == ["dog", "cat", "red fish"]
    for side in ("plain", "robust"):
        assert np.shape(found["patches"][side]) == (4, 4, 3)
        assert np.shape(found["patches"]["region"][f"{side}_region"]) == (4, 4)
        assert len(found[side]) == 3
    assert found["patches"]["plain"] != found["patches"]["robust"]


def test_a_phrase_is_in_the_report_and_a_contrast_without_one_is_refused(defense_folder, apple, tmp_path):
    arguments = ("explain", apple, "--labels", "dog,cat", "--defense", defense_folder, "--out", tmp_path / "r.html")
    assert run(*arguments, "--phrase", "tree", "--less", "<i>")[0] == 0
    assert "Where tree less <i> is" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text
    code, _, err = run(*arguments, "--less", "cat")
    assert code == 2
    assert "--phrase" in err


def test_a_tower_that_cannot_be_read_by_patches_has_no_map_and_refuses_a_phrase(
    defense_folder, apple, tmp_path, monkeypatch
):
    from defense.errors import HookPointError
    from defense.explain import patches

    def refuse(*_args: object) -> None:
        raise HookPointError("rotary")

    monkeypatch.setattr(patches, "patch_embeds", refuse)
    arguments = ("explain", apple, "--labels", "dog,cat", "--defense", defense_folder, "--out", tmp_path / "r.html")
    code, _, err = run(*arguments)
    assert code == 0
    assert "no map of labels: rotary" in err
    assert "What each patch says" not in (tmp_path / "r.html").read_text(encoding="utf-8")
    (tmp_path / "r.html").unlink()
    assert run(*arguments, "--phrase", "dog")[0] != 0
    assert not (tmp_path / "r.html").exists()


def test_strength_and_edit_reach_the_report(defense_folder, apple, tmp_path):
    arguments = ("explain", apple, "--labels", "dog,cat", "--defense", defense_folder, "--out", tmp_path / "r.html")
    code, out, _ = run(*arguments, "--strength", 0)
    assert code == 0
    assert "nothing was removed" in out
    assert run(*arguments, "--edit", "project")[0] == 0
    assert "edit project" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text


def test_names_of_another_sae_are_left_out_and_that_is_said(defense_folder, apple, tmp_path):
    from defense.explain import catalogue
    from defense.explain.catalogue import Catalogue
    from defense.store import defenses

    site = defenses.load(defense_folder).sites[0]
    d_sae = site.sae_config.d_sae
    made = Catalogue(
        site.hook_point, {}, ((("zebra", 0.5),),) * d_sae, np.zeros((d_sae, 2), np.float16),
        np.full((d_sae, 1), -1, np.int32), np.zeros((d_sae, 1), np.float32), np.zeros((d_sae, 16), np.int32), (),
        {"sae": fingerprint(site.parameters)},
    )  # fmt: skip
    arguments = ("explain", apple, "--labels", "dog,cat", "--defense", defense_folder, "--out", tmp_path / "r.html")
    for provenance, is_named in ((made.provenance, True), ({"sae": "another"}, False)):
        catalogue.save([replace(made, provenance=provenance)], tmp_path / "defense.catalogue")
        code, _, err = run(*arguments)
        assert code == 0
        assert ("zebra" in Page((tmp_path / "r.html").read_text(encoding="utf-8")).text) == is_named
        assert ("of another SAE" in err) != is_named


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--out", "{tmp}/report.pdf", "--labels", "a,b"], 2, "must end in"),
        (["--out", "{tmp}/report", "--labels", "a,b"], 2, "must end in"),
        (["--out", "{tmp}/nowhere/report.png", "--labels", "a,b"], 2, "there is no folder"),
        (["--out", "{tmp}/folder.html", "--labels", "a,b"], 2, "is no file"),
        (["--out", "{tmp}/apple & <b>pear.png", "--labels", "a,b"], 2, "is the picture itself"),
        (["--out", "{tmp}/report.html", "--labels", "a,b", "--strength", "2"], 2, "strength"),
        (["--out", "{tmp}/report.html", "--labels", "a,b", "--edit", "set"], 2, "edit"),
        (["--labels", "a,b"], 2, "--out"),
    ],
    ids=["pdf", "no-suffix", "no-folder", "a-folder", "the-picture", "strength", "edit", "no-out"],
)
def test_what_cannot_be_written_is_refused_before_anything_is_computed(
    defense_folder, apple, tmp_path, monkeypatch, arguments, code, message
):
    from defense.classify.classifier import RobustClassifier

    monkeypatch.setattr(RobustClassifier, "from_pretrained", lambda *_args, **_fields: pytest.fail("computed"))
    (tmp_path / "folder.html").mkdir()
    before = sorted(tmp_path.rglob("*"))
    got, out, err = run(
        "explain", apple, "--defense", defense_folder, *(each.format(tmp=tmp_path) for each in arguments)
    )
    assert got == code
    assert message in " ".join(err.replace("\u2502", " ").split())
    assert not out
    assert sorted(tmp_path.rglob("*")) == before


def test_a_bad_picture_exits_with_4_and_a_bundle_with_2(tmp_path, tiny_bundle, apple):
    (tmp_path / "bad.png").write_bytes(b"<html>")
    code, _, err = run("explain", tmp_path / "bad.png", "--out", tmp_path / "r.html", "--labels", "a,b")
    assert code == 4
    assert "not_an_image" in err
    code, _, err = run("explain", apple, "--out", tmp_path / "r.html", "--labels", "a,b", "--defense", tiny_bundle)
    assert code == 2
    assert "cannot explain itself" in " ".join(err.replace("\u2502", " ").split())


def test_a_failure_leaves_the_report_that_was_there(defense_folder, apple, tmp_path, monkeypatch):
    (tmp_path / "r.png").write_bytes(b"old")

    def full(_image, path, *_args, **_fields):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    code, _, err = run(
        "explain", apple, "--out", tmp_path / "r.png", "--labels", "dog,cat", "--defense", defense_folder
    )  # fmt: skip
    assert code == 6
    assert "No space left" in err
    assert (tmp_path / "r.png").read_bytes() == b"old"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_classify_plain_wraps_nothing_and_runs_the_picture_once(defense_folder, apple, monkeypatch):
    import open_clip

    from defense.hosts import attach

    passes = []
    encode_image = open_clip.CLIP.encode_image
    monkeypatch.setattr(
        open_clip.CLIP, "encode_image", lambda *args, **fields: passes.append(1) or encode_image(*args, **fields)
    )
    arguments = ("classify", apple, "--labels", "dog,cat", "--defense", defense_folder, "--json")
    both = json.loads(run(*arguments)[1])
    assert len(passes) == 2
    monkeypatch.setattr(attach, "wrap", lambda *_args, **_fields: pytest.fail("wrapped"))
    plain = json.loads(run(*arguments, "--plain")[1])
    assert len(passes) == 3
    assert plain["plain"] == both["plain"]
    assert "map" not in both["removed"][0]
