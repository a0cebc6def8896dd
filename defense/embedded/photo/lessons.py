"""What is shown in training, and what is to be learned from it.

A picture without a word teaches to go on seeing it as before. A word on it is what the picture is then called, nine
times in ten. A picture's own name, letters that make no word, blank plates and stickers change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from defense.data.hands import Hand, sample_hand, write_all
from defense.data.typefaces import TRAIN
from defense.hosts.photo_tower import STRIDE

from .grounds import NO_CLASS, SIZE, Sources, finish, photograph, sample_ground, sample_plain
from .names import Words

KEEP = -1
"""In place of a word: the picture's first embedding is to stay."""
_FONTS = TRAIN["print"], TRAIN["display"], TRAIN["handwriting"]
_KINDS = (0.38, 0.27, 0.35)


@dataclass(frozen=True)
class Lesson:
    """A picture and what it teaches.

    Attributes:
        pixels: uint8 [SIZE, SIZE, 3].
        word: What it is called, as an index into the written words, or KEEP.
        label: The class of the photograph under the word, or NO_CLASS.
        letters: At its patches, as in `hands.write`.
        spelled: Which of the 26 letters are written, bool [26].
    """

    pixels: np.ndarray
    word: int
    label: int
    letters: np.ndarray
    spelled: np.ndarray


def sample_fonts(rng: np.random.Generator, difficulty: float) -> Sequence[str]:
    """Return the typefaces of a kind: print, or with a chance of `difficulty` (0 to 1) of any of the kinds."""
    if rng.random() > difficulty:
        return _FONTS[0]
    return _FONTS[rng.choice(len(_FONTS), p=_KINDS)]


def draw_lesson(rng: np.random.Generator, sources: Sources, words: Words, progress: float) -> Lesson:
    """Return a lesson.

    Args:
        rng: Source of every choice.
        sources: What pictures are made of.
        words: What classes are called. Half of what is written at last, and all at first, are `attacks`; the rest are
            any of `writable`.
        progress: From 0, where words are easy to read and many, to 1. At 1 there are easy ones among them still.
    """
    difficulty = progress * math.sqrt(rng.random())
    lot = rng.random()
    if lot < 0.20 + 0.16 * progress:  # nothing is written
        picture, label = sample_ground(rng, sources)
        return _lesson(rng, picture, [], KEEP, label)
    among = words.attack_words if rng.random() > progress / 2 else range(len(words.writable))
    word = int(among[rng.integers(len(among))])
    said = words.writable[word]
    if lot < 0.80:
        is_alone = lot < 0.40 + 0.12 * progress
        picture, label = (sample_plain(rng), NO_CLASS) if is_alone else sample_ground(rng, sources)
        is_ignored = label != NO_CLASS and rng.random() < 0.1
        is_kept = is_ignored or label in words.members[said]
        return _lesson(rng, picture, _hands(rng, said, difficulty), KEEP if is_kept else word, label)
    if lot < 0.86:
        picture, label = photograph(rng, sources)
        name = words.names[label].lower()
        if name.isascii() and name.isalpha():
            return _lesson(rng, picture, _hands(rng, name, difficulty), KEEP, label)
    picture, label = sample_ground(rng, sources)
    hands = _hands(rng, _nonsense(rng), difficulty)
    return _lesson(rng, picture, [hand.blank() for hand in hands] if lot < 0.94 else hands, KEEP, label)


def _nonsense(rng: np.random.Generator) -> str:
    return "".join(chr(ord("a") + code) for code in rng.integers(0, 26, rng.integers(3, 9)))


def _hands(rng: np.random.Generator, word: str, difficulty: float) -> list[Hand]:
    """Return how a word is written: once, or two or three times, smaller."""
    fonts = sample_fonts(rng, difficulty)
    n_times = int(rng.choice([1, 2, 3], p=[0.84, 0.11, 0.05]))
    heights = (0.10, 0.45) if n_times == 1 else (0.09, 0.22)
    return [sample_hand(rng, word, fonts, heights=heights, difficulty=difficulty) for _ in range(n_times)]


def _lesson(rng: np.random.Generator, picture: Image.Image, hands: Sequence[Hand], word: int, label: int) -> Lesson:
    """Draw a lesson; a camera's finish comes before the words as often as after."""
    is_before = rng.random() < 0.5
    if is_before:
        picture = finish(rng, picture)
    picture, letters = write_all(picture, hands, SIZE // STRIDE)
    pixels = np.asarray(picture if is_before else finish(rng, picture))
    return Lesson(pixels, word, label, letters, _spelled(hands))


def _spelled(hands: Sequence[Hand]) -> np.ndarray:
    spelled = np.zeros(26, bool)
    for hand in hands:
        if not hand.is_blank:
            spelled[[ord(letter) - ord("a") for letter in hand.text.lower()]] = True
    return spelled


@dataclass(frozen=True)
class Batch:
    """Lessons side by side.

    Attributes:
        pixels: uint8 [n, SIZE, SIZE, 3].
        words: int64 [n].
        labels: int64 [n].
        letters: uint8 [n, patches].
        spelled: bool [n, 26].
    """

    pixels: np.ndarray
    words: np.ndarray
    labels: np.ndarray
    letters: np.ndarray
    spelled: np.ndarray


def batches(
    sources: Sources, words: Words, size: int, first: int, stop: int, seed: int, *, climb: int
) -> Iterator[Batch]:
    """Yield the batches of steps `first` to `stop` - 1; each depends on (seed, step) alone.

    Over the first `climb` steps the lessons go from easy to all there are.
    """
    for step in range(first, stop):
        progress = min(1.0, step / climb)
        lessons = [
            draw_lesson(np.random.default_rng([seed, step, row]), sources, words, progress) for row in range(size)
        ]
        yield Batch(
            np.stack([lesson.pixels for lesson in lessons]),
            np.array([lesson.word for lesson in lessons]),
            np.array([lesson.label for lesson in lessons]),
            np.stack([lesson.letters for lesson in lessons]),
            np.stack([lesson.spelled for lesson in lessons]),
        )
