"""Words drawn on pictures: to train on activations in which something can be read, and to fit on attacks.

Photographs for training hold little text, and an SAE learns no latent for what it never sees.
"""

from __future__ import annotations

import gzip
import re
import unicodedata
from functools import cache
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw

from defense.world.scenes import TRAIN_FONTS, load_font

_N_WORDS = 10_000
_LETTERS = range(3, 11)
_HEIGHT = (0.08, 0.22)
"""Font size, as a fraction of the shorter side."""
_GAP = 0.3
"""Between two words, as a fraction of the font size."""
_LEAST_CONTRAST = 110
"""Between ink and paper, in gray levels."""


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


def write_word(
    image: Image.Image,
    rng: np.random.Generator,
    word: str | None = None,
    *,
    height: tuple[float, float] = _HEIGHT,
    blank: bool = False,
) -> Image.Image:
    """Return a picture with a word on it, within its central square, which a model's crop keeps.

    Args:
        image: Mode RGB; left as it is.
        rng: Decides the typeface (one of `scenes.TRAIN_FONTS`), size, case, place, colors, and whether the word
            stands on a plate.
        word: One word of letters A-Z and a-z or several with a space between; one of `common_words` where None.
        height: Least and largest font size, as fractions of the shorter side. A long word is written smaller.
        blank: Leave out the letters: draw the plate alone, or nothing where the word would have no plate.
    """
    text = common_words()[rng.integers(_N_WORDS)] if word is None else word
    text = (text, text.capitalize(), text.upper())[rng.integers(3)]
    side = min(image.size)
    name = str(rng.choice(TRAIN_FONTS))
    px = rng.uniform(*height) * side
    words = text.split()  # the fonts hold letters and no space
    widths = [load_font(name, 64).getlength(each) / 64 for each in words]
    unit_width = sum(widths) + _GAP * (len(words) - 1)
    px = max(6, round(min(px, 0.9 * side / (unit_width + 0.6))))
    half_width, half_height = (unit_width / 2 + 0.3) * px, 0.68 * px
    x = image.width / 2 + rng.uniform(-1, 1) * max(0, side / 2 - half_width)
    y = image.height / 2 + rng.uniform(-1, 1) * max(0, side / 2 - half_height)
    ink, paper = _contrasting(rng)
    picture = image.copy()
    draw = ImageDraw.Draw(picture)
    has_plate = rng.random() < 0.5
    if has_plate:
        draw.rectangle((x - half_width, y - half_height, x + half_width, y + half_height), fill=paper)
    if blank:
        return picture
    stroke = 0 if has_plate else max(1, round(0.06 * px))
    middle = x - unit_width / 2 * px
    for each, width in zip(words, widths, strict=True):
        middle += width / 2 * px
        draw.text((middle, y), each, ink, load_font(name, px), anchor="mm", stroke_width=stroke, stroke_fill=paper)
        middle += (width / 2 + _GAP) * px
    return picture


def _contrasting(rng: np.random.Generator) -> tuple[tuple[int, ...], tuple[int, ...]]:
    luminance = np.array([0.299, 0.587, 0.114])
    while True:
        ink, paper = rng.integers(0, 256, (2, 3))
        if abs(float((ink - paper) @ luminance)) >= _LEAST_CONTRAST:
            return tuple(ink.tolist()), tuple(paper.tolist())
