"""Pictures that tests of `decode` make, files of them written by hand, and what `decode` says."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from defense.data.images import decode
from defense.errors import InvalidImageError

CASES = Path(__file__).parents[3] / "shared" / "cases"
"""Small files that people have, beside the project; what needs them is skipped elsewhere."""
RED, GREEN, SECRET = (255, 0, 0), (0, 200, 0), (10, 20, 30)


def picture(width=60, height=40):
    """A smooth picture without any symmetry."""
    y, x = np.mgrid[0:height, 0:width]
    levels = np.stack([x * 255 // max(1, width - 1), y * 255 // max(1, height - 1), (x * y) % 200], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


def photograph(width=96, height=64):
    """Noise over a gradient: like a photograph, and nowhere black."""
    y, x = np.mgrid[0:height, 0:width]
    smooth = np.stack([40 + x * 150 // width, 60 + y * 150 // height, 60 + (x + y) % 120], axis=-1)
    return Image.fromarray((smooth + np.random.default_rng(0).integers(0, 40, smooth.shape)).astype(np.uint8))


def encoded(image, format="PNG", **options):
    """The bytes of a file; the test is skipped where this Pillow lacks the format."""
    if format == "AVIF" and not features.check("avif"):
        pytest.skip("this Pillow was built without AVIF")
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


def tiff_of(levels, photometric, bits):
    """A little-endian TIFF of one strip, rows of 16-bit samples, or of 12-bit ones packed two in three bytes."""
    if bits == 16:
        data = levels.astype("<u2").tobytes()
    else:
        left, right = levels[:, ::2].astype(int), levels[:, 1::2].astype(int)
        packed = np.stack([left >> 4, (left & 15) << 4 | right >> 8, right & 255], axis=-1)
        data = packed.astype(np.uint8).tobytes()
    height, width = levels.shape
    return tiff_of_parts([data], {256: width, 257: height, 258: bits, 262: photometric, 278: height})


def tiff_of_parts(parts, tags, is_tiled=False):
    """A little-endian TIFF of strips or tiles as they are to stand in it, of one sample unless `tags` says more."""
    offsets = [8 + sum(map(len, parts[:index])) for index in range(len(parts))]
    behind = 8 + sum(map(len, parts))
    data = b"".join(parts)
    at, sizes = (324, 325) if is_tiled else (273, 279)
    entries = b""
    stated = {259: 1, 277: 1, **tags, at: offsets, sizes: [len(part) for part in parts]}
    for tag, value in sorted(stated.items()):
        values = struct.pack(f"<{len(value)}I", *value) if isinstance(value, list) else struct.pack("<I", value)
        n = len(values) // 4
        if n > 1:
            values, data = struct.pack("<I", behind), data + values
            behind += 4 * n
        entries += struct.pack("<HHI", tag, 4, n) + values
    directory = struct.pack("<H", len(stated)) + entries + bytes(4)
    return struct.pack("<2sHI", b"II", 42, behind) + data + directory


def case(name):
    if not (CASES / name).exists():
        pytest.skip(f"no {CASES / name}")
    return CASES / name


def pixels(source, **options):
    return np.asarray(decode(source, **options).image)


def refusal(source, **options):
    """The error that `decode` raises."""
    with pytest.raises(InvalidImageError) as caught:
        decode(source, **options)
    return caught.value
