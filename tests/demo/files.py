"""Files that nobody should send, each by the code of its error."""

from __future__ import annotations

import io

from PIL import Image

from defense.demo import limits


def file_of(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    """Return a picture as a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


BAD_FILES = {
    "empty": b"",
    "not_an_image": b"<html>",
    "truncated": file_of(Image.effect_noise((64, 64), 90), "JPEG")[:400],
    "corrupt": file_of(Image.effect_noise((64, 64), 90)).replace(b"IDAT", b"IDAT\xff\xff", 1),
    "unsupported_format": b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>',
    "unsupported_mode": file_of(Image.new("F", (8, 8)), "TIFF"),
    "extreme_aspect": file_of(Image.new("RGB", (4000, 10))),
    "too_large": b"\0" * (limits.MAX_FILE_BYTES + 1),
}
