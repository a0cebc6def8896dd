"""Whether a file holds all of its picture, where decoders do not notice: half a download with zeros behind it.

Programs that fetch in parts reserve a file of the full size first. What never came is zeros, which JPEG, WebP, AVIF and
raw pixels decode to a gray or black rest without a word; PNG has checksums, GIF a mark at its end.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from typing import Any, Literal

from PIL import Image, ImageFile

Rest = Literal["whole", "zeros", "cut"]
"""All there; ends in zeros, which may be missing or black; certainly not all there."""

# Compressed data may end in zeros where a picture is flat: libwebp writes at most a byte for 7,500 pixels of it.
_FREE_ZEROS, _PIXELS_PER_ZERO = 64, 2048
_SHARE = 16
"""Zeros at the end of raw pixels are of interest from one in so many bytes."""
_PADDING = 32
"""Equal bytes at the end of a JPEG without an end that are no picture."""

_PPM_BITS = {"1": 1, "1;I": 1, "RGB": 24, "I;16B": 16}
"""Bits per pixel of Pillow's raw modes; 8 for others."""

# A JPEG's markers but those without content, which also stand in the middle of compressed data.
MARKER = re.compile(rb"\xff+([^\x00\xff\x01\xd0-\xd8])", re.DOTALL)
END_OF_IMAGE = 0xD9
_NO_ZERO = re.compile(rb"[^\0]")


def jpeg_end(data: bytes) -> int | None:
    """Return where the first picture of a JPEG ends, thumbnails in its headers aside; None if it does not."""
    position = 2
    while found := MARKER.search(data, position):
        position = found.end()
        if found[1][0] == END_OF_IMAGE:
            return position
        position += int.from_bytes(data[position : position + 2], "big")
    return None


def rest_of(image: ImageFile.ImageFile, data: bytes) -> Rest:
    """Return whether a file's last part was ever filled in.

    Args:
        image: Opened and not loaded.
        data: The file's bytes.
    """
    if image.format in ("JPEG", "MPO"):
        return _rest_of_jpeg(data)
    start, end = _pixels_at(image, data)
    n_zeros = len(data[start:end]) - len(data[start:end].rstrip(b"\0"))
    most = _FREE_ZEROS + image.width * image.height // _PIXELS_PER_ZERO
    if image.format in ("WEBP", "AVIF"):  # in the middle, too: their coders do not write the same byte again and again
        return "cut" if any(bytes([byte]) * (most + 1) in data[start:end] for byte in (0, 0xFF)) else "whole"
    if _codec(image) not in ("raw", ""):
        return "cut" if n_zeros > most else "whole"
    return _rest_of_raw(data[start:end], n_zeros, _stride(image, data, end - start))


def _rest_of_jpeg(data: bytes) -> Rest:
    if jpeg_end(data) is not None:
        return "whole"
    # Some writers leave out the mark at the end, and the decoder notices where more than that is missing: but it takes
    # whatever stands behind for picture, and with this flag it supplies the mark itself.
    is_padded = len(data) - len(data.rstrip(data[-1:])) >= _PADDING
    return "cut" if is_padded or ImageFile.LOAD_TRUNCATED_IMAGES else "whole"


def _codec(image: ImageFile.ImageFile) -> str:
    return str(image.tile[0][0]) if image.tile else ""


def _pixels_at(image: ImageFile.ImageFile, data: bytes) -> tuple[int, int]:
    """Return where a file's pixels start and end, (0, 0) where that is not known; what lies behind is no picture."""
    if image.format == "WEBP":
        return 12, 8 + int.from_bytes(data[4:8], "little")
    if image.format == "AVIF":
        return media_box(data)
    if image.format == "BMP":
        start = int.from_bytes(data[10:14], "little")
        stride = _stride(image, data, 0)
        return start, start + stride * image.height if _codec(image) == "raw" else len(data)
    if image.format == "PPM" and image.tile:
        start = image.tile[0][2]
        return start, start + _stride(image, data, 0) * image.height if _codec(image) == "raw" else start
    if image.format == "TIFF":
        strips = strips_of(image)
        return (min(at for at, _ in strips), max(at + size for at, size in strips)) if strips else (0, 0)
    return 0, 0


def media_box(data: bytes) -> tuple[int, int]:
    """Return where the box with the compressed data of an AVIF starts and ends; (0, 0) where there is none."""
    position = 0
    while position + 8 <= len(data):
        size, kind, head = int.from_bytes(data[position : position + 4], "big"), data[position + 4 : position + 8], 8
        if size == 1:
            size, head = int.from_bytes(data[position + 8 : position + 16], "big"), 16
        end = len(data) if size == 0 else position + size
        if kind == b"mdat":
            return position + head, end
        position = max(end, position + 8)
    return 0, 0


