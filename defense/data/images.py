"""Bytes -> upright RGB -> `pixel_values`, bit-equal to open_clip's eval transform, without torch.

Every picture enters through `decode`, whoever hands it over: Pillow's `convert("RGB")` alone turns 16-bit gray white
and uncovers pixels that transparency hides, which lets text that nobody sees reach the model. `Preprocess` then makes
the array that the image tower reads.
"""

from __future__ import annotations

import io
import os
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, BinaryIO, NamedTuple, cast

import numpy as np
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError

from defense.errors import ConfigError, InvalidImageError

from .locks import fork_safe_lock

__all__ = ["Decoded", "Limits", "decode"]

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_ACCEPTED = "a path, bytes, a binary file object, a PIL image or a uint8 array of shape (height, width, 3)"

# What the first bytes are, to say why a file was refused; Pillow itself decides which of `_FORMATS` it opens.
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "AVIF": rb".{4}ftypavi[fs]",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml.*?|<!--.*?|<!DOCTYPE svg.*?)?<svg",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "WMF": rb"\xd7\xcd\xc6\x9a|\x01\0{3}.{36} EMF",
    "PSD": rb"8BPS",
    "FITS": rb"SIMPLE  =",
    "ICO": rb"\0\0[\1\2]\0",
    "PDF": rb"%PDF",
}
_HINTS = {"HEIC": "or open it with pillow-heif and hand over the PIL image"}

_OPAQUE_MODES = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa"})

