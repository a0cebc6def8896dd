"""Pictures that decode and are none: half a file, nothing to be seen, levels of another depth, a stream that breaks."""

from __future__ import annotations

import base64
import gzip
import io
import logging
import struct
import urllib.parse
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, TiffImagePlugin, features

from defense.data.images import Limits, decode
from defense.data.notes import NOTES, NoteLog
from defense.errors import InvalidImageError

CASES = Path(__file__).parents[3] / "shared" / "cases"

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


def photograph(width=96, height=64):
    """Noise over a gradient: like a photograph, and nowhere black."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([40 + x * 150 // width, 60 + y * 150 // height, 60 + (x + y) % 120], axis=-1)
    return Image.fromarray((smooth + np.random.default_rng(0).integers(0, 40, smooth.shape)).astype(np.uint8))


def encoded(image, format, **options):
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def refusal(source, **options):
    with pytest.raises(InvalidImageError) as caught:
        decode(source, **options)
    return caught.value


def case(name):
    if not (CASES / name).exists():
        pytest.skip(f"no {CASES / name}")
    return CASES / name


# Half a file


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
    from .test_fault_images import png

    few = png(32, 32, 8, 2, [b"\x7f" * 96] * 5)
    codes = [refusal(few).code]
    black = png(32, 32, 8, 2, [b"\x7f" * 96] * 5 + [bytes(96)] * 27)
    assert decode(black).warnings == ()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert [*codes, refusal(few).code] == ["truncated", "truncated"]


def test_fault_94_the_half_download():
    assert refusal(case("zero-padded.jpeg")).code == "truncated"


# Nothing to be seen


@pytest.mark.parametrize("color", [(0, 0, 0), (10, 200, 30)])
def test_fault_96_a_picture_without_a_visible_pixel_is_told(color):
    image = Image.new("RGBA", (32, 32), (*color, 0))
    for source in (image, encoded(image, "PNG"), encoded(image, "WEBP", lossless=True)):
        assert decode(source).warnings == ("invisible",)
    ink = image.copy()
    ink.putpixel((3, 3), (*color, 255))
    assert decode(ink).warnings == ()


def test_fault_96_white_ink_on_nothing_cannot_be_seen_on_white():
    image = Image.new("RGBA", (32, 32), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (8, 8, 20, 20))
    assert decode(image).warnings == ("invisible",)
    assert decode(image, background=(0, 0, 0)).warnings == ()
    assert decode(Image.new("RGBA", (32, 32), (255, 255, 255, 255))).warnings == (), "an opaque white page"


def test_fault_96_an_empty_first_frame_is_told():
    frames = [Image.new("RGBA", (32, 32), (0, 0, 0, 0)), Image.new("RGBA", (32, 32), (200, 0, 0, 255))]
    for format in ("GIF", "WEBP", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert set(decode(data).warnings) == {"animated", "invisible"}


def test_fault_96_the_small_inputs():
    assert decode(case("alpha-zero.png")).warnings == ("invisible",)
    assert decode(case("first-frame-empty.gif")).warnings == ("animated", "invisible")


# Other depths


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_fault_97_samples_of_fewer_bits_in_16_are_told(bits, format):
    levels = np.linspace(0, 2**bits - 1, 32 * 32).astype(np.uint16).reshape(32, 32)
    assert decode(encoded(Image.fromarray(levels), format)).warnings == ("dark",)
    scaled = Image.fromarray(levels << (16 - bits))
    assert decode(encoded(scaled, format)).warnings == ()


def test_fault_97_colors_of_fewer_bits_in_16_are_told():
    from .test_fault_images import png

    row = struct.pack(">3H", 4095, 300, 17) * 32
    assert decode(png(32, 32, 16, 2, [row] * 32)).warnings == ("dark",)
    assert decode(png(32, 32, 16, 2, [struct.pack(">3H", 65535, 300, 17) * 32] * 32)).warnings == ()


def test_fault_97_a_night_picture_of_8_bits_is_a_night_picture():
    assert decode(encoded(Image.new("RGB", (32, 32), (9, 9, 20)), "PNG")).warnings == ()


def test_fault_97_the_small_inputs():
    for name in ("uint16-12bit.png", "uint16-0__255.png"):
        assert decode(case(name)).warnings == ("dark",)


def tiff_of(levels, photometric, bits):
    """A little-endian TIFF of one strip, rows of 16-bit samples, or of 12-bit ones packed two in three bytes."""
    if bits == 16:
        data = levels.astype("<u2").tobytes()
    else:
        left, right = levels[:, ::2].astype(int), levels[:, 1::2].astype(int)
        packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=-1)
        data = packed.astype(np.uint8).tobytes()
    height, width = levels.shape
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1), (278, height)]
    tags += [(279, len(data))]
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return struct.pack("<2sHI", b"II", 42, 8 + len(data)) + data + directory + bytes(4)


def test_fault_98_white_is_zero_in_16_bits():
    levels = np.linspace(0, 65535, 32 * 32).astype(np.uint16).reshape(32, 32)
    for photometric, want in ((1, levels >> 8), (0, (65535 - levels) >> 8)):
        data = tiff_of(levels, photometric, 16)
        assert Image.open(io.BytesIO(data)).tag_v2[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] == photometric
        for source in (data, Image.open(io.BytesIO(data))):
            np.testing.assert_array_equal(np.asarray(decode(source).image)[..., 0], want)


def test_fault_98_packed_12_bits_fill_the_range():
    levels = np.linspace(0, 4095, 32 * 32).astype(np.uint16).reshape(32, 32)
    decoded = decode(tiff_of(levels, 1, 12))
    assert decoded.warnings == ()
    np.testing.assert_array_equal(np.asarray(decoded.image)[..., 0], levels >> 4)


def test_fault_99_the_key_of_a_1_bit_png_hides_its_color():
    from .test_fault_images import png

    rows = [b"\0" * 4] * 16 + [b"\xff" * 4] * 16
    for key, hidden, shown in ((0, slice(0, 16), slice(16, 32)), (1, slice(16, 32), slice(0, 16))):
        pixels = np.asarray(decode(png(32, 32, 1, 0, rows, tRNS=struct.pack(">H", key)), background=(1, 2, 250)).image)
        assert (pixels[hidden] == (1, 2, 250)).all()
        assert (pixels[shown] == (255 if key == 0 else 0)).all()


def test_fault_99_older_pillows_state_the_key_of_1_bit_as_0_or_1():
    from defense.data.levels import bring_key_to_8_bits

    from .test_fault_images import png

    image = Image.open(io.BytesIO(png(32, 32, 1, 0, [b"\xff" * 4] * 32, tRNS=struct.pack(">H", 1))))
    image.info["transparency"] = 1  # as up to Pillow 12.0
    bring_key_to_8_bits(image)
    assert image.info["transparency"] == 255


# Formats


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


# data: URLs and texts


@pytest.mark.parametrize("quote", [str, urllib.parse.quote], ids=["plain", "percent-encoded"])
def test_data_urls_are_read(quote):
    data = encoded(photograph(), "PNG")
    text = base64.b64encode(data).decode()
    for url in (f"data:image/png;base64,{quote(text)}", f"DATA:;base64,{quote(text)}"):
        np.testing.assert_array_equal(np.asarray(decode(url).image), np.asarray(photograph()))
    np.testing.assert_array_equal(
        np.asarray(decode("data:image/png," + urllib.parse.quote(data)).image), np.asarray(photograph())
    )


def test_broken_data_urls_are_refused():
    assert refusal("data:image/png;base64").code == "corrupt"
    assert refusal("data:image/png;base64,@@@").code == "corrupt"
    assert refusal("data:image/png;base64,").code == "empty"
    assert refusal("data:,hello").code == "not_an_image"
    long = "data:image/png;base64," + "A" * 5000
    assert refusal(long, limits=Limits(max_bytes=1000)).code == "too_large"
    assert len(str(refusal(long))) < 400


def test_fault_101_a_base64_text_gets_a_short_message_that_says_what_to_do():
    text = base64.b64encode(np.random.default_rng(0).bytes(200_000)).decode()
    error = refusal(text)
    assert "data:image/png;base64," in str(error)
    assert len(str(error)) < 500


def test_fault_101_an_array_of_paths_is_told_from_a_tensor():
    for array in (np.array(["a.png", "b.png"]), np.array(["a.png", None], dtype=object)):
        error = refusal(array)
        assert error.code == "bad_array"
        assert "tolist()" in str(error)
        assert "permute" not in str(error)


# Streams that break


class Breaking(io.RawIOBase):
    """Gives a part of a file, then raises."""

    def __init__(self, data, error):
        self._data, self._error = data, error

    def read(self, size=-1):
        if not self._data:
            raise self._error
        part, self._data = self._data[:10], self._data[10:]
        return part


class OddError(Exception):
    """Of a library that has exceptions of its own."""


@pytest.mark.parametrize(
    "error",
    [EOFError("cut"), OddError("strange"), RuntimeError(), KeyError("k"), OSError(5, "I/O"), zipfile.BadZipFile("b")],
)
def test_fault_102_whatever_a_stream_raises_is_one_invalid_image_error(error):
    found = refusal(Breaking(encoded(photograph(), "PNG")[:500], error))
    assert found.__cause__ is error
    assert found.code in ("not_found", "truncated", "corrupt")


def test_fault_102_cut_gzip_bad_zip_member_and_incomplete_body():
    import http.client

    data = encoded(photograph(), "PNG")
    assert refusal(gzip.GzipFile(fileobj=io.BytesIO(gzip.compress(data)[:-2000]))).code == "truncated"
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", data)
    damaged = bytearray(archive.getvalue())
    damaged[1000] ^= 1
    with zipfile.ZipFile(io.BytesIO(damaged)) as file:
        assert refusal(file.open("a.png")).code == "corrupt"
    assert refusal(Breaking(data[:100], http.client.IncompleteRead(b"", 100))).code == "truncated"


def test_fault_102_async_and_other_reads_are_refused_without_a_python_warning():
    class Upload:
        async def read(self, size=-1):
            return b""

    class Numbers:
        def read(self, size=-1):
            return 7

    class Waiting:
        def read(self, size=-1):
            return None

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "await" in str(refusal(Upload()))
    for stream in (Numbers(), Waiting()):
        assert refusal(stream).code == "not_an_image"


def test_fault_102_objects_that_raise_when_asked_for_anything():
    class Array:
        dtype = "uint8"

        @property
        def shape(self):
            raise OddError

    released = memoryview(b"abc")
    released.release()
    for source in (Array(), released):
        assert isinstance(refusal(source), InvalidImageError)


# Notes


def test_every_kind_of_note_is_logged_once_and_counted(caplog):
    notes = NoteLog()
    with caplog.at_level(logging.WARNING):
        for name in ("a.png", "b.png"):
            notes.add(name, ("tiny", "dark"))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["a.png", "a.png"]
    assert notes.counts == {"tiny": 2, "dark": 2}
    assert set(NOTES) >= {"animated", "exif_ignored", "tiny", "invisible", "dark", "zeros"}


@pytest.mark.parametrize(("n_bytes", "is_whole"), [(79, True), (78, False)])
def test_fault_95_rows_of_an_interlaced_png_are_counted_too(n_bytes, is_whole):
    import zlib

    from .test_fault_images import chunk

    header = struct.pack(">IIBBBBB", 8, 8, 8, 0, 0, 0, 1)  # 8 x 8 gray: 1 + 1 + 1 + 2 + 2 + 4 + 4 rows
    body = [chunk(b"IHDR", header), chunk(b"IDAT", zlib.compress(bytes(n_bytes))), chunk(b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(body)
    if is_whole:
        assert decode(data).warnings == ("tiny",)
    else:
        assert refusal(data).code == "truncated"
