"""Properties of `decode` and `Preprocess`; damaged files and wrong arrays are in the modules test_fault_*.py."""

import io
import json
import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from defense.data import images, preprocess
from defense.data.images import Decoded, decode
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError, InvalidImageError

from .pictures import encoded

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("CLIP_DEFENSE_DATA", ROOT.parent / "shared" / "data"))

OPENAI = Preprocess(
    size=(224, 224),
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    interpolation="bicubic",
    resize_mode="shortest",
)

quick = settings(max_examples=60, deadline=None, database=None, derandomize=True)


def noise(width, height, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


# decode


def test_every_kind_of_source_gives_the_same_picture(tmp_path):
    image = noise(40, 30)
    data = encoded(image)
    path = tmp_path / "a picture \N{RED APPLE}.png"
    path.write_bytes(data)
    with path.open("rb") as stream:
        sources = [path, str(path), data, bytearray(data), memoryview(data), io.BytesIO(data), stream]
        decoded = [decode(source) for source in [*sources, image, np.asarray(image), Image.open(path)]]
    for result in decoded:
        assert isinstance(result, Decoded)
        assert result.warnings == ()
        assert result.image.mode == "RGB"
        assert not result.image.info
        np.testing.assert_array_equal(np.asarray(result.image), np.asarray(image))


def test_file_object_is_read_from_where_it_stands():
    data = encoded(noise(20, 20))
    stream = io.BytesIO(b"header" + data)
    stream.seek(6)
    assert decode(stream).image.size == (20, 20)


SMALL_FILES = [
    encoded(noise(20, 17), "JPEG"),
    encoded(noise(20, 17).convert("RGBA"), "PNG"),
    encoded(noise(20, 17), "WEBP", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"),
    encoded(noise(20, 17), "GIF", save_all=True, append_images=[noise(20, 17, 1)]),
    encoded(noise(20, 17), "BMP"),
    encoded(noise(20, 17), "TIFF"),
]


@settings(quick, max_examples=300)
@given(st.sampled_from(SMALL_FILES), st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6))
def test_damaged_file_gives_a_picture_or_the_one_error(data, edits):
    damaged = bytearray(data)
    for position, byte in edits:
        damaged[position % len(damaged)] = byte
    try:
        image = decode(bytes(damaged)).image
    except InvalidImageError:
        return
    assert image.mode == "RGB"
    assert np.asarray(image).shape == (image.height, image.width, 3)


@settings(quick, max_examples=200)
@given(st.binary(max_size=300))
def test_arbitrary_bytes_give_the_one_error(data):
    with pytest.raises(InvalidImageError):
        decode(data)


def test_eight_threads_agree():
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(decode, SMALL_FILES * 20))
    for index, result in enumerate(results):
        np.testing.assert_array_equal(np.asarray(result.image), np.asarray(results[index % 6].image))


def test_overlapping_calls_leave_the_warning_filters_alone(monkeypatch):
    before, open_image = warnings.filters, Image.open

    def open_slowly(*args, **options):
        time.sleep(0.05)
        return open_image(*args, **options)

    monkeypatch.setattr(Image, "open", open_slowly)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(decode, SMALL_FILES[0])
        time.sleep(0.02)
        pool.submit(decode, SMALL_FILES[0]).result()
        first.result()
    assert warnings.filters is before


