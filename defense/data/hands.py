"""Words on square pictures as people write them: on plates, tape and stickers, turned, bent, in perspective.

A `Hand` holds every choice, so a picture's twins (the blank plate, no writing) come from the same one; `write` draws
it, and says which letter lies at each patch.

A word is drawn on a small canvas, upright and straight; one transformation takes the canvas onto the picture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

import numpy as np
from PIL import Image, ImageDraw

from .typefaces import letter_height, load_font

Paper = Literal["plate", "tape", "sticker", "bare"]
Case = Literal["lower", "upper", "title", "mixed"]
Color = tuple[int, int, int]
MAX_WIDTH = 0.95
"""Of a word, as a fraction of the picture."""
_LEAST_PX = 9
"""Height of capitals below which nobody can read a word."""
_GAP = 0.45
"""Between two words, in heights of a capital: the typefaces hold no space."""
_LEAST_CONTRAST = 40.0
_LUMINANCE = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Hand:
    """How a word is written.

    Attributes:
        text: Words of letters A-Z and a-z, in the case in which they are written, with a space between.
        font: One of `typefaces`.
        paper: What is behind the word. "tape" crosses the whole picture.
        center: Fractions of the picture.
        height: Of the capitals, as a fraction of the picture.
        angle: Turn against the clock, in degrees.
        tilt: How much smaller the word's right end is than its left: 0 for no perspective. Negative the other way.
        bend: How far the ends hang below the middle, in heights of a capital.
        ink: Color of the letters.
        paper_color: Color of what is behind them, and of the outline.
        outline: Width of an outline around the letters, in heights of a capital.
        is_blank: Draws the paper and leaves out the ink.
    """

    text: str
    font: str
    paper: Paper
    center: tuple[float, float]
    height: float
    angle: float
    tilt: float
    bend: float
    ink: Color
    paper_color: Color
    outline: float
    is_blank: bool = False

    def blank(self) -> Hand:
        """Return the twin without ink."""
        return replace(self, is_blank=True)

    def turned(self, angle: float, center: tuple[float, float]) -> Hand:
        """Return the twin at another angle and place."""
        return replace(self, angle=angle, center=center)


def cased(text: str, case: Case, rng: np.random.Generator) -> str:
    """Return a text in a case; "mixed" draws each letter's."""
    if case == "mixed":
        return "".join(letter.upper() if rng.random() < 0.5 else letter for letter in text)
    return {"lower": text.lower(), "upper": text.upper(), "title": text.title()}[case]


def sample_colors(rng: np.random.Generator, least_contrast: float = _LEAST_CONTRAST) -> tuple[Color, Color]:
    """Return ink and paper that differ by at least so many gray levels; every third is black on white or near it."""
    if rng.random() < 0.35:
        dark, light = rng.integers(0, 60, 3), rng.integers(190, 256, 3)
        ink, paper = (dark, light) if rng.random() < 0.75 else (light, dark)
        return _color(ink), _color(paper)
    while True:
        ink, paper = rng.integers(0, 256, (2, 3))
        if abs(float(_LUMINANCE @ (ink - paper))) >= least_contrast:
            return _color(ink), _color(paper)


def _color(values: np.ndarray) -> Color:
    red, green, blue = values.tolist()
    return red, green, blue


def sample_hand(
    rng: np.random.Generator,
    word: str,
    fonts: Sequence[str],
    *,
    cases: Sequence[Case] = ("lower", "lower", "title", "upper", "upper", "mixed"),
    max_angle: float = 30.0,
    heights: tuple[float, float] = (0.10, 0.45),
    least_contrast: float = _LEAST_CONTRAST,
    difficulty: float = 1.0,
) -> Hand:
    """Return a way to write a word.

    Args:
        rng: Source of every choice.
        word: Letters A-Z and a-z; several words have a space between.
        fonts: Names to choose from.
        cases: Cases to choose from.
        max_angle: Half of all words are turned, by up to so many degrees; the others hardly.
        heights: Of the capitals, as fractions of the picture; a long word is smaller than its height says.
        least_contrast: Between ink and paper, in gray levels.
        difficulty: 1 for all of this; towards 0, words are rather large, straight and rich in contrast.
    """
    font = str(rng.choice(list(fonts)))
    text = cased(word, cases[int(rng.integers(len(cases)))], rng)
    low, high = heights
    low += (1 - difficulty) * 0.4 * (high - low)
    height = low * (high / low) ** float(rng.uniform(0, 1))
    width = text_width(text, font)  # in heights of a capital
    height = min(height, MAX_WIDTH / width)
    reach = max_angle * difficulty if rng.random() < 0.5 else min(4.0, max_angle)
    angle = float(rng.uniform(-reach, reach))
    half = height * (width * abs(math.cos(math.radians(angle))) + abs(math.sin(math.radians(angle)))) / 2
    rise = height * (width * abs(math.sin(math.radians(angle))) + 1) / 2
    x, y = (float(rng.uniform(margin, 1 - margin)) if margin < 0.5 else 0.5 for margin in (half + 0.01, rise + 0.02))
    paper: Paper = ("plate", "tape", "sticker", "bare")[rng.choice(4, p=[0.35, 0.1, 0.1, 0.45])]
    ink, paper_color = sample_colors(rng, least_contrast + (1 - difficulty) * 70.0)
    return Hand(
        text, font, paper, (x, y), height, angle,
        tilt=float(rng.uniform(-0.35, 0.35)) * difficulty if rng.random() < 0.3 else 0.0,
        bend=float(rng.uniform(-0.6, 0.6)) * difficulty if rng.random() < 0.2 else 0.0,
        ink=ink, paper_color=paper_color,
        outline=float(rng.uniform(0.06, 0.16)) if rng.random() < (0.6 if paper == "bare" else 0.1) else 0.0,
    )  # fmt: skip


