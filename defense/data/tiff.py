"""Whether the strips and tiles of a TIFF hold what their pixels take, where decoders do not notice.

libtiff decodes a strip until it has its pixels. Behind a hole, PackBits, Deflate and JPEG go on with garbage, which
often makes up for what is missing; what is left over then is skipped, checksums with it. So the strips are unpacked
here once more, to their ends.

What this cannot see: holes within one run of PackBits, whose bytes stand for themselves; and what libtiff itself does
not see in LZW, whose codes it holds against each other, and in the codes that few write (LZMA, Zstandard, fax).
"""

from __future__ import annotations

import io
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from PIL import Image, ImageFile

from defense.errors import InvalidImageError

from .complete import strips_of
from .formats import truncated
from .jpeg import decode_whole

_WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER = 256, 257, 258, 259, 262, 266
_SAMPLES, _ROWS_PER_STRIP, _PLANAR, _TILE_WIDTH, _TILE_LENGTH, _JPEG_TABLES = 277, 278, 284, 322, 323, 347
_JPEG, _PACKBITS, _DEFLATE = 7, 32773, frozenset({8, 32946})
_YCBCR = 6
_SEPARATE = 2
"""Planes of one sample each."""
_BLOCK = 1 << 20
"""Bytes that are unpacked at a time."""
_NOTHING = 0x80
"""A byte of PackBits that stands for no pixel."""
_PADDING = 1
"""Bytes behind a strip that make its length even."""


class _Strip(NamedTuple):
    """Compressed data, and what they unpack to."""

    data: bytes
    n_bytes: int
    """That its pixels take."""
    n_full: int
    """The same of a strip of the usual height: some writers fill up the last one."""


def are_strips_even(image: ImageFile.ImageFile, data: bytes, name: str) -> bool:
    """Return whether the strips or tiles of a TIFF's frame come out even with its pixels, as far as can be told.

    They do not where some data are left over: most often a part of the picture is garbage then.

    Args:
        image: Opened and not loaded.
        data: The file's bytes.
        name: What messages call it.

    Raises:
        InvalidImageError: Some of the compressed data are missing or damaged.
    """
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    compression = tags.get(_COMPRESSION)
    if compression == _JPEG:
        strips = [data[at : at + size] for at, size in strips_of(image)]
        return all([_is_jpeg_even(strip, tags.get(_JPEG_TABLES, b""), name) for strip in strips])
    if compression == _PACKBITS:
        return all([_is_packbits_even(strip, name) for strip in _strips(image, tags, data)])
    if compression in _DEFLATE:
        return all([_is_deflate_even(strip, name) for strip in _strips(image, tags, data)])
    return True


def _strips(image: ImageFile.ImageFile, tags: Mapping[int, Any], data: bytes) -> Iterator[_Strip]:
    """Yield the strips or tiles; none where the tags do not say, in a way that is known here, what they unpack to."""
    width, height, n_samples = _number(tags, _WIDTH), _number(tags, _HEIGHT), _number(tags, _SAMPLES, 1)
    bits = tags.get(_BITS, 1)
    depths = set(bits) if isinstance(bits, tuple) else {bits}
    n_planes = 1
    if tags.get(_PLANAR) == _SEPARATE:
        n_planes, n_samples = n_samples, 1
    is_tiled = _TILE_WIDTH in tags
    across = _number(tags, _TILE_WIDTH) if is_tiled else width
    rows = _number(tags, _TILE_LENGTH) if is_tiled else min(_number(tags, _ROWS_PER_STRIP, height), height)
    if 0 in (width, height, n_samples, n_planes, across, rows) or len(depths) != 1:
        return
    if tags.get(_FILL_ORDER, 1) != 1 or tags.get(_PHOTOMETRIC) == _YCBCR:  # bits the other way round; shared colors
        return
    stride = (across * n_samples * int(depths.pop()) + 7) // 8
    n_down = -(-height // rows)
    places = strips_of(image)
    if len(places) != n_planes * n_down * -(-width // across):
        return
    for index, (at, size) in enumerate(places):
        is_short = not is_tiled and index % n_down == n_down - 1
        n_rows = height - (n_down - 1) * rows if is_short else rows
        yield _Strip(data[at : at + size], n_rows * stride, rows * stride)


def _number(tags: Mapping[int, Any], tag: int, default: int = 0) -> int:
    """Return a tag that is a number above 0; 0 where it is none."""
    value = tags.get(tag, default)
    return value if isinstance(value, int) and value > 0 else 0


def _is_packbits_even(strip: _Strip, name: str) -> bool:
    """Return whether runs of PackBits end with the pixels: a byte up to 127 precedes one byte more than it says."""
    data, position, n_found = strip.data, 0, 0
    while position < len(data) and n_found < strip.n_full:
        if n_found == strip.n_bytes and _is_padding(data[position:]):
            return True
        head = data[position]
        if head < _NOTHING:
            position += head + 2
            n_found += head + 1
        elif head > _NOTHING:  # the next byte again and again
            position += 2
            n_found += 257 - head
        else:
            position += 1
    if n_found < strip.n_bytes or position > len(data):
        raise truncated(name)
    return n_found in (strip.n_bytes, strip.n_full) and _is_padding(data[position:])


def _is_padding(rest: bytes) -> bool:
    return len(rest.strip(bytes([_NOTHING]))) <= _PADDING


def _is_deflate_even(strip: _Strip, name: str) -> bool:
    """Return whether a stream of zlib ends, with its checksum, where the pixels do."""
    stream, n_found, rest = zlib.decompressobj(), 0, strip.data
    try:
        while rest and not stream.eof and n_found <= strip.n_full:
            n_found += len(stream.decompress(rest, min(_BLOCK, strip.n_full + 1 - n_found)))
            rest = stream.unconsumed_tail
    except zlib.error as error:
        raise InvalidImageError("corrupt", f"{name} is damaged ({error}); fetch it again") from error
    if n_found < strip.n_bytes:
        raise truncated(name)
    if n_found > strip.n_full:
        reason = "a strip unpacks to more than its pixels"
        raise InvalidImageError("corrupt", f"{name} is damaged ({reason}); fetch it again")
    return stream.eof and n_found in (strip.n_bytes, strip.n_full)


def _is_jpeg_even(strip: bytes, tables: bytes, name: str) -> bool:
    """Return whether a JPEG without its tables comes out even with its pixels."""
    whole = tables[:-2] + strip[2:] if tables else strip
    image = Image.open(io.BytesIO(whole), formats=("JPEG",))
    return decode_whole(image, whole, name)
