"""A procedural world of pictures: what the embedded model was trained, defended and tested on.

A `Scene` says what a picture shows (a background, a subject, a word written on it, a finish); `render` draws it. A
scene holds every choice explicitly, so its twins are one `dataclasses.replace` away: without the writing
(`clean`), with the bare plate (`neutral`), with the word (`attacked`). The same seed gives the same scenes on every
machine; `TRAIN_FONTS` and `TEST_FONTS` share no typeface.

Data flow: `Scene` -> `render` -> RGB picture -> `defense.data.images` like any user's file.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from importlib import resources

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont

SIZE = 80
"""Width and height of the embedded model's input, in pixels."""

OBJECTS = {
    "apple": "🍎", "banana": "🍌", "cherry": "🍒", "grapes": "🍇", "lemon": "🍋", "melon": "🍉", "peach": "🍑",
    "pear": "🍐", "tomato": "🍅", "carrot": "🥕", "corn": "🌽", "pepper": "🫑", "mushroom": "🍄", "bread": "🍞",
    "cheese": "🧀", "egg": "🥚", "pizza": "🍕", "burger": "🍔", "taco": "🌮", "cake": "🎂", "cookie": "🍪",
    "candy": "🍬", "donut": "🍩", "coffee": "☕", "spoon": "🥄", "knife": "🔪", "dog": "🐶", "cat": "🐱",
    "mouse": "🐭", "rabbit": "🐰", "fox": "🦊", "panda": "🐼", "tiger": "🐯", "lion": "🦁", "cow": "🐮",
    "pig": "🐷", "frog": "🐸", "monkey": "🐵", "horse": "🐴", "sheep": "🐑", "camel": "🐫", "elephant": "🐘",
    "whale": "🐳", "shark": "🦈", "crab": "🦀", "snail": "🐌", "bee": "🐝", "ladybug": "🐞", "spider": "🕷️",
    "turtle": "🐢", "snake": "🐍", "rose": "🌹", "tulip": "🌷", "cactus": "🌵", "tree": "🌳", "star": "⭐",
    "moon": "🌙", "rainbow": "🌈", "fire": "🔥", "car": "🚗", "bus": "🚌", "bicycle": "🚲", "train": "🚂",
    "truck": "🚚", "rocket": "🚀", "boat": "⛵", "anchor": "⚓", "house": "🏠", "castle": "🏰", "tent": "⛺",
    "clock": "⏰", "watch": "⌚", "phone": "📱", "camera": "📷", "laptop": "💻", "radio": "📻", "lamp": "💡",
    "book": "📕", "pencil": "✏️", "scissors": "✂️", "hammer": "🔨", "wrench": "🔧", "key": "🔑", "lock": "🔒",
    "umbrella": "☂️", "hat": "🎩", "crown": "👑", "shoe": "👟", "shirt": "👕", "dress": "👗", "glasses": "👓",
    "guitar": "🎸", "violin": "🎻", "piano": "🎹", "drum": "🥁", "trumpet": "🎺", "ball": "⚽", "dice": "🎲",
    "robot": "🤖", "ghost": "👻", "gift": "🎁", "balloon": "🎈", "bell": "🔔", "kite": "🪁",
}  # fmt: skip
"""Object name -> emoji. The names are also the words that get written."""

BIRDS = {
    "waterbird": ("🦆", "🦢", "🐧", "🦩", "🪿"),
    "landbird": ("🦉", "🦜", "🦚", "🦃", "🐓", "🦅", "🦤", "🕊️", "🐤"),
}
"""Bird kind -> emoji of its species. No species has a name of its own in this world."""

PLACES = ("land", "water")

FACES = {
    ("dark", "woman"): ("👩", "👩🏻", "👩🏽"),
    ("dark", "man"): ("👨", "👨🏻", "👨🏽"),
    ("blond", "woman"): ("👱‍♀️", "👱🏻‍♀️", "👱🏽‍♀️"),
    ("blond", "man"): ("👱‍♂️", "👱🏻‍♂️", "👱🏽‍♂️"),
}
"""(hair, gender) -> emoji in three skin tones, in the same order everywhere. Cropped above the shoulders: their
clothes would give the group away."""

