"""Formats: read, refused by name, sound and yet unread."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from PIL import Image

from defense.data.images import decode

from .pictures import encoded, photograph, picture, pixels, refusal, tiff_of

# Refused


FOREIGN = {
    "EPS": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n",
    "WMF": b"\xd7\xcd\xc6\x9a" + bytes(60),
    "PSD": b"8BPS\0\1" + bytes(60),
    "FITS": b"SIMPLE  =                    T" + b" " * 60,
    "ICO": encoded(picture(32, 32), "ICO"),
    "TGA": encoded(picture(32, 32), "TGA"),
    "QOI": b"qoif" + bytes(20),
    "PDF": b"%PDF-1.7\n",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_fault_26_formats_off_the_list_are_refused_by_name(name, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)  # no Ghostscript
    error = refusal(FOREIGN[name])
    assert error.code == "unsupported_format"
    assert f"is {name}; convert it" in str(error)


@pytest.mark.parametrize(
    "start", [b"<svg ", b"\xef\xbb\xbf<?xml version='1.0'?>\n<!-- a --><svg ", b"\n <!-- b --><svg "]
)
def test_fault_27_svg_is_an_unsupported_format(start):
    error = refusal(start + b"xmlns='http://www.w3.org/2000/svg'></svg>")
    assert error.code == "unsupported_format"
    assert "SVG" in str(error)


@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_fault_28_heic_is_an_unsupported_format_with_a_hint(brand):
    error = refusal(b"\0\0\0\x18ftyp" + brand + bytes(40))
    assert error.code == "unsupported_format"
    assert "pillow-heif" in str(error)


@pytest.mark.parametrize(
    "data",
    [
        b"BM" + struct.pack("<IHHIIIIHHIIIIII", 5000, 0, 0, 54, 40, 32, 32, 1, 24, 9, 0, 0, 0, 0, 0) + b"\x7f" * 4946,
        tiff_of(np.ones((32, 32), np.uint16), 32844, 16),
    ],
    ids=["BMP compression", "TIFF photometric"],
)
def test_fault_101_a_sound_picture_of_an_unread_kind_is_not_called_damaged(data):
    error = refusal(data)
    assert error.code == "unsupported_format"
    assert "fetch it again" not in str(error)
    assert "save it as PNG" in str(error)


@pytest.mark.parametrize("start", [b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0\x2f"])
def test_fault_29_jpeg_2000_is_an_unsupported_format(start):
    assert refusal(start + bytes(60)).code == "unsupported_format"


# Read


def test_fault_29_progressive_jpeg_is_accepted():
    baseline, progressive = (pixels(encoded(picture(), "JPEG", progressive=flag)) for flag in (False, True))
    np.testing.assert_array_equal(progressive, baseline)


def test_fault_100_portable_pixmaps_are_read_up_to_16_bits():
    image = photograph()
    np.testing.assert_array_equal(np.asarray(decode(encoded(image, "PPM")).image), np.asarray(image))
    gray = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    data = b"P5\n32 32\n65535\n" + gray.astype(">u2").tobytes()
    np.testing.assert_array_equal(np.asarray(decode(data).image)[..., 0], gray >> 8)


def test_fault_100_avif_is_read_upright():
    decoded = decode(encoded(photograph(), "AVIF", quality=95))
    assert decoded.image.size == (96, 64)
    assert np.abs(np.asarray(decoded.image).astype(int) - np.asarray(photograph())).mean() < 8
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(photograph(), "AVIF", exif=exif)).image.size == (64, 96)
