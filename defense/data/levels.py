"""From the modes and depths in which pictures are stored to 8-bit RGB without transparency."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from defense.errors import InvalidImageError

_OPAQUE_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa"})

# Pillow leaves a PNG's transparent color at the depth of the file when it brings the pixels to 8 bits; for 1 bit up to
# version 12.0.
_KEY_TO_8_BITS: dict[str, Callable[[int], int]] = {
    "1": lambda key: 255 * bool(key),
    "L;2": lambda key: key * 85,
    "L;4": lambda key: key * 17,
    "RGB;16B": lambda key: key >> 8,
}

_DARK = 64
"""Levels of 255 that 8, 10, 12 or 14 bits stored in 16 do not reach."""
_ALIKE = 8
"""Levels of 255 by which a picture that shows nothing may differ from its background."""
_WHITE_IS_ZERO = (262, 0)
"""A TIFF's tag for what its samples mean, and the value that says so."""


def stored_bits(image: Image.Image) -> int:
    """Return the bits per sample in which a picture that is not loaded is stored: 8 (or fewer), 12 or 16."""
    tile = image.tile[0] if isinstance(image, ImageFile.ImageFile) and image.tile else None
    if tile is not None and "I;12" in str(tile[3]):
        return 12
    is_deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM")
    return 16 if is_deep or (tile is not None and ";16" in str(tile[3])) else 8


def bring_key_to_8_bits(image: ImageFile.ImageFile) -> None:
    """Bring the color that stands for transparent to the depth that the pixels will have once they are loaded."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return
    if rescale := _KEY_TO_8_BITS.get(str(image.tile[0].args)):
        image.info["transparency"] = tuple(map(rescale, key)) if isinstance(key, tuple) else rescale(key)


def to_rgb(
    image: Image.Image, name: str, background: tuple[int, int, int], bits: int
) -> tuple[Image.Image, tuple[str, ...]]:
    """Return a new, opaque RGB picture without metadata, and what there is to say about it.

    Args:
        image: Loaded.
        name: What messages call it.
        background: Put under transparent pixels.
        bits: See `stored_bits`.

    Raises:
        InvalidImageError: Its mode says nothing of the range of its values.
    """
    notes: list[str] = []
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        image = _high_byte(image, bits)
    if image.mode not in _OPAQUE_MODES | _ALPHA_MODES:
        raise InvalidImageError(
            "unsupported_mode",
            f"{name} has Pillow mode {image.mode}, of unknown range; convert it to 8 bits per channel",
        )
    if bits == 16 and _brightest(image) < _DARK:
        notes.append("dark")
    if not image.has_transparency_data:
        rgb = image.convert("RGB")
        rgb.info = {}  # the orientation must not be applied again to a picture that is upright
        return rgb, tuple(notes)
    rgba = image.convert("RGBA")
    rgb = Image.new("RGB", image.size, background)
    rgb.paste(rgba, mask=rgba)
    if _levels_of(rgba)[3][0] < 255 and all(
        max(high - level, level - low) <= _ALIKE for (low, high), level in zip(_levels_of(rgb), background, strict=True)
    ):
        notes.append("invisible")
    return rgb, tuple(notes)


def _levels_of(image: Image.Image) -> list[Any]:
    """Return the lowest and the highest level of each band."""
    return [band.getextrema() for band in image.split()]


def _brightest(image: Image.Image) -> int:
    """Return the highest level of all bands but alpha."""
    return max(
        int(high) for band, (_, high) in zip(image.getbands(), _levels_of(image), strict=True) if band not in "Aa"
    )


def _high_byte(image: Image.Image, bits: int) -> Image.Image:
    """Return gray of 12 or 16 bits as 8-bit gray, with alpha where one level stands for transparent."""
    levels = np.asarray(image)
    tag, is_negative = _WHITE_IS_ZERO
    if getattr(image, "tag_v2", {}).get(tag) == is_negative:  # Pillow inverts the other depths itself
        levels = 2**bits - 1 - levels
    gray = Image.fromarray((levels >> (bits - 8)).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))
