"""Bytes -> upright RGB -> `pixel_values`, bit-equal to open_clip's eval transform, without torch.

Every picture enters through `decode`, whoever hands it over: Pillow's `convert("RGB")` alone turns 16-bit gray white
and uncovers pixels that transparency hides, which lets text that nobody sees reach the model. `Preprocess` then makes
the array that the image tower reads.
"""

from __future__ import annotations

import base64
import binascii
import inspect
import io
import os
import re
import stat
import types
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, BinaryIO, NamedTuple, TypeGuard, cast
from urllib.parse import unquote_to_bytes

from PIL import ExifTags, Image, ImageFile, TiffImagePlugin

from defense.errors import ConfigError, InvalidImageError

from .arrays import checked_array, is_array
from .complete import lacks_rows, rest_of
from .formats import FORMATS, diagnosis, truncated
from .jpeg import decode_whole
from .levels import bring_key_to_8_bits, stored_bits, to_rgb
from .locks import fork_safe_lock
from .tiff import are_strips_even

__all__ = ["Decoded", "Limits", "decode"]

_ACCEPTED = "a path, bytes, a binary file object, a PIL image or a uint8 array of shape (height, width, 3)"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_TINY = 16  # pixels on the shorter side: less than one patch of a vision transformer


@dataclass(frozen=True)
class Limits:
    """What `decode` accepts at most.

    Attributes:
        max_pixels: Width times height. Pillow refuses above about 179 million whatever stands here.
        max_bytes: Size of the file.
        max_aspect: Longer side over shorter side.

    Raises:
        ConfigError: One of them is no number above 0, or `max_bytes` no whole one.
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 50_000_000
    max_aspect: float = 50.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            kind: Any
            kind, wanted = (Integral, "a whole number") if name == "max_bytes" else (Real, "a number")
            if isinstance(value, bool) or not isinstance(value, kind) or not value > 0:  # NaN would allow everything
                raise ConfigError(f"{name} is {value!r}; want {wanted} above 0")


DEFAULT_LIMITS = Limits()


class Decoded(NamedTuple):
    """A picture that was read.

    Attributes:
        image: Upright, opaque, loaded; mode RGB, without metadata, shared with nothing.
        warnings: What makes the answer doubtful, of the keys of `notes.NOTES`: "animated" (only the first frame was
            read), "exif_ignored" (its orientation is unreadable), "tiny" (the shorter side has fewer than 16 pixels),
            "invisible" (it is as good as transparent, or of the background's color where it is not), "dark" (stored in
            16 bits of which the upper two are never used), "zeros" (the last part of its file is zeros: one flat
            color, or never written) and "uneven" (a JPEG holds more compressed data than its pixels take).
    """

    image: Image.Image
    warnings: tuple[str, ...]


def decode(
    source: object,
    *,
    limits: Limits = DEFAULT_LIMITS,
    background: tuple[int, int, int] = (255, 255, 255),
    rotate: bool = True,
) -> Decoded:
    """Return the picture as upright RGB, or raise one `InvalidImageError`.

    JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF and PPM are read, of several frames the first. Transparent pixels show the
    background and nothing of the color stored under them. 16-bit samples keep their high byte; color profiles are
    ignored. A file that is not all there is refused, also where `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.

    Args:
        source: A path, a `data:` URL, bytes, a binary file object (read from where it stands), a PIL image (the frame
            it stands at) or a uint8 array of shape (height, width, 3).
        limits: Checked before anything is decoded.
        background: Red, green and blue, 0 to 255, put under transparent pixels.
        rotate: False leaves the pixels as stored, as open_clip does, instead of turning them upright by EXIF. (Pillow
            turns TIFF pages itself, here and in open_clip.)

    Raises:
        InvalidImageError: The picture cannot be read; `.code` says why.
        ConfigError: `background` is no color.
    """
    levels = background if isinstance(background, (tuple, list)) else ()
    if len(levels) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in levels):
        raise ConfigError(f"background is {background!r}; want three integers from 0 to 255")
    name, notes, data = _name_of(source), [], b""
    with _one_error(name, b""):
        if is_array(source):
            source = Image.fromarray(checked_array(source, name))
        elif isinstance(source, Image.Image):
            data = _bytes_behind(source, limits.max_bytes)
        else:
            data = _read(source, name, limits.max_bytes)
    with _one_error(name, data):
        if isinstance(source, Image.Image):
            image = source
            _check_size(image, name, limits)
        else:
            image, is_animated = _open(data, name, limits)
            notes += ["animated"] * is_animated
        bits = stored_bits(image)
        if isinstance(image, ImageFile.ImageFile):
            notes += _notes_on_rest(image, data, name)
            bring_key_to_8_bits(image)
        if _is_jpeg(image, data):
            notes += [] if decode_whole(image, data, name) else ["uneven"]
        elif _is_tiff(image, data):
            notes += [] if are_strips_even(image, data, name) else ["uneven"]
        _load(image)
        if image.format == "PNG" and data and lacks_rows(image, data):
            raise truncated(name)
        rgb, more = to_rgb(image, name, background, bits)
        notes += more
        if rotate:
            orientation = _orientation(image)
            if orientation is None:
                notes.append("exif_ignored")
            elif orientation in _UPRIGHT:
                rgb = rgb.transpose(_UPRIGHT[orientation])
    if min(rgb.size) < _TINY:
        notes.append("tiny")
    return Decoded(rgb, tuple(notes))


def _name_of(source: object) -> str:
    """Return what error messages call the source."""
    if isinstance(source, (str, os.PathLike)):
        text = os.fsdecode(source)
        return repr(text if len(text) <= 100 else f"{text[:100]}...")
    return f"the given {type(source).__module__.partition('.')[0]}.{type(source).__name__}".replace("builtins.", "")


def _read(source: object, name: str, max_bytes: int) -> bytes:
    """Return the bytes of a path, a `data:` URL, a buffer or a binary file object, 1 to `max_bytes` of them."""
    if isinstance(source, str) and source[:5].lower() == "data:":
        data = _read_data_url(source, name, max_bytes)
    elif isinstance(source, (str, os.PathLike)):
        data = _read_file(source, name, max_bytes)
    elif isinstance(source, (bytes, bytearray, memoryview)):
        data = bytes(source)
    elif hasattr(source, "read"):
        data = _read_stream(cast(BinaryIO, source), name, max_bytes)
    else:
        raise InvalidImageError("not_an_image", f"{name} is no picture; want {_ACCEPTED}")
    if not data:
        raise InvalidImageError("empty", f"{name} holds no bytes; want a picture")
    if len(data) > max_bytes:
        raise _too_many_bytes(name, max_bytes)
    return data


def _read_data_url(url: str, name: str, max_bytes: int) -> bytes:
    """Return what a `data:` URL (RFC 2397) holds. It is no address: nothing is fetched."""
    head, comma, body = url.partition(",")
    if not comma:
        raise InvalidImageError("corrupt", f"{name} is a data: URL without a comma; want data:image/png;base64,...")
    if len(body) > 4 * max_bytes:  # of a percent-encoded byte, three characters; base64 takes fewer
        raise _too_many_bytes(name, max_bytes)
    data = unquote_to_bytes(body)
    if not head.rstrip().lower().endswith(";base64"):
        return data
    try:
        return base64.b64decode(b"".join(data.split()), validate=True)
    except binascii.Error as error:
        raise InvalidImageError("corrupt", f"{name} is no base64 ({error}); encode the file's bytes again") from error


def _read_file(path: str | os.PathLike[str], name: str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file, refusing a large one unread."""
    if isinstance(path, str) and re.match(r"(?i)[a-z][a-z0-9+.-]+://", path):
        raise InvalidImageError("url_not_supported", f"{name} is a URL; nothing is fetched: hand over its bytes")
    try:
        status = os.stat(path)
        # Asked before opening: opening a FIFO would wait for a writer.
        if not stat.S_ISREG(status.st_mode):
            raise InvalidImageError(
                "not_an_image", f"{name} is a folder or a device, not a file; give the file of one picture"
            )
        if status.st_size > max_bytes:
            raise _too_many_bytes(name, max_bytes)
        with open(path, "rb") as stream:
            return stream.read(max_bytes + 1)
    except InvalidImageError:
        raise
    except FileNotFoundError as error:
        raise InvalidImageError("not_found", f"{name}: no such file{_hint_on_text(path)}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        # The text of an OSError ends with the path, which may be a whole file in base64.
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)[:200]
        raise InvalidImageError("not_found", f"{name} cannot be read: {reason}{_hint_on_text(path)}") from error


def _hint_on_text(path: str | os.PathLike[str]) -> str:
    """Return what a text that is no path may be instead."""
    if not isinstance(path, str):
        return "; check the path"
    if len(path) > 200 and re.fullmatch(r"[\w+/=\s-]+", path[:1000]):
        return "; it looks like base64: hand over base64.b64decode(...), or put data:image/png;base64, before it"
    return "; check the path" if re.search(r"[./\\]", path) else "; did you mean candidate_labels?"


def _read_stream(stream: BinaryIO, name: str, max_bytes: int) -> bytes:
    """Return what is left in the stream, at most one byte more than `max_bytes`.

    Raises:
        InvalidImageError: Whatever `read` raises: other libraries' streams have exceptions of their own.
    """
    data = bytearray()
    try:
        while len(data) <= max_bytes and (chunk := _chunk(stream, name, max_bytes + 1 - len(data))):
            data += chunk
    except InvalidImageError:
        raise
    except MemoryError:
        raise _too_many_bytes(name, max_bytes) from None
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"[:200]
        if isinstance(error, (OSError, ValueError)):  # ValueError: closed, or text that is not UTF-8
            raise InvalidImageError("not_found", f"{name} cannot be read: {reason}") from error
        if isinstance(error, EOFError) or "Incomplete" in reason:  # a cut gzip; a connection that broke
            raise InvalidImageError("truncated", f"{name} ends too early ({reason}); fetch it again") from error
        raise InvalidImageError("corrupt", f"{name} cannot be read ({reason}); fetch it again") from error
    return bytes(data)


def _chunk(stream: BinaryIO, name: str, n_bytes: int) -> bytes:
    """Return the next bytes of a stream, at most so many; none at its end."""
    chunk: Any = stream.read(n_bytes)
    if isinstance(chunk, (bytes, bytearray, memoryview)):
        return bytes(chunk)
    if inspect.isawaitable(chunk):
        with suppress(AttributeError):
            chunk.close()  # type: ignore[attr-defined]  # else Python warns that nobody awaits it
        raise InvalidImageError("not_an_image", f"{name} has an async read(); await it, and hand over the bytes")
    if isinstance(chunk, str):
        raise InvalidImageError("not_an_image", f'{name} was opened as text; open it with mode "rb"')
    raise InvalidImageError(
        "not_an_image", f"{name}: read() gave a {type(chunk).__name__}, not bytes; hand over the bytes"
    )


def _too_many_bytes(name: str, max_bytes: int) -> InvalidImageError:
    return InvalidImageError(
        "too_large", f"{name} is larger than {max_bytes} bytes; shrink it, or allow more: limits=Limits(max_bytes=...)"
    )


def _open(data: bytes, name: str, limits: Limits) -> tuple[Image.Image, bool]:
    """Return the first frame, not yet decoded, and whether more follow."""
    with _silence():
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_size(image, name, limits)
        # The further pictures of a MPO, a JPEG of many phones, are no frames but depth or gain maps.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    return image, is_animated


def _bytes_behind(image: Image.Image, max_bytes: int) -> bytes:
    """Return the file of a PIL image that somebody else opened, whose first frame is not loaded; else nothing."""
    file: Any = getattr(image, "fp", None)
    if file is None or getattr(file, "closed", False) or image.tell() or image.format not in FORMATS:
        return b""
    position = file.tell()
    file.seek(0)
    data: bytes = file.read(max_bytes + 1)
    file.seek(position)
    return data if len(data) <= max_bytes else b""


def _notes_on_rest(image: ImageFile.ImageFile, data: bytes, name: str) -> list[str]:
    """Return "zeros" where a file may lack its rest.

    Raises:
        InvalidImageError: It does.
    """
    if not data:
        return []
    if image.format == "PNG":
        with _silence():  # loading a PNG skips its checksums
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
    rest = rest_of(image, data)
    if rest == "cut":
        raise truncated(name)
    return ["zeros"] * (rest == "zeros")


def _is_jpeg(image: Image.Image, data: bytes) -> TypeGuard[ImageFile.ImageFile]:
    """Return whether a picture is a JPEG that is still to be decoded from these bytes."""
    is_pending = isinstance(image, ImageFile.ImageFile) and len(image.tile) == 1 and image.tile[0].codec_name == "jpeg"
    return is_pending and image.format in ("JPEG", "MPO") and bool(data)


def _is_tiff(image: Image.Image, data: bytes) -> TypeGuard[ImageFile.ImageFile]:
    """Return whether a picture is a TIFF that is still to be decoded from these bytes."""
    is_pending = isinstance(image, ImageFile.ImageFile) and bool(image.tile)
    return is_pending and image.format == "TIFF" and bool(data)


def _load(image: Image.Image) -> None:
    """Decode the pixels, and raise where some are missing, whatever the application has set.

    Many a training library sets `ImageFile.LOAD_TRUNCATED_IMAGES`, which makes half a file a picture. Turning it off
    meanwhile would turn it off for all threads, so Pillow's function runs with a copy of the names around it.
    """
    # A TIFF goes on reading tags while it loads, and Pillow complains about them there.
    with _silence() if image.format == "TIFF" else nullcontext():
        load: Any = ImageFile.ImageFile.load
        is_own = type(image).load not in (load, TiffImagePlugin.TiffImageFile.load)  # WebP, AVIF: all or nothing
        if not ImageFile.LOAD_TRUNCATED_IMAGES or is_own or getattr(image, "use_load_libtiff", False):
            image.load()
            return
        names = {**load.__globals__, "LOAD_TRUNCATED_IMAGES": False}
        types.FunctionType(load.__code__, names, load.__name__, load.__defaults__, load.__closure__)(image)


def _check_size(image: Image.Image, name: str, limits: Limits) -> None:
    """Raise `InvalidImageError` unless the size stated in the header is one to decode."""
    width, height = image.size
    if not width or not height:
        raise InvalidImageError("corrupt", f"{name} is {width} x {height} pixels; want at least 1 x 1")
    if width * height > limits.max_pixels:
        raise InvalidImageError(
            "too_large",
            f"{name} is {width} x {height} pixels, more than {limits.max_pixels}; shrink it, or allow more: "
            "limits=Limits(max_pixels=...), --max-pixels",
        )
    if max(image.size) > limits.max_aspect * min(image.size):
        raise InvalidImageError(
            "extreme_aspect",
            f"{name} is {width} x {height} pixels, longer than {limits.max_aspect:g} to 1; crop it, or allow "
            "more: limits=Limits(max_aspect=...)",
        )


def _orientation(image: Image.Image) -> int | None:
    """Return the EXIF orientation, 1 to 8, of a loaded picture; None if it cannot be made out."""
    try:
        with _silence() as complaints:
            # Parsed anew, since the JPEG reader has parsed it already and keeps its failures to itself.
            Image.Exif().load(image.info.get("exif", b""))
            orientation = image.getexif().get(ExifTags.Base.Orientation, 0 if complaints else 1)
    except Exception:  # parsing made-up EXIF fails with whatever it trips over, as in `_one_error`
        return None
    return orientation if orientation in range(1, 9) else None


@contextmanager
def _one_error(name: str, data: bytes) -> Iterator[None]:
    """Turn whatever Pillow raises into one `InvalidImageError`."""
    try:
        yield
    except InvalidImageError:
        raise
    except (Image.DecompressionBombError, MemoryError) as error:
        raise InvalidImageError("too_large", f"{name} does not fit: {error or 'out of memory'}; shrink it") from error
    except Exception as error:  # Pillow's own fuzzers allow a dozen unrelated types, SyntaxError and struct.error too
        raise diagnosis(name, data, error) from error


_SILENCE_LOCK = fork_safe_lock()


@contextmanager
def _silence() -> Iterator[list[warnings.WarningMessage]]:
    """Collect Python warnings instead of showing them.

    The list of warning filters belongs to the whole process, hence the lock; pixels are decoded outside of it.
    """
    with _SILENCE_LOCK, warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        yield complaints
