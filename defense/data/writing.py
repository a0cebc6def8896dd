"""Words drawn on pictures: to train on activations in which something can be read, and to fit on attacks.

Photographs for training hold little text, and an SAE learns no latent for what it never sees.
"""

from __future__ import annotations

import gzip
import re
import unicodedata
from dataclasses import replace
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image

from .hands import sample_hand, write
from .typefaces import TRAIN

_N_WORDS = 10_000
_LETTERS = range(3, 11)
_HEIGHT = (0.06, 0.30)
"""Of capitals, as a fraction of the shorter side."""
_LEAST_CONTRAST = 110.0
"""Between ink and paper, in gray levels: what nobody can read fools nobody."""
_LEAST_SIDE = 224
"""Of a picture, in pixels: a smaller one is enlarged first, as a model does it; writing of 64 pixels is a smear."""
_OUTLINE = 0.1
"""Around bare words, in heights of a capital."""
_SHARES = {"print": 0.5, "display": 0.2, "handwriting": 0.3}
"""Of the kinds of typefaces."""


@cache
def common_words() -> tuple[str, ...]:
    """Return words of 3 to 10 letters a-z from CLIP's own vocabulary, the most frequent first."""
    with gzip.open(str(resources.files("defense.data").joinpath("bpe_simple_vocab_16e6.txt.gz")), "rt") as lines:
        next(lines)  # a version
        tokens = ("".join(line.split()) for line in lines)
        ends = (token.removesuffix("</w>") for token in tokens if token.endswith("</w>"))
        words = [word for word in ends if len(word) in _LETTERS and word.isascii() and word.isalpha()]
    return tuple(words[:_N_WORDS])


def writable(label: str) -> str:
    """Return a label as `write_word` takes it: words of letters A-Z and a-z; "" where none is left."""
    ascii_ = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return " ".join(re.findall("[A-Za-z]+", ascii_))


def enlarged(image: Image.Image) -> Image.Image:
    """Return a picture, with 224 pixels on its shorter side where it has less: words on it can be read then."""
    if min(image.size) >= _LEAST_SIDE:
        return image
    factor = _LEAST_SIDE / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return image.resize(size, Image.Resampling.BICUBIC)


def write_word(
    image: Image.Image,
    rng: np.random.Generator,
    word: str | None = None,
    *,
    height: tuple[float, float] = _HEIGHT,
    blank: bool = False,
) -> Image.Image:
    """Return a picture with a word on it, within its central square, which a model's crop keeps.

    Words are written as people write them, in print, display and handwriting typefaces (`hands`). The picture is
    `enlarged` first.

    Args:
        image: Mode RGB; left as it is.
        rng: Decides how the word is written.
        word: One word of letters A-Z and a-z or several with a space between; one of `common_words` where None.
        height: Of the capitals, least and largest, as fractions of the shorter side. A long word is written smaller.
        blank: Leave out the letters: draw the paper alone, or nothing where the word would have none.
    """
    text = common_words()[rng.integers(_N_WORDS)] if word is None else word
    fonts = TRAIN[str(rng.choice(list(_SHARES), p=list(_SHARES.values())))]
    hand = sample_hand(rng, text, fonts, heights=height, least_contrast=_LEAST_CONTRAST)
    if hand.paper == "bare" and not hand.outline:
        hand = replace(hand, outline=_OUTLINE)  # ink alone may be as dark as the picture below it
    image = enlarged(image)
    side = min(image.size)
    corner = ((image.width - side) // 2, (image.height - side) // 2)
    square = image.crop((*corner, corner[0] + side, corner[1] + side))
    picture = image.copy()
    picture.paste(write(square, hand.blank() if blank else hand)[0], corner)
    return picture
