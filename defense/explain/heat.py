"""Patch maps as pictures: squared norms by patch, drawn over what the model saw.

One color map everywhere, violet through red to yellow over a gray picture: it gets lighter throughout, so that it
survives print and color blindness, and it is told from a light and from a dark page.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from defense.data.preprocess import Box

_STOPS = np.array([(72, 12, 120), (150, 20, 130), (215, 45, 90), (245, 110, 40), (253, 185, 40), (255, 240, 110)])
"""Red, green and blue at equal steps from nothing to the peak."""
_OPACITY = 0.8
"""Of a map that is not faint."""
_UNSEEN = 0.45
"""Brightness that is left of what the model did not see."""


def heat(map: np.ndarray, size: tuple[int, int], *, peak: float | None = None) -> Image.Image:
    """Return a patch map as a picture: bilinear, see-through where nothing is, mode RGBA.

    Colors follow the square root, so that they compare norms: half the norm of the peak, a quarter of its energy, is
    half way along the color map.

    Args:
        map: Squared norms, [rows, columns], none below 0.
        size: Width and height of the result, in pixels.
        peak: What gets the last color, as a squared norm; by default the map's largest.
    """
    norms = np.sqrt(np.asarray(map, np.float32))
    top = np.sqrt(peak) if peak is not None else norms.max(initial=0.0)
    scaled = norms / top if top > 0 else np.zeros_like(norms)
    smooth = np.asarray(Image.fromarray(scaled).resize(size, Image.Resampling.BILINEAR)).clip(0, 1)
    return Image.fromarray(np.dstack([_colors(smooth), _alpha(smooth)]))


def overlay(picture: Image.Image, map: np.ndarray, *, box: Box | None = None, peak: float | None = None) -> Image.Image:
    """Return a picture in gray with a patch map over it, dark where the model did not see it; mode RGB.

    Args:
        picture: Upright.
        map: See `heat`.
        box: The part of the picture that the map covers (`Explanation.box`), where the model did not see all of it; by
            default the whole.
        peak: See `heat`.
    """
    left, upper, right, lower = box or (0, 0, *picture.size)
    gray = picture.convert("L").convert("RGB")
    result = gray.point(lambda level: _UNSEEN * level)
    visible = (max(left, 0), max(upper, 0), min(right, picture.width), min(lower, picture.height))
    result.paste(gray.crop(visible), visible)
    colors = heat(map, (right - left, lower - upper), peak=peak)
    result.paste(colors, (left, upper), colors)
    return result


def scale_bar(size: tuple[int, int]) -> Image.Image:
    """Return the color map from nothing (left) to the peak (right), mode RGB, opaque."""
    width, height = size
    return Image.fromarray(np.tile(_colors(np.linspace(0, 1, width, dtype=np.float32)), (height, 1, 1)))


def _colors(values: np.ndarray) -> np.ndarray:
    """Return uint8 [..., 3] of values from 0 to 1."""
    steps = np.linspace(0, 1, len(_STOPS))
    return np.stack([np.interp(values, steps, channel) for channel in _STOPS.T], -1).round().astype(np.uint8)


def _alpha(values: np.ndarray) -> np.ndarray:
    """Return uint8 opacities of values from 0 to 1: nothing at 0, and full from a half on."""
    opacities: np.ndarray = (255 * _OPACITY * np.minimum(2 * values, 1)).round().astype(np.uint8)
    return opacities
