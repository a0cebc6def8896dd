"""What a defense is fitted on: words written on pictures, groups from csv files, groups without labels."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.data import images
from defense.data.sources import open_pictures
from defense.errors import ConfigError
from defense.fit import from_pictures
from defense.fit.from_pictures import metadata_material, spurious_material, text_material
from defense.fit.material import Groups, Material, Pairs
from defense.fit.metadata import read_metadata
from defense.hosts.clip import load_clip

LABELS = ["dog", "hot dog", "cat", "猫"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Twelve pictures of noise, and one that is broken."""
    folder = tmp_path_factory.mktemp("fit-pictures")
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (48, 48, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    (folder / "05.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return folder


@pytest.fixture
def clf(tiny_folder) -> RobustClassifier:
    return RobustClassifier(load_clip(f"local-dir:{tiny_folder}")).set_labels(LABELS)


# --- text ---------------------------------------------------------------------------------------------------------


def test_the_right_answer_is_plain_clips_own_and_another_label_is_written(clf, folder):
    material = text_material(clf, open_pictures([folder]), n=100, seed=0)
    data = material.data
    assert isinstance(data, Pairs)
    assert material.unreadable == ("05.png",)
    assert len(data.label) == 11
    answers = clf.encode_pixels(data.clean.numpy()) @ clf.text_embeds().T
    assert data.label.tolist() == answers.argmax(1).tolist()
    assert (data.word != data.label).all()
    assert LABELS.index("猫") not in data.word.tolist(), "the fonts have no such letters"
    assert material.provenance["n"] == 11
    assert material.provenance["n_unreadable"] == 1


def test_the_twins_differ_by_the_letters_alone(clf, folder):
    data = text_material(clf, open_pictures([folder]), n=100, seed=0).data
    assert (data.attacked != data.neutral).flatten(1).any(1).all(), "every picture gets letters"
    has_plate = (data.neutral != data.clean).flatten(1).any(1)
    assert 0 < has_plate.sum() < len(has_plate), "some words stand on a plate, some on none"
    changed = (data.attacked != data.clean).flatten(1).double().mean(1)
    assert changed.max() < 0.9, "the picture is still there"


def test_pictures_and_writing_follow_the_seed(clf, folder):
    source = open_pictures([folder])
    first, again, other = (text_material(clf, source, n=6, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.data.attacked, again.data.attacked)
    assert first.provenance == again.provenance
    assert first.provenance["pictures_sha256"] != other.provenance["pictures_sha256"]


def test_two_folders_may_hold_pictures_of_the_same_name(seen, folder, tmp_path, monkeypatch):
    first, second = tmp_path / "one", tmp_path / "two"
    for place, name in ((first, "00.png"), (second, "01.png")):
        place.mkdir()
        shutil.copy(folder / name, place / "same.png")
    clf = seen(np.array([[1.0, 1, 0], [-1.0, -1, 0]]))
    data = text_material(clf, open_pictures([first, second]), n=2, seed=0).data
    assert sorted(data.label.tolist()) == [0, 1]
    assert data.word.tolist() == (1 - data.label).tolist(), "never the right answer"


def test_labels_that_cannot_be_written_are_refused(clf, folder):
    clf.set_labels(["猫", "犬", "dog"])
    with pytest.raises(ConfigError, match=r"1 of the 3 labels"):
        text_material(clf, open_pictures([folder]), n=6, seed=0)


def test_a_folder_of_broken_pictures_is_refused(clf, tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ConfigError, match="none of 1 pictures can be read"):
        text_material(clf, open_pictures([tmp_path]), n=6, seed=0)


# --- folds --------------------------------------------------------------------------------------------------------


def groups_material(strata: list[int]) -> Material:
    n = len(strata)
    data = Groups(torch.zeros(n, 3, 2, 2), torch.zeros(n, dtype=torch.int64), torch.tensor(strata))
    return Material(data, np.array(strata), (), {})


def test_every_picture_is_held_out_once_and_every_fold_has_every_group():
    material = groups_material([0] * 7 + [1] * 12)
    held_out = []
    for fitted_on, rest in material.folds(3, seed=0):
        assert set(fitted_on.tolist()) | set(rest.tolist()) == set(range(19))
        assert not set(fitted_on.tolist()) & set(rest.tolist())
        groups = [set(material.data.without_pixels(rows).a.tolist()) for rows in (rest, fitted_on)]
        assert groups == [{0, 1}, {0, 1}]
        held_out += rest.tolist()
    assert sorted(held_out) == list(range(19))


def test_fewer_pictures_than_folds_are_refused():
    with pytest.raises(ConfigError, match=r"2 pictures .* 3 folds"):
        groups_material([0] * 7 + [1] * 2).folds(3, seed=0)


# --- csv files ----------------------------------------------------------------------------------------------------

CLASSES = ("landbird", "waterbird")
WATERBIRDS = {"path_column": "img_filename", "label_column": "y", "attribute_column": "place"}


def written(path: Path, text: str) -> Path:
    path.write_bytes(text.encode())
    return path


def test_columns_are_read_by_name_and_the_test_split_is_left_out(tmp_path):
    path = written(
        tmp_path / "metadata.csv",
        "\ufeffextra,img_filename,y,split,place\r\n"
        "x,a b.jpg,0,0,1\r\nx,b.jpg,1,1,0\r\nx,c.jpg,1,2,0\r\nx,d.jpg,1,test,1",
    )
    rows = read_metadata(path, CLASSES, **WATERBIRDS)
    assert [picture.source for picture in rows.pictures] == [tmp_path / "a b.jpg", tmp_path / "b.jpg"]
    assert rows.y.tolist() == [0, 1]
    assert rows.a.tolist() == [1, 0]
    assert rows.values == ("0", "1")
    assert rows.n_test == 2
    assert rows.has_split


@pytest.mark.parametrize(("column", "cell"), [("Split", "Test"), ("split", "2.0"), (" SPLIT", "2")])
def test_no_spelling_of_the_test_split_is_fitted_on(tmp_path, column, cell):
    path = written(tmp_path / "rows.csv", f"path,label,{column}\na.jpg,0,0\nb.jpg,1,{cell}\n")
    rows = read_metadata(path, CLASSES, path_column="path", label_column="label")
    assert [picture.name for picture in rows.pictures] == ["a.jpg"]
    assert (rows.n_test, rows.has_split) == (1, True)


def test_a_file_without_splits_says_so(tmp_path):
    path = written(tmp_path / "rows.csv", "path,label\na.jpg,0\nb.jpg,1\n")
    assert not read_metadata(path, CLASSES, path_column="path", label_column="label").has_split


@pytest.mark.parametrize("cell", ["../secret.jpg", "a/../../secret.jpg", "/etc/secret.jpg"])
def test_a_path_that_leads_out_of_the_folder_is_refused(tmp_path, cell):
    path = written(tmp_path / "rows.csv", f"path,label\na/../b.jpg,0\n{cell},1\n")
    with pytest.raises(ConfigError, match=r"line 3: the path .* leads out"):
        read_metadata(path, CLASSES, path_column="path", label_column="label")


def test_spaces_around_an_attribute_make_no_other_value(tmp_path):
    path = written(tmp_path / "rows.csv", "path,label,place\na.jpg,0,sea\nb.jpg,1,sea \nc.jpg,1,land\n")
    rows = read_metadata(path, CLASSES, path_column="path", label_column="label", attribute_column="place")
    assert rows.values == ("land", "sea")


def test_classes_may_stand_as_names_numbers_or_signs(tmp_path):
    for cells in (("landbird", "waterbird"), ("0", "1"), ("-1", "1")):
        path = written(tmp_path / "rows.csv", f"path,label\na.jpg,{cells[0]}\nb.jpg,{cells[1]}\n")
        rows = read_metadata(path, CLASSES, path_column="path", label_column="label", root=Path("/pictures"))
        assert rows.y.tolist() == [0, 1]
        assert rows.a is None
        assert rows.pictures[0].source == Path("/pictures/a.jpg")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na.jpg,0\n", r"no column 'place'; it has 'path', 'label'"),
        ("", r"it has none"),
        ("path,label,place\n", "no rows to fit on"),
        ("path,label,place,split\na.jpg,0,1,2\n", "apart from 1 of the test split"),
        ("path,label,place\na.jpg,0,0\nb.jpg,2,1\n", r"line 3: the label '2' is none of the classes"),
        ("path,label,place\na.jpg,0\n", r"line 2: nothing in the column 'place'"),
        ("path,label,place\na.jpg,0,0\nb.jpg,1,0\n", r"'place' .* has 1 different values"),
        ("<!DOCTYPE html><html>", "web page"),
        ("path,label,place\n\x00,0,0\n", r"csv|nothing"),
    ],
    ids=["column", "empty", "no-rows", "test-only", "label", "cell", "one-value", "html", "nul"],
)
def test_a_csv_file_that_cannot_be_used_is_refused(tmp_path, text, message):
    path = written(tmp_path / "rows.csv", text)
    with pytest.raises(ConfigError, match=message):
        read_metadata(path, CLASSES, path_column="path", label_column="label", attribute_column="place")


def test_a_csv_file_that_is_not_there_or_no_text_is_refused(tmp_path):
    columns = {"path_column": "path", "label_column": "label"}
    with pytest.raises(ConfigError, match=r"missing\.csv cannot be read"):
        read_metadata(tmp_path / "missing.csv", CLASSES, **columns)
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ConfigError, match="UTF-8"):
        read_metadata(tmp_path / "binary.csv", CLASSES, **columns)


