"""Rows 1 to 38 of the fault table: what files, paths and arrays do to `decode`. The number is in each name."""

import io
import os
import struct
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, TiffImagePlugin, TiffTags

from defense.data import images
from defense.data.images import Limits, decode
from defense.errors import ConfigError, InvalidImageError

ORIENTATION = 0x0112


def picture(width=60, height=40):
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    levels = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x * y) % 200], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


def encoded(image, format="PNG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def chunk(kind, body):
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, depth, color, rows, **chunks):
    """A PNG from raw rows; `chunks` stand before the pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    raw = b"".join(b"\0" + row for row in rows)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + b"".join(chunk(kind.encode(), body) for kind, body in chunks.items())
        + chunk(b"IDAT", zlib.compress(raw))
        + chunk(b"IEND", b"")
    )


def pixels(source, **options):
    return np.asarray(decode(source, **options).image)


def refusal(source, **options):
    """The error that `decode` raises."""
    with pytest.raises(InvalidImageError) as caught:
        decode(source, **options)
    return caught.value


# Files that are no picture, or half of one


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


# Orientation and other metadata

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


# Color modes


def cmyk_picture():
    """Sixteen flat patches and, computed here, their RGB."""
    inks = np.array([[c, m, y, k] for c in (0, 255) for m in (0, 200) for y in (0, 100) for k in (0, 60)], np.uint8)
    patches = np.kron(inks.reshape(4, 4, 4), np.ones((16, 16, 1), np.uint8))
    rgb = (255 - patches[..., :3].astype(int)) * (255 - patches[..., 3:].astype(int)) / 255
    return Image.frombytes("CMYK", (64, 64), patches.tobytes()), rgb


def test_fault_09_cmyk_tiff_has_the_colors_of_the_reference():
    image, reference = cmyk_picture()
    assert np.abs(pixels(encoded(image, "TIFF")) - reference).max() <= 1


@pytest.mark.parametrize("is_marked", [True, False], ids=["adobe marker", "no marker"])
def test_fault_09_adobe_inverted_cmyk_jpeg_has_the_colors_of_the_reference(is_marked):
    image, reference = cmyk_picture()
    data = encoded(image, "JPEG", quality=100, subsampling=0)
    start = data.index(b"\xff\xee\x00\x0eAdobe")
    assert np.abs(pixels(data if is_marked else data[:start] + data[start + 16 :]) - reference).max() <= 4


@pytest.mark.parametrize("profile", [b"no profile at all", os.urandom(300_000)], ids=["bad", "huge"])
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_fault_10_icc_profile_is_ignored(format, profile):
    with_profile = decode(encoded(picture(), format, icc_profile=profile))
    assert with_profile.warnings == ()
    np.testing.assert_array_equal(np.asarray(with_profile.image), pixels(encoded(picture(), format)))


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_fault_11_16_bit_gray_is_shifted_by_8_bits(format):
    levels = np.arange(0, 65536, 16, dtype=np.uint16).reshape(64, 64)
    decoded = pixels(encoded(Image.fromarray(levels), format))
    np.testing.assert_array_equal(decoded, np.repeat((levels >> 8)[..., None], 3, axis=-1))
    twin = Image.fromarray((levels / 257).round().astype(np.uint8))
    assert abs(decoded.mean() - pixels(encoded(twin)).mean()) < 1


def test_fault_11_big_endian_16_bit_gray_is_shifted_too():
    levels = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    image = Image.frombytes("I;16B", (32, 32), levels.astype(">u2").tobytes())
    np.testing.assert_array_equal(pixels(image)[..., 0], levels >> 8)


def test_fault_12_16_bit_rgb_png_keeps_its_high_bytes():
    row = struct.pack(">6H", 0x1234, 0x56FF, 0xFF00, 0, 0xFFFF, 0x8000) * 16
    decoded = pixels(png(32, 16, 16, 2, [row] * 16))
    np.testing.assert_array_equal(decoded[0, :2], [[0x12, 0x56, 0xFF], [0, 0xFF, 0x80]])


@pytest.mark.parametrize("dtype", [np.float32, np.int32])
def test_fault_13_float_and_32_bit_tiffs_are_refused_with_a_hint(dtype):
    image = Image.fromarray(np.ones((32, 32), dtype))
    for source in (encoded(image, "TIFF"), image):
        error = refusal(source)
        assert error.code == "unsupported_mode"
        assert "convert it to 8 bits" in str(error)


@pytest.mark.parametrize("mode", ["LAB", "HSV", "La"])
def test_fault_13_other_odd_modes_are_refused(mode):
    assert refusal(Image.new(mode, (32, 32))).code == "unsupported_mode"


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P"])
def test_fault_14_gray_and_palette_modes_are_accepted(mode):
    gray = Image.linear_gradient("L").resize((32, 32))
    image = gray.convert(mode)
    want = np.asarray(image.convert("L"))
    for source in (encoded(image), image):
        decoded = decode(source)
        assert decoded.image.mode == "RGB"
        assert decoded.warnings == ()
        np.testing.assert_array_equal(np.asarray(decoded.image), np.repeat(want[..., None], 3, axis=-1))


# Transparency

RED, GREEN, SECRET = (255, 0, 0), (0, 200, 0), (10, 20, 30)


@pytest.mark.parametrize("format", ["PNG", "GIF"])
@pytest.mark.parametrize("background", [(255, 255, 255), (1, 2, 3)])
def test_fault_15_transparent_palette_entry_shows_the_background(format, background):
    image = Image.new("P", (32, 32), 0)
    image.putpalette([*SECRET, *GREEN])
    image.paste(1, (16, 0, 32, 32))
    decoded = pixels(encoded(image, format, transparency=0), background=background)
    np.testing.assert_array_equal(decoded[0, 0], background)
    np.testing.assert_array_equal(decoded[0, 31], GREEN)


def test_fault_15_palette_with_partial_alpha_is_blended():
    image = Image.new("P", (32, 32), 0)
    image.putpalette([*RED, *GREEN])
    image.paste(1, (16, 0, 32, 32))
    decoded = pixels(encoded(image, transparency=bytes([128, 0])))
    assert np.abs(decoded[0, 0].astype(int) - [255, 127, 127]).max() <= 1
    np.testing.assert_array_equal(decoded[0, 31], (255, 255, 255))


def hidden_text(mode, text):
    """A picture whose left half is transparent and has `text` stored under it."""
    image = picture().convert(mode.removesuffix("A"))
    ImageDraw.Draw(image).text((2, 10), text, fill=0)
    alpha = Image.new("L", image.size, 255)
    alpha.paste(0, (0, 0, 30, 40))
    image.paste(picture().convert(image.mode).crop((30, 0, 60, 40)), (30, 0))
    image.putalpha(alpha)
    return image


@pytest.mark.parametrize(
    ("mode", "format"),
    [
        ("LA", "PNG"),
        ("LA", "TIFF"),
        ("LA", "PIL"),
        ("RGBA", "PNG"),
        ("RGBA", "TIFF"),
        ("RGBA", "WEBP"),
        ("RGBA", "PIL"),
    ],
)
def test_fault_16_text_hidden_at_alpha_zero_has_no_effect(mode, format):
    def seen(text):
        image = hidden_text(mode, text)
        options = {"lossless": True, "exact": True} if format == "WEBP" else {}
        return pixels(image if format == "PIL" else encoded(image, format, **options))

    assert (np.asarray(hidden_text(mode, "iPod")) != np.asarray(hidden_text(mode, "apple"))).any()
    np.testing.assert_array_equal(seen("iPod"), seen("apple"))
    np.testing.assert_array_equal(seen("iPod")[:, :30], 255)


def test_fault_16_opaque_pixels_keep_their_color():
    image = picture()
    image.putalpha(255)
    np.testing.assert_array_equal(pixels(encoded(image), background=SECRET), np.asarray(picture()))


KEYED = {  # depth, color type, transparent sample, other sample, tRNS, what the other one decodes to
    "1 bit gray": (1, 0, b"\x00" * 4, b"\xff" * 4, struct.pack(">H", 0), 255),
    "2 bit gray": (2, 0, b"\x55" * 8, b"\xaa" * 8, struct.pack(">H", 1), 170),
    "4 bit gray": (4, 0, b"\x33" * 16, b"\x44" * 16, struct.pack(">H", 3), 68),
    "8 bit gray": (8, 0, b"\x07" * 32, b"\x08" * 32, struct.pack(">H", 7), 8),
    "16 bit gray": (16, 0, b"\x12\x34" * 32, b"\x12\x35" * 32, struct.pack(">H", 0x1234), 0x12),
    "8 bit rgb": (8, 2, b"\x01\x02\x03" * 32, b"\x09\x09\x09" * 32, struct.pack(">3H", 1, 2, 3), 9),
    "16 bit rgb": (16, 2, b"\x12\x34" * 96, b"\x56\x34" * 96, struct.pack(">3H", *[0x1234] * 3), 0x56),
}


@pytest.mark.parametrize("case", KEYED.values(), ids=KEYED)
@pytest.mark.parametrize("is_opened", [False, True], ids=["bytes", "PIL"])
def test_fault_16_color_that_stands_for_transparent_shows_the_background(case, is_opened):
    depth, color, hidden, visible, key, level = case
    data = png(32, 32, depth, color, [hidden] * 16 + [visible] * 16, tRNS=key)
    decoded = pixels(Image.open(io.BytesIO(data)) if is_opened else data, background=(1, 2, 250))
    assert (decoded[:16] == (1, 2, 250)).all()
    assert (decoded[16:] == level).all()


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


# Formats

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


def test_fault_29_progressive_jpeg_is_accepted():
    baseline, progressive = (pixels(encoded(picture(), "JPEG", progressive=flag)) for flag in (False, True))
    np.testing.assert_array_equal(progressive, baseline)


@pytest.mark.parametrize("start", [b"\0\0\0\x0cjP  \r\n\x87\n", b"\xff\x4f\xff\x51\0\x2f"])
def test_fault_29_jpeg_2000_is_an_unsupported_format(start):
    assert refusal(start + bytes(60)).code == "unsupported_format"


# Where bytes come from


def test_fault_30_large_file_is_refused_unread(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.touch()
    os.truncate(path, 50_000_001)
    monkeypatch.setattr(images, "open", None, raising=False)
    assert refusal(path).code == "too_large"


def test_fault_30_bytes_over_the_limit_are_too_large():
    data = encoded(picture())
    assert refusal(data, limits=Limits(max_bytes=len(data) - 1)).code == "too_large"
    assert decode(data, limits=Limits(max_bytes=len(data))).warnings == ()


def test_fault_30_endless_stream_is_read_with_a_cap():
    class Endless:
        served = 0

        def read(self, size):
            assert 0 < size <= 1001
            self.served += 300  # more than asked for in the end
            return bytes(300)

    stream = Endless()
    assert refusal(stream, limits=Limits(max_bytes=1000)).code == "too_large"
    assert stream.served == 1200


def test_fault_30_stream_of_short_reads_is_read_to_its_end():
    class Trickle(io.BytesIO):
        def read(self, size=-1):
            return super().read(min(size, 7))

    np.testing.assert_array_equal(pixels(Trickle(encoded(picture()))), np.asarray(picture()))


def test_fault_31_folder_is_refused(tmp_path):
    error = refusal(tmp_path)
    assert error.code == "not_an_image"
    assert "want a regular file" in str(error)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs and /dev")
def test_fault_31_fifo_and_device_are_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    assert refusal(tmp_path / "fifo").code == "not_an_image"
    assert refusal("/dev/zero").code == "not_an_image"


@pytest.mark.skipif(sys.platform == "win32", reason="needs symbolic links")
def test_fault_31_dangling_link_is_not_found(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    assert refusal(tmp_path / "link.png").code == "not_found"


def test_fault_31_unreadable_file_gives_the_text_of_the_system(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(encoded(picture()))

    def deny(*_):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(images, "open", deny, raising=False)
    error = refusal(path)
    assert error.code == "not_found"
    assert "Permission denied" in str(error)
    assert isinstance(error.__cause__, PermissionError)


@pytest.mark.parametrize("path", ["a\0b.png", "x" * 5000, "a.png/b.png"])
def test_fault_31_impossible_path_is_not_found(path):
    error = refusal(path)
    assert error.code == "not_found"
    assert len(str(error)) < 6000


def test_fault_31_closed_and_text_streams_are_refused(tmp_path):
    stream = io.BytesIO(encoded(picture()))
    stream.close()
    assert refusal(stream).code == "not_found"
    error = refusal(io.StringIO("text"))
    assert error.code == "not_an_image"
    assert '"rb"' in str(error)


def test_fault_32_label_taken_for_a_path_gets_a_hint():
    error = refusal("dog")
    assert error.code == "not_found"
    assert "no such file; did you mean candidate_labels?" in str(error)
    assert "candidate_labels" not in str(refusal("photos/dog.jpg"))
    assert "candidate_labels" not in str(refusal(Path("dog")))


@pytest.mark.parametrize(
    "url", ["http://a.b/c.png", "HTTPS://a.b/c.png", "file:///etc/passwd", "s3://a/b", "ftp://a.b/data:,"]
)
def test_fault_33_urls_are_refused(url):
    assert refusal(url).code == "url_not_supported"


# Arrays


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((3, 40, 60), "CHW"),
        ((40, 60), "stack"),
        ((40, 60, 4), "transparency"),
        ((40, 60, 1), "one picture"),
        ((2, 40, 60, 3), "one picture"),
        ((0, 60, 3), "one picture"),
        ((), "one picture"),
    ],
)
def test_fault_34_only_height_width_3_is_accepted(shape, advice):
    error = refusal(np.zeros(shape, np.uint8))
    assert error.code == "bad_array"
    assert f"uint8 of shape {shape}; want uint8 of shape (height, width, 3)" in str(error)
    assert advice in str(error)


def test_fault_34_height_width_3_is_taken_as_it_is():
    array = np.asarray(picture())
    np.testing.assert_array_equal(pixels(array), array)
    assert decode(np.zeros((3, 20, 3), np.uint8)).image.size == (20, 3)


@pytest.mark.parametrize(
    ("dtype", "top", "advice"),
    [
        (np.float32, 1, "* 255"),
        (np.float64, 255, "round()"),
        (np.float16, 255, "round()"),
        (np.int64, 255, "astype"),
        (np.uint16, 255, "astype"),
        (bool, 1, "astype"),
    ],
)
def test_fault_35_other_dtypes_are_refused_with_advice(dtype, top, advice):
    array = np.zeros((40, 60, 3), dtype)
    array[0, 0] = top
    error = refusal(array)
    assert error.code == "bad_array"
    assert str(np.dtype(dtype)) in str(error)
    assert advice in str(error)


def test_fault_36_memory_layout_makes_no_difference():
    array = np.array(picture())
    frozen = array.copy()
    frozen.flags.writeable = False
    swapped = array.astype(np.dtype("u1").newbyteorder(">"))
    strided = np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)[::2, ::2]
    for same in (frozen, swapped, strided, np.asfortranarray(array), array[::-1][::-1]):
        np.testing.assert_array_equal(pixels(same), array)


def test_fault_36_result_shares_no_memory_with_its_source():
    array = np.array(picture())
    image = picture()
    decoded = [decode(source).image for source in (array, image)]
    array[:] = 0
    image.paste(0, (0, 0, 60, 40))
    for result in decoded:
        np.testing.assert_array_equal(np.asarray(result), np.asarray(picture()))


def test_fault_38_normalized_pixels_are_told_by_dtype_and_range():
    error = refusal(np.linspace(-1.8, 2.1, 3 * 224 * 224, dtype=np.float32).reshape(3, 224, 224))
    assert error.code == "bad_array"
    assert "values from -1.8 to 2.1 look normalized" in str(error)


def test_fault_38_tensor_is_refused_without_torch():
    class Tensor:
        shape = (1, 3, 224, 224)
        dtype = "torch.float32"

    error = refusal(Tensor())
    assert error.code == "bad_array"
    assert "torch.float32 of shape (1, 3, 224, 224)" in str(error)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"path": "a.png"}])
def test_fault_38_anything_else_is_not_an_image(source):
    error = refusal(source)
    assert error.code == "not_an_image"
    assert "want a path, bytes, a binary file object, a PIL image or a uint8 array" in str(error)


@pytest.mark.parametrize("background", [(0, 0), (0, 0, 256), (0.5, 0.5, 0.5), "red"])
def test_background_that_is_no_color_is_refused(background):
    with pytest.raises(ConfigError, match="background"):
        decode(picture(), background=background)
