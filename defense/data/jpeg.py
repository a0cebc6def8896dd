"""Decoding a JPEG such that data which are missing in its middle are noticed.

libjpeg makes a picture of whatever it is given: where compressed data end early it goes on in gray, where some are left
over it skips them, and Pillow passes none of its warnings on. So the data are fed to the decoder piece by piece, and a
few bytes behind each piece show whether it has what it needs: one that is done skips them, another one keeps them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from math import ceil
from typing import Any, NamedTuple

from PIL import Image, ImageFile

from defense.errors import InvalidImageError

from .complete import END_OF_IMAGE, MARKER, jpeg_end
from .formats import truncated

_LOOKAHEAD = 9
"""Bytes that the decoder may want to see beyond the last ones that it needs: it fills a buffer of 64 bits."""
_MARKER_OR_RESTART = re.compile(rb"\xff+([^\x00\xff\x01\xd8])", re.DOTALL)
_FILLER = b"\x55"
_SURPLUS = 16
"""Bytes at the end of a piece that are fed apart: a decoder that is done before them has been given too much."""
_START_OF_SCAN, _RESTART_INTERVAL, _RST0, _RST7 = 0xDA, 0xDD, 0xD0, 0xD7
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


class _Piece(NamedTuple):
    """Compressed data between two markers."""

    start: int
    end: int
    restart: int | None
    """The number of the restart marker behind it, 0 to 7; None behind the last piece of a scan."""


def decode_whole(image: ImageFile.ImageFile, data: bytes, name: str) -> bool:
    """Decode the pixels of a JPEG, and return whether its compressed data come out even with them.

    They do not where some are left over, which a decoder skips: most often a part of the picture is garbage then.

    Args:
        image: Opened and not loaded; its first frame.
        data: The file's bytes, of which the first picture is complete (`jpeg_end`).
        name: What messages call it.

    Raises:
        InvalidImageError: Some of the compressed data are missing.
    """
    scans = list(_scans(data))
    if not all(scan.is_in_order for scan in scans):
        reason = "its restart markers are out of order: a part of it is missing"
        raise InvalidImageError("corrupt", f"{name} is damaged ({reason}); fetch it again")
    decoder = _Decoder(image)
    is_even = not any(scan.has_more for scan in scans)
    try:
        is_even &= _feed_pieces(decoder, data, [piece for scan in scans for piece in scan.pieces], name)
        if not decoder.is_done:
            raise truncated(name)
    finally:
        decoder.close()
    image.tile = []
    image.load_end()
    own: Any = image
    if own._exclusive_fp and own._close_exclusive_fp_after_loading:  # as Pillow does, for a file that it opened
        own.fp.close()
        own.fp = None
    return is_even


class _Frame:
    """What the headers of a JPEG say of its scans.

    Attributes:
        interval: Blocks between restart markers, as they are interleaved; 0 where there are no such markers.
    """

    interval = 0
    _size = (0, 0)
    _factors: Mapping[int, tuple[int, int]] = {}

    def read(self, marker: int, segment: bytes) -> None:
        """Take in what stands behind a marker."""
        if marker == _RESTART_INTERVAL:
            self.interval = int.from_bytes(segment[:2], "big")
        elif marker in _START_OF_FRAME:
            self._size = (int.from_bytes(segment[3:5], "big"), int.from_bytes(segment[1:3], "big"))
            self._factors = {segment[i]: divmod(segment[i + 1], 16) for i in range(6, 6 + 3 * segment[5], 3)}

    def n_pieces(self, header: bytes) -> int:
        """Return how many pieces a scan has, by its header."""
        if not self.interval:
            return 1
        colors = [header[i] for i in range(1, 1 + 2 * header[0], 2)]
        blocks = 1
        for axis, length in enumerate(self._size):
            most = max(factors[axis] for factors in self._factors.values())
            if len(colors) == 1:  # then its own blocks count, and those at the edge that are not needed are left out
                blocks *= ceil(ceil(length * self._factors[colors[0]][axis] / most) / 8)
            else:
                blocks *= ceil(length / (8 * most))
        return ceil(blocks / self.interval)


class _Scan(NamedTuple):
    """What stands between the header of a scan and the next header."""

    pieces: list[_Piece]
    n_pieces: int
    """How many the headers call for."""

    @property
    def is_in_order(self) -> bool:
        """Whether no restart marker is missing."""
        restarts = [piece.restart for piece in self.pieces[:-1]]
        return restarts == [i % 8 for i in range(len(restarts))] and len(self.pieces) >= self.n_pieces

    @property
    def has_more(self) -> bool:
        """Whether there are pieces beyond those, and not just a marker behind the last one."""
        return any(piece.start < piece.end for piece in self.pieces[self.n_pieces :])


def _scans(data: bytes) -> Iterator[_Scan]:
    """Yield the scans of the first picture."""
    position, frame = 2, _Frame()
    while (found := MARKER.search(data, position)) and found[1][0] != END_OF_IMAGE:
        position = found.end() + int.from_bytes(data[found.end() : found.end() + 2], "big")
        segment = data[found.end() + 2 : position]
        if found[1][0] != _START_OF_SCAN:
            frame.read(found[1][0], segment)
            continue
        pieces: list[_Piece] = []
        while not pieces or pieces[-1].restart is not None:
            behind = _MARKER_OR_RESTART.search(data, position)
            end, code = (len(data), 0) if behind is None else (behind.start(), behind[1][0])
            pieces.append(_Piece(position, end, code - _RST0 if _RST0 <= code <= _RST7 else None))
            position = end if behind is None else behind.end()
        position = pieces[-1].end
        yield _Scan(pieces, frame.n_pieces(segment))


def _feed_pieces(decoder: _Decoder, data: bytes, pieces: list[_Piece], name: str) -> bool:
    """Feed a JPEG to a decoder, and return whether nothing is left over.

    Raises:
        InvalidImageError: Something is missing.
    """
    position, is_even = 0, True
    for number, piece in enumerate(pieces, start=1):
        early = _early(data, piece)
        decoder.feed(data[position:early])
        position = early
        if early > piece.start:
            is_even = not decoder.skips(data[early : early + 1], data[early + 1 : early + 2]) and is_even
            position = early + 2
        if decoder.is_done:
            return False
        decoder.feed(data[position : piece.end] + _FILLER * _LOOKAHEAD)
        position = piece.end
        if decoder.is_done:
            return is_even and number == len(pieces)
        if not decoder.skips(_FILLER, _FILLER):
            raise truncated(name)
    decoder.feed(data[position : jpeg_end(data)])
    return is_even


def _early(data: bytes, piece: _Piece) -> int:
    """Return where in a piece, near its end, two bytes stand that begin no marker; its start where it is too short."""
    for early in range(piece.end - _SURPLUS, max(piece.start, piece.end - 4 * _SURPLUS), -1):
        if 0xFF not in data[early - 1 : early + 2]:
            return early
    return piece.start


class _Decoder:
    """Pillow's decoder, fed by hand.

    Attributes:
        is_done: Whether it has all pixels.
    """

    def __init__(self, image: ImageFile.ImageFile) -> None:
        ((codec, extents, _, args),) = image.tile
        image.load_prepare()
        self._decoder: Any = Image._getdecoder(image.mode, codec, args, image.decoderconfig)
        self._decoder.setimage(image.im, extents)
        self._kept = b""
        self.is_done = False

    def feed(self, part: bytes) -> None:
        """Hand over the next bytes.

        Raises:
            OSError: The decoder gives up.
        """
        if self.is_done:
            return
        part = self._kept + part
        n_used, error = self._decoder.decode(part)
        if error < 0:
            raise OSError(f"broken data stream, error {error} of the decoder")
        self.is_done = n_used < 0
        self._kept = b"" if self.is_done else part[n_used:]

    def skips(self, *parts: bytes) -> bool:
        """Hand over two single bytes, and return whether it takes each at once, as it does where it looks for a marker.

        Where it decodes it waits until its buffer can be filled.
        """
        kept = 0
        for part in parts:
            self.feed(part)
            kept += len(self._kept)
        return kept == 0

    def close(self) -> None:
        """Give back its memory."""
        self._decoder.cleanup()
