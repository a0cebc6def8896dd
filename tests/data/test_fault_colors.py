"""Color modes, depths and transparency: the right levels, and a note where nothing is to be seen."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from PIL import Image, ImageDraw, TiffImagePlugin

from defense.data.images import decode

from .pictures import GREEN, RED, SECRET, case, encoded, picture, pixels, png, refusal, tiff_of

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


# Other depths


@pytest.mark.parametrize("bits", [8, 10, 12, 14])
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_fault_97_samples_of_fewer_bits_in_16_are_told(bits, format):
    levels = np.linspace(0, 2**bits - 1, 32 * 32).astype(np.uint16).reshape(32, 32)
    assert decode(encoded(Image.fromarray(levels), format)).warnings == ("dark",)
    scaled = Image.fromarray(levels << (16 - bits))
    assert decode(encoded(scaled, format)).warnings == ()


def test_fault_97_colors_of_fewer_bits_in_16_are_told():
    row = struct.pack(">3H", 4095, 300, 17) * 32
    assert decode(png(32, 32, 16, 2, [row] * 32)).warnings == ("dark",)
    assert decode(png(32, 32, 16, 2, [struct.pack(">3H", 65535, 300, 17) * 32] * 32)).warnings == ()


def test_fault_97_a_night_picture_of_8_bits_is_a_night_picture():
    assert decode(encoded(Image.new("RGB", (32, 32), (9, 9, 20)), "PNG")).warnings == ()


def test_fault_97_the_small_inputs():
    for name in ("uint16-12bit.png", "uint16-0__255.png"):
        assert decode(case(name)).warnings == ("dark",)


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


# Transparency


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


def test_fault_99_the_key_of_a_1_bit_png_hides_its_color():
    rows = [b"\0" * 4] * 16 + [b"\xff" * 4] * 16
    for key, hidden, shown in ((0, slice(0, 16), slice(16, 32)), (1, slice(16, 32), slice(0, 16))):
        pixels = np.asarray(decode(png(32, 32, 1, 0, rows, tRNS=struct.pack(">H", key)), background=(1, 2, 250)).image)
        assert (pixels[hidden] == (1, 2, 250)).all()
        assert (pixels[shown] == (255 if key == 0 else 0)).all()


def test_fault_99_older_pillows_state_the_key_of_1_bit_as_0_or_1():
    from defense.data.levels import bring_key_to_8_bits

    image = Image.open(io.BytesIO(png(32, 32, 1, 0, [b"\xff" * 4] * 32, tRNS=struct.pack(">H", 1))))
    image.info["transparency"] = 1  # as up to Pillow 12.0
    bring_key_to_8_bits(image)
    assert image.info["transparency"] == 255


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
