"""RTA-100, PAINT, Disentangling: pictures whose names or annotations say what they show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from defense.benchmarks.datasets import named
from defense.errors import ConfigError

from .datasets_made import PARTIAL, png, read

# --- pictures named label=..._text=... --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pair"),
    [
        ("label=hair dryer_text=light bulb.jpg", ("hair dryer", "light bulb")),
        ("label=iPhone_text=DVD.JPG", ("iPhone", "DVD")),
        ("label=laptop_text=TV.jpeg", ("laptop", "TV")),
        ("label=a_b=c_text=d_e.png", ("a_b=c", "d_e")),
        ("label=v1.5_text=2.0.png", ("v1.5", "2.0")),
    ],
    ids=["spaces", "capitals", "jpeg", "underscores", "dots"],
)
def test_names_are_parsed_as_they_are_spelled(name, pair):
    assert named.parse(Path(name)) == pair


@pytest.mark.parametrize("name", ["label=cat.jpg", "cat_text=dog.jpg", "label=cat_text=dog.txt", "label=_text=x.png"])
def test_other_names_are_refused(name):
    with pytest.raises(ConfigError, match="is not named"):
        named.parse(Path(name))


def test_a_partial_set_is_refused_or_says_so(named_folder):
    with pytest.raises(ConfigError, match="3 of 1,000 pictures; 3 of 100 classes"):
        read("rta100", named_folder)
    (dataset,) = read("rta100", named_folder, PARTIAL).tests
    assert dataset.shortfall == "3 of 1,000 pictures; 3 of 100 classes"
    assert dataset.class_names == ("cat", "dog", "red fox")
    assert [(e.key, e.label, e.word) for e in dataset.examples] == [
        ("label=cat_text=dog.png", 0, 1),
        ("label=dog_text=red fox.png", 1, 2),
        ("label=red fox_text=cat.png", 2, 0),
    ]


def test_the_whole_set_has_no_shortfall(tmp_path):
    names = [f"thing {i:02}" for i in range(100)]
    for i, label in enumerate(names):
        for step in range(1, 11):
            (tmp_path / f"label={label}_text={names[(i + step) % 100]}.jpg").touch()
    (dataset,) = read("rta100", tmp_path).tests
    assert dataset.shortfall is None
    assert len(dataset.examples) == 1000
    assert dataset.class_names == tuple(names)


def test_a_stranger_between_the_pictures_is_an_error_that_names_it(named_folder):
    (named_folder / "ours" / "my data" / "readme.txt").write_text("hello")
    with pytest.raises(ConfigError, match=r"readme\.txt is not named"):
        read("rta100", named_folder, PARTIAL)


def test_pictures_in_two_folders_are_refused(named_folder):
    (named_folder / "label=cat_text=cow.png").write_bytes(png())
    with pytest.raises(ConfigError, match="2 folders with pictures"):
        read("rta100", named_folder, PARTIAL)


def test_a_class_with_and_without_spaces_is_refused(named_folder):
    (named_folder / "ours" / "my data" / "label=cat _text=dog.png").write_bytes(png())
    with pytest.raises(ConfigError, match="with and without spaces"):
        read("rta100", named_folder, PARTIAL)


def test_a_word_that_equals_the_label_is_refused(named_folder):
    (named_folder / "ours" / "my data" / "label=cat_text=cat.png").write_bytes(png())
    with pytest.raises(ConfigError, match="'cat' written on itself"):
        read("rta100", named_folder, PARTIAL)


def test_a_missing_set_says_where_to_get_it(tmp_path):
    with pytest.raises(ConfigError, match=r"RTA-100 is not at .*Defense-Prefix"):
        read("rta100", tmp_path / "nothing")
    with pytest.raises(ConfigError, match=r"no pictures named .*Defense-Prefix"):
        read("rta100", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"<!DOCTYPE html><title>Quota exceeded</title>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n", r"12,345 bytes.*git lfs pull"),
        (b"PK\x03\x04", "unpack it"),
    ],
    ids=["web-page", "lfs", "zip"],
)
def test_a_file_in_place_of_the_folder_is_told_for_what_it_is(tmp_path, content, message):
    (tmp_path / "rta100.zip").write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read("rta100", tmp_path / "rta100.zip")


def test_real_rta100(shared_data):
    with pytest.raises(ConfigError, match="100 of 1,000 pictures"):
        read("rta100", shared_data / "rta100")
    (dataset,) = read("rta100", shared_data / "rta100", PARTIAL).tests
    assert dataset.shortfall == "100 of 1,000 pictures"  # the sample has all 100 classes
    assert len(dataset.class_names) == 100
    assert {"iPad", "DVD", "light bulb"} <= set(dataset.class_names)
    assert all(e.picture.load().size == (512, 512) for e in dataset.examples[:5])


def test_real_paint(shared_data):
    (dataset,) = read("paint", shared_data / "paint", PARTIAL).tests
    assert dataset.shortfall == "32 of 110 pictures; 53 of 159 classes"
    assert "TV" in dataset.class_names
    assert not [name for name in dataset.class_names if name.endswith(".")]  # the reference loader's "TV."
    pairs = {(dataset.class_names[e.label], dataset.class_names[e.word]) for e in dataset.examples}
    assert {("apple", "ipod"), ("iphone", "apple"), ("water bottle", "pencil")} <= pairs
    assert {e.picture.load().mode for e in dataset.examples} == {"RGB"}


# --- Disentangling ----------------------------------------------------------------------------------------------------


@pytest.fixture
def disentangling_folder(tmp_path):
    folder = tmp_path / "typographic_attack_dataset"
    (folder / "images").mkdir(parents=True)
    (folder / "classes.json").write_text(json.dumps({"cup": 0, "apple": 1, "good": 2}))
    annotations = {
        f"IMG_{i}.JPG": {"true object": label, "typographic attack label": word}
        for i, (label, word) in enumerate([("cup", "good"), ("apple", "cup"), ("apple", "unknown word")])
    }
    (folder / "annotations.json").write_text(json.dumps(annotations))
    return folder


def test_disentangling_keeps_the_order_of_classes(disentangling_folder):
    with pytest.raises(ConfigError, match="3 of 180 pictures"):
        read("disentangling", disentangling_folder.parent)
    (dataset,) = read("disentangling", disentangling_folder.parent, PARTIAL).tests
    assert dataset.class_names == ("cup", "apple", "good")
    assert dataset.templates == ("a photo of {}.",)
    assert [(e.label, e.word) for e in dataset.examples] == [(0, 2), (1, 0), (1, None)]
    (disentangling_folder / "annotations.json").rename(disentangling_folder / "annotation.json")
    assert read("disentangling", disentangling_folder, PARTIAL).tests[0] == dataset


@pytest.mark.parametrize(
    ("annotations", "message"),
    [
        ({"a.jpg": {"true object": "spoon", "typographic attack label": "good"}}, "'spoon'"),
        ({"a.jpg": {"label": "cup"}}, "true object"),
        ({"../a.jpg": {"true object": "cup", "typographic attack label": "good"}}, "inside"),
        (["a.jpg"], "no object"),
    ],
    ids=["label", "keys", "path", "list"],
)
def test_disentangling_refuses_what_it_cannot_read(disentangling_folder, annotations, message):
    (disentangling_folder / "annotations.json").write_text(json.dumps(annotations))
    with pytest.raises(ConfigError, match=message):
        read("disentangling", disentangling_folder, PARTIAL)
