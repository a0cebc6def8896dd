"""What callers hand over, told apart and checked: one picture, many in memory, a stream of them, prepared pixels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import numpy as np
from PIL import Image

from defense.errors import ConfigError, NonFiniteError, ShapeError

_ROW_KEY = "image"
"""Where a row of a data set has its picture, as for the pipeline of `transformers`."""


def is_one_picture(given: Any) -> bool:
    """Return whether something is not several pictures: it is one, or `images.decode` refuses it."""
    if isinstance(given, (str, bytes, bytearray, memoryview, os.PathLike, Mapping, Image.Image)):
        return True
    if hasattr(given, "read"):
        return True
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        return not (len(given.shape) == 4 or _is_column(given))
    return not (isinstance(given, Iterable) or hasattr(given, "__getitem__"))


def _is_column(array: Any) -> bool:
    """Return whether an array or a pandas Series is a list of paths or pictures: its items are no numbers."""
    return len(array.shape) == 1 and getattr(array.dtype, "kind", "O") in "OUST" and "torch" not in str(array.dtype)


def many(given: Any) -> list[Any] | Iterator[Any]:
    """Return pictures as a list where they are in memory (list, tuple, array, column), else as an iterator.

    Args:
        given: What is not one picture. The rows of a data set may be pictures, or have them under "image".
    """
    if isinstance(given, (list, tuple)):
        return list(given)
    if hasattr(given, "shape") and hasattr(given, "dtype"):
        return list(np.asarray(given).tolist()) if _is_column(given) else list(given)
    if hasattr(given, "__len__") and hasattr(given, "__getitem__"):  # not by `iter`: few of them end with IndexError
        return (_picture_of(given[index]) for index in range(len(given)))
    return map(_picture_of, given)


def _picture_of(row: Any) -> Any:
    return row[_ROW_KEY] if isinstance(row, Mapping) and _ROW_KEY in row else row


def batched(inputs: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield tuples of `size` items; the last one may be shorter."""
    iterator = iter(inputs)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def check_count(name: str, value: Any) -> int:
    """Return a number of things.

    Raises:
        ConfigError: It is no integer, or below 1.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
        raise ConfigError(f"{name}={value!r}; it must be an integer of at least 1")
    return int(value)


def check_top_k(top_k: int | None) -> None:
    """Raise `ConfigError` unless it is None or at least 1."""
    if top_k is not None:
        check_count("top_k", top_k)


def checked_pixels(pixel_values: Any, size: tuple[int, int]) -> np.ndarray:
    """Return prepared pictures as contiguous float32 [batch, 3, height, width]; there may be none.

    Args:
        pixel_values: An array or a tensor, on any device, of floating point numbers.
        size: Height and width.

    Raises:
        ShapeError: Another shape.
        ConfigError: Its numbers are not of floating point, as those of pictures that are not prepared.
        NonFiniteError: A pixel is NaN or infinite, or beyond what float32 holds.
    """
    if hasattr(pixel_values, "detach"):
        pixel_values = pixel_values.detach().cpu().float()
    array = np.asarray(pixel_values)
    if array.dtype.kind != "f":
        raise ConfigError(f"pixel_values is of {array.dtype}; want floats, as `preprocess` makes them of a picture")
    if array.ndim != 4 or array.shape[1:] != (3, *size):
        raise ShapeError(
            f"pixel_values is {list(array.shape)}; want [batch, 3, {size[0]}, {size[1]}] as `preprocess` makes it"
        )
    with np.errstate(over="ignore"):  # what is too large becomes infinite, which is refused
        pixels = np.ascontiguousarray(array, np.float32)
    return finite(pixels, "input")


def finite(array: np.ndarray, where: str) -> np.ndarray:
    """Return an array.

    Raises:
        NonFiniteError: It holds NaN or infinity.
    """
    if not np.isfinite(array).all():
        raise NonFiniteError(where)
    return array