def test_the_published_waterbirds_variant_is_read(shared_data):
    rows = read_metadata(shared_data / "waterbirds" / "metadata-variant.csv", CLASSES, **WATERBIRDS)
    counts = np.bincount(rows.y * 2 + rows.a).tolist()
    assert counts == [2054 + 126, 109 + 127, 105 + 140, 1992 + 139]
    assert rows.n_test == 123 + 124 + 144 + 143


def grouped(folder: Path, tmp_path: Path, rows: str):
    path = written(tmp_path / "rows.csv", "path,label,place\n" + rows)
    columns = {"path_column": "path", "label_column": "label", "attribute_column": "place"}
    return read_metadata(path, CLASSES, root=folder, **columns)


def test_each_group_gives_as_many_pictures_as_may_be(clf, folder, tmp_path):
    clf.set_labels(CLASSES)
    names = [f"{i:02d}.png" for i in range(12)]
    groups = ["0,sea"] * 6 + ["0,land"] * 2 + ["1,sea"] * 2 + ["1,land"] * 2
    rows = grouped(folder, tmp_path, "".join(f"{n},{g}\n" for n, g in zip(names, groups, strict=True)))
    material = metadata_material(clf, rows, n=10, seed=0)
    data = material.data
    assert material.provenance["groups"]["landbird, land"] == 2
    assert material.provenance["groups"]["waterbird, sea"] == 2
    assert material.provenance["groups"]["landbird, sea"] + len(material.unreadable) == 4
    assert material.strata.tolist() == (2 * data.y + data.a).tolist()


