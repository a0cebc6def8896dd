"""Words as people write them: where letters stand, how they turn, and what their twins share."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from defense.data.hands import Hand, sample_hand, write, write_all
from defense.data.typefaces import FILES, TEST, TRAIN

FONTS = ("caladea", "kaushan", "lobster")


def hand(text: str, font: str = "caladea", **fields) -> Hand:
    """A straight word in the middle, black on white paper."""
    made = {
        "paper": "plate", "center": (0.5, 0.5), "height": 0.15, "angle": 0.0, "tilt": 0.0, "bend": 0.0,
        "ink": (0, 0, 0), "paper_color": (255, 255, 255), "outline": 0.0, **fields,
    }  # fmt: skip
    return Hand(text, font, **made)


def gray(side: int = 200) -> Image.Image:
    return Image.new("RGB", (side, side), (128, 128, 128))


def ink_of(made: Hand, side: int = 200) -> np.ndarray:
    """Where the ink is, bool [side, side]."""
    written, blank = (np.asarray(write(gray(side), each)[0], np.int64) for each in (made, made.blank()))
    return np.abs(written - blank).max(-1) > 60


@pytest.mark.parametrize("font", FONTS)
def test_two_words_have_a_gap_between_them_that_letters_of_one_word_do_not_have(font):
    def widest_gap(text: str) -> int:
        columns = np.flatnonzero(ink_of(hand(text, font)).any(0))
        return int(np.diff(columns).max())

    assert widest_gap("ab ab") > 2 * widest_gap("abab")


def test_letters_are_told_where_they_stand_and_none_at_a_space():
    _, letters = write(gray(), hand("ab ab", height=0.12), 20)
    middle = letters.reshape(20, 20)[10]
    told = [int(each) for each in middle if each]
    assert set(told) == {1, 2}
    runs = [told[0], *(after for before, after in pairwise(told) if before != after)]
    assert runs == [1, 2, 1, 2]
    first, last = np.flatnonzero(middle)[[0, -1]]
    assert (middle[first : last + 1] == 0).any(), "the space"


@pytest.mark.parametrize("side", [80, 160, 333])
def test_a_hand_is_drawn_alike_at_any_size(side):
    ink = ink_of(hand("word", center=(0.6, 0.3)), side)
    rows, columns = np.nonzero(ink)
    assert abs(columns.mean() / side - 0.6) < 0.06
    assert abs(rows.mean() / side - 0.3) < 0.06


def test_a_turned_word_runs_uphill():
    rows, columns = np.nonzero(ink_of(hand("wwwwww", angle=20.0)))
    slope = np.polyfit(columns, rows, 1)[0]
    assert slope == pytest.approx(-np.tan(np.radians(20.0)), abs=0.06)


def test_a_tape_crosses_the_picture():
    taped = np.asarray(write(gray(), hand("ab", paper="tape"))[0])
    assert (taped[100, [0, 199]] == 255).all()


@pytest.mark.parametrize("seed", range(8))
def test_sampled_words_of_several_letters_stay_inside(seed):
    made = sample_hand(np.random.default_rng(seed), "granny smith", TRAIN["print"], max_angle=0.0)
    ink = ink_of(made, 300)
    assert ink.any()
    assert not ink[0].any()
    assert not ink[-1].any()


def test_later_words_lie_over_earlier_ones():
    hands = [hand("aaa"), hand("bbb")]
    _, letters = write_all(gray(), hands, 20)
    assert set(letters[letters > 0].tolist()) == {2}


def test_no_typeface_is_for_training_and_for_tests():
    trained, tested = ({font for kind in fonts.values() for font in kind} for fonts in (TRAIN, TEST))
    assert not trained & tested
    assert set(FILES) <= trained | tested
