"""`from_pretrained`: which CLIP and which defense a name stands for, and names that stand for nothing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.classify.classifier import RobustClassifier
from defense.errors import BackendError, CheckpointError, ConfigError, NotThereError
from defense.hosts.clip import load_clip, resolve_device
from defense.hosts.golden import golden_difference, make_golden
from defense.hosts.naming import names_clip
from defense.store import defenses
from defense.store.defenses import find_defense

from .pictures import LABELS, picture


def test_from_pretrained_reads_a_folder_and_its_host(tmp_path, tiny_defense, clf):
    defenses.save(tiny_defense, tmp_path / "defense")
    loaded = RobustClassifier.from_pretrained(tmp_path / "defense", device="cpu").set_labels(LABELS)
    np.testing.assert_allclose(loaded.predict_proba([picture()]), clf.predict_proba([picture()]), atol=1e-6)
    with pytest.raises(ConfigError, match="no set 'birds'; it has text"):
        RobustClassifier.from_pretrained(tmp_path / "defense", sets=["birds"])


def test_weights_of_no_model_are_refused_before_anything_is_looked_for(tmp_path):
    with pytest.raises(ConfigError, match=r"pretrained='openai' .* there is no model=; give both"):
        RobustClassifier.from_pretrained(tmp_path / "nowhere", pretrained="openai")


def test_golden_vectors_are_reproduced_and_notice_another_host(tmp_path, tiny_defense, clf):
    pictures = np.stack([picture(i, (32, 32)) for i in range(3)])
    defense = replace(tiny_defense, golden=make_golden(clf.clip, pictures))
    defenses.save(defense, tmp_path / "defense")
    loaded = RobustClassifier.from_pretrained(tmp_path / "defense", device="cpu")
    golden = loaded.defense.golden
    assert golden_difference(loaded.clip, golden) < 1e-5
    with torch.no_grad():
        loaded.clip.model.visual.proj[:8] += 0.1
    assert golden_difference(loaded.clip, golden) > 1e-3


def test_fault_51_a_defense_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="neither a folder, nor a hub id"):
        find_defense(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="is missing"):
        find_defense(tmp_path)


def test_fault_77_a_hub_id_without_network_gives_one_error(monkeypatch, tmp_path):
    with pytest.raises(CheckpointError, match="no-such-org/no-such-defense"):
        find_defense("no-such-org/no-such-defense", local_files_only=True, cache_dir=str(tmp_path))


def test_a_defense_whose_clip_is_elsewhere_says_which_will_do_and_takes_it(tmp_path, tiny_defense, tiny_folder):
    """What binds a defense is the fingerprint, not the path that the CLIP was loaded from."""
    moved = replace(tiny_defense, clip=replace(tiny_defense.clip, model="local-dir:/home/somebody/clip"))
    folder = defenses.save(moved, tmp_path / "defense")
    with pytest.raises(ConfigError, match=rf"Give model= .* vision tower \(sha256 {moved.clip.sha256[:16]}"):
        RobustClassifier.from_pretrained(folder, device="cpu")
    clf = RobustClassifier.from_pretrained(folder, model=f"local-dir:{tiny_folder}", device="cpu")
    again = clf.save_pretrained(tmp_path / "again")
    assert defenses.load(again).sets == moved.sets
    with pytest.raises(ConfigError, match="no defense to save"):
        RobustClassifier(load_clip(f"local-dir:{tiny_folder}")).save_pretrained(tmp_path / "stock")


def test_the_name_of_a_clip_without_a_ready_defense_says_how_to_make_one(tmp_path, tiny_folder, monkeypatch):
    monkeypatch.setenv("CLIP_DEFENSE_CACHE", str(tmp_path))
    with pytest.raises(
        CheckpointError, match=r"no defense is ready for local-dir:.*make one: defense protect local-dir"
    ):
        RobustClassifier.from_pretrained(f"local-dir:{tiny_folder}", device="cpu", local_files_only=True)


@pytest.mark.parametrize("name", ["ViT-B-32", "vit-b-32"])
def test_a_folder_that_is_not_there_and_is_called_like_a_clip_is_said_to_be_missing(name):
    with pytest.raises(NotThereError, match=f"{name} is not there.*say with which weights: pretrained="):
        RobustClassifier.from_pretrained(name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("phto", r"ships \(photo, .*embedded:waterbirds\). Did you mean photo\?"),
        ("embeded", r"Did you mean embedded\?"),
        ("nothing-like-it", r"embedded:waterbirds\)$"),
    ],
)
def test_a_defense_that_is_not_there_is_told_what_ships(name, expected):
    with pytest.raises(NotThereError, match=expected):
        find_defense(name)


def test_a_mistyped_path_is_said_to_be_no_folder_before_the_hub_is(tmp_path):
    with pytest.raises(CheckpointError, match="there is no folder nofolder/x here, so the hub was asked for it: "):
        find_defense("nofolder/x", local_files_only=True, cache_dir=str(tmp_path))
    with pytest.raises(CheckpointError, match=r"^(?!there is no folder)"):
        find_defense("hf://nofolder/x", local_files_only=True, cache_dir=str(tmp_path))


@pytest.mark.parametrize(
    ("pretrained", "expected"),
    [
        (None, "ViT-B-32 needs weights: give pretrained="),
        ("datacomp", "did you mean datacomp_xl_s13b_b90k"),
        ("opnai", "did you mean openai"),
        ("tuned.safetensors", "there is no such file; there are openai, "),
    ],
)
def test_weights_that_open_clip_does_not_know_are_refused_with_those_it_does(pretrained, expected, caplog):
    with pytest.raises(ConfigError, match=expected):
        load_clip("ViT-B-32", pretrained)
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("ViT-B-32", True),
        ("ViT-B/32", True),
        ("ViT-L/14@336px", True),
        ("ViT-B-32-quickgelu", True),
        ("hf-hub:org/repo", True),
        ("local-dir:here", True),
        ("ViT-Z-99", False),
        ("org/repo", False),
        ("embedded", False),
        ("embedded:text", False),
        ("./folder", False),
    ],
)
def test_a_name_of_a_clip_is_told_from_one_of_a_defense(name, expected):
    assert names_clip(name) == expected


def test_a_host_that_open_clip_does_not_know_is_refused():
    with pytest.raises(ConfigError, match="knows no model 'ViT-Z-99'"):
        load_clip("ViT-Z-99", "openai")
    with pytest.raises(ConfigError, match="ViT-B-32 needs weights"):
        load_clip("ViT-B-32")
    with pytest.raises(ConfigError, match="cannot load"):
        load_clip("local-dir:/no/such/folder")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there, so asking for it is no fault")
def test_fault_68_cuda_that_is_not_there_is_refused():
    with pytest.raises(BackendError, match="sees no CUDA device"):
        resolve_device("cuda")
    assert resolve_device("auto") == "cpu"


def test_a_defended_host_is_no_stock_clip(tiny_folder, tiny_defense):
    clip = load_clip(f"local-dir:{tiny_folder}")
    RobustClassifier(clip, tiny_defense)
    with pytest.raises(ConfigError, match="defended already"):
        RobustClassifier(clip)


def test_other_preprocessing_than_the_defense_was_fitted_with_is_refused_unless_asked_for(tiny_folder, tiny_defense):
    clip = load_clip(f"local-dir:{tiny_folder}")
    other = replace(clip, preprocess=replace(clip.preprocess, mean=(0.4, 0.5, 0.5)))
    with pytest.raises(ConfigError, match="prepared with"):
        RobustClassifier(other, tiny_defense)
    clf = RobustClassifier(other, tiny_defense, allow_mismatch=True)
    assert clf.defense is not None