def test_an_empty_group_is_named(clf, folder, tmp_path):
    clf.set_labels(CLASSES)
    rows = grouped(folder, tmp_path, "00.png,0,sea\n01.png,0,land\n02.png,1,sea\n")
    with pytest.raises(ConfigError, match=r"no picture is in the group waterbird, land"):
        metadata_material(clf, rows, n=10, seed=0)


# --- without labels -----------------------------------------------------------------------------------------------


class Seen:
    """A classifier whose embeddings are given: the classes lie along one axis, the cue along another."""

    def __init__(self, clf: RobustClassifier, embeds: np.ndarray) -> None:
        self.clip, self.classes_, self.embeds = clf.clip, np.array(["land", "sea"], dtype=object), embeds

    def text_embeds(self) -> np.ndarray:
        return normalized(np.array([[1.0, 0.9, 0], [-1.0, -0.9, 0]]))  # each class is mixed up with its place


def normalized(rows: np.ndarray) -> np.ndarray:
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture
def seen(clf, monkeypatch):
    def make(embeds: np.ndarray) -> Seen:
        monkeypatch.setattr(from_pictures, "_embeds", lambda clf, pixels: clf.embeds)
        return Seen(clf, normalized(embeds))

    return make


def test_the_spurious_cue_does_not_decide_the_class(seen, folder, monkeypatch):
    core = np.tile([1.0, -1.0], 6)[:11]
    place = np.repeat([2.0, -2.0], 6)[:11]
    clf = seen(np.stack([core, place, np.ones(11)], axis=1))
    spurious = normalized(np.array([[0, 1.0, 0.5], [0, -1.0, 0.5]]))

    class Prompts:
        def __init__(self, clip) -> None: ...

        def set_labels(self, labels, template):
            assert template == "{}"
            return self

        def text_embeds(self) -> np.ndarray:
            return spurious

    monkeypatch.setattr(from_pictures, "RobustClassifier", Prompts)
    data = spurious_material(clf, open_pictures([folder]), ["hills", "waves"], n=20, seed=0).data
    assert data.y.tolist() == (core < 0).astype(int).tolist()
    assert data.a.tolist() == (place < 0).astype(int).tolist()
    plain = (clf.embeds @ clf.text_embeds().T).argmax(1)
    assert plain.tolist() == data.a.tolist(), "plain CLIP follows the place"


