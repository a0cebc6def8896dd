"""Files that are no picture or a part of one: cut, damaged, filled up with zeros."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image, ImageFile

from defense.data.images import decode

from .pictures import case, chunk, encoded, photograph, picture, pixels, png, refusal

# No picture, or the beginning of one


def test_fault_01_zero_bytes_are_empty(tmp_path):
    (tmp_path / "a.jpg").touch()
    assert refusal(tmp_path / "a.jpg").code == "empty"
    assert refusal(b"").code == refusal(io.BytesIO()).code == "empty"


@pytest.mark.parametrize("data", [b"<!DOCTYPE html><svg></svg>", b"just text", b"BMW builds cars", b"\x00" * 40])
def test_fault_02_text_named_jpg_is_not_an_image_and_its_bytes_are_shown(tmp_path, data):
    path = tmp_path / "a.jpg"
    path.write_bytes(data)
    error = refusal(path)
    assert error.code == "not_an_image"
    assert repr(data[:16]) in str(error)
    assert "JPEG, PNG" in str(error)


@pytest.mark.parametrize("progressive", [False, True])
def test_fault_03_cut_jpeg_is_truncated_wherever_it_is_cut(progressive):
    data = encoded(picture(), "JPEG", progressive=progressive)
    codes = {refusal(data[:cut]).code for cut in range(3, len(data), 7)}
    assert codes == {"truncated"}


def test_fault_04_jpeg_header_alone_is_truncated():
    data = encoded(picture(), "JPEG")
    assert refusal(data[:20]).code == "truncated"
    assert refusal(data[: data.index(b"\xff\xda")]).code == "truncated"


@pytest.mark.parametrize("format", ["PNG", "GIF", "BMP", "WEBP", "TIFF"])
def test_fault_05_cut_file_is_truncated(format):
    data = encoded(picture(), format)
    assert {refusal(data[: len(data) * part // 10]).code for part in range(1, 10)} == {"truncated"}


def test_fault_05_cut_compressed_tiff_is_truncated():
    data = encoded(picture(), "TIFF", compression="tiff_lzw")
    assert refusal(data[: len(data) // 2]).code == "truncated"


@pytest.mark.parametrize("kind", [b"IHDR", b"tEXt", b"IDAT"])
def test_fault_05_png_with_bad_checksum_is_corrupt(kind):
    data = bytearray(png(2, 2, 8, 2, [bytes(6)] * 2, tEXt=b"Comment\0hello"))
    start = data.index(kind)
    length = struct.unpack(">I", data[start - 4 : start])[0]
    data[start + 4 + length] ^= 1
    assert refusal(bytes(data)).code == "corrupt"


def test_fault_06_zip_behind_a_jpeg_is_ignored():
    data, trailer = encoded(picture(), "JPEG"), io.BytesIO()
    with zipfile.ZipFile(trailer, "w") as archive:
        archive.writestr("evil.js", "alert(1)" * 100)
    np.testing.assert_array_equal(pixels(data + trailer.getvalue()), pixels(data))


# Half a file


FORMATS = [
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("JPEG", {"optimize": True}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {"compression": "packbits"}),
    ("GIF", {}),
    ("PNG", {}),
    ("AVIF", {}),
    ("PPM", {}),
]


every_format = pytest.mark.parametrize(("format", "options"), FORMATS, ids=lambda value: str(value).strip("{}"))


@every_format
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_fault_94_what_was_never_downloaded_is_no_picture(format, options, share):
    whole = encoded(photograph(), format, **options)
    kept = int(len(whole) * share) + 1
    unfilled = whole[:kept] + bytes(len(whole) - kept)
    if (format, share) == ("PPM", 0.5):  # cut at the end of a row: as good as a black bar
        assert decode(unfilled).warnings == ("zeros",)
    else:
        assert refusal(unfilled).code == "truncated"
    assert decode(whole).warnings == ()


@every_format
def test_fault_94_it_is_noticed_in_an_opened_picture_too(format, options):
    whole = encoded(photograph(), format, **options)
    unfilled = io.BytesIO(whole[: len(whole) * 2 // 5] + bytes(len(whole) - len(whole) * 2 // 5))
    try:
        image = Image.open(unfilled)
    except OSError:
        return  # Pillow notices by itself
    assert refusal(image).code == "truncated"


@every_format
def test_fault_94_zeros_behind_a_whole_file_do_no_harm(format, options):
    whole = encoded(photograph(), format, **options)
    if format == "GIF":
        pytest.skip("nothing says where a GIF's last frame ends")
    padded = decode(whole + bytes(5000))
    assert padded.warnings == ()
    np.testing.assert_array_equal(np.asarray(padded.image), np.asarray(decode(whole).image))


@pytest.mark.parametrize("format", ["BMP", "TIFF", "PPM"])
def test_fault_94_black_rows_at_the_end_of_raw_pixels_are_told_and_kept(format):
    image = photograph()
    image.paste(0, (0, 0, 96, 20) if format == "BMP" else (0, 44, 96, 64))  # a BMP starts at the bottom
    decoded = decode(encoded(image, format))
    assert decoded.warnings == ("zeros",)
    np.testing.assert_array_equal(np.asarray(decoded.image), np.asarray(image))


@every_format
def test_fault_94_dark_pictures_are_not_taken_for_half_ones(format, options):
    letterboxed = photograph()
    letterboxed.paste(0, (0, 0, 96, 12))
    letterboxed.paste(0, (0, 52, 96, 64))
    lamp = Image.new("RGB", (96, 64))
    lamp.paste(photograph(10, 10), (40, 27))
    for image in (letterboxed, lamp, Image.new("RGB", (96, 64))):
        assert decode(encoded(image, format, **options)).warnings == ()


@pytest.mark.parametrize("size", [(64, 64), (600, 400), (2000, 1500)])
def test_fault_94_flat_pictures_end_in_zeros_and_are_whole(size):
    flat = Image.new("RGB", size, (200, 30, 60))
    flat.paste(photograph(64, 32), (0, 0))
    for options in ({}, {"lossless": True}):
        assert decode(encoded(flat, "WEBP", **options)).warnings == ()


def test_fault_94_a_jpeg_that_lacks_its_last_mark_alone_is_whole():
    whole = encoded(photograph(), "JPEG")
    assert whole.endswith(b"\xff\xd9")
    assert refusal(whole[:-2] + b"\xff" * 4000).code == "truncated"
    assert refusal(whole[:-2] + b"\n" * 4000).code == "truncated"


def test_fault_94_the_half_download():
    assert refusal(case("zero-padded.jpeg")).code == "truncated"


# Applications that let half a file pass


@every_format
def test_fault_95_an_application_that_allows_half_files_gets_none(format, options, monkeypatch):
    whole = encoded(photograph(), format, **options)
    want = np.asarray(decode(whole).image)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    for cut in range(len(whole) // 4, len(whole) * 9 // 10, len(whole) // 7):
        assert refusal(whole[:cut]).code == "truncated"
    np.testing.assert_array_equal(np.asarray(decode(whole).image), want)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_fault_95_a_png_with_too_few_rows_is_refused_whatever_is_allowed(monkeypatch):
    few = png(32, 32, 8, 2, [b"\x7f" * 96] * 5)
    codes = [refusal(few).code]
    black = png(32, 32, 8, 2, [b"\x7f" * 96] * 5 + [bytes(96)] * 27)
    assert decode(black).warnings == ()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert [*codes, refusal(few).code] == ["truncated", "truncated"]


@pytest.mark.parametrize(("n_bytes", "is_whole"), [(79, True), (78, False)])
def test_fault_95_rows_of_an_interlaced_png_are_counted_too(n_bytes, is_whole):
    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)  # 8 x 8 gray: 1 + 1 + 1 + 2 + 2 + 4 + 4 rows
    body = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(n_bytes))), chunk(b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(body)
    if is_whole:
        assert decode(data).warnings == ("tiny",)
    else:
        assert refusal(data).code == "truncated"
