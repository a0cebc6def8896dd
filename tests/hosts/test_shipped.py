"""The CLIPs that ship, by name."""

from pathlib import Path

import pytest

from defense.errors import ConfigError
from defense.hosts import shipped
from defense.hosts.shipped import EMBEDDED, MODELS, PHOTO


@pytest.mark.parametrize(
    ("name", "model", "defense"),
    [
        ("photo", PHOTO, "text"),
        ("photo:text", PHOTO, "text"),
        ("embedded", EMBEDDED, "text"),
        ("drawn", EMBEDDED, "text"),
        ("embedded:waterbirds", EMBEDDED, "waterbirds"),
    ],
)
def test_a_name_is_a_model_and_one_of_its_defenses(name, model, defense):
    found = shipped.find(name)
    assert found is not None
    assert (found.model.name, found.defense) == (model, defense)


@pytest.mark.parametrize("name", ["ViT-B-32", "./photo", "photos", "hf://org/photo", "", Path("photo"), None, 3])
def test_other_names_and_paths_are_none_of_them(name):
    assert shipped.find(name) is None


def test_a_model_has_no_defense_in_its_name():
    assert shipped.find_model("embedded:waterbirds") is None
    assert shipped.find_model("drawn") is MODELS[EMBEDDED]
    assert shipped.find_model(None) is None


def test_a_shipped_defense_is_for_its_own_model():
    shipped.check_own_model("embedded:celeba", "drawn")
    shipped.check_own_model("embedded", None)
    shipped.check_own_model("some/folder", "ViT-B-32")
    shipped.check_own_model("embedded", "local-dir:somewhere")  # its weights are held against when it is attached
    with pytest.raises(ConfigError, match="defense protect ViT-B-32 --pretrained openai"):
        shipped.check_own_model("embedded", "ViT-B-32", "openai")
    with pytest.raises(ConfigError, match="is a defense of photo, not of embedded"):
        shipped.check_own_model("photo", "embedded")


def test_the_folders_of_the_drawn_model_are_there():
    model = MODELS[EMBEDDED]
    assert model.is_there
    assert model.defenses == ("celeba", "text", "waterbirds")
    assert {path.name for path in model.folder("clip").iterdir()} >= {"open_clip_config.json"}


def test_a_model_that_is_not_installed_is_not_looked_for(tmp_path, monkeypatch):
    from defense.store.defenses import find_defense

    monkeypatch.setattr(shipped.ShippedClip, "folder", lambda _self, name: tmp_path / name)
    with pytest.raises(ConfigError, match=r"the photo model is not part of this installation; `python -m defense"):
        find_defense("photo")
    pytest.importorskip("open_clip")
    from defense.hosts.clip import load_clip

    with pytest.raises(ConfigError, match="the photo model is not part"):
        load_clip("photo")