def text_width(text: str, font: str) -> float:
    """Return a text's width in heights of a capital."""
    return _layout(text, font, 64, _GAP * 64 * letter_height(font))[1][-1] / 64 / letter_height(font)


def _layout(text: str, font: str, px: int, gap: float) -> tuple[list[tuple[str, float]], tuple[float, ...]]:
    """Return where words stand from the left, and the right edge of each letter and space, in pixels."""
    loaded = load_font(font, px)
    words: list[tuple[str, float]] = []
    edges, left = [0.0], 0.0
    for word in text.split(" "):
        if words:
            left = edges[-1] + gap
            edges.append(left)
        words.append((word, left))
        edges += [left + loaded.getlength(word[: i + 1]) for i in range(len(word))]
    return words, tuple(edges[1:])


# --- drawing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Canvas:
    """A drawn word: the picture RGBA, right edges of its letters in pixels, left edge, and rows of its capitals."""

    picture: Image.Image
    left: float
    edges: tuple[float, ...]
    rows: tuple[float, float]


def _draw_canvas(hand: Hand, capital_px: float, side: int) -> _Canvas:
    """Draw words upright and straight, capitals `capital_px` high, with their paper, which may be `side` longer."""
    px = max(8, round(capital_px / letter_height(hand.font)))
    font = load_font(hand.font, px)
    words, edges = _layout(hand.text, hand.font, px, _GAP * capital_px)
    stroke = round(hand.outline * capital_px)
    pad = round(0.45 * capital_px) + stroke
    reach = side if hand.paper == "tape" else 0
    left, top, _, bottom = font.getbbox(hand.text.replace(" ", ""), anchor="ls")
    right = words[-1][1] + font.getbbox(words[-1][0], anchor="ls")[2]
    above, below = max(-top, capital_px), max(bottom, 0.25 * capital_px)
    left, right = min(left, 0), max(right, edges[-1])
    size = (math.ceil(right - left) + 2 * (pad + reach), math.ceil(above + below) + 2 * pad)
    picture = Image.new("RGBA", size, (*hand.paper_color, 0))
    draw = ImageDraw.Draw(picture)
    box = (0, 0, size[0] - 1, size[1] - 1)
    if hand.paper == "sticker":
        draw.rounded_rectangle(
            box, radius=size[1] * 0.4, fill=(*hand.paper_color, 255), outline=(*hand.ink, 255), width=max(1, pad // 5)
        )
    elif hand.paper != "bare":
        draw.rectangle(box, fill=(*hand.paper_color, 255))
    origin, baseline = pad + reach - left, pad + above
    if not hand.is_blank:
        for word, offset in words:
            draw.text(
                (origin + offset, baseline), word, font=font, anchor="ls", fill=(*hand.ink, 255),
                stroke_width=stroke, stroke_fill=(*hand.paper_color, 255) if stroke else None,
            )  # fmt: skip
    return _Canvas(picture, origin, edges, (baseline - capital_px, baseline))


def _bent(canvas: _Canvas, drop: float) -> _Canvas:
    """Return a canvas whose ends hang `drop` pixels below its middle, column by column."""
    pixels = np.asarray(canvas.picture)
    room = math.ceil(abs(drop))
    height, width = pixels.shape[:2]
    tall = np.zeros((height + 2 * room, width, 4), np.uint8)
    tall[..., :3] = pixels[0, 0, :3]
    tall[room : room + height] = pixels
    rows = np.arange(len(tall))[:, None] - _sag(np.arange(width), width, drop)[None].round().astype(int)
    rows = np.clip(rows, 0, len(tall) - 1)
    top, bottom = canvas.rows
    picture = Image.fromarray(tall[rows, np.arange(width)[None]])
    return replace(canvas, picture=picture, rows=(top + room, bottom + room))


def _sag(columns: np.ndarray, width: int, drop: float) -> np.ndarray:
    """Return how far columns hang below the middle one, in pixels."""
    return drop * (2 * columns / width - 1) ** 2


def _onto_picture(hand: Hand, canvas: _Canvas, side: int) -> np.ndarray:
    """Return the 3 x 3 matrix from points (x, y, 1) of the picture to points of the canvas, both in pixels."""
    turn = math.radians(hand.angle)
    x, y = hand.center[0] * side, hand.center[1] * side
    middle = canvas.left + canvas.edges[-1] / 2, sum(canvas.rows) / 2
    turned = np.array(
        [[math.cos(turn), -math.sin(turn), 0.0], [math.sin(turn), math.cos(turn), 0.0], [0.0, 0.0, 1.0]]
    ) @ np.array([[1.0, 0.0, -x], [0.0, 1.0, -y], [0.0, 0.0, 1.0]])
    span = max(canvas.edges[-1], 1.0)
    tilted = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [-hand.tilt / span, 0.0, 1.0]])
    matrix: np.ndarray = np.array([[1.0, 0.0, middle[0]], [0.0, 1.0, middle[1]], [0.0, 0.0, 1.0]]) @ tilted @ turned
    return matrix


