"""Patch maps of labels and regions, drawn over the picture that they are of."""

from __future__ import annotations

from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from defense.data.preprocess import Box

from .heat import overlay
from .patches import PatchLabels, Region, region_of

N_COLORED = 6
"""Labels that have a color and a number; the patches of others stay gray."""
COLORS = ((230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167))
"""Of these labels, told apart by color-blind readers too. Source: Okabe and Ito 2008, "Color universal design"."""
_TINT = 0.55
_INK, _PAPER = (20, 20, 20), (255, 255, 255)
_SMALLEST = 14
"""Pixels along a patch below which its number is left out."""


def colored(patches: PatchLabels) -> list[tuple[str, float, float | None]]:
    """Return the labels to color: each with the share of patches that say it, without and with the defense.

    Those with the largest share on either side come first, at most `N_COLORED`.
    """
    plain = dict(patches.shares())
    robust = {} if patches.robust is None else dict(patches.shares(robust=True))
    names = sorted({*plain, *robust}, key=lambda name: (-max(plain.get(name, 0), robust.get(name, 0)), name))
    has_robust = patches.robust is not None
    return [(name, plain.get(name, 0.0), robust.get(name, 0.0) if has_robust else None) for name in names[:N_COLORED]]


def label_map(picture: Image.Image, box: Box, patches: PatchLabels, *, robust: bool) -> Image.Image:
    """Return a picture in gray, each patch tinted and numbered by the label that it says; mode RGB.

    Args:
        picture: Upright.
        box: The part of it that the patches cover.
        patches: What they say.
        robust: With the defense.
    """
    number_of = {name: number for number, (name, *_) in enumerate(colored(patches))}
    result = picture.convert("L").convert("RGB")
    for row, column, edges in _patches_of(patches.best(robust=robust), box):
        number = number_of.get(patches.labels[patches.best(robust=robust)[row, column]])
        if number is None:
            continue
        visible = _within(edges, picture.size)
        tint = Image.new("RGB", (visible[2] - visible[0], visible[3] - visible[1]), COLORS[number])
        result.paste(Image.blend(result.crop(visible), tint, _TINT), visible)
        _draw_number(result, edges, number + 1)
    return result


def region_picture(picture: Image.Image, box: Box, region: Region, *, robust: bool) -> Image.Image:
    """Return a picture with the heat of a phrase over it and its region outlined; mode RGB.

    Both sides have one scale, from the least to the largest heat of either.

    Args:
        picture: Upright.
        box: The part of it that the patches cover.
        region: Of the phrase.
        robust: With the defense, which there must be.
    """
    sides = [side for side in (region.plain, region.robust) if side is not None]
    least, most = min(side.min() for side in sides), max(side.max() for side in sides)
    heat = sides[-1] if robust else region.plain
    level = (heat - least) / max(most - least, np.finfo(np.float32).tiny)
    result = overlay(picture, level**2, box=box, peak=1.0)  # `overlay` takes squares
    draw, inside = ImageDraw.Draw(result), np.pad(region_of(heat), 1)
    width = max(2, round((box[2] - box[0]) / 160))
    for row, column, (left, upper, right, lower) in _patches_of(heat, box):
        if not inside[row + 1, column + 1]:
            continue
        sides_of = (
            (inside[row, column + 1], (left, upper, right, upper)),
            (inside[row + 2, column + 1], (left, lower, right, lower)),
            (inside[row + 1, column], (left, upper, left, lower)),
            (inside[row + 1, column + 2], (right, upper, right, lower)),
        )
        for neighbor, line in sides_of:
            if not neighbor:
                draw.line(line, _INK, width + 2)
                draw.line(line, _PAPER, width)
    return result


def _patches_of(map: np.ndarray, box: Box) -> list[tuple[int, int, Box]]:
    """Return row, column and edges in pixels of each patch of a box."""
    rows, columns = map.shape[:2]
    left, upper, right, lower = box
    xs = [round(left + (right - left) * index / columns) for index in range(columns + 1)]
    ys = [round(upper + (lower - upper) * index / rows) for index in range(rows + 1)]
    return [(r, c, (xs[c], ys[r], xs[c + 1], ys[r + 1])) for r in range(rows) for c in range(columns)]


def _within(edges: Box, size: tuple[int, int]) -> Box:
    """Return the part of some edges that lies in a picture; of no size where none does."""
    left, upper = (min(max(edge, 0), most) for edge, most in zip(edges[:2], size, strict=True))
    right, lower = (min(max(edge, 0), most) for edge, most in zip(edges[2:], size, strict=True))
    return left, upper, max(left, right), max(upper, lower)


def _draw_number(picture: Image.Image, edges: Box, number: int) -> None:
    left, upper, right, lower = edges
    side = min(right - left, lower - upper)
    if side < _SMALLEST:
        return
    center = ((left + right) / 2, (upper + lower) / 2)
    ImageDraw.Draw(picture).text(
        center, str(number), _INK, _font(round(0.5 * side)), anchor="mm", stroke_width=2, stroke_fill=_PAPER
    )


@cache
def _font(px: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(px)