def test_pillows_globals_are_left_alone():
    script = (
        "from PIL import Image, ImageFile, PngImagePlugin as png; import defense.data.images as images, io, sys\n"
        "state = lambda: (Image.MAX_IMAGE_PIXELS, ImageFile.LOAD_TRUNCATED_IMAGES, png.MAX_TEXT_CHUNK)\n"
        "before = state(); stream = io.BytesIO(); Image.new('RGB', (20, 20)).save(stream, 'PNG')\n"
        "images.decode(stream.getvalue())\n"
        "assert state() == before == (89478485, False, 1048576), state()\n"
        "assert not {'torch', 'torchvision', 'open_clip'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)


def test_public_names_are_the_documented_ones():
    assert images.__all__ == ["Decoded", "Limits", "decode"]
    assert preprocess.__all__ == ["Preprocess"]


# Preprocess


@pytest.fixture(scope="module")
def open_clip_transform():
    """Builds open_clip's eval transform for a `Preprocess`, returning numpy."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from packages that torch and timm import
        transform = pytest.importorskip("open_clip.transform", reason="bit-equality needs open_clip: install [torch]")

    def build(preprocess):
        size = preprocess.size
        apply = transform.image_transform(
            size[0] if size[0] == size[1] else size,
            is_train=False,
            mean=preprocess.mean,
            std=preprocess.std,
            resize_mode=preprocess.resize_mode,
            interpolation=preprocess.interpolation,
            fill_color=preprocess.fill_color,
        )
        return lambda image: apply(image).numpy()

    return build


PICTURE_SIZES = [(1, 1), (7, 5), (1, 50), (50, 1), (32, 32), (33, 32), (224, 224), (223, 225), (225, 224), (61, 59)]
PICTURE_SIZES += [(91, 350), (448, 223), (227, 96), (301, 400), (481, 359)]


@pytest.mark.parametrize("size", [(224, 224), (32, 32), (160, 225), (97, 64)], ids=str)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pixel_values_are_bit_equal_to_open_clip(open_clip_transform, resize_mode, interpolation, size):
    preprocess = replace(OPENAI, size=size, interpolation=interpolation, resize_mode=resize_mode, fill_color=37)
    reference = open_clip_transform(preprocess)
    for seed, picture_size in enumerate(PICTURE_SIZES):
        image = noise(*picture_size, seed)
        np.testing.assert_array_equal(preprocess(image), reference(image), err_msg=str(picture_size), strict=True)


@settings(quick, max_examples=40)
@given(width=st.integers(1, 300), height=st.integers(1, 300), mode=st.sampled_from(["shortest", "longest", "squash"]))
def test_pixel_values_are_bit_equal_to_open_clip_at_any_size(open_clip_transform, width, height, mode):
    if max(width, height) > 50 * min(width, height):
        return
    preprocess = replace(OPENAI, size=(64, 64), resize_mode=mode, mean=(0.5,) * 3, std=(0.5,) * 3)
    image = noise(width, height)
    np.testing.assert_array_equal(preprocess(image), open_clip_transform(preprocess)(image), strict=True)


@quick
@given(
    width=st.integers(1, 512),
    height=st.integers(1, 512),
    size=st.tuples(st.integers(1, 96), st.integers(1, 96)),
    mode=st.sampled_from(["shortest", "longest", "squash"]),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
)
@example(width=500, height=10, size=(8, 8), mode="longest", interpolation="bicubic")
@example(width=10, height=500, size=(8, 8), mode="longest", interpolation="bicubic")
def test_pixel_values_have_shape_dtype_and_range_for_any_picture(width, height, size, mode, interpolation):
    if max(width, height) > 50 * min(width, height):
        return
    preprocess = replace(OPENAI, size=size, resize_mode=mode, interpolation=interpolation)
    pixel_values = preprocess(decode(noise(width, height)).image)
    assert pixel_values.shape == (3, *size)
    assert pixel_values.dtype == np.float32
    assert pixel_values.flags.c_contiguous
    assert pixel_values.flags.writeable
    low = (0 - np.float32(OPENAI.mean)) / np.float32(OPENAI.std)
    high = (1 - np.float32(OPENAI.mean)) / np.float32(OPENAI.std)
    assert (pixel_values >= low[:, None, None]).all()
    assert (pixel_values <= high[:, None, None]).all()


def test_longest_pads_with_the_fill_color_around_the_center():
    preprocess = Preprocess((20, 20), (0.0,) * 3, (1.0,) * 3, "bicubic", "longest", fill_color=51)
    pixel_values = preprocess(Image.new("RGB", (40, 20), (255, 0, 0)))
    np.testing.assert_array_equal(pixel_values[:, :5], np.float32(0.2))
    np.testing.assert_array_equal(pixel_values[:, 15:], np.float32(0.2))
    np.testing.assert_array_equal(pixel_values[0, 5:15], 1)


def test_picture_is_not_changed_by_preprocessing():
    image = noise(50, 40)
    before = np.array(image)
    OPENAI(image)
    np.testing.assert_array_equal(np.asarray(image), before)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P"])
def test_picture_that_is_not_rgb_is_refused(mode):
    with pytest.raises(InvalidImageError, match=r"decode\(image\)") as caught:
        OPENAI(Image.new(mode, (30, 30)))
    assert caught.value.code == "unsupported_mode"


@given(
    size=st.tuples(st.integers(1, 1000), st.integers(1, 1000)),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    std=st.tuples(*[st.floats(0.01, 1)] * 3),
    interpolation=st.sampled_from(["bicubic", "bilinear"]),
    resize_mode=st.sampled_from(["shortest", "longest", "squash"]),
    fill_color=st.integers(0, 255),
)
@quick
def test_preprocess_survives_json(**values):
    preprocess = Preprocess(**values)
    assert Preprocess.from_dict(json.loads(json.dumps(preprocess.to_dict()))) == preprocess
    assert Preprocess.from_dict(preprocess.to_dict()) == preprocess
    assert Preprocess.from_open_clip({**preprocess.to_dict(), "mode": "RGB"}) == preprocess


def test_open_clip_config_of_a_siglip_is_understood():
    cfg = {"size": 256, "mode": "RGB", "mean": [0.5] * 3, "std": [0.5] * 3}
    cfg |= {"interpolation": "bicubic", "resize_mode": "squash", "fill_color": 0}
    want = Preprocess((256, 256), (0.5,) * 3, (0.5,) * 3, "bicubic", "squash")
    assert Preprocess.from_open_clip(cfg) == want
    assert cfg["size"] == 256


def test_keys_missing_from_an_open_clip_config_have_its_defaults():
    assert Preprocess.from_open_clip({"size": 224}) == OPENAI


def test_defaults_are_those_of_open_clip(open_clip_transform):
    from open_clip.transform import PreprocessCfg

    assert Preprocess.from_open_clip(asdict(PreprocessCfg())) == OPENAI


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": None}, "size is None"),
        ({"size": 0}, "size"),
        ({"size": (224,)}, "size"),
        ({"size": (224.0, 224.0)}, "size"),
        ({"size": "224"}, "size"),
        ({"mode": "L"}, "mode is 'L'; want RGB"),
        ({"mean": 0.5}, "mean is 0.5"),
        ({"mean": (0.5, 0.5)}, "mean"),
        ({"mean": (0.5, 0.5, float("nan"))}, "mean"),
        ({"std": (0.5, 0.0, 0.5)}, "no std of zero"),
        ({"std": (0.5, 1e-60, 0.5)}, "no std of zero"),
        ({"interpolation": "random"}, "interpolation is 'random'; want one of bicubic, bilinear"),
        ({"resize_mode": "stretch"}, "resize_mode is 'stretch'; want one of shortest, longest, squash"),
        ({"fill_color": 256}, "fill_color is 256"),
        ({"fill_color": (0, 0, 0)}, "fill_color"),
        ({"crop_pct": 0.9}, "crop_pct"),
    ],
    ids=str,
)
def test_unknown_value_in_an_open_clip_config_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        Preprocess.from_open_clip({"size": 224, **change})


def test_missing_size_or_key_is_refused():
    with pytest.raises(ConfigError, match="preprocess has the keys"):
        Preprocess.from_open_clip({"mode": "RGB"})
    with pytest.raises(ConfigError, match="preprocess has the keys"):
        Preprocess.from_dict({"size": [224, 224]})


# Real photographs


def photographs():
    paths = sorted(path for folder in ("rta100", "paint") for path in (DATA / folder).glob("label=*"))
    if not paths:
        pytest.skip(f"no photographs in {DATA}; set CLIP_DEFENSE_DATA to the folder that holds rta100/ and paint/")
    return paths


def test_real_photographs_decode():
    for path in photographs():
        decoded = decode(path)
        assert decoded.warnings == (), path
        assert min(decoded.image.size) > 32, path


def test_real_photographs_are_bit_equal_to_open_clip(open_clip_transform):
    reference = open_clip_transform(OPENAI)
    for path in photographs()[::19]:
        with Image.open(path) as image:
            stored = image.convert("RGB") if not image.has_transparency_data else decode(path, rotate=False).image
        np.testing.assert_array_equal(OPENAI(decode(path, rotate=False).image), reference(stored), err_msg=str(path))
