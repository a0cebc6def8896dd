"""Arrays as pictures: uint8 of shape (height, width, 3) and nothing else, since other arrays leave room to guess."""

from __future__ import annotations

from typing import Any

import numpy as np

from defense.errors import InvalidImageError


def is_array(source: object) -> bool:
    """Return whether something is an array or a tensor of whatever library."""
    return hasattr(source, "shape") and hasattr(source, "dtype")


def checked_array(array: Any, name: str) -> np.ndarray:
    """Return the array if it is a picture.

    Raises:
        InvalidImageError: It is not; the message says what to do with it.
    """
    shape, dtype = tuple(array.shape), str(array.dtype)
    if isinstance(array, np.ndarray) and array.dtype == np.uint8 and len(shape) == 3 and shape[2] == 3 and array.size:
        return array
    raise InvalidImageError(
        "bad_array",
        f"{name} is {dtype} of shape {shape}; want uint8 of shape (height, width, 3); {_advice(array, shape, dtype)}",
    )


def _advice(array: Any, shape: tuple[int, ...], dtype: str) -> str:
    """Return what to do with an array that is no picture."""
    if dtype in ("object", "string", "str") or dtype.startswith(("<U", ">U", "|S", "string")):
        return "it holds paths or other objects, not pixels: hand over the list, .tolist(), to classify each of them"
    if not isinstance(array, np.ndarray):
        return "hand over the file, or .permute(1, 2, 0).cpu().numpy() of a uint8 picture in CHW order"
    if array.dtype.kind == "f":
        return _float_advice(array)
    if array.dtype != np.uint8:
        return "cast levels of 0 to 255 with .astype(numpy.uint8)"
    if len(shape) == 2:
        return "for gray levels use numpy.stack([array] * 3, axis=-1); palette indices are no picture"
    if len(shape) == 3 and shape[2] == 4:
        return "hand over PIL.Image.fromarray(array), so that its transparency is seen to"
    if len(shape) == 3 and shape[0] == 3:
        return "it looks like CHW: use .transpose(1, 2, 0)"
    return "hand over one picture at a time"


def _float_advice(array: np.ndarray) -> str:
    """Return what to do with a float array, by the range of its values."""
    low, high = (float(array.min()), float(array.max())) if array.size else (0.0, 0.0)
    if low >= 0 and high <= 1:
        return "values from 0 to 1: use (array * 255).round().astype(numpy.uint8)"
    if low >= 0 and high <= 255:
        return "values from 0 to 255: use .round().astype(numpy.uint8)"
    return f"values from {low:.3g} to {high:.3g} look normalized already: hand over the picture itself"
