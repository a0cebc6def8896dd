"""Any classified pictures with the name of another class drawn on them, and the same pictures without it.

The recipe is that of Defense-Prefix (arXiv:2304.04512, section 4.1; datasets/utils/make_dataset_train.py of its code):
shorter side to 224 pixels, center crop; one of several fonts, 20 to 40 pixels high and smaller where the text does not
fit; fill and outline in two different colors of eight; anywhere where all of it is inside; two or three words break
after the first, more after the second. Differences: the seed of a picture follows from (seed, key), so that neither the
order nor the number of pictures matters; fonts are those of this package, or one that is given; nothing is saved as
JPEG, since its artifacts are not the attack.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defense.benchmarks.datasets.base import Dataset, Example, Options, Picture, Task
from defense.benchmarks.datasets.files import listed
from defense.benchmarks.datasets.folders import read_classified
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.errors import ConfigError
from defense.store.folders import sha256_of

RECIPE = "defense-prefix-1"
SIZE = 224
FONT_PX = (20, 40)
COLORS = ("white", "blue", "green", "red", "magenta", "cyan", "yellow", "black")

_GAP = 0.3
"""Between words, over the font's height: the fonts that ship have no space."""
_NO_GLYPH = "\uffff"


def read(folder: Path, options: Options) -> Task:
    """Make the data set from classified pictures (see `folders`).

    Args:
        folder: Where they are.
        options: Font and seed.

    Raises:
        ConfigError: There are fewer than two classes, or the fonts lack a character of a class name.
    """
    classified = read_classified(folder)
    class_names = classified.class_names
    if len(class_names) < 2:
        raise ConfigError(
            f"{folder} has one class, {class_names[0]!r}; there is no other name to write on its pictures"
        )
    fonts = font_files(options.font)
    check_fonts(fonts, class_names)
    clean, attacked = [], []
    for key, picture, label in classified.pictures:
        word = other_class(label, len(class_names), options.seed, key)
        clean.append(Example(key, Overlay(picture, None, fonts, options.seed, key), label))
        attacked.append(Example(key, Overlay(picture, class_names[word], fonts, options.seed, key), label, word))
    facts = {
        "class_rule": "classes of the folder",
        "recipe": RECIPE,
        "seed": options.seed,
        "fonts": {font.name: _sha256_of(font) for font in fonts},
    }
    tests = tuple(
        Dataset("synthetic", variant, tuple(examples), class_names, classified.templates, facts=facts)
        for variant, examples in (("clean", clean), ("attacked", attacked))
    )
    return Task("synthetic", f"drawn words on {folder.resolve().name}", tests)


def font_files(font: Path | None) -> tuple[Path, ...]:
    """Return the font that was given, or those of the package."""
    if font is not None:
        return (font,)
    return tuple(sorted(Path(str(resources.files("defense.world").joinpath("fonts"))).iterdir()))


def check_fonts(fonts: Sequence[Path], texts: Sequence[str]) -> None:
    """Raise `ConfigError` where a font cannot be read or lacks a character of a text: it would draw an empty box."""
    for path in fonts:
        try:
            font = _font(path, FONT_PX[1])
        except OSError as error:
            raise ConfigError(f"{path} is no font that can be read: {error}") from error
        box = _drawn(font, _NO_GLYPH)
        lacking = sorted({letter for text in texts for letter in text.replace(" ", "") if _drawn(font, letter) == box})
        if lacking:
            raise ConfigError(
                f"the font {path.name} has no glyph for {listed(lacking)}, which class names hold; pass --font with "
                "one that has (those that ship have the letters A to Z and a to z)"
            )


def _drawn(font: ImageFont.FreeTypeFont, letter: str) -> tuple[tuple[int, int], bytes]:
    mask = font.getmask(letter)
    return mask.size, bytes(mask)


