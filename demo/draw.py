"""Write a word on a picture, as an attacker with a pen and a sticker would."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from PIL import Image, ImageDraw

from defense.demo import limits
from defense.errors import ConfigError
from defense.world.scenes import TEST_FONTS, TRAIN_FONTS, load_font

Style = Literal["plate", "strip", "bare"]
STYLES: tuple[Style, ...] = get_args(Style)
FONTS = (*TEST_FONTS, *TRAIN_FONTS)
"""The typefaces that ship with the package, those that the embedded model never saw in training first."""

_INK, _PAPER = (24, 24, 27), (250, 250, 249)
_MAX_WIDTH = 0.94
_LEAST_PX = 6
_GAP = 0.32
"""Between words, as a multiple of the font size: the shipped fonts hold letters alone."""


@dataclass(frozen=True)
class Note:
    """A word to write.

    Attributes:
        text: Letters a to z in either case, and spaces; empty for none.
        font: One of `FONTS`.
        style: "plate" puts a rectangle behind it, "strip" a band across the picture, "bare" nothing but an outline.
        x, y: Its center, as fractions of width and height.
        height: Font size as a fraction of the shorter side.

    Raises:
        ConfigError: A value that is not one of these.
    """

    text: str
    font: str = FONTS[0]
    style: Style = "plate"
    x: float = 0.5
    y: float = 0.5
    height: float = 0.2

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", " ".join(self.text.split()))
        if len(self.text) > limits.MAX_WORD_LENGTH:
            raise ConfigError(f"the text to write has {len(self.text)} letters; at most {limits.MAX_WORD_LENGTH}")
        if other := sorted({letter for letter in self.text if not (letter.isascii() and letter.isalpha())} - {" "}):
            raise ConfigError(f"{other[0]!r} cannot be written: the typefaces hold the letters A to Z only")
        if self.font not in FONTS or self.style not in STYLES:
            raise ConfigError(f"no typeface {self.font!r} or no style {self.style!r}")
        for name in ("x", "y", "height"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must lie in [0, 1]")


def write(picture: Image.Image, note: Note) -> Image.Image:
    """Return a copy of a picture with a note on it; a word that would not fit is made smaller."""
    written = picture.copy()
    words = note.text.split()
    if not words:
        return written
    unit = _width(words, note.font, 64) / 64
    side = min(picture.size)
    px = max(_LEAST_PX, round(min(note.height * side, _MAX_WIDTH * picture.width / (unit + 0.6))))
    width = _width(words, note.font, px)
    half_width, half_height = width / 2 + 0.3 * px, 0.68 * px
    x = _inside(note.x * picture.width, half_width, picture.width)
    y = _inside(note.y * picture.height, half_height, picture.height)
    draw = ImageDraw.Draw(written)
    if note.style == "plate":
        draw.rectangle((x - half_width, y - half_height, x + half_width, y + half_height), fill=_PAPER)
    elif note.style == "strip":
        draw.rectangle((0, y - half_height, picture.width, y + half_height), fill=_PAPER)
    font = load_font(note.font, px)
    stroke = max(1, round(0.09 * px)) if note.style == "bare" else 0
    left = x - width / 2
    for word in words:
        draw.text((left, y), word, _INK, font, anchor="lm", stroke_width=stroke, stroke_fill=_PAPER)
        left += font.getlength(word) + _GAP * px
    return written


def _width(words: list[str], font: str, px: int) -> float:
    return sum(load_font(font, px).getlength(word) for word in words) + _GAP * px * (len(words) - 1)


def _inside(center: float, half: float, size: int) -> float:
    """Return a center moved so that what reaches `half` to both sides stays within the picture."""
    return size / 2 if 2 * half >= size else min(max(center, half), size - half)