def strips_of(image: Any) -> list[tuple[int, int]]:
    """Return offset and size of the strips or tiles of a TIFF."""
    tags = image.tag_v2
    found: list[tuple[int, int]] = []
    for offsets, sizes in ((273, 279), (324, 325)):
        columns = [value if isinstance(value, tuple) else (value,) for value in map(tags.get, (offsets, sizes))]
        if None not in columns[0] + columns[1]:
            found += zip(*columns, strict=False)
    return found


def _stride(image: ImageFile.ImageFile, data: bytes, n_bytes: int) -> int:
    """Return the bytes of a row of raw pixels; 0 where they are not stored in rows.

    Args:
        image: The picture.
        data: The file's bytes.
        n_bytes: Of all pixels of a TIFF.
    """
    if image.format == "BMP":
        return (image.width * int.from_bytes(data[28:30], "little") + 31) // 32 * 4
    if image.format == "PPM":
        args: Any = image.tile[0][3]
        bits = _PPM_BITS.get(args if isinstance(args, str) else args[0], 8)
        return (image.width * bits + 7) // 8
    tags: Any = getattr(image, "tag_v2", {})
    is_in_rows = 273 in tags and tags.get(284, 1) == 1 and len(strips_of(image)) > 0
    return n_bytes // image.height if is_in_rows and n_bytes % image.height == 0 else 0


def _rest_of_raw(pixels: bytes, n_zeros: int, stride: int) -> Rest:
    """Return what zeros at the end of raw pixels mean.

    A black bar starts with a row. Zeros that start in the middle of one, under a row that goes on, are missing; so are
    those of two rows and more that start and end so.

    Args:
        pixels: The rows in the order of the file.
        n_zeros: Zeros at their end.
        stride: Bytes per row; 0 where that is not known.
    """
    if stride >= 8 and any(_is_hole(pixels, start, end, stride) for start, end in _zeros(pixels, 2 * stride)):
        return "cut"
    n_before = len(pixels) - len(pixels.lstrip(b"\0"))  # letterboxed pictures and night skies are black at both ends
    if n_zeros * _SHARE < len(pixels) or 2 * n_before >= n_zeros:
        return "whole"
    start = len(pixels) - n_zeros
    if stride and start >= stride:
        above = pixels[start - stride : start - start % stride]
        if start % stride and len(above) >= 8 and above.count(0) * 10 <= len(above):
            return "cut"
    return "zeros"


def _zeros(pixels: bytes, n: int) -> Iterator[tuple[int, int]]:
    """Yield where `n` zeros or more start and end."""
    start = pixels.find(bytes(n))
    while start >= 0:
        rest = _NO_ZERO.search(pixels, start)
        end = len(pixels) if rest is None else rest.start()
        yield start, end
        start = pixels.find(bytes(n), end)


def _is_hole(pixels: bytes, start: int, end: int, stride: int) -> bool:
    """Return whether zeros start and end in the middle of rows, below one and above one with few zeros."""
    if start < stride or end + stride > len(pixels) or not start % stride or not end % stride:
        return False
    above, below = pixels[start - stride : start], pixels[end : end + stride]
    return max(above.count(0), below.count(0)) * 10 <= stride


_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}
"""Of a PNG's color types."""
_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
"""First column and row, and steps, of the passes of an interlaced PNG."""


def lacks_rows(image: Image.Image, data: bytes) -> bool:
    """Return whether a PNG's compressed data, sound as they are, end before its last row.

    Args:
        image: Loaded; the rows that are missing are black.
        data: The file's bytes.
    """
    last = image.crop((0, image.height - 1, *image.size))
    if any(high > 0 for _, high in [band.getextrema() for band in last.split()]):  # type: ignore[operator]
        return False
    depth, color, is_interlaced = data[24], data[25], data[28]
    passes = _ADAM7 if is_interlaced else ((0, 0, 1, 1),)
    n_missing = 0
    for left, top, across, down in passes:
        columns, rows = -(-(image.width - left) // across), -(-(image.height - top) // down)
        n_missing += rows * (1 + (columns * depth * _CHANNELS[color] + 7) // 8) if columns > 0 else 0
    inflate = zlib.decompressobj()
    for part in _image_data(data):
        while part and n_missing > 0:
            n_missing -= len(inflate.decompress(part, 1 << 20))
            part = inflate.unconsumed_tail
    return n_missing > 0


def _image_data(data: bytes) -> Iterator[bytes]:
    """Yield the compressed data of a PNG's first picture, chunk by chunk."""
    position = 8
    while position + 8 <= len(data):
        size = int.from_bytes(data[position : position + 4], "big")
        if data[position + 4 : position + 8] == b"IDAT":
            yield data[position + 8 : position + 8 + size]
        position += 12 + size