def write(picture: Image.Image, hand: Hand, grid: int = 1) -> tuple[Image.Image, np.ndarray]:
    """Return a picture with words on it, and the letters at its patches.

    Args:
        picture: RGB, as wide as high; left as it is.
        hand: How.
        grid: Patches along each side.

    Returns:
        The picture, and uint8 [grid * grid], row by row: the letter at a patch's center, 1 to 26 for a to z in either
        case, 0 for none.
    """
    side = picture.width
    capital_px = max(_LEAST_PX, hand.height * side)
    canvas = _draw_canvas(hand, capital_px, side)
    drop = hand.bend * capital_px
    if drop:
        canvas = _bent(canvas, drop)
    matrix = _onto_picture(hand, canvas, side)
    coefficients = (matrix / matrix[2, 2]).flatten()[:8].tolist()
    layer = canvas.picture.transform(
        (side, side), Image.Transform.PERSPECTIVE, coefficients, Image.Resampling.BICUBIC,
        fillcolor=(*hand.paper_color, 0),
    )  # fmt: skip
    written = picture.copy()
    written.paste(layer, (0, 0), layer)
    if hand.is_blank:
        return written, np.zeros(grid * grid, np.uint8)
    return written, _letters_at(hand.text, canvas, _patch_centers(side, grid) @ matrix.T, drop)


@cache
def _patch_centers(side: int, grid: int) -> np.ndarray:
    """Return the center of each patch in pixels, row by row, [grid * grid, 3]: x, y and 1."""
    axis = (np.arange(grid) + 0.5) * side / grid
    x, y = np.meshgrid(axis, axis)
    centers: np.ndarray = np.column_stack([x.ravel(), y.ravel(), np.ones(grid * grid)])
    return centers


def _letters_at(text: str, canvas: _Canvas, points: np.ndarray, drop: float) -> np.ndarray:
    """Return the letters at points of a canvas, [n, 3] in homogeneous pixels."""
    points = points[:, :2] / points[:, 2:]
    along = points[:, 0] - canvas.left
    top, bottom = canvas.rows
    down = points[:, 1] - (_sag(points[:, 0], canvas.picture.width, drop) if drop else 0.0)
    slack = 0.3 * (bottom - top)
    inside = (along >= 0) & (along < canvas.edges[-1]) & (down > top - slack) & (down < bottom + slack)
    codes = np.array([0 if letter == " " else ord(letter) - ord("a") + 1 for letter in text.lower()], np.uint8)
    which = np.searchsorted(np.array(canvas.edges), along[inside], side="right").clip(max=len(text) - 1)
    letters = np.zeros(len(points), np.uint8)
    letters[inside] = codes[which]
    return letters


def write_all(picture: Image.Image, hands: Sequence[Hand], grid: int = 1) -> tuple[Image.Image, np.ndarray]:
    """Return a picture with several hands' words, later ones over earlier ones, and the letters at its patches."""
    letters = np.zeros(grid * grid, np.uint8)
    for hand in hands:
        picture, more = write(picture, hand, grid)
        letters = np.where(more > 0, more, letters)
    return picture, letters
