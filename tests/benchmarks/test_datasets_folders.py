"""Classified pictures in folders and shards, and words drawn on them."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from PIL import Image, ImageDraw

from defense.benchmarks.datasets import Options, synthetic
from defense.benchmarks.datasets import folders as classified
from defense.errors import ConfigError

from .datasets_made import png, read


@pytest.fixture
def shard_folder(tmp_path, image_folder):
    """The same pictures as WebDataset shards."""
    root = tmp_path / "shards"
    (root / "test").mkdir(parents=True)
    files = sorted(image_folder.rglob("*.png"))
    for shard in range(2):
        with tarfile.open(root / "test" / f"{shard}.tar", "w") as tar:
            for i, path in enumerate(files[shard::2]):
                label = ("dog", "red_fox", "sheep").index(path.parent.name)
                for suffix, data in (("png", path.read_bytes()), ("cls", str(label).encode())):
                    member = tarfile.TarInfo(f"{i:06}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
    (root / "test" / "nshards.txt").write_text("2\n")
    (root / "classnames.txt").write_text("dog\nred fox\nsheep\n")
    return root


def test_folders_and_shards_hold_the_same(image_folder, shard_folder):
    a, b = classified.read_classified(image_folder), classified.read_classified(shard_folder)
    assert a.class_names == b.class_names == ("dog", "red fox", "sheep")
    assert sorted((p.digest(), label) for _, p, label in a.pictures) == sorted(
        (p.digest(), label) for _, p, label in b.pictures
    )
    for _, picture, _ in b.pictures:
        assert picture.load().size == (40, 30)


def test_templates_of_shards_are_read(shard_folder):
    (shard_folder / "zeroshot_classification_templates.txt").write_text("a {c}.\nthe {c} of it.\n")
    assert classified.read_classified(shard_folder).templates == ("a {}.", "the {} of it.")


def test_class_names_may_stand_in_a_file(image_folder):
    (image_folder / "classnames.txt").write_text("Hund\nFuchs\nSchaf\n")
    assert classified.read_classified(image_folder).class_names == ("Hund", "Fuchs", "Schaf")
    (image_folder / "classnames.txt").write_text("Hund\n\nSchaf\n")
    with pytest.raises(ConfigError, match="line 2 is blank"):
        classified.read_classified(image_folder)
    (image_folder / "classnames.txt").write_text("Hund\nFuchs\n")
    with pytest.raises(ConfigError, match="2 names for 3 folders"):
        classified.read_classified(image_folder)


def test_strangers_among_classified_pictures_are_refused(image_folder):
    (image_folder / "dog" / "notes.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"dog/notes\.txt"):
        classified.read_classified(image_folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: (root / "test" / "1.tar").write_bytes(b"<html>no</html>"), "web page"),
        (lambda root: (root / "test" / "1.tar").write_bytes(b"no tar at all"), "cannot be read as a shard"),
        (lambda root: (root / "test" / "1.tar").unlink(), "cannot be read as a shard"),
        (lambda root: (root / "classnames.txt").write_text("dog\nred fox\n"), "'2'; want one of 0, 1"),
        (lambda root: (root / "test" / "nshards.txt").write_text("many"), "'many'"),
    ],
    ids=["web-page", "no-tar", "missing", "label", "nshards"],
)
def test_damaged_shards_are_refused(shard_folder, damage, message):
    damage(shard_folder)
    with pytest.raises(ConfigError, match=message):
        classified.read_classified(shard_folder)


def test_a_picture_without_a_label_is_refused(shard_folder):
    with tarfile.open(shard_folder / "test" / "0.tar", "w") as tar:
        member = tarfile.TarInfo("x.png")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))
    with pytest.raises(ConfigError, match=r"without a .cls file"):
        classified.read_classified(shard_folder)


def test_drawn_words_have_clean_twins(image_folder):
    clean, attacked = read("synthetic", image_folder).tests
    assert (clean.variant, attacked.variant) == ("clean", "attacked")
    assert attacked.is_attacked
    assert not clean.is_attacked
    for plain, drawn in zip(clean.examples, attacked.examples, strict=True):
        assert (plain.key, plain.label, plain.word) == (drawn.key, drawn.label, None)
        before, after = np.asarray(plain.picture.load()), np.asarray(drawn.picture.load())
        assert before.shape == after.shape == (224, 224, 3)
        changed = (before != after).any(2)
        assert 0 < changed.mean() < 0.25
        rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
        assert rows[0] > 0 or rows[-1] < 223  # it does not fill the picture
        assert columns[0] > 0 or columns[-1] < 223


def test_what_is_drawn_depends_on_seed_and_key_alone(image_folder):
    first = {e.key: (e.word, e.picture.digest()) for e in read("synthetic", image_folder).tests[1].examples}
    pixels = {e.key: e.picture.load().tobytes() for e in read("synthetic", image_folder).tests[1].examples}
    (image_folder / "dog" / "a-new-first-one.png").write_bytes(png(200))
    later = read("synthetic", image_folder).tests[1].examples
    for example in later:
        if example.key in first:
            assert (example.word, example.picture.digest()) == first[example.key]
            assert example.picture.load().tobytes() == pixels[example.key]
    other = read("synthetic", image_folder, Options(seed=1)).tests[1].examples
    assert all(e.picture.digest() != first[e.key][1] for e in other if e.key in first)


def test_every_other_class_is_written_equally_often():
    words = [synthetic.other_class(2, 5, 0, f"picture {i}") for i in range(4000)]
    counts = np.bincount(words, minlength=5)
    assert counts[2] == 0
    assert np.all(np.abs(counts[[0, 1, 3, 4]] - 1000) < 5 * 27.4)  # five standard deviations


@pytest.mark.parametrize("text", ["a", "hippopotamus", "red fox", "one two three four five", "jelly", "W" * 40])
def test_all_of_the_text_is_inside(text):
    for path in synthetic.font_files(None):
        for px in (9, 31):
            placed, (width, height) = synthetic._placed(synthetic.broken(text), synthetic._font(path, px), px)
            canvas = Image.new("L", (width + 80, height + 80))
            draw = ImageDraw.Draw(canvas)
            for word, (x, y) in placed:
                draw.text((40 + x, 40 + y), word, font=synthetic._font(path, px), fill=255, stroke_width=1)
            left, top, right, bottom = canvas.getbbox()
            assert left >= 40
            assert top >= 40
            assert right <= 40 + width
            assert bottom <= 40 + height


def test_long_text_is_drawn_smaller_until_it_fits():
    blank = Image.new("RGB", (224, 224), (90, 90, 90))
    drawn = synthetic.written(blank, "W" * 40, synthetic.font_files(None), np.random.default_rng(0))
    columns = np.flatnonzero((np.asarray(drawn) != 90).any((0, 2)))
    assert 150 < np.ptp(columns) < 224
    with pytest.raises(ConfigError, match="does not fit"):
        synthetic.written(blank, "W" * 400, synthetic.font_files(None), np.random.default_rng(0))


def test_lines_break_as_in_the_recipe():
    assert synthetic.broken("fox") == (("fox",),)
    assert synthetic.broken("red fox") == (("red",), ("fox",))
    assert synthetic.broken("big red fox") == (("big",), ("red", "fox"))
    assert synthetic.broken("a big red fox") == (("a", "big"), ("red", "fox"))


def test_a_letter_that_the_font_lacks_is_refused_by_name(image_folder):
    (image_folder / "dog").rename(image_folder / "Shih-Tzu 2é")
    with pytest.raises(ConfigError, match=r"no glyph for '-', '2', 'é'.*--font"):
        read("synthetic", image_folder)


def test_a_font_can_be_given(image_folder):
    font = synthetic.font_files(None)[0]
    attacked = read("synthetic", image_folder, Options(font=font)).tests[1]
    assert list(attacked.facts["fonts"]) == [font.name]
    with pytest.raises(ConfigError, match="no font that can be read"):
        read("synthetic", image_folder, Options(font=image_folder / "dog" / "0.png"))


def test_one_class_has_no_other_name_to_write(tmp_path):
    (tmp_path / "dog").mkdir()
    (tmp_path / "dog" / "0.png").write_bytes(png())
    with pytest.raises(ConfigError, match="one class, 'dog'"):
        read("synthetic", tmp_path)
