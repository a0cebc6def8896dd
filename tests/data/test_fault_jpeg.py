"""Holes in the middle of JPEGs: what is missing is refused, what is left over is told, what is sound is read."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from defense.data.images import decode
from defense.data.jpeg import _Frame, _scans
from defense.errors import InvalidImageError

KINDS: dict[str, dict[str, Any]] = {
    "baseline": {},
    "optimized": {"optimize": True},
    "progressive": {"progressive": True},
    "restarts": {"restart_marker_rows": 1},
    "many restarts": {"restart_marker_blocks": 3},
    "4:4:4": {"subsampling": 0},
    "quality 30": {"quality": 30},
    "smoothed": {"progressive": True, "restart_marker_blocks": 7, "optimize": True},
}
MODES = ("RGB", "L", "CMYK")


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    """A picture with flat, smooth and rough parts, not a multiple of 16 on either side."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (26, 40, 3), dtype=np.uint8))
    pixels = np.asarray(small.resize((317, 203), Image.Resampling.BICUBIC)) + rng.normal(0, 6, (203, 317, 3))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    ImageDraw.Draw(picture).rectangle((40, 30, 150, 120), "white")
    return picture


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, "JPEG", **options)
    return file.getvalue()


def body(data: bytes) -> tuple[int, int]:
    """Where compressed data start and end, over all scans."""
    pieces = [piece for scan in _scans(data, _Frame()) for piece in scan.pieces]
    return pieces[0].start, pieces[-1].end


def outcome(data: bytes) -> str:
    """The code of the error, "uneven", or "read"."""
    try:
        return "uneven" if "uneven" in decode(data).warnings else "read"
    except InvalidImageError as error:
        return error.code


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_fault_113_sound_files_are_read_bit_for_bit(kind, mode, photo) -> None:
    data = jpeg(photo.convert(mode), **KINDS[kind])
    for tail in (b"", b"\0" * 500, b"PK\x03\x04" + b"\xff\xd8\xff\xda" * 20, data):
        read = decode(data + tail)
        assert read.warnings == ()
        assert np.array_equal(read.image, Image.open(io.BytesIO(data)).convert("RGB"))
    lazy = Image.open(io.BytesIO(data))
    assert np.array_equal(decode(lazy).image, read.image)


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (8, 8), (16, 16), (17, 16), (640, 16)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("color", ["black", "white", (200, 30, 90)])
def test_fault_113_flat_and_small_pictures_are_sound(size, kind, color) -> None:
    data = jpeg(Image.new("RGB", size, color), **KINDS[kind])
    assert outcome(data) == "read"


@pytest.mark.parametrize("fill", [b"\0", b"\x7f", b"\xaa", None], ids=["zeros", "7f", "aa", "cut out"])
@pytest.mark.parametrize("kind", KINDS)
def test_fault_113_a_hole_in_the_middle_is_never_read_in_silence(kind, fill, photo) -> None:
    data = jpeg(photo, **KINDS[kind])
    start, end = body(data)
    n = (end - start) // 8
    seen = []
    for part in range(1, 7):
        at = start + (end - start) * part // 8
        seen.append(outcome(data[:at] + (b"" if fill is None else fill * n) + data[at + n :]))
    assert "read" not in seen
    if fill is None:
        assert {"truncated", "corrupt"}.intersection(seen)


@pytest.mark.parametrize("kind", ["baseline", "4:4:4", "quality 30", "restarts"])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_fault_129_a_hole_of_64_zeros_is_refused_wherever_it_is(kind, mode, photo) -> None:
    data = jpeg(photo.convert(mode), **KINDS[kind])
    start, end = body(data)
    for at in range(start, end - 64, (end - start) // 40):
        assert outcome(data[:at] + bytes(64) + data[at + 64 :]) in ("corrupt", "truncated"), at


@pytest.mark.parametrize("kind", ["progressive", "smoothed"])
@pytest.mark.parametrize("mode", MODES)
def test_fault_129_a_scan_that_is_missing_as_a_whole_is_noticed(kind, mode, photo) -> None:
    data = jpeg(photo.convert(mode), **KINDS[kind])
    scans = list(_scans(data, _Frame()))
    assert len(scans) > 4
    outcomes = []
    for scan in scans:
        header = data.rindex(b"\xff\xda", 0, scan.pieces[0].start)
        outcomes.append(outcome(data[:header] + data[scan.pieces[-1].end :]))
    assert "read" not in outcomes
    assert outcomes[0] == "corrupt", "later scans refine it"
    assert outcomes[-1] == "uneven", "nothing refines it, so a file may end there"


@pytest.mark.parametrize("kind", ["restarts", "many restarts"])
def test_fault_113_a_restart_marker_that_is_missing_or_moved_is_corrupt(kind, photo) -> None:
    data = jpeg(photo, **KINDS[kind])
    third, fourth = data.index(b"\xff\xd2"), data.index(b"\xff\xd3")
    assert outcome(data[:third] + data[fourth:]) == "corrupt"
    assert outcome(data[: third + 1] + b"\xd3" + data[third + 2 :]) == "corrupt"


def test_fault_113_data_left_over_are_told_and_the_picture_is_read(photo) -> None:
    data = jpeg(photo)
    read = decode(data[:-2] + b"\x12\x34" * 40 + data[-2:])
    assert read.warnings == ("uneven",)
    assert np.array_equal(read.image, decode(data).image)


def test_fault_113_every_real_photograph_is_sound(shared_data: Path) -> None:
    files = [file for file in shared_data.rglob("*") if file.suffix.lower() in (".jpg", ".jpeg")]
    assert len(files) > 100
    for file in files:
        data = file.read_bytes()
        assert outcome(data) == "read", file
        assert np.array_equal(decode(data, rotate=False).image, Image.open(file).convert("RGB")), file
