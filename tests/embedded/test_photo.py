"""What the CLIP for photographs is trained from and on: names, words on pictures, lessons, the tower."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
import torch
from torch.nn import functional

from defense.data.hands import sample_hand, write
from defense.data.typefaces import FILES, TEST, TRAIN
from defense.embedded.photo.build import new_model
from defense.embedded.photo.grounds import SIZE, Sources
from defense.embedded.photo.lessons import KEEP, batches
from defense.embedded.photo.names import load_words
from defense.embedded.photo.pictures import crops_of
from defense.embedded.photo.start import D_EMBED, Start
from defense.embedded.photo.training import Reader, Recipe, train
from defense.embedded.train_clip import check_recipe
from defense.errors import ConfigError
from defense.hosts.families import tower_of
from defense.hosts.photo_tower import D_PATCH, D_POOLED, Stem, fold_norms

GRID = 10


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return new_model().eval()


@pytest.fixture(scope="module")
def sources():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 1000, 8)
    return Sources(
        rng.integers(0, 256, (8, 64, 64, 3), np.uint8), labels, rng.integers(0, 256, (2, SIZE, SIZE, 3), np.uint8)
    )


def test_every_class_has_a_name_of_its_own_and_stands_for_itself_by_it():
    words = load_words()
    assert len(words.wnids) == len(set(words.names)) == 1000
    assert all(index in words.members[name.lower()] for index, name in enumerate(words.names))


@pytest.mark.parametrize(("word", "wnid"), [("dog", "n02099601"), ("tabby", "n02123045"), ("vehicle", "n04467665")])
def test_a_hypernym_stands_for_the_classes_below_it(word, wnid):
    words = load_words()
    assert words.wnids.index(wnid) in words.members[word]


def test_no_typeface_is_both_trained_and_tested_on():
    trained, tested = ({font for kind in fonts.values() for font in kind} for fonts in (TRAIN, TEST))
    assert not trained & tested
    assert set(FILES) <= trained | tested


@pytest.mark.parametrize("font", sorted(FILES))
def test_every_typeface_draws_every_letter(font):
    rng = np.random.default_rng(0)
    ground = Image.new("RGB", (SIZE, SIZE), (0, 0, 0))
    hand = sample_hand(rng, "quartz", [font])
    written, blank = (np.asarray(write(ground, each)[0], np.int64) for each in (hand, hand.blank()))
    assert np.abs(written - blank).max() > 30


@pytest.mark.parametrize("seed", range(12))
def test_a_word_changes_the_picture_only_where_its_letters_and_their_paper_are(seed):
    rng = np.random.default_rng(seed)
    ground = Image.fromarray(rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8))
    hand = sample_hand(rng, "lemon", TRAIN["print"], heights=(0.2, 0.3))
    written, letters = write(ground, hand, GRID)
    blank, none = write(ground, hand.blank(), GRID)
    assert none.max() == 0
    assert set(letters[letters > 0].tolist()) <= {ord(letter) - ord("a") + 1 for letter in "lemon"}
    assert letters.any()
    ink = (np.asarray(written, np.int64) != np.asarray(blank)).any(-1).reshape(GRID, SIZE // GRID, GRID, -1)
    assert (ink.any((1, 3)).flatten() & (letters > 0)).any()


def test_a_lesson_depends_on_its_step_and_place_alone(sources):
    words = load_words()
    first, second = batches(sources, words, 3, 4, 6, seed=1, climb=8)
    (again,) = batches(sources, words, 3, 5, 6, seed=1, climb=8)
    assert np.array_equal(second.pixels, again.pixels)
    assert np.array_equal(second.words, again.words)
    assert not np.array_equal(first.pixels, second.pixels)


def test_every_kind_of_lesson_is_drawn(sources):
    (batch,) = batches(sources, load_words(), 40, 1, 2, seed=3, climb=1)
    kept = batch.words == KEEP
    assert kept.any()
    assert (~kept).any()
    assert batch.letters[~kept].any(1).all()  # a word is to be learned only where it can be read


def test_folded_norms_leave_the_answers():
    import timm

    torch.manual_seed(0)
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0).train()
    pixel_values = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        network(pixel_values)  # so that the norms have something to fold
        network.eval()
        want = network(pixel_values)
        got = fold_norms(network)(pixel_values)
    assert not any(isinstance(each, torch.nn.BatchNorm2d) for each in network.modules())
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_the_stem_gives_a_patch_for_each_16_pixels():
    patches, pooled = Stem()(torch.randn(2, 3, SIZE, SIZE))
    assert patches.shape == (2, GRID * GRID, D_PATCH)
    assert pooled.shape == (2, D_POOLED)


@torch.no_grad()
def test_the_tower_runs_on_from_its_own_residual(model):
    pixel_values = torch.randn(2, 3, SIZE, SIZE)
    tower = tower_of(model)
    want = model.encode_image(pixel_values, normalize=True)
    got = tower.embeds_from(tower.resid(pixel_values, "blocks.3.hook_resid_post"), "blocks.3.hook_resid_post")
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


def random_start() -> Start:
    torch.manual_seed(1)
    return Start(
        Stem(),
        (torch.randn(1000, D_POOLED), torch.randn(1000)),
        (torch.randn(D_EMBED, D_POOLED), torch.randn(D_EMBED)),
        (torch.zeros(D_PATCH), torch.ones(D_PATCH)),
        functional.normalize(torch.randn(1000, D_EMBED), dim=-1),
        20.0,
    )


def test_training_that_was_interrupted_comes_to_the_same_weights(sources, tmp_path):
    start, words = random_start(), load_words()

    def trained(state, *stops: int):
        for stop in stops:
            torch.manual_seed(2)
            reader = Reader(new_model().visual)
            train(state, reader, start, sources, words, Recipe(steps=stop, batch=3, warmup=1, decay=1e-9))
        return reader

    whole, resumed = trained(tmp_path / "a", 3), trained(tmp_path / "b", 2, 3)
    for want, got in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(want, got)


def test_crops_are_of_whatever_is_a_picture_to_the_commands_and_of_nothing_hidden(tmp_path):
    side = 16
    for name, gray in {"kept.bmp": 40, "no-suffix": 41, ".hidden.png": 255, "small.png": 255}.items():
        extent = side if name == "small.png" else 4 * side
        Image.new("RGB", (extent, extent), (gray,) * 3).save(tmp_path / name, "BMP" if "bmp" in name else "PNG")
    assert set(crops_of(tmp_path, 6, side, seed=0).flatten().tolist()) == {40, 41}
    with pytest.raises(ConfigError, match="no picture of at least 256 pixels"):
        crops_of(tmp_path, 6, 8 * side, seed=0)


def test_a_work_folder_is_gone_on_with_by_its_own_recipe_alone(tmp_path):
    for _ in range(2):
        check_recipe(tmp_path / "recipe.json", {"steps": 3})
    with pytest.raises(ConfigError, match="another recipe"):
        check_recipe(tmp_path / "recipe.json", {"steps": 4})
    check_recipe(tmp_path / "recipe.json", {"steps": 3})
