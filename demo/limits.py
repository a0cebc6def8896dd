"""What the demo accepts, and what it says about the rest.

A page that anybody may open has to bound what one visitor can ask for. Sizes are checked here or, for uploads and the
queue, by Gradio with the numbers that stand here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

from defense.data import images, labels
from defense.data.images import Decoded, Limits
from defense.errors import ConfigError, DefenseError, InvalidImageError

MAX_FILE_BYTES = 10_000_000
MAX_UPLOAD_BYTES = MAX_FILE_BYTES + 100_000
"""Of a request that uploads: one file, and what announces it."""
MAX_BODY_BYTES = 3_000_000
"""Of any other request: `MAX_LABELS` of `MAX_LABEL_LENGTH` as JSON writes the longest characters, and as much again."""
MAX_QUEUE = 32
"""Requests that wait; the next one is told that the demo is busy."""
MAX_AT_ONCE = 2
"""Requests that are worked on: the model itself answers one at a time."""
MAX_SESSIONS = 64
"""Visitors whose picture is held in memory; the one who came first is forgotten."""
MAX_IDLE_S = 1800.0
"""After which a visitor's picture is forgotten."""
MAX_LABELS = 1000
MAX_LABEL_LENGTH = 200
MAX_LABELS_TEXT = 20_000
"""Characters in the box for labels. The API takes `MAX_LABELS` of `MAX_LABEL_LENGTH`."""
MAX_WORD_LENGTH = 24
MAX_QUERY_LENGTH = 80
SHOWN_SIDE = 1024
"""A larger picture is scaled down to this, in pixels, when it is put on the page."""

_PICTURE_LIMITS = Limits(max_pixels=40_000_000, max_bytes=MAX_FILE_BYTES)

_SAYS = {
    "empty": "This file is empty.",
    "not_an_image": "This is not a picture.",
    "truncated": "This picture is cut off: the file ends too early.",
    "corrupt": "This picture is damaged.",
    "too_large": f"This picture is too large: at most {MAX_FILE_BYTES // 1_000_000} MB and "
    f"{_PICTURE_LIMITS.max_pixels // 1_000_000} megapixels.",
    "extreme_aspect": f"This picture is too long and thin: at most {_PICTURE_LIMITS.max_aspect:g} to 1.",
    "unsupported_format": "This kind of picture cannot be read.",
    "unsupported_mode": "The pixels of this picture are of a kind that cannot be read; save it with 8 bits per color.",
    "url_not_supported": "Addresses are not fetched; upload the file itself.",
    "not_found": "There is no such file; upload it first.",
}
_WANTED = " Want a JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF or PPM file."

_NOTES = {
    "animated": "Animated: only the first frame is used.",
    "exif_ignored": "Its EXIF data is damaged, so it may lie on its side.",
    "tiny": "It is tiny: the model has very little to see.",
    "invisible": "Nothing in it can be seen: it is transparent, or white on nothing.",
    "dark": "It is nearly black: its 16-bit levels use less than a quarter of their range.",
    "zeros": "The last part of the file is zeros: one flat color, or never downloaded.",
    "uneven": "The file holds more data than its pixels take, or lacks scans: a part of it may be garbage.",
}


class Loaded(NamedTuple):
    """A picture as the page holds it.

    Attributes:
        image: Upright RGB without metadata, at most `SHOWN_SIDE` pixels on the longer side.
        notes: What there is to say about the file.
    """

    image: Image.Image
    notes: tuple[str, ...] = ()


def decode(data: bytes) -> Decoded:
    """Return the picture of an untouched file.

    Raises:
        InvalidImageError: It is too large, or cannot be read.
    """
    return images.decode(data, limits=_PICTURE_LIMITS)


def load(data: bytes) -> Loaded:
    """Return the picture of an untouched file for the page.

    Raises:
        InvalidImageError: It is too large, or cannot be read.
    """
    decoded = decode(data)
    notes = tuple(_NOTES[warning] for warning in decoded.warnings)
    image = decoded.image
    if max(image.size) > SHOWN_SIDE:
        notes += (f"Scaled down from {image.width} x {image.height} pixels.",)
        image.thumbnail((SHOWN_SIDE, SHOWN_SIDE), Image.Resampling.LANCZOS)
    return Loaded(image, notes)


def split_labels(text: str) -> list[str]:
    """Return the labels of a text: one a line, or, where it is a single line, separated by commas.

    Raises:
        ConfigError: There are more than `MAX_LABELS`, or one is longer than `MAX_LABEL_LENGTH`.
    """
    longest = MAX_LABELS * (MAX_LABEL_LENGTH + 2)
    if len(text) > longest:
        raise ConfigError(f"the labels are {len(text):,} characters long; at most {longest:,} are taken")
    parts = text.strip().splitlines() if "\n" in text.strip() else text.split(",")
    found = [part.strip() for part in parts if part.strip()]
    if len(found) > MAX_LABELS:
        raise ConfigError(f"there are {len(found):,} labels; at most {MAX_LABELS:,} are taken")
    for label in found:
        if len(label) > MAX_LABEL_LENGTH:
            raise ConfigError(
                f"the label {label[:30]!r}... is {len(label):,} characters long; at most {MAX_LABEL_LENGTH} are taken"
            )
    return found


def check_labels(text: str, default: Sequence[str]) -> tuple[str, ...]:
    """Return the labels of a text, or the default where it holds none.

    Raises:
        ConfigError: See `split_labels` and `labels.check_labels`.
    """
    return labels.check_labels(split_labels(text) or default)


def friendly(error: DefenseError) -> str:
    """Return what to say to a visitor about an error."""
    if not isinstance(error, InvalidImageError):
        text = str(error)
        return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")
    said = _SAYS.get(error.code, "This picture cannot be used.")
    wanted = _WANTED if error.code in ("not_an_image", "unsupported_format") else ""
    return f"{said}{wanted} ({error.code})"
