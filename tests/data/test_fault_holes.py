"""Holes in the middle of files without checksums, and limits that would limit nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from defense.core.config import SAEConfig
from defense.data.images import Limits, decode
from defense.errors import ConfigError, InvalidImageError, ShapeError

from .pictures import encoded


@pytest.fixture(scope="module")
def noise() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(1, 256, (150, 201, 3), dtype=np.uint8))


KINDS = [("WEBP", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {}), ("TIFF", {})]
KINDS += [("AVIF", {})] if features.check("avif") else []


@pytest.mark.parametrize("part", [0.3, 0.5, 0.7])
@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: str(value))
def test_fault_116_zeros_in_the_middle_of_a_file_are_no_picture(kind, options, part, noise) -> None:
    data = encoded(noise, kind, **options)
    assert decode(data).warnings == ()
    at, n = int(len(data) * part) + 1, len(data) // 10 + 1
    with pytest.raises(InvalidImageError) as caught:
        decode(data[:at] + bytes(n) + data[at + n :])
    assert caught.value.code == "truncated"


@pytest.mark.parametrize(("kind", "options"), KINDS, ids=lambda value: str(value))
@pytest.mark.parametrize("color", ["black", "white"])
def test_fault_116_black_and_white_parts_are_pictures(kind, options, color, noise) -> None:
    flat = Image.new("RGB", (1500, 1000), color)
    assert "cut" not in decode(encoded(flat, kind, **options)).warnings
    bars = noise.copy()
    draw = ImageDraw.Draw(bars)
    draw.rectangle((0, 40, 201, 60), color)
    draw.rectangle((50, 80, 150, 140), color)
    draw.polygon([(0, 100), (201, 90), (201, 130), (0, 141)], color)
    assert decode(encoded(bars, kind, **options)).warnings == ()


@pytest.mark.parametrize("name", ["max_pixels", "max_bytes", "max_aspect"])
@pytest.mark.parametrize("value", [math.nan, -math.inf, 0, -1, True, "5", None])
def test_fault_117_limits_that_are_no_numbers_above_0_are_refused(name, value) -> None:
    with pytest.raises(ConfigError, match=f"{name} is "):
        Limits(**{name: value})


def test_fault_117_no_limit_can_be_asked_for() -> None:
    assert decode(Image.new("RGB", (2000, 4)), limits=Limits(max_pixels=math.inf, max_aspect=math.inf))
    with pytest.raises(ConfigError, match="a whole number"):
        Limits(max_bytes=math.inf)


@pytest.mark.parametrize("background", [None, 5, "abc", (0, 0), (math.nan, 0, 0), (True, 0, 0), (256, 0, 0)])
def test_fault_117_a_background_that_is_no_color_is_refused(background) -> None:
    with pytest.raises(ConfigError, match="background is"):
        decode(Image.new("RGB", (20, 20)), background=background)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1.5, "3", None, True, 0])
def test_fault_117_widths_of_an_sae_are_whole_numbers(value) -> None:
    for given in ({"d_model": value, "d_sae": 4}, {"d_model": 4, "d_sae": value}):
        with pytest.raises(ShapeError, match="must be whole and at least 1"):
            SAEConfig(act="relu", **given)


def test_fault_117_damage_that_pillow_does_not_recognize_is_damage(noise) -> None:
    data = encoded(noise, "PNG", compress_level=0)
    start = data.index(b"IDAT")
    lost = data[: start - 4] + data[data.index(b"IDAT", start + 4) - 4 :]
    with pytest.raises(InvalidImageError) as caught:
        decode(lost)
    assert caught.value.code in ("corrupt", "truncated")
