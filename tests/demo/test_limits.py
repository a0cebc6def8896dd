"""What the demo takes from a visitor, and how it writes words."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("gradio", reason='needs the extra "demo"')

import gradio

from defense.demo import draw, limits, uploads
from defense.errors import ConfigError, InvalidImageError

from .files import BAD_FILES, file_of

# --- limits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("dog, cat", ["dog", "cat"]), ("dog\nhot dog, warm\n", ["dog", "hot dog, warm"]), (" ,\n ", []), ("", [])],
)
def test_labels_are_split_at_lines_or_else_at_commas(text, expected):
    assert limits.split_labels(text) == expected


def test_no_labels_stand_for_the_default():
    assert limits.check_labels("  ", ("dog", "cat")) == ("dog", "cat")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("\n".join(map(str, range(1001))), "1,001 labels; at most 1,000"),
        ("a" * 201, "201 characters long; at most 200"),
        ("a" * 1_000_000, "1,000,000 characters long"),
        ("dog,dog", "repeats"),
    ],
    ids=["too-many", "too-long", "a-megabyte", "twice"],
)
def test_fault_78_labels_are_bounded(text, message):
    with pytest.raises(ConfigError, match=message):
        limits.check_labels(text, ("dog",))


def test_labels_at_the_limits_are_taken():
    assert len(limits.check_labels("\n".join(f"{i:0200}" for i in range(1000)), ())) == 1000


def test_a_large_picture_is_scaled_down_and_said_to_be():
    loaded = limits.load(file_of(Image.new("RGB", (2048, 1000))))
    assert loaded.image.size == (1024, 500)
    assert loaded.notes == ("Scaled down from 2048 x 1000 pixels.",)


def test_a_small_picture_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(limits.load(file_of(Image.fromarray(pixels))).image), pixels)


def test_metadata_is_dropped_and_orientation_applied():
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a secret"
    image = limits.load(file_of(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif)).image
    assert image.size == (20, 40)
    assert not image.getexif()
    assert not image.info


@pytest.mark.parametrize("code", BAD_FILES)
def test_fault_78_every_bad_file_gets_a_sentence_of_its_own(code):
    with pytest.raises(InvalidImageError) as caught:
        limits.load(BAD_FILES[code])
    said = limits.friendly(caught.value)
    assert said.endswith(f"({code})")
    assert "bytes" not in said  # nothing of Python's
    assert len({limits.friendly(InvalidImageError(each, "")) for each in BAD_FILES}) == len(BAD_FILES)


# --- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(320, 320), (60, 400), (301, 97)])
@pytest.mark.parametrize("style", draw.STYLES)
def test_a_word_is_written_within_the_picture_and_nowhere_else(size, style):
    picture = Image.new("RGB", size, "green")
    written = draw.write(picture, draw.Note("Pizza", style=style, x=0.95, y=0.99, height=0.3))
    changed = np.argwhere((np.asarray(written) != np.asarray(picture)).any(2))
    assert len(changed) > 20
    assert picture.getcolors() == [(size[0] * size[1], (0, 128, 0))]  # the original stays
    if style != "strip":  # all of the word is there, with a margin
        assert changed[:, 1].max() < size[0]
        assert changed[:, 1].min() > 0


def test_the_place_of_a_word_is_followed():
    picture = Image.new("RGB", (300, 300), "green")
    centers = []
    for x, y in ((0.25, 0.2), (0.75, 0.8)):
        written = draw.write(picture, draw.Note("ab", x=x, y=y, height=0.1))
        centers.append(np.argwhere((np.asarray(written) != np.asarray(picture)).any(2)).mean(0) / 300)
    assert np.allclose(centers, [(0.2, 0.25), (0.8, 0.75)], atol=0.02)


def test_no_word_leaves_the_picture_as_it_is():
    picture = Image.effect_noise((50, 40), 90).convert("RGB")
    assert draw.write(picture, draw.Note("  ")).tobytes() == picture.tobytes()


@pytest.mark.parametrize(
    "fields",
    [{"text": "a" * 25}, {"text": "pizza!"}, {"text": "é"}, {"text": "a", "font": "../x"}, {"text": "a", "x": 1.5}],
    ids=["long", "sign", "accent", "font", "place"],
)
def test_what_cannot_be_written_is_refused(fields):
    with pytest.raises(ConfigError):
        draw.Note(**fields)


def test_fault_79_a_file_outside_of_the_private_folder_is_neither_read_nor_deleted(tmp_path, monkeypatch):
    private, secret = tmp_path / "private", tmp_path / "secret.txt"
    private.mkdir()
    secret.write_text("a secret")
    (private / "link").symlink_to(secret)
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(private))
    for path in (secret, private / ".." / "secret.txt", private / "link"):
        with pytest.raises(gradio.Error, match="not_found"):
            uploads.take(path)
    assert secret.read_text() == "a secret"
    own = private / "request" / "content" / "picture.png"
    own.parent.mkdir(parents=True)
    own.write_bytes(b"bytes")
    assert uploads.take(own) == b"bytes"
    assert not own.exists()
