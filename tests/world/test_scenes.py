"""The procedural world: deterministic, twins alike, letters where they are drawn, train and test apart."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

from defense.world import draws, scenes
from defense.world.scenes import Background, Finish, Scene, Writing

FONTS = (*scenes.TRAIN_FONTS, *scenes.TEST_FONTS)


def pixels(scene: Scene, size: int = scenes.SIZE) -> np.ndarray:
    return np.asarray(scenes.render(scene, size))


def test_the_same_seed_draws_the_same_pictures():
    for first, second in zip(draws.typographic(5, 3), draws.typographic(5, 3), strict=True):
        assert first == second
        assert np.array_equal(pixels(first.scene), pixels(second.scene))


def test_a_picture_depends_on_seed_and_index_alone():
    assert list(draws.typographic(9, 3))[:4] == list(draws.typographic(4, 3))
    assert list(draws.typographic(4, 3)) != list(draws.typographic(4, 4))


def test_word_and_object_differ_and_all_objects_occur():
    cases = list(draws.typographic(1500, 0))
    assert all(case.label != case.word for case in cases)
    assert {case.label for case in cases} == set(scenes.OBJECTS) == {case.word for case in cases}


def test_twins_differ_only_where_the_writing_is():
    for case in draws.typographic(30, 5):
        quiet = case.scene.finish.__class__(0)
        scene = replace(case.scene, finish=quiet, oversample=1)
        clean, neutral, attacked = pixels(scene.clean()), pixels(scene.neutral()), pixels(scene)
        inked = (attacked != neutral).any(-1)
        assert inked.any()
        if scene.writing.style == "bare":
            assert np.array_equal(clean, neutral)
        else:
            covered = (clean != neutral).any(-1)
            assert covered.sum() > inked.sum() / 2


def test_letters_are_found_where_ink_is_drawn():
    centers = (np.stack(np.meshgrid(np.arange(80), np.arange(80)), -1).reshape(-1, 2) + 0.5) / 80
    for case in draws.typographic(20, 6):
        scene = replace(case.scene, finish=Finish(0), oversample=1)
        ink = (pixels(scene) != pixels(scene.neutral())).any(-1).ravel()
        letters = scenes.letters_at(scene, centers)
        assert (letters[ink] > 0).mean() > 0.7
        assert {chr(96 + letter) for letter in letters if letter} == set(case.word)
        assert not scenes.letters_at(scene.neutral(), centers).any()
        assert not scenes.letters_at(scene.clean(), centers).any()


def test_letters_run_in_reading_order():
    writing = Writing("abc", "roboto", "bare", (0.5, 0.5), 0.25, 0.0, (0, 0, 0), (255, 255, 255))
    scene = Scene(Background("plain", 0), None, writing, Finish(0))
    row = np.stack([np.linspace(0, 1, 200), np.full(200, 0.5)], 1)
    letters = scenes.letters_at(scene, row)
    assert [letter for i, letter in enumerate(letters) if i == 0 or letters[i - 1] != letter] == [0, 1, 2, 3, 0]


def test_train_and_test_share_no_font():
    assert not set(scenes.TRAIN_FONTS) & set(scenes.TEST_FONTS)
    folder = resources.files("defense.world").joinpath("fonts")
    assert {path.name.removesuffix(".ttf") for path in folder.iterdir()} == set(FONTS)


@pytest.mark.parametrize("name", FONTS)
def test_every_font_draws_different_letters_that_fit(name):
    font = scenes.load_font(name, 32)
    drawn = {bytes(font.getmask(letter)) for letter in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"}
    assert len(drawn) >= 26
    rng = np.random.default_rng(0)
    for word in scenes.OBJECTS:
        writing = draws.sample_writing(rng, word, [name])
        assert scenes.letter_edges(writing.text, name)[-1] * writing.height <= 0.92 + 1e-6


def test_every_glyph_of_the_atlas_is_drawn():
    seen = set()
    for emoji in scenes.GLYPHS:
        glyph = np.asarray(scenes._glyph(emoji))
        assert (glyph[..., 3] > 128).mean() > 0.05, emoji
        seen.add(hashlib.sha256(glyph.tobytes()).hexdigest())
    assert len(seen) == len(set(scenes.GLYPHS)) == len(scenes.GLYPHS)


@pytest.mark.parametrize("world", [draws.waterbirds, draws.celeba], ids=["waterbirds", "celeba"])
def test_groups_are_balanced_in_tests_and_correlated_in_training(world):
    balanced = np.bincount([case.group for case in world(4000, 0)], minlength=4) / 4000
    np.testing.assert_allclose(balanced, 0.25, atol=0.03)
    cases = list(world(4000, 0, correlation=0.95))
    agree = np.mean([(case.a == case.y) if world is draws.waterbirds else (case.a != case.y) for case in cases])
    assert agree == pytest.approx(0.95, abs=0.015)


def test_groups_show_what_they_say():
    for case in draws.waterbirds(50, 1):
        assert case.scene.subject.emoji in scenes.BIRDS[("landbird", "waterbird")[case.y]]
        assert case.scene.background.kind == ("land", "water")[case.a]
    for case in draws.celeba(50, 1):
        assert case.scene.subject.emoji in scenes.FACES[("dark", "blond")[case.y], ("woman", "man")[case.a]]


def test_a_larger_drawing_shows_the_same_scene():
    for case in draws.typographic(5, 8):
        scene = replace(case.scene, finish=Finish(0), oversample=1)
        small = pixels(scene).astype(float)
        large = np.asarray(scenes.render(scene, 320).resize((80, 80))).astype(float)
        assert np.abs(small - large).mean() < 12