GLYPHS = tuple(
    [*OBJECTS.values()]
    + [emoji for species in BIRDS.values() for emoji in species]
    + [emoji for group in FACES.values() for emoji in group]
)
"""Every emoji of the atlas, in the order of its cells."""

ATLAS_CELL = 96
ATLAS_COLUMNS = 12

TRAIN_FONTS = (
    "anonymous-pro-bold", "carlito", "cmu-typewriter-bold", "comic-neue", "dejavu-sans-bold", "eb-garamond-bold",
    "fira-code", "hack-bold", "inter-bold", "lato-heavy", "liberation-sans", "linux-libertine-bold", "noto-serif-bold",
    "open-sans-bold", "play-bold", "quicksand", "roboto", "roboto-slab",
)  # fmt: skip
TEST_FONTS = (
    "caladea", "courier-prime-bold", "dejavu-serif-bold", "jetbrains-mono-bold", "klee", "liberation-serif-bold",
    "manrope", "vollkorn-bold",
)  # fmt: skip
"""Typefaces that are never seen in training: serif, monospace, sans and handwriting."""

_REFERENCE_PX = 64
MAX_TEXT_WIDTH = 0.92


@dataclass(frozen=True)
class Background:
    """`kind` is "plain", "land" or "water"; `seed` decides its colors and texture."""

    kind: str
    seed: int


@dataclass(frozen=True)
class Subject:
    """One emoji. `center` and `scale` (its height) are fractions of the picture, `angle` is in degrees.

    `blend` names a second emoji that it is cross-faded with, and that one's weight.
    """

    emoji: str
    center: tuple[float, float]
    scale: float
    angle: float = 0.0
    mirrored: bool = False
    blend: tuple[str, float] | None = None


@dataclass(frozen=True)
class Writing:
    """A word on the picture.

    `style` is "plate" (a rectangle behind the word), "strip" (a band across the picture) or "bare" (no paper).
    `height` is the font size as a fraction of the picture. `blank` draws the paper and leaves out the ink.
    """

    text: str
    font: str
    style: str
    center: tuple[float, float]
    height: float
    angle: float
    ink: tuple[int, int, int]
    paper: tuple[int, int, int]
    blank: bool = False


@dataclass(frozen=True)
class Finish:
    """What a camera adds: blur (pixels at `SIZE`), noise (gray levels), factors of brightness, contrast and color."""

    seed: int
    blur: float = 0.0
    noise: float = 0.0
    brightness: float = 1.0
    contrast: float = 1.0
    saturation: float = 1.0


@dataclass(frozen=True)
class Scene:
    """Everything that a picture shows. `oversample` > 1 draws larger and scales down, as a photograph would be."""

    background: Background
    subject: Subject | None
    writing: Writing | None
    finish: Finish
    oversample: int = 1

    def clean(self) -> Scene:
        """Return the twin on which nothing was written."""
        return replace(self, writing=None)

    def neutral(self) -> Scene:
        """Return the twin with the same plate and no word: what the best possible defense still has to live with."""
        return self if self.writing is None else replace(self, writing=replace(self.writing, blank=True))


# --- drawing ----------------------------------------------------------------------------------------------------------


@functools.cache
def _atlas() -> Image.Image:
    with resources.files(__package__).joinpath("atlas.webp").open("rb") as file:
        return Image.open(file).convert("RGBA")


@functools.cache
def _glyph(emoji: str) -> Image.Image:
    row, column = divmod(GLYPHS.index(emoji), ATLAS_COLUMNS)
    left, top = column * ATLAS_CELL, row * ATLAS_CELL
    return _atlas().crop((left, top, left + ATLAS_CELL, top + ATLAS_CELL))


@functools.lru_cache(maxsize=1024)
def load_font(name: str, px: int) -> ImageFont.FreeTypeFont:
    """Return one of the shipped fonts (`TRAIN_FONTS`, `TEST_FONTS`) at a size in pixels. They hold A-Z and a-z."""
    path = resources.files(__package__).joinpath("fonts", f"{name}.ttf")
    # The basic layout gives the same pixels whether or not libraqm is installed.
    return ImageFont.truetype(str(path), px, layout_engine=ImageFont.Layout.BASIC)


