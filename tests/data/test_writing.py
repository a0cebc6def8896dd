"""Words on pictures."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from defense.data.hands import text_width
from defense.data.typefaces import TRAIN
from defense.data.writing import common_words, write_word


def gray(size: tuple[int, int] = (400, 240)) -> Image.Image:
    return Image.new("RGB", size, (128, 128, 128))


def test_common_words_are_words_that_the_fonts_can_draw():
    words = common_words()
    assert len(words) == len(set(words)) == 10_000
    assert all(word.isascii() and word.isalpha() and word.islower() and 3 <= len(word) <= 10 for word in words)
    assert {"the", "love", "street"} <= set(words)


@pytest.mark.parametrize("size", [(400, 240), (240, 400), (224, 224)], ids=str)
def test_a_word_stands_within_the_central_square(size):
    for seed in range(40):
        image = gray(size)
        written = write_word(image, np.random.default_rng(seed))
        changed = (np.asarray(written) != np.asarray(image)).any(2)
        assert changed.sum() > 20
        side, left, top = min(size), (size[0] - min(size)) // 2, (size[1] - min(size)) // 2
        outside = changed.copy()
        outside[top : top + side, left : left + side] = False
        assert not outside.any()
        assert np.asarray(image).std() == 0, "the picture itself must stay as it is"


def test_what_is_written_follows_the_generator():
    pictures = [np.asarray(write_word(gray(), np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).any()


def test_ink_stands_out_from_its_paper():
    for seed in range(20):
        written = np.asarray(write_word(gray(), np.random.default_rng(seed), "word")).astype(int)
        luminance = written @ np.array([0.299, 0.587, 0.114])
        assert luminance.max() - luminance.min() > 90


def test_another_word_gives_another_picture():
    first, second = (np.asarray(write_word(gray(), np.random.default_rng(3), word)) for word in ("apple", "pizza"))
    assert (first != second).any()


@pytest.mark.parametrize(("size", "enlarged"), [((5, 3), (373, 224)), ((64, 64), (224, 224)), ((64, 96), (224, 336))])
def test_a_small_picture_is_enlarged_before_it_is_written_on(size, enlarged):
    written = write_word(gray(size), np.random.default_rng(0), "cats")
    assert written.size == enlarged
    assert (np.asarray(written) == np.asarray(write_word(gray(enlarged), np.random.default_rng(0), "cats"))).all()


def test_the_plate_alone_is_what_the_word_stands_on():
    n_plates = 0
    for seed in range(20):
        written, blank = (
            np.asarray(write_word(gray(), np.random.default_rng(seed), "word", blank=blank)) for blank in (False, True)
        )
        outside_letters = (written == blank).all(2)
        is_bare = (blank == np.asarray(gray())).all()
        n_plates += not is_bare
        assert 0.5 < outside_letters.mean() < 1, "the two differ by the letters"
        if not is_bare:
            changed = blank[(blank != np.asarray(gray())).any(2)]
            _, counts = np.unique(changed, axis=0, return_counts=True)
            assert counts.max() > 0.6 * len(changed), "paper has one color, but for its edge"
    assert 5 < n_plates < 15


def test_several_words_stand_side_by_side():
    for seed in range(10):
        written, blank = (
            np.asarray(write_word(gray((400, 400)), np.random.default_rng(seed), "ab ab", blank=blank)).astype(int)
            for blank in (False, True)
        )
        assert (written != blank).any()
    for font in ("kaushan", TRAIN["print"][0]):
        assert text_width("ab ab", font) > 2 * text_width("ab", font)


def test_the_height_of_the_letters_can_be_chosen():
    small, large = (
        np.asarray(write_word(gray(), np.random.default_rng(3), "cat", height=(height, height)))
        for height in (0.1, 0.3)
    )
    assert (large != 128).sum() > 3 * (small != 128).sum()