# Pillow leaves a PNG's transparent color at the depth of the file when it brings the pixels to 8 bits.
_KEY_TO_8_BITS = {"L;2": lambda key: key * 85, "L;4": lambda key: key * 17, "RGB;16B": lambda key: key >> 8}

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
    """

    max_pixels: int = 64_000_000
    max_bytes: int = 50_000_000
    max_aspect: float = 50.0


_DEFAULT_LIMITS = Limits()


class Decoded(NamedTuple):
    """A picture that was read.

    Attributes:
        image: Upright, opaque, loaded; mode RGB, without metadata, shared with nothing.
        warnings: Any of "animated" (only the first frame was read), "exif_ignored" (its orientation is unreadable) and
            "tiny" (the shorter side has fewer than 16 pixels).
    """

    image: Image.Image
    warnings: tuple[str, ...]


def decode(
    source: object,
    *,
    limits: Limits = _DEFAULT_LIMITS,
    background: tuple[int, int, int] = (255, 255, 255),
    rotate: bool = True,
) -> Decoded:
    """Return the picture as upright RGB, or raise one `InvalidImageError`.

    JPEG, PNG, WebP, GIF, BMP and TIFF are read, of several frames the first. Transparent pixels show the background
    and nothing of the color stored under them. 16-bit samples keep their high byte; color profiles are ignored.

    Args:
        source: A path, bytes, a binary file object (read from where it stands), a PIL image (the frame it stands at) or
            a uint8 array of shape (height, width, 3).
        limits: Checked before anything is decoded.
        background: Red, green and blue, 0 to 255, put under transparent pixels.
        rotate: False leaves the pixels as stored, as open_clip does, instead of turning them upright by EXIF. (Pillow
            turns TIFF pages itself, here and in open_clip.)

    Raises:
        InvalidImageError: The picture cannot be read; `.code` says why.
        ConfigError: `background` is no color.
    """
    if len(background) != 3 or not all(isinstance(level, int) and 0 <= level <= 255 for level in background):
        raise ConfigError(f"background is {background!r}; want three integers from 0 to 255")
    name = _name_of(source)
    data, notes = b"", []
    if isinstance(source, np.ndarray) or (hasattr(source, "shape") and hasattr(source, "dtype")):
        source = Image.fromarray(_checked_array(source, name))
    elif not isinstance(source, Image.Image):
        data = _read(source, name, limits.max_bytes)
    with _one_error(name, data):
        if isinstance(source, Image.Image):
            image = source
            _check_size(image, name, limits)
        else:
            image, is_animated = _open(data, name, limits)
            notes += ["animated"] * is_animated
        if isinstance(image, ImageFile.ImageFile):
            _bring_key_to_8_bits(image)
        # A TIFF goes on reading tags while it loads, and Pillow complains about them there.
        with _silence() if image.format == "TIFF" else nullcontext():
            image.load()
        rgb = _to_rgb(image, name, background)
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


def _checked_array(array: Any, name: str) -> np.ndarray:
    """Return the array if it is a picture: uint8 of shape (height, width, 3)."""
    shape, dtype = tuple(array.shape), str(array.dtype)
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and array.size:
        return array
    if not isinstance(array, np.ndarray):
        advice = "hand over the file, or .permute(1, 2, 0).cpu().numpy() of a uint8 picture in CHW order"
    elif array.dtype.kind == "f":
        advice = _float_advice(array)
    elif array.dtype != np.uint8:
        advice = "cast levels of 0 to 255 with .astype(numpy.uint8)"
    elif len(shape) == 2:
        advice = "for gray levels use numpy.stack([array] * 3, axis=-1); palette indices are no picture"
    elif len(shape) == 3 and shape[2] == 4:
        advice = "hand over PIL.Image.fromarray(array), so that its transparency is seen to"
    elif len(shape) == 3 and shape[0] == 3:
        advice = "it looks like CHW: use .transpose(1, 2, 0)"
    else:
        advice = "hand over one picture at a time"
    raise InvalidImageError(
        "bad_array", f"{name} is {dtype} of shape {shape}; want uint8 of shape (height, width, 3); {advice}"
    )


def _float_advice(array: np.ndarray) -> str:
    """Return what to do with a float array, by the range of its values."""
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if low >= 0 and high <= 1:
        return "values from 0 to 1: use (array * 255).round().astype(numpy.uint8)"
    if low >= 0 and high <= 255:
        return "values from 0 to 255: use .round().astype(numpy.uint8)"
    return f"values from {low:.3g} to {high:.3g} look normalized already: hand over the picture itself"


def _read(source: object, name: str, max_bytes: int) -> bytes:
    """Return the bytes of a path, a buffer or a binary file object, 1 to `max_bytes` of them."""
    if isinstance(source, (str, os.PathLike)):
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


def _read_file(path: str | os.PathLike[str], name: str, max_bytes: int) -> bytes:
    """Return the bytes of a regular file, refusing a large one unread."""
    if isinstance(path, str) and re.match(r"(?i)[a-z][a-z0-9+.-]+://|data:", path):
        raise InvalidImageError("url_not_supported", f"{name} is a URL; nothing is fetched: hand over its bytes")
    try:
        status = os.stat(path)
        # Asked before opening: opening a FIFO would wait for a writer.
        if not stat.S_ISREG(status.st_mode):
            raise InvalidImageError("not_an_image", f"{name} is a folder, device or pipe; want a regular file")
        if status.st_size > max_bytes:
            raise _too_many_bytes(name, max_bytes)
        with open(path, "rb") as stream:
            return stream.read(max_bytes + 1)
    except InvalidImageError:
        raise
    except FileNotFoundError as error:
        looks_like_label = isinstance(path, str) and not re.search(r"[./\\]", path)
        hint = "; did you mean candidate_labels?" if looks_like_label else "; check the path"
        raise InvalidImageError("not_found", f"{name}: no such file{hint}") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise InvalidImageError("not_found", f"{name} cannot be read: {error}") from error


def _read_stream(stream: BinaryIO, name: str, max_bytes: int) -> bytes:
    """Return what is left in the stream, at most one byte more than `max_bytes`."""
    data = bytearray()
    try:
        while len(data) <= max_bytes and (chunk := stream.read(max_bytes + 1 - len(data))):
            if isinstance(chunk, str):
                raise InvalidImageError("not_an_image", f'{name} was opened as text; open it with mode "rb"')
            data += chunk
    except InvalidImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: closed, or text that is not UTF-8
        raise InvalidImageError("not_found", f"{name} cannot be read: {error}") from error
    return bytes(data)


def _too_many_bytes(name: str, max_bytes: int) -> InvalidImageError:
    return InvalidImageError("too_large", f"{name} is larger than {max_bytes} bytes; raise Limits.max_bytes to read it")


def _open(data: bytes, name: str, limits: Limits) -> tuple[Image.Image, bool]:
    """Return the first frame, not yet decoded, and whether more follow."""
    with _silence():
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        _check_size(image, name, limits)
        if image.format == "PNG":
            # Loading a PNG skips its checksums.
            Image.open(io.BytesIO(data), formats=("PNG",)).verify()
        # The further pictures of a MPO, a JPEG of many phones, are no frames but depth or gain maps.
        is_animated = image.format != "MPO" and getattr(image, "is_animated", False)
    return image, is_animated


def _check_size(image: Image.Image, name: str, limits: Limits) -> None:
    """Raise `InvalidImageError` unless the size stated in the header is one to decode."""
    width, height = image.size
    if not width or not height:
        raise InvalidImageError("corrupt", f"{name} is {width} x {height} pixels; want at least 1 x 1")
    if width * height > limits.max_pixels:
        raise InvalidImageError(
            "too_large",
            f"{name} is {width} x {height} pixels, more than {limits.max_pixels}; shrink it or raise Limits.max_pixels",
        )
    if max(image.size) > limits.max_aspect * min(image.size):
        raise InvalidImageError(
            "extreme_aspect",
            f"{name} is {width} x {height} pixels, longer than {limits.max_aspect:g} to 1; crop it or raise "
            "Limits.max_aspect",
        )


def _bring_key_to_8_bits(image: ImageFile.ImageFile) -> None:
    """Bring the color that stands for transparent to the depth that the pixels will have once they are loaded."""
    key = image.info.get("transparency")
    if image.format != "PNG" or key is None or not image.tile:
        return
    if rescale := _KEY_TO_8_BITS.get(str(image.tile[0].args)):
        image.info["transparency"] = tuple(map(rescale, key)) if isinstance(key, tuple) else rescale(key)


def _to_rgb(image: Image.Image, name: str, background: tuple[int, int, int]) -> Image.Image:
    """Return a new, opaque RGB picture without metadata."""
    if image.mode.startswith("I;16"):
        image = _high_byte(image)
    if image.mode not in _OPAQUE_MODES | _ALPHA_MODES:
        raise InvalidImageError(
            "unsupported_mode",
            f"{name} has Pillow mode {image.mode}, of unknown range; convert it to 8 bits per channel",
        )
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        rgb = Image.new("RGB", image.size, background)
        rgb.paste(rgba, mask=rgba)
    else:
        rgb = image.convert("RGB")
        rgb.info = {}  # the orientation must not be applied again to a picture that is upright
    return rgb


def _high_byte(image: Image.Image) -> Image.Image:
    """Return 16-bit gray as 8-bit gray, with alpha where one level stands for transparent."""
    levels = np.asarray(image)
    gray = Image.fromarray((levels >> 8).astype(np.uint8))
    key = image.info.get("transparency")
    if key is None:
        return gray
    return Image.merge("LA", (gray, Image.fromarray(np.where(levels == key, 0, 255).astype(np.uint8))))


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
        raise _diagnosis(name, data, error) from error


def _diagnosis(name: str, data: bytes, error: Exception) -> InvalidImageError:
    """Return what the failure says about the file."""
    kind = next((kind for kind, magic in _SIGNATURES.items() if re.match(magic, data[:1024], re.DOTALL)), None)
    wanted = ", ".join(_FORMATS)
    if isinstance(error, UnidentifiedImageError) and kind is None:
        return InvalidImageError("not_an_image", f"{name} begins with {data[:16]!r}; want one of {wanted}")
    if isinstance(error, UnidentifiedImageError) and kind not in _FORMATS:
        hint = f", {_HINTS[kind]}" if kind in _HINTS else ""
        return InvalidImageError("unsupported_format", f"{name} is {kind}; convert it to one of {wanted}{hint}")
    if "truncated" in str(error).lower() or _is_cut(kind, data):
        return InvalidImageError("truncated", f"{name} ends before the picture does; fetch it again")
    return InvalidImageError("corrupt", f"{name} is damaged ({type(error).__name__}: {error}); fetch it again")


def _is_cut(kind: str | None, data: bytes) -> bool:
    """Return whether the end that the format calls for is missing, as far as the format tells."""
    if kind == "JPEG":
        return b"\xff\xd9" not in data
    if kind == "PNG":
        return b"IEND" not in data
    if kind == "GIF":
        return not data.endswith(b";")
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    if kind == "TIFF":
        return len(data) <= int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big")
    return False


_SILENCE_LOCK = fork_safe_lock()


@contextmanager
def _silence() -> Iterator[list[warnings.WarningMessage]]:
    """Collect Python warnings instead of showing them.

    The list of warning filters belongs to the whole process, hence the lock; pixels are decoded outside of it.
    """
    with _SILENCE_LOCK, warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        yield complaints
