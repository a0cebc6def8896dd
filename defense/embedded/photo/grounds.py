"""Pictures without words: what is written on in training, and what the network must go on seeing as it did.

Photographs of 64 pixels alone would teach it that whatever is sharp is writing. So half of the pictures are sharp:
mosaics of photographs at their own resolution, crops of large pictures, drawings, textures, strokes that look like
text from afar.
"""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from defense.world import draws, scenes

from .pictures import SIDE

SIZE = 160
"""Width and height of a picture, in pixels."""
NO_CLASS = -1


@dataclass(frozen=True)
class Sources:
    """What pictures are made of.

    Attributes:
        pixels: Photographs, uint8 [n, SIDE, SIDE, 3].
        labels: Their classes, int64 [n].
        crops: Sharp pictures without words, uint8 [n, SIZE, SIZE, 3].
    """

    pixels: np.ndarray
    labels: np.ndarray
    crops: np.ndarray


def sample_ground(rng: np.random.Generator, sources: Sources) -> tuple[Image.Image, int]:
    """Return a picture without words, RGB SIZE x SIZE, and its class, or `NO_CLASS`."""
    lot = rng.random()
    if lot < 0.55:
        return photograph(rng, sources)
    if lot < 0.73:
        crop = Image.fromarray(sources.crops[rng.integers(len(sources.crops))])
        return _flipped(rng, crop), NO_CLASS
    if lot < 0.89:
        return _mosaic(rng, sources), NO_CLASS
    if lot < 0.94:
        return _blend(rng, sources), NO_CLASS
    return sample_plain(rng), NO_CLASS


def photograph(rng: np.random.Generator, sources: Sources) -> tuple[Image.Image, int]:
    """Return a photograph, cropped a little and enlarged, and its class."""
    row = int(rng.integers(len(sources.pixels)))
    extent = SIDE * float(rng.uniform(0.7, 1.0)) if rng.random() < 0.7 else SIDE
    left, top = rng.uniform(0, SIDE - extent + 1e-6, 2).tolist()
    how = Image.Resampling.BICUBIC if rng.random() < 0.7 else Image.Resampling.LANCZOS
    box = (left, top, min(SIDE, left + extent), min(SIDE, top + extent))
    picture = Image.fromarray(sources.pixels[row]).resize((SIZE, SIZE), how, box)
    return _flipped(rng, picture), int(sources.labels[row])


def sample_plain(rng: np.random.Generator) -> Image.Image:
    """Return a ground that shows nothing, or a drawing, or strokes in lines."""
    lot = rng.random()
    if lot < 0.3:
        return _drawing(rng)
    picture = _cloudy(rng) if rng.random() < 0.6 else Image.new("RGB", (SIZE, SIZE), scenes.random_color(rng))
    if lot < 0.6:
        return draw_strokes(rng, picture)
    if lot < 0.75:
        return _pattern(rng, picture)
    return picture


def finish(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Return a picture as a camera may give it: sharpened or blurred, lighter or darker, with noise, as a JPEG."""
    if rng.random() < 0.35:
        percent = int(rng.integers(80, 320))
        picture = picture.filter(ImageFilter.UnsharpMask(float(rng.uniform(0.8, 2.5)), percent, 0))
    elif rng.random() < 0.12:
        picture = picture.filter(ImageFilter.BoxBlur(float(rng.uniform(0.3, 1.2))))
    if rng.random() < 0.35:
        pixels = np.asarray(picture, np.float32)
        if rng.random() < 0.6:
            pixels = (pixels - 128) * np.float32(rng.uniform(0.7, 1.25)) + np.float32(128 + rng.uniform(-30, 30))
        if rng.random() < 0.6:
            noise = rng.standard_normal((SIZE, SIZE, 3), dtype=np.float32)
            pixels = pixels + noise * np.float32(rng.uniform(2, 16))
        picture = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    if rng.random() < 0.15:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=int(rng.integers(25, 90)))
        picture = Image.open(file).convert("RGB")
    return picture


def _flipped(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else picture


def _mosaic(rng: np.random.Generator, sources: Sources) -> Image.Image:
    """Return photographs side by side at their own resolution or nearly, cut off at a random place."""
    side = int(SIDE * rng.uniform(0.8, 1.4))
    tiles = SIZE // side + 2
    picture = Image.new("RGB", (SIZE, SIZE))
    left, top = (-int(offset) for offset in rng.integers(0, side, 2))
    for row in range(tiles):
        for column in range(tiles):
            tile = Image.fromarray(sources.pixels[rng.integers(len(sources.pixels))])
            picture.paste(tile.resize((side, side), Image.Resampling.BICUBIC), (left + column * side, top + row * side))
    return picture


def _blend(rng: np.random.Generator, sources: Sources) -> Image.Image:
    first, _ = photograph(rng, sources)
    second, _ = photograph(rng, sources)
    return Image.blend(first, second, float(rng.uniform(0.2, 0.8)))


def _drawing(rng: np.random.Generator) -> Image.Image:
    """Return a scene of the drawn world, without a word."""
    name = str(rng.choice(list(scenes.OBJECTS)))
    return scenes.render(draws.sample_scene(rng, draws.sample_object(rng, name), None), SIZE)


def _cloudy(rng: np.random.Generator) -> Image.Image:
    """Return colors that change slowly, or quickly."""
    cells = int(rng.integers(2, 24))
    colors = rng.integers(0, 256, 3) + rng.integers(-70, 71, (cells, cells, 3))
    small = Image.fromarray(np.clip(colors, 0, 255).astype(np.uint8))
    return small.resize((SIZE, SIZE), Image.Resampling.BICUBIC if rng.random() < 0.8 else Image.Resampling.NEAREST)


def _pattern(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Draw stripes or checks over a picture, at any angle."""
    period, angle = rng.uniform(4, 40), rng.uniform(0, np.pi)
    x, y = np.meshgrid(np.arange(SIZE), np.arange(SIZE))
    along, across = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    is_on = along % period < period / 2
    if rng.random() < 0.5:
        is_on ^= across % period < period / 2
    mask = Image.fromarray((is_on * np.uint8(rng.integers(80, 256))).astype(np.uint8))
    picture.paste(scenes.random_color(rng), (0, 0, SIZE, SIZE), mask)
    return picture


def draw_strokes(rng: np.random.Generator, picture: Image.Image) -> Image.Image:
    """Draw strokes in lines: from afar they look like text, and no one can read them."""
    draw = ImageDraw.Draw(picture)
    height = float(rng.uniform(6, 40))
    ink, width = scenes.random_color(rng), max(1, round(height * float(rng.uniform(0.08, 0.2))))
    for line in range(int(rng.integers(1, max(2, int(SIZE / height / 1.6))))):
        x, base = float(rng.uniform(2, 40)), float(rng.uniform(0, height)) + line * height * 1.5
        while x < SIZE - height * rng.uniform(0.3, 3):
            points = rng.uniform(0, 1, (int(rng.integers(2, 5)), 2)) * (height * 0.7, height) + (x, base)
            draw.line([tuple(point) for point in points.tolist()], fill=ink, width=width)
            x += height * float(rng.uniform(0.6, 1.1))
    return picture