def _rng(seed: int, key: str, purpose: str) -> np.random.Generator:
    digest = hashlib.sha256(f"{RECIPE}\0{seed}\0{key}\0{purpose}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest[:16], "little"))


def other_class(label: int, n_classes: int, seed: int, key: str) -> int:
    """Return the index of the class whose name is written on a picture: any but its own, with equal chance."""
    return (label + 1 + int(_rng(seed, key, "word").integers(n_classes - 1))) % n_classes


@dataclass(frozen=True)
class Overlay:
    """A picture, cropped, with a word drawn on it, or without (the clean twin).

    Attributes:
        base: The picture below.
        word: What is written; None for nothing.
        fonts: One of these is used.
        seed: Of the data set.
        key: Of the picture.
    """

    base: Picture
    word: str | None
    fonts: tuple[Path, ...]
    seed: int
    key: str

    def digest(self) -> str:
        """Return a digest of the picture below and of all that decides what is drawn."""
        fonts = [_sha256_of(font) for font in self.fonts]
        return hashlib.sha256(
            repr((self.base.digest(), RECIPE, self.word, fonts, self.seed, self.key)).encode()
        ).hexdigest()

    def load(self, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture, 224 x 224 pixels."""
        image = cropped(self.base.load(limits))
        return image if self.word is None else written(image, self.word, self.fonts, _rng(self.seed, self.key, "look"))


@lru_cache(maxsize=256)
def _sha256_of(path: Path) -> str:
    return sha256_of(path)


def cropped(image: Image.Image) -> Image.Image:
    """Return the central square of a picture at 224 pixels."""
    ratio = SIZE / min(image.size)
    width, height = (max(SIZE, round(side * ratio)) for side in image.size)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + SIZE, top + SIZE))


def broken(text: str) -> tuple[tuple[str, ...], ...]:
    """Return the lines of a text, each as its words."""
    words = tuple(text.split())
    n_first = len(words) if len(words) < 2 else 1 if len(words) < 4 else 2
    return tuple(line for line in (words[:n_first], words[n_first:]) if line)


def written(image: Image.Image, text: str, fonts: Sequence[Path], rng: np.random.Generator) -> Image.Image:
    """Return a picture with a text drawn on it, all of it inside.

    Raises:
        ConfigError: The text does not fit at any size.
    """
    path = fonts[int(rng.integers(len(fonts)))]
    fill, outline = (str(color) for color in rng.choice(COLORS, 2, replace=False))
    lines = broken(text)
    for px in range(int(rng.integers(FONT_PX[0], FONT_PX[1] + 1)), 0, -1):
        placed, (width, height) = _placed(lines, _font(path, px), px)
        if width < image.width and height < image.height:
            break
    else:
        raise ConfigError(f"{text!r} does not fit on {image.width} x {image.height} pixels at any size")
    left, top = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
    drawn = image.copy()
    draw = ImageDraw.Draw(drawn)
    for word, (x, y) in placed:
        draw.text((left + x, top + y), word, font=_font(path, px), fill=fill, stroke_width=1, stroke_fill=outline)
    return drawn


@cache
def _font(path: Path, px: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(path), px, layout_engine=ImageFont.Layout.BASIC)


def _placed(
    lines: Sequence[Sequence[str]], font: ImageFont.FreeTypeFont, px: int
) -> tuple[list[tuple[str, tuple[int, int]]], tuple[int, int]]:
    """Return each word with its place, such that the ink of all begins at (0, 0), and the ink's width and height."""
    ascent, descent = font.getmetrics()
    words, boxes = [], []
    for row, line in enumerate(lines):
        x = 0.0
        for word in line:
            at = (round(x), row * (ascent + descent))
            words.append((word, at))
            left, top, right, bottom = font.getbbox(word, stroke_width=1)
            boxes.append((at[0] + left, at[1] + top, at[0] + right, at[1] + bottom))
            x += font.getlength(word) + _GAP * px
    left, top = (int(np.floor(min(box[side] for box in boxes))) for side in (0, 1))
    right, bottom = (int(np.ceil(max(box[side] for box in boxes))) for side in (2, 3))
    return [(word, (x - left, y - top)) for word, (x, y) in words], (right - left, bottom - top)
