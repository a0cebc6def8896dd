"""Holes in the middle of files without checksums, and limits that would limit nothing."""

from __future__ import annotations

import io
import math
import zlib

import numpy as np
import pytest
from PIL import Image, ImageDraw, features

from defense.core.config import SAEConfig
from defense.data.images import Limits, decode
from defense.errors import ConfigError, InvalidImageError, ShapeError

from .pictures import encoded, tiff_of_parts


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


# Strips and tiles of a TIFF, which libtiff fills up with garbage

UNNOTICED = ("packbits", "tiff_adobe_deflate", "jpeg")
CODES = (*UNNOTICED, "tiff_lzw")
every_code = pytest.mark.parametrize("code", CODES)


@pytest.mark.parametrize("fill", [b"\0", b"\xff", None], ids=["zeros", "ff", "cut out"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
@every_code
def test_fault_134_a_hole_in_a_strip_of_a_tiff_is_never_read_in_silence(code, mode, fill, noise) -> None:
    smooth = noise.resize((20, 15)).resize((160, 101), Image.Resampling.BICUBIC)
    for picture in (noise, smooth):
        data = encoded(picture.convert(mode), "TIFF", compression=code, strip_size=8000)
        assert decode(data).warnings == ()
        start, end = strips_at(data)
        for part in range(1, 8):
            at, n = start + (end - start) * part // 8, (end - start) // 12
            broken = data[:at] + (bytes(n) if fill is None else fill * n) + data[at + n :]
            if fill is None:  # the strips behind it move
                broken = data[:at] + data[at + n : end] + bytes(n) + data[end:]
            assert outcome(broken) != (), (at, n)


def strips_at(data: bytes) -> tuple[int, int]:
    tags = Image.open(io.BytesIO(data)).tag_v2
    return tags[273][0], tags[273][-1] + tags[279][-1]


def outcome(data: bytes) -> tuple[str, ...]:
    try:
        return decode(data).warnings
    except InvalidImageError as error:
        return (error.code,)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "LA", "I;16", "CMYK"])
@every_code
def test_fault_134_sound_strips_are_read(code, mode, noise) -> None:
    if code == "jpeg" and mode in ("P", "1", "LA", "I;16", "RGBA"):
        pytest.skip("no JPEG of this mode")
    picture = noise.quantize(40) if mode == "P" else noise.convert("L").convert(mode)
    for options in ({}, {"strip_size": 999}, {"strip_size": 10**9}):
        data = encoded(picture, "TIFF", compression=code, **options)
        assert "uneven" not in decode(data).warnings
        again = Image.open(io.BytesIO(data))
        assert np.array_equal(decode(again).image, decode(data).image)


def packed(row: bytes) -> bytes:
    """PackBits of a row whose pixels have no runs."""
    return b"".join(bytes([len(row[at : at + 128]) - 1]) + row[at : at + 128] for at in range(0, len(row), 128))


HEIGHT, WIDTH = 21, 33
TAGS = {256: WIDTH, 257: HEIGHT, 258: 8, 262: 1}
PACKED, ZIPPED = {259: 32773, **TAGS}, {259: 8, **TAGS}


def sound_tiffs(levels: np.ndarray) -> dict[str, bytes]:
    """Forms that Pillow does not write, of levels [HEIGHT, WIDTH]."""
    rows = [packed(row.tobytes()) for row in levels]
    filled = np.full((32, 48), 7, np.uint8)
    filled[:HEIGHT, :WIDTH] = levels
    tiles = [filled[y : y + 16, x : x + 16].tobytes() for y in (0, 16) for x in (0, 16, 32)]
    tiled = {322: 16, 323: 16}
    halves = [levels[:16].tobytes(), levels[16:].tobytes()]
    full = [halves[0], filled[16:, :WIDTH].tobytes()]
    return {
        "packbits": tiff_of_parts([b"".join(rows)], {**PACKED, 278: 2**32 - 1}),
        "packbits, runs over rows": tiff_of_parts([packed(levels.tobytes())], {**PACKED, 278: HEIGHT}),
        "packbits, padded": tiff_of_parts([b"\x80" + b"".join(rows) + b"\x80\x80\0"], {**PACKED, 278: HEIGHT}),
        "packbits, last strip filled": tiff_of_parts([packed(half) for half in full], {**PACKED, 278: 16}),
        "packbits, tiles": tiff_of_parts([packed(tile) for tile in tiles], {**PACKED, **tiled}, is_tiled=True),
        "deflate": tiff_of_parts([zlib.compress(half) for half in halves], {**ZIPPED, 278: 16}),
        "deflate, last strip filled": tiff_of_parts([zlib.compress(half) for half in full], {**ZIPPED, 278: 16}),
        "deflate, tiles": tiff_of_parts([zlib.compress(tile) for tile in tiles], {**ZIPPED, **tiled}, is_tiled=True),
        "deflate, planes": tiff_of_parts(
            [zlib.compress(half) for half in halves * 3], {**ZIPPED, 258: [8] * 3, 262: 2, 277: 3, 284: 2, 278: 16}
        ),
    }


def test_fault_134_forms_that_other_programs_write_are_read_and_their_holes_noticed(noise) -> None:
    levels = np.asarray(noise.convert("L"))[:HEIGHT, :WIDTH]
    for form, data in sound_tiffs(levels).items():
        assert decode(data).warnings == (), form
        assert np.array_equal(np.asarray(decode(data).image)[..., 0], levels), form
        for at in range(40, HEIGHT * WIDTH - 160, 60):
            for fill in (b"\0", b"\xfe"):  # more of it than a run of 128 that stand for themselves
                assert outcome(data[:at] + fill * 140 + data[at + 140 :]) != (), (form, at)


@pytest.mark.parametrize("n_more", [-40, 3, 4000])
def test_fault_134_what_a_strip_unpacks_to_is_held_against_its_pixels(n_more) -> None:
    pixels = bytes(range(1, HEIGHT + 1)) * WIDTH + bytes(range(1, 201)) * 20
    pixels = pixels[: HEIGHT * WIDTH + n_more]
    packed_data = tiff_of_parts([packed(pixels)], {**PACKED, 278: HEIGHT})
    zipped = tiff_of_parts([zlib.compress(pixels)], {**ZIPPED, 278: HEIGHT})
    assert outcome(packed_data) == (("truncated",) if n_more < 0 else ("uneven",))
    assert outcome(zipped) == (("truncated",) if n_more < 0 else ("corrupt",))


def test_fault_134_a_stream_of_zlib_that_lacks_its_checksum_is_told() -> None:
    pixels = bytes(range(1, HEIGHT + 1)) * WIDTH
    assert outcome(tiff_of_parts([zlib.compress(pixels)], {**ZIPPED, 278: HEIGHT})) == ()
    assert outcome(tiff_of_parts([zlib.compress(pixels)[:-4]], {**ZIPPED, 278: HEIGHT})) != ()


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
