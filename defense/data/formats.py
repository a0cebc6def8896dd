"""What a file is by its first bytes, and what to say about one that cannot be read as a picture."""

from __future__ import annotations

import io
import re

from PIL import Image, UnidentifiedImageError, features

from defense.errors import InvalidImageError

from .complete import jpeg_end, media_box

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "PPM")
"""What is read; Pillow's names. AVIF where Pillow was built with it, as its wheels are."""

# To say why a file was refused, and what a file without a suffix is; Pillow itself decides which of `FORMATS` it opens.
_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF.{4}WEBP",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{4}\0{4}",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "AVIF": rb".{4}ftypavi[fs]",
    "PPM": rb"P[1-6][\s#]|Pf[\s#]",
    "HEIC": rb".{4}ftyp(hei|hev|mif1|msf1)",
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\0\0\0\x0cJXL |\xff\x0a",
    "JPEG XR": rb"II\xbc",
    "SVG": rb"(\xef\xbb\xbf)?\s*(<\?xml.*?|<!--.*?|<!DOCTYPE svg.*?)?<svg",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    "WMF": rb"\xd7\xcd\xc6\x9a|\x01\0{3}.{36} EMF",
    "PSD": rb"8BPS",
    "FITS": rb"SIMPLE  =",
    "ICO": rb"\0\0[\x01\2]\0(?!\0\0)",  # a count of pictures follows, which a TGA has as zero
    "TGA": rb".(\0[\2\3\x0a\x0b]\0{5}|\x01[\x01\x09]\0\0.[\0\x01][\x0f\x10\x18\x20]).{8}[\x08\x0f\x10\x18\x20]",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?(RADIANCE|RGBE)",
    "DDS": rb"DDS \x7c",
    "QOI": rb"qoif",
    "ICNS": rb"icns",
    "PCX": rb"\x0a[\0\2-\5]\x01[\x01\2\4\x08]",
    "SGI": rb"\x01\xda[\0\x01][\x01\2]",
    "PAM or PFM": rb"P[7F][\s#]",
    "DICOM": rb".{128}DICM",
    "PDF": rb"%PDF",
    "MP4 or QuickTime video": rb".{4}ftyp",
    "WebM or Matroska video": rb"\x1a\x45\xdf\xa3",
    "ZIP": rb"PK\x03\x04",
    "gzip": rb"\x1f\x8b\x08",
}
_HINTS = {"HEIC": "or open it with pillow-heif and hand over the PIL image"}

HEAD_BYTES = 1024
"""How much of a file `format_of` looks at."""

# How Pillow says that a file is sound, as far as it knows, and of a kind that it does not read.
_UNSUPPORTED = re.compile(
    r"unsupported|unknown|cannot handle|not supported|not available|unrecognized(?! data)|KeyError", re.I
)


def format_of(head: bytes) -> str | None:
    """Return the name of a format by a file's first bytes, one of `FORMATS` or another; None where nothing fits."""
    found = (kind for kind, magic in _SIGNATURES.items() if re.match(magic, head[:HEAD_BYTES], re.DOTALL))
    return next(found, None)


def diagnosis(name: str, data: bytes, error: Exception) -> InvalidImageError:
    """Return what a failure says about a file.

    Args:
        name: What messages call it.
        data: Its bytes; none where the picture was handed over opened.
        error: What Pillow raised.
    """
    kind = format_of(data)
    wanted = ", ".join(FORMATS)
    if isinstance(error, UnidentifiedImageError) and kind is None:
        return InvalidImageError("not_an_image", f"{name} begins with {data[:16]!r}; want one of {wanted}")
    if isinstance(error, UnidentifiedImageError) and kind not in FORMATS:
        hint = f", {_HINTS[kind]}" if kind in _HINTS else ""
        return InvalidImageError("unsupported_format", f"{name} is {kind}; convert it to one of {wanted}{hint}")
    if kind == "AVIF" and not features.check("avif"):
        return InvalidImageError("unsupported_format", f"{name} is AVIF, and this Pillow was built without; convert it")
    if "truncated" in str(error).lower() or _is_cut(kind, data):
        return truncated(name)
    reason = _reason(kind, data, error)
    if _UNSUPPORTED.search(reason):
        return InvalidImageError(
            "unsupported_format",
            f"{name} is {kind or 'a picture'} of a kind that is not read ({reason}), if it is not damaged; save it as "
            "PNG or JPEG with 8 bits per color",
        )
    return InvalidImageError("corrupt", f"{name} is damaged ({reason}); fetch it again")


def truncated(name: str) -> InvalidImageError:
    """Return the error for a file that ends before the picture does, or whose rest was never filled in."""
    return InvalidImageError("truncated", f"{name} ends before the picture does; fetch it again")


def _reason(kind: str | None, data: bytes, error: Exception) -> str:
    """Return what Pillow has against a file; where it only says that it knows no such format, what lies behind that."""
    if isinstance(error, UnidentifiedImageError) and kind in Image.OPEN:
        try:
            Image.OPEN[kind][0](io.BytesIO(data), "")
        except Exception as behind:  # whatever a damaged header makes it trip over
            error = behind
    return f"{type(error).__name__}: {error}"[:200]


def _is_cut(kind: str | None, data: bytes) -> bool:
    """Return whether the end that the format calls for is missing, as far as the format tells."""
    if kind == "JPEG":
        return jpeg_end(data) is None
    if kind == "PNG":
        return b"IEND" not in data
    if kind == "GIF":
        return not data.endswith(b";")
    if kind == "WEBP":
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if kind == "BMP":
        return len(data) < int.from_bytes(data[2:6], "little")
    if kind == "TIFF":
        directory = int.from_bytes(data[4:8], "little" if data.startswith(b"II") else "big")
        return not data[directory : directory + 2].strip(b"\0")  # its number of entries is not there, or 0
    return kind == "AVIF" and not 0 < media_box(data)[1] <= len(data)