def test_one_spurious_prompt_is_refused(clf, folder):
    with pytest.raises(ConfigError, match="two or more"):
        spurious_material(clf, open_pictures([folder]), ["water"], n=20, seed=0)


def test_one_class_is_refused(clf, folder):
    clf.set_labels(["dog"])
    with pytest.raises(ConfigError, match=r"the classes are \['dog'\]; give two or more"):
        spurious_material(clf, open_pictures([folder]), ["water", "land"], n=20, seed=0)


def test_without_an_attribute_plain_clips_errors_stand_for_it(seen, folder, tmp_path):
    answers = [0, 1] * 5
    clf = seen(np.array([[1.0, 1, 0] if answer == 0 else [-1.0, -1, 0] for answer in answers]))
    labels = [0, 1, 0, 1, 0, 1, 1, 0, 1, 0]
    names = [f"{i:02d}.png" for i in range(12) if i != 5][:10]
    text = "path,label\n" + "".join(f"{name},{label}\n" for name, label in zip(names, labels, strict=True))
    path = written(tmp_path / "rows.csv", text)
    rows = read_metadata(path, CLASSES, path_column="path", label_column="label", root=folder)
    material = metadata_material(clf, rows, n=20, seed=0)
    assert material.data.y.tolist() == labels
    assert material.data.a.tolist() == [1] * 6 + [0] * 4
    assert material.provenance["kind"] == "errors of plain CLIP"
    clf.embeds = clf.embeds[[0, 1] * 5]
    path.write_text("path,label\n" + "".join(f"{name},{i % 2}\n" for i, name in enumerate(names)))
    rows = read_metadata(path, CLASSES, path_column="path", label_column="label", root=folder)
    with pytest.raises(ConfigError, match="plain CLIP is wrong"):
        metadata_material(clf, rows, n=20, seed=0)


def test_values_are_split_between_their_two_clusters():
    values = np.array([0.1, 5.2, 0.3, 5.0, 0.2, 5.1, 4.9])
    assert 0.3 < from_pictures._threshold(values) < 4.9
    assert from_pictures._threshold(values - 100) == pytest.approx(from_pictures._threshold(values) - 100)
    assert from_pictures._threshold(values[:1]) == 0.0


# --- how often pictures are read ----------------------------------------------------------------------------------


def test_each_picture_is_decoded_once(clf, folder, monkeypatch):
    decode, opened = images.decode, []
    monkeypatch.setattr(images, "decode", lambda source, **limits: opened.append(source) or decode(source, **limits))
    material = text_material(clf, open_pictures([folder]), n=100, seed=0)
    assert len(opened) == len(set(opened)) == 12
    assert len(material.data.label) == 11
