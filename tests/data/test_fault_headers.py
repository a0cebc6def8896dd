"""What stands around pixels: orientation, metadata, frames, sizes."""

from __future__ import annotations

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin, TiffTags

from defense.data.images import Limits, decode

from .pictures import GREEN, RED, SECRET, encoded, picture, pixels, png, refusal

# Orientation and other metadata


ORIENTATION = 0x0112


STORED = {  # orientation -> stored pixels of an upright picture
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


def with_orientation(image, orientation, format="PNG"):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    return encoded(image, format, exif=exif, **({"lossless": True} if format == "WEBP" else {}))


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED)
def test_fault_07_exif_orientation_gives_the_upright_picture(orientation, format):
    upright = np.asarray(picture())
    stored = Image.fromarray(np.ascontiguousarray(STORED[orientation](upright)))
    data = with_orientation(stored, orientation, format)
    np.testing.assert_array_equal(pixels(data), upright)
    np.testing.assert_array_equal(pixels(Image.open(io.BytesIO(data))), upright)


@pytest.mark.parametrize("orientation", STORED)
def test_fault_07_jpeg_equals_the_file_rotated_beforehand(orientation):
    data = with_orientation(picture(), orientation, "JPEG")
    np.testing.assert_array_equal(STORED[orientation](pixels(data)), pixels(data, rotate=False))


def test_fault_07_without_rotate_the_pixels_are_as_stored():
    stored = picture()
    np.testing.assert_array_equal(pixels(with_orientation(stored, 6), rotate=False), np.asarray(stored))


def test_fault_07_an_upright_result_is_not_turned_again():
    once = decode(with_orientation(picture(), 6)).image
    np.testing.assert_array_equal(pixels(once), np.asarray(once))
    plain = decode(with_orientation(picture(), 6), rotate=False).image
    np.testing.assert_array_equal(pixels(plain), np.asarray(plain))


CORRUPT_EXIF = {
    "garbage": b"Exif\0\0garbage that is no TIFF header",
    "cut": b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01",
    "orientation 99": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x63\0\0\0\0\0\0\0",
    "orientation text": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x02\0\0\0\x36\0\0\0\0\0\0\0",
}


@pytest.mark.parametrize("exif", CORRUPT_EXIF.values(), ids=CORRUPT_EXIF)
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_fault_08_corrupt_exif_is_ignored_with_one_warning(format, exif):
    plain = encoded(picture(), format)
    decoded = decode(encoded(picture(), format, exif=exif))
    assert decoded.warnings == ("exif_ignored",)
    np.testing.assert_array_equal(np.asarray(decoded.image), pixels(plain))


def test_fault_08_tiff_with_a_dangling_exif_directory_is_read_without_a_python_warning():
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[0x8768] = TiffTags.LONG
    tags[0x8768] = 10
    data = encoded(picture(), "TIFF", tiffinfo=tags)
    data = data.replace(struct.pack("<HHII", 0x8768, 4, 1, 10), struct.pack("<HHII", 0x8769, 4, 1, len(data) - 1))
    with pytest.warns(UserWarning, match="EXIF"):
        Image.open(io.BytesIO(data)).load()
    np.testing.assert_array_equal(pixels(data), np.asarray(picture()))


@pytest.mark.parametrize("profile", [b"no profile at all", os.urandom(300_000)], ids=["bad", "huge"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_fault_10_icc_profile_is_ignored(format, profile):
    with_profile = decode(encoded(picture(), format, icc_profile=profile))
    assert with_profile.warnings == ()
    np.testing.assert_array_equal(np.asarray(with_profile.image), pixels(encoded(picture(), format)))


# Several frames


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_fault_17_animation_gives_its_first_frame_and_a_warning(format):
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, GREEN, SECRET)]
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode(encoded(frames[0], format, save_all=True, append_images=frames[1:], **options))
    assert decoded.warnings == ("animated",)
    assert (np.asarray(decoded.image) == RED).all()
    assert decode(encoded(frames[0], format)).warnings == ()


def test_fault_18_multi_page_tiff_gives_its_first_page_and_a_warning():
    pages = [Image.new("RGB", (32, 32), color) for color in (RED, GREEN)]
    decoded = decode(encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:]))
    assert decoded.warnings == ("animated",)
    assert (np.asarray(decoded.image) == RED).all()


def test_fault_18_further_pictures_in_a_phone_jpeg_are_no_animation():
    data = encoded(picture(), "MPO", save_all=True, append_images=[Image.new("RGB", (30, 20))])
    assert data.startswith(b"\xff\xd8\xff")
    decoded = decode(data)
    assert decoded.warnings == ()
    assert decoded.image.size == picture().size


def test_fault_17_pil_image_stays_at_the_frame_it_was_handed_over_at():
    frames = [Image.new("RGB", (32, 32), color) for color in (RED, GREEN)]
    image = Image.open(io.BytesIO(encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])))
    image.seek(1)
    assert (pixels(image) == GREEN).all()
    assert image.tell() == 1


def test_fault_19_gif_file_gives_colors_and_its_palette_indices_are_refused():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([*SECRET, *GREEN])
    assert (pixels(encoded(image, "GIF")) == SECRET).all()
    error = refusal(np.asarray(image))
    assert error.code == "bad_array"
    assert "palette indices" in str(error)


# Size


def test_fault_20_one_pixel_is_accepted_with_a_warning():
    decoded = decode(encoded(Image.new("RGB", (1, 1), RED)))
    assert decoded.warnings == ("tiny",)
    assert decoded.image.size == (1, 1)


@pytest.mark.parametrize("size", [(1, 4000), (20000, 1), (51, 1)])
def test_fault_21_extreme_aspect_is_refused(size):
    image = Image.new("RGB", size)
    for source in (encoded(image), image, np.asarray(image)):
        assert refusal(source).code == "extreme_aspect"


def test_fault_21_aspect_at_the_limit_is_accepted():
    assert decode(Image.new("RGB", (50, 1))).image.size == (50, 1)


def bomb(width, height):
    return png(width, height, 8, 2, [b""])


def test_fault_22_size_in_the_header_is_refused_before_decoding():
    error = refusal(bomb(10_000, 10_000))
    assert error.code == "too_large"
    assert "10000 x 10000 pixels, more than 64000000" in str(error)


def test_fault_22_limit_is_the_callers_and_holds_for_every_source():
    image = picture(20, 30)
    for source in (encoded(image), image, np.asarray(image)):
        assert refusal(source, limits=Limits(max_pixels=599)).code == "too_large"
        assert decode(source, limits=Limits(max_pixels=600)).image.size == (20, 30)


def test_fault_22_pillows_own_bomb_warning_does_not_leak():
    assert refusal(bomb(10_000, 10_000), limits=Limits(max_pixels=10**9)).code == "truncated"


@pytest.mark.parametrize("size", [(20_000, 20_000), (2**31 - 1, 1), (2**31 - 1, 2**31 - 1)])
def test_fault_23_sizes_that_pillow_refuses_are_too_large_as_well(size):
    assert refusal(bomb(*size)).code == "too_large"


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_fault_24_no_pixels_in_the_header_are_corrupt(size):
    assert refusal(bomb(*size)).code == "corrupt"
    assert refusal(Image.new("RGB", size)).code == "corrupt"


def test_fault_25_text_bomb_in_a_png_is_corrupt():
    text = b"Comment\0\0" + zlib.compress(bytes(80_000_000), 1)
    assert refusal(png(2, 2, 8, 2, [bytes(6)] * 2, zTXt=text)).code == "corrupt"