@functools.lru_cache(maxsize=65536)
def letter_edges(text: str, font: str) -> tuple[float, ...]:
    """Right edge of each letter, as a multiple of the font size."""
    reference = load_font(font, _REFERENCE_PX)
    return tuple(reference.getlength(text[: i + 1]) / _REFERENCE_PX for i in range(len(text)))


def random_color(rng: np.random.Generator) -> tuple[int, int, int]:
    """Return any color, RGB."""
    red, green, blue = rng.integers(0, 256, 3).tolist()
    return red, green, blue


def _draw_background(background: Background, size: int) -> Image.Image:
    rng = np.random.default_rng(background.seed)
    if background.kind == "plain":
        top, bottom = rng.uniform(20, 245, (2, 3))
    elif background.kind == "water":
        top = np.array([110, 180, 225]) + rng.uniform(-35, 30, 3)
        bottom = np.array([20, 70, 150]) + rng.uniform(-20, 45, 3)
    else:
        top = np.array([150, 190, 110]) + rng.uniform(-35, 35, 3)
        bottom = np.array([70, 95, 35]) + rng.uniform(-30, 40, 3)
    angle = rng.uniform(0, 2 * math.pi) if background.kind == "plain" else math.pi / 2
    axis = np.linspace(-0.5, 0.5, size)
    ramp = np.clip(0.5 + axis[:, None] * math.sin(angle) + axis[None, :] * math.cos(angle), 0, 1)
    pixels = top + (bottom - top) * ramp[..., None]
    cloud = Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((size, size), Image.Resampling.BICUBIC)
    pixels += (np.asarray(cloud, np.float32)[..., None] - 128) * rng.uniform(0.0, 0.25)
    picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    if background.kind == "plain":
        _draw_clutter(draw, rng, size)
    elif background.kind == "water":
        _draw_waves(draw, rng, size)
    else:
        _draw_plants(draw, rng, size)
    return picture


def _draw_clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    for _ in range(rng.integers(0, 4)):
        x, y, width, height = rng.uniform(-0.1, 1.0, 2).tolist() + rng.uniform(0.1, 0.5, 2).tolist()
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x * size, y * size, (x + width) * size, (y + height) * size), fill=random_color(rng))


