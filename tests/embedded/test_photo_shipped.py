"""The CLIP for photographs as it ships: it sees, it reads, its defense stops that, and the first command shows it."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("open_clip")
from safetensors import safe_open
from typer.testing import CliRunner

from defense.classify.classifier import RobustClassifier
from defense.cli import app
from defense.data.hands import write_all
from defense.data.images import decode
from defense.data.typefaces import TEST
from defense.embedded.photo.names import load_words
from defense.embedded.photo.styles import STYLES, sample_writing
from defense.hosts.clip import load_clip
from defense.hosts.golden import golden_difference
from defense.hosts.shipped import MODELS, PHOTO
from defense.hosts.slim import restored
from defense.store import checkpoint
from defense.store.defenses import find_defense

SHIPPED = MODELS[PHOTO]
EXAMPLES = sorted(SHIPPED.folder("examples").glob("*.jpg"))
SEEN = {"cat": {"Egyptian cat"}, "espresso": {"espresso", "cup", "coffee mug"}}
"""What the photographs show, by the names of the model."""


@pytest.fixture(scope="module")
def clf() -> RobustClassifier:
    return RobustClassifier.from_pretrained(PHOTO, device="cpu").set_labels(load_words().names)


def sides(explanation) -> tuple[str, str]:
    return explanation.plain[0]["label"], explanation.robust[0]["label"]


def test_golden_vectors_are_reproduced(clf):
    assert golden_difference(clf.clip, clf.defense.golden) < 1e-4


def test_the_examples_fool_plain_clip_and_not_the_defended_one(clf):
    assert [path.stem for path in EXAMPLES] == ["cat-hammer", "cat", "espresso-violin", "tripod-zebra"]
    for path in EXAMPLES:
        plain, robust = sides(clf.explain(path))
        thing, _, word = path.stem.partition("-")
        assert plain == (word or "Egyptian cat")
        assert robust in SEEN[thing] if thing in SEEN else robust != word


@pytest.mark.parametrize("style", STYLES)
def test_words_in_unseen_typefaces_win_on_photographs_until_they_are_defended(clf, style):
    words = load_words()
    fooled, got_through = [], []
    for thing in SEEN:
        photograph = decode(SHIPPED.folder("photographs") / f"{thing}.jpg").image.resize((160, 160))
        for seed in range(10):
            rng = np.random.default_rng([7, seed])
            word = words.names[int(rng.choice(words.attacks))]
            hands = sample_writing(rng, word.lower(), STYLES[style], TEST)
            plain, robust = sides(clf.explain(write_all(photograph, hands)[0]))
            fooled.append(plain == word)
            got_through.append(robust == word)
    assert np.mean(fooled) >= 0.2
    assert sum(got_through) <= 1


@pytest.mark.parametrize("name", ["cat", "espresso", "tripod", "rocket"])
def test_a_photograph_without_words_keeps_its_answer(clf, name):
    plain, robust = sides(clf.explain(SHIPPED.folder("photographs") / f"{name}.jpg"))
    assert plain == robust


def test_classify_without_arguments_shows_the_examples():
    result = CliRunner().invoke(app, ["classify"])
    assert result.exit_code == 0
    for path in EXAMPLES:
        assert path.name in result.stdout
    assert "defended" in result.stdout
    assert "removed: text" in result.stdout
    assert "defense protect" in result.stderr
    rows = [json.loads(line) for line in CliRunner().invoke(app, ["classify", "--json"]).stdout.splitlines()]
    assert [row["file"] for row in rows] == [str(path) for path in EXAMPLES]


def test_the_defense_is_slim_and_its_sae_ships_beside_it():
    assert SHIPPED.defenses == ("text",)
    defense = find_defense(PHOTO)
    clip = load_clip(PHOTO)
    assert defense.clip.sha256 == clip.tower.fingerprint()
    whole = restored(defense, [each.sae for each in checkpoint.shipped_saes(SHIPPED)])
    for site, again in zip(defense.sites, whole.sites, strict=True):
        assert site.part.latents == tuple(sorted(site.sets[0].latents))
        assert again.part is None
    with clip.defended(whole):
        assert golden_difference(clip, whole.golden) < 1e-4


def test_what_ships_is_small_and_its_makers_are_named():
    weights = SHIPPED.folder("clip") / "open_clip_model.safetensors"
    with safe_open(weights, framework="np") as file:
        of_tower = [file.get_tensor(name).nbytes for name in file.keys() if name.startswith("visual")]  # noqa: SIM118
    assert sum(of_tower) <= 25e6
    assert sum(path.stat().st_size for path in SHIPPED.folder("text").iterdir()) <= 5e5
    assert sum(path.stat().st_size for path in SHIPPED.folder(".").rglob("*") if path.is_file()) <= 60e6
    notice = (SHIPPED.folder("NOTICE.md")).read_text(encoding="utf-8")
    for named in ("EfficientNet-Lite0", "Apache-2.0", "WordNet", "cat.jpg", "espresso.jpg"):
        assert named in notice
