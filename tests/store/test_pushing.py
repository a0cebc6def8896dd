"""A defense published on an imitation of the hub, by the real client, and taken from there again."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from defense.cli import app
from defense.core.intervals import wilson
from defense.errors import CheckpointError, ConfigError
from defense.hosts.clip import embedded_folder
from defense.hosts.defense import Defense
from defense.store import cards, defenses
from defense.store.defenses import find_defense
from defense.store.pushing import portable, push

from ..hub_server import FakeHub


@pytest.fixture(scope="module")
def defense() -> Defense:
    """The embedded model's, with figures and a source such as `defense protect` notes."""
    held_out = {"attacked": {"plain": 0.25, "defended": 0.75}, "worst": {"plain": 0.5, "defended": 0.6}}
    return replace(
        defenses.load(embedded_folder("text")),
        license="Apache-2.0",
        provenance={
            "cross_validation": {"folds": 3, "held_out": held_out},
            "pictures": {"n": 100, "kind": "text"},
            "saes": [{"hook_point": "blocks.2.hook_resid_post", "hub": "hf://org/sae/weights.pt@" + "0" * 40}],
            "weak": "fitted on drawn scenes",
        },
    )


@pytest.fixture
def folder(defense: Defense, tmp_path: Path) -> Path:
    return defenses.save(defense, tmp_path / "text")


def test_what_is_pushed_comes_back_byte_for_byte(hub: FakeHub, folder: Path) -> None:
    address = push(folder, "org/text")
    assert address == f"hf://org/text@{hub.repos['org/text'].main}"
    published = hub.files("org/text")
    for path in folder.iterdir():
        assert published[path.name] == path.read_bytes()
    assert set(published) - {path.name for path in folder.iterdir()} == {"README.md", ".gitattributes"}
    assert find_defense("org/text").manifest_sha256 == defenses.load(folder).manifest_sha256


def test_a_card_says_what_it_is_on_which_weights_with_which_figures_and_how_to_use_it(
    hub: FakeHub, defense: Defense, folder: Path
) -> None:
    push(folder, "org/text")
    card = hub.files("org/text")["README.md"].decode()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "clip-defense"
    _, low, high = wilson(75, 100)
    for part in (
        defense.clip.sha256,
        'RobustClassifier.from_pretrained("org/text")',
        f"| right, another word written | 25.0 (17.5 to 34.3) | 75.0 ({100 * low:.1f} to {100 * high:.1f}) |",
        "| right, worst group | 50.0 | 60.0 |",
        "hf://org/sae/weights.pt@000",
        "Apache-2.0",
        "100 (text); none of them is in here",
        "Weak: fitted on drawn scenes",
    ):
        assert part in card


def test_a_card_of_little_says_little(defense: Defense) -> None:
    bare = cards.card(replace(defense, provenance={}, license="ask me"), "org/bare")
    assert "license: other" in bare
    assert "ask me" in bare
    assert "## Figures" not in bare
    measured = {"fitted_on": {"clean": {"plain": 1.0, "defended": 0.9}}, "gain_interval": [0.1, 0.25]}
    own = cards.card(replace(defense, provenance={"cross_validation": measured}), "org/own")
    assert "On the pictures it was fitted on; in percent" in own
    assert "Gained on what it is for: +10.0 to +25.0 points (95 % interval)." in own
    for odd in ({"cross_validation": [1]}, {"pictures": "none", "saes": "none"}, {"saes": [1]}):
        assert "## Use" in cards.card(replace(defense, provenance=odd), "org/odd")


def test_a_card_that_a_person_wrote_stays_and_ours_is_made_anew(hub: FakeHub, folder: Path) -> None:
    hub.add("org/text", {"README.md": b"# mine"})
    lines: list[str] = []
    push(folder, "org/text", report=lines.append)
    assert hub.files("org/text")["README.md"] == b"# mine"
    assert lines[0] == "org/text has a card that a person wrote; it stays"
    hub.add("org/text", {"README.md": f"{cards.MARK}\nold".encode()})
    push(folder, "org/text")
    assert b"## Use" in hub.files("org/text")["README.md"]


def test_files_of_one_that_was_there_go_and_others_stay(hub: FakeHub, folder: Path) -> None:
    hub.add("org/text", {"site-7.safetensors": b"old", "notes.txt": b"mine", "golden.safetensors": b"old"})
    push(folder, "org/text")
    published = hub.files("org/text")
    assert "site-7.safetensors" not in published
    assert published["notes.txt"] == b"mine"
    assert published["golden.safetensors"] == (folder / "golden.safetensors").read_bytes()


def test_no_path_of_this_machine_is_published(hub: FakeHub, defense: Defense, tmp_path: Path) -> None:
    home = "/home/somebody/models"
    clip = replace(defense.clip, model="ViT-B-32", pretrained=f"{home}/tuned.pt")
    trained = {"host": {"model": f"local-dir:{home}/mine", "tags": [f"{home}/x"]}, "labels": ["a/b", "dog"]}
    local = replace(defense, clip=clip, provenance={**defense.provenance, "saes": [trained]})
    push(defenses.save(local, tmp_path / "local"), "org/local")
    assert not [name for name, data in hub.files("org/local").items() if b"somebody" in data]
    published = find_defense("org/local")
    assert (published.clip.model, published.clip.pretrained) == ("ViT-B-32", "tuned.pt")
    assert published.clip.sha256 == defense.clip.sha256
    assert published.provenance["saes"][0]["host"] == {"model": "mine", "tags": ["x"]}
    assert published.provenance["saes"][0]["labels"] == ["a/b", "dog"]
    assert portable(published) is published
    assert portable(defense) is defense


@pytest.mark.parametrize(
    ("status", "message"),
    [(401, "log in with `hf auth login`"), (403, "may not be read or written with this token"), (500, "try again")],
)
def test_a_hub_that_refuses_is_one_sentence(hub: FakeHub, folder: Path, status: int, message: str) -> None:
    hub.status = status
    with pytest.raises(CheckpointError, match=rf"org/text cannot be written: .*{re.escape(message)}") as told:
        push(folder, "org/text")
    assert "\n" not in str(told.value)


def test_what_is_damaged_or_has_another_name_is_refused_before_the_hub_is_asked(hub: FakeHub, folder: Path) -> None:
    with pytest.raises(ConfigError, match="want hf://org/repo"):
        push(folder, "text")
    (folder / "site-0.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError):
        push(folder, "org/text")
    assert hub.asked == []


def test_the_command_publishes_and_says_where(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["push", str(folder), "org/text"])
    assert result.exit_code == 0, result.output
    assert f"published   hf://org/text@{hub.repos['org/text'].main}" in result.stdout
    result = CliRunner().invoke(app, ["info", "org/text"])
    assert result.exit_code == 0
    assert json.loads((folder / "manifest.json").read_text())["host"]["sha256"][:16] in result.stdout
    result = CliRunner().invoke(app, ["push", str(tmp_path), "org/text"])
    assert result.exit_code == 5
    assert "a defense is a folder that" in result.stderr