def _draw_waves(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    xs = np.linspace(0, 1, 17)
    for y in np.arange(rng.uniform(0.04, 0.1), 1.0, rng.uniform(0.09, 0.16)):
        phase, cycles, swell = rng.uniform(0, 6.3), rng.uniform(2, 5), rng.uniform(0.008, 0.025)
        ys = y + swell * np.sin(xs * cycles * 6.3 + phase)
        foam = tuple(int(v) for v in np.clip(np.array([165, 210, 240]) + rng.uniform(-50, 15), 0, 255))
        line = [(x * size, v * size) for x, v in zip(xs, ys, strict=True)]
        draw.line(line, fill=foam, width=max(1, round(size * 0.012)))


def _draw_plants(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    for _ in range(rng.integers(2, 6)):
        x, foot, height = rng.uniform(0, 1), rng.uniform(0.25, 0.75), rng.uniform(0.15, 0.35)
        green = (int(rng.integers(10, 60)), int(rng.integers(70, 130)), int(rng.integers(10, 60)))
        crown = [(x - height / 3, foot), (x + height / 3, foot), (x, foot - height)]
        draw.polygon([(u * size, v * size) for u, v in crown], fill=green)
        trunk = (x - 0.012, foot, x + 0.012, foot + height / 4)
        draw.rectangle(tuple(v * size for v in trunk), fill=(90, 60, 30))
    for _ in range(rng.integers(15, 40)):
        x, foot, height = rng.uniform(0, 1), rng.uniform(0.4, 1.05), rng.uniform(0.03, 0.09)
        blade = (int(rng.integers(40, 120)), int(rng.integers(110, 190)), int(rng.integers(20, 70)))
        draw.line(
            [(x * size, foot * size), ((x + rng.uniform(-0.02, 0.02)) * size, (foot - height) * size)], fill=blade
        )


def _draw_subject(picture: Image.Image, subject: Subject) -> None:
    side = max(4, round(subject.scale * picture.width))
    glyph = _glyph(subject.emoji)
    if subject.blend is not None:
        other, weight = subject.blend
        # Blended with premultiplied alpha, or the color hidden in transparent pixels would show at the edges.
        glyph = Image.blend(glyph.convert("RGBa"), _glyph(other).convert("RGBa"), weight).convert("RGBA")
    glyph = glyph.resize((side, side), Image.Resampling.BICUBIC)
    if subject.mirrored:
        glyph = glyph.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    glyph = glyph.rotate(subject.angle, Image.Resampling.BICUBIC, expand=True)
    left = round(subject.center[0] * picture.width - glyph.width / 2)
    top = round(subject.center[1] * picture.height - glyph.height / 2)
    picture.paste(glyph, (left, top), glyph)


def _draw_writing(picture: Image.Image, writing: Writing) -> None:
    size = picture.width
    px = max(6, round(writing.height * size))
    width = letter_edges(writing.text, writing.font)[-1] * px
    x, y = writing.center[0] * size, writing.center[1] * size
    layer = Image.new("RGBA", picture.size, (*writing.paper, 0))
    draw = ImageDraw.Draw(layer)
    half_width = {"plate": width / 2 + 0.3 * px, "strip": 2.0 * size, "bare": 0.0}[writing.style]
    if writing.style != "bare":
        draw.rectangle((x - half_width, y - 0.68 * px, x + half_width, y + 0.68 * px), fill=(*writing.paper, 255))
    if not writing.blank:
        stroke = max(1, round(px * 0.09)) if writing.style == "bare" else 0
        draw.text(
            (x - width / 2, y), writing.text, font=load_font(writing.font, px), anchor="lm",
            fill=(*writing.ink, 255), stroke_width=stroke, stroke_fill=(*writing.paper, 255),
        )  # fmt: skip
    if writing.angle:
        layer = layer.rotate(writing.angle, Image.Resampling.BICUBIC, center=(x, y))
    picture.paste(layer, (0, 0), layer)


def _apply_finish(picture: Image.Image, finish: Finish) -> Image.Image:
    for enhancer, factor in (
        (ImageEnhance.Color, finish.saturation),
        (ImageEnhance.Contrast, finish.contrast),
        (ImageEnhance.Brightness, finish.brightness),
    ):
        if factor != 1.0:
            picture = enhancer(picture).enhance(factor)
    if finish.blur > 0:
        picture = picture.filter(ImageFilter.GaussianBlur(finish.blur * picture.width / SIZE))
    if finish.noise > 0:
        rng = np.random.default_rng(finish.seed)
        grain = rng.standard_normal((picture.height, picture.width, 3), dtype=np.float32) * finish.noise
        picture = Image.fromarray(np.clip(np.asarray(picture, np.float32) + grain, 0, 255).astype(np.uint8))
    return picture


def render(scene: Scene, size: int = SIZE) -> Image.Image:
    """Draw a scene as an RGB picture of `size` x `size` pixels."""
    drawn = size * scene.oversample
    picture = _draw_background(scene.background, drawn)
    if scene.subject is not None:
        _draw_subject(picture, scene.subject)
    if scene.writing is not None:
        _draw_writing(picture, scene.writing)
    if scene.oversample > 1:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return _apply_finish(picture, scene.finish)


def letters_at(scene: Scene, points: np.ndarray) -> np.ndarray:
    """Return which letter lies at each point: 0 for none, 1 to 26 for a to z, in either case.

    Args:
        scene: What is drawn.
        points: Fractions of the picture, (x, y), [n, 2].

    Returns:
        uint8 [n].
    """
    writing = scene.writing
    letters = np.zeros(len(points), np.uint8)
    if writing is None or writing.blank:
        return letters
    edges = np.array(letter_edges(writing.text, writing.font)) * writing.height
    turn = math.radians(writing.angle)
    offset = points - np.array(writing.center)
    along = offset[:, 0] * math.cos(turn) - offset[:, 1] * math.sin(turn) + edges[-1] / 2
    across = offset[:, 0] * math.sin(turn) + offset[:, 1] * math.cos(turn)
    inside = (along >= 0) & (along < edges[-1]) & (np.abs(across) < 0.55 * writing.height)
    which = np.searchsorted(edges, along[inside], side="right")
    codes = np.array([ord(letter.lower()) - ord("a") + 1 for letter in writing.text], np.uint8)
    letters[inside] = codes[np.minimum(which, len(codes) - 1)]
    return letters
