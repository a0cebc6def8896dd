"""Arrays and other objects in the place of a picture."""

from __future__ import annotations

import numpy as np
import pytest

from defense.data.images import decode
from defense.errors import ConfigError, InvalidImageError

from .pictures import picture, pixels, refusal


@pytest.mark.parametrize(
    ("shape", "advice"),
    [
        ((3, 40, 60), "CHW"),
        ((40, 60), "stack"),
        ((40, 60, 4), "transparency"),
        ((40, 60, 1), "one picture"),
        ((2, 40, 60, 3), "one picture"),
        ((0, 60, 3), "one picture"),
        ((), "one picture"),
    ],
)
def test_fault_34_only_height_width_3_is_accepted(shape, advice):
    error = refusal(np.zeros(shape, np.uint8))
    assert error.code == "bad_array"
    assert f"uint8 of shape {shape}; want uint8 of shape (height, width, 3)" in str(error)
    assert advice in str(error)


def test_fault_34_height_width_3_is_taken_as_it_is():
    array = np.asarray(picture())
    np.testing.assert_array_equal(pixels(array), array)
    assert decode(np.zeros((3, 20, 3), np.uint8)).image.size == (20, 3)


@pytest.mark.parametrize(
    ("dtype", "top", "advice"),
    [
        (np.float32, 1, "* 255"),
        (np.float64, 255, "round()"),
        (np.float16, 255, "round()"),
        (np.int64, 255, "astype"),
        (np.uint16, 255, "astype"),
        (bool, 1, "astype"),
    ],
)
def test_fault_35_other_dtypes_are_refused_with_advice(dtype, top, advice):
    array = np.zeros((40, 60, 3), dtype)
    array[0, 0] = top
    error = refusal(array)
    assert error.code == "bad_array"
    assert str(np.dtype(dtype)) in str(error)
    assert advice in str(error)


def test_fault_36_memory_layout_makes_no_difference():
    array = np.array(picture())
    frozen = array.copy()
    frozen.flags.writeable = False
    swapped = array.astype(np.dtype("u1").newbyteorder(">"))
    strided = np.repeat(np.repeat(array, 2, axis=0), 2, axis=1)[::2, ::2]
    for same in (frozen, swapped, strided, np.asfortranarray(array), array[::-1][::-1]):
        np.testing.assert_array_equal(pixels(same), array)


def test_fault_36_result_shares_no_memory_with_its_source():
    array = np.array(picture())
    image = picture()
    decoded = [decode(source).image for source in (array, image)]
    array[:] = 0
    image.paste(0, (0, 0, 60, 40))
    for result in decoded:
        np.testing.assert_array_equal(np.asarray(result), np.asarray(picture()))


def test_fault_38_normalized_pixels_are_told_by_dtype_and_range():
    error = refusal(np.linspace(-1.8, 2.1, 3 * 224 * 224, dtype=np.float32).reshape(3, 224, 224))
    assert error.code == "bad_array"
    assert "values from -1.8 to 2.1 look normalized" in str(error)


def test_fault_38_tensor_is_refused_without_torch():
    class Tensor:
        shape = (1, 3, 224, 224)
        dtype = "torch.float32"

    error = refusal(Tensor())
    assert error.code == "bad_array"
    assert "torch.float32 of shape (1, 3, 224, 224)" in str(error)


@pytest.mark.parametrize("source", [None, 3, ["a.png"], {"path": "a.png"}])
def test_fault_38_anything_else_is_not_an_image(source):
    error = refusal(source)
    assert error.code == "not_an_image"
    assert "want a path, bytes, a binary file object, a PIL image or a uint8 array" in str(error)


def test_fault_101_an_array_of_paths_is_told_from_a_tensor():
    for array in (np.array(["a.png", "b.png"]), np.array(["a.png", None], dtype=object)):
        error = refusal(array)
        assert error.code == "bad_array"
        assert "tolist()" in str(error)
        assert "permute" not in str(error)


def test_fault_102_objects_that_raise_when_asked_for_anything():
    class Array:
        dtype = "uint8"

        @property
        def shape(self):
            raise LookupError

    released = memoryview(b"abc")
    released.release()
    for source in (Array(), released):
        assert isinstance(refusal(source), InvalidImageError)


@pytest.mark.parametrize("background", [(0, 0), (0, 0, 256), (0.5, 0.5, 0.5), "red"])
def test_background_that_is_no_color_is_refused(background):
    with pytest.raises(ConfigError, match="background"):
        decode(picture(), background=background)
