"""Readers of the benchmark data in general: files, data sets, suites."""

from __future__ import annotations

import unicodedata

import pytest
from PIL import Image

from defense.benchmarks.datasets import READERS, SUITES, Dataset, File, Options, read_tasks
from defense.benchmarks.datasets.files import read_rows, read_text
from defense.errors import ConfigError, InvalidImageError

from .datasets_made import PARTIAL, SMALL, example, png, read, waterbird_lines, write_waterbirds


def test_text_files_that_are_none_are_told(tmp_path):
    path = tmp_path / "a file.txt"
    with pytest.raises(ConfigError, match="is missing"):
        read_text(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not UTF-8"):
        read_text(path)
    path.write_bytes(b"\xef\xbb\xbf<HTML>")
    with pytest.raises(ConfigError, match="web page"):
        read_text(path)
    path.write_bytes("\ufeffé\r\nb\rc".encode())
    assert read_text(path) == "é\nb\nc"


def test_cells_with_commas_and_quotes_are_whole(tmp_path):
    path = tmp_path / "table.csv"
    path.write_text('b,a\n"x, ""y""",1\n')
    assert read_rows(path, ("a", "b")) == [{"a": "1", "b": 'x, "y"'}]


def test_pictures_are_read_as_stored_and_digests_follow_their_bytes(tmp_path):
    path = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 30)).save(path, exif=exif)
    assert File(path).load().size == (40, 30)  # EXIF would turn it
    before = File(path).digest()
    path.write_bytes(path.read_bytes() + b"\0")
    assert File(path).digest() != before
    with pytest.raises(InvalidImageError, match="no such file"):
        File(tmp_path / "nothing.jpg").digest()


def test_names_in_two_unicode_forms_stay_two_names(tmp_path):
    """Verbatim: folding them would change the class set."""
    for form in ("NFC", "NFD"):
        name = unicodedata.normalize(form, "é")
        (tmp_path / f"label={name}_text=cat.png").write_bytes(png())
    assert len(read("paint", tmp_path, PARTIAL).tests[0].class_names) == 3


@pytest.mark.parametrize(
    ("examples", "fields", "message"),
    [
        ((), {}, "holds no pictures"),
        ((example(), example()), {}, "the picture 'a' is there twice"),
        ((example(),), {"class_names": ("x", "x")}, "the class name 'x' is there twice"),
        ((example(label=2),), {}, "outside of 0 to 1"),
        ((example(word=5),), {}, "outside of 0 to 1"),
        ((example(word=0),), {}, "written on itself"),
        ((example(),), {"choice": "pair"}, "no word to choose"),
        ((example(attribute=1),), {}, "all or none"),
        ((example(),), {"group_names": ("a", "b", "c", "d")}, "all or none"),
    ],
)
def test_a_data_set_that_cannot_be_measured_is_refused(examples, fields, message):
    with pytest.raises(ConfigError, match=message):
        Dataset(**{"name": "x", "variant": "test", "examples": examples, "class_names": ("cat", "dog"), **fields})


@pytest.mark.usefixtures("small_minis")
def test_a_suite_reads_what_is_there_and_names_the_rest(tmp_path, named_folder, image_folder):
    named_folder.rename(tmp_path / "paint")
    image_folder.rename(tmp_path / "synthetic")
    tasks, missing = read_tasks("typographic", tmp_path, PARTIAL)
    assert [task.name for task in tasks] == ["paint", "synthetic"], "nothing drawn is added to real pictures"
    assert missing == ["rta100", "disentangling", "scam", "mini-typographic"]
    tasks, missing = read_tasks("typographic", tmp_path, PARTIAL, with_drawn=True)
    assert [task.name for task in tasks] == ["paint", "synthetic", "mini-typographic"], "unless it is asked for"
    assert missing == ["rta100", "disentangling", "scam"]


def test_a_single_data_set_may_be_given_by_its_own_folder(named_folder, tmp_path):
    (task,), missing = read_tasks("rta100", named_folder, PARTIAL)
    assert (task.name, missing) == ("rta100", [])
    named_folder.rename(tmp_path / "rta100")
    assert read_tasks("rta100", tmp_path, PARTIAL)[0][0].name == "rta100"


def test_a_suite_of_which_nothing_is_there_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"holds none of rta100, paint.*nothing is downloaded"):
        read_tasks("typographic", tmp_path, PARTIAL)
    with pytest.raises(ConfigError, match="no data set 'imagenet'; there are mini, typographic"):
        read_tasks("imagenet", tmp_path, PARTIAL)


@pytest.mark.usefixtures("small_minis")
def test_without_a_folder_a_suite_is_what_is_drawn(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suite, names in {
        "typographic": ["mini-typographic"],
        "waterbirds": ["mini-waterbirds"],
        "celeba": ["mini-celeba"],
        "semantic": ["mini-semantic"],
        "all": [*SUITES["mini"], "mini-semantic"],
        "mini": list(SUITES["mini"]),
    }.items():
        tasks, missing = read_tasks(suite, None, Options())
        assert [task.name for task in tasks] == names
        assert set(missing) == set(SUITES[suite]) - set(names)


def test_a_folder_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder"):
        read_tasks("mini", tmp_path / "typo", Options())


@pytest.mark.usefixtures("small_minis")
def test_a_data_set_with_the_name_of_a_suite_may_be_given_by_its_own_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"metadata\.csv is missing"):
        read_tasks("waterbirds", tmp_path, PARTIAL)
    write_waterbirds(tmp_path, waterbird_lines(SMALL))
    tasks, left_out = read_tasks("waterbirds", tmp_path, PARTIAL)
    assert ([task.name for task in tasks], left_out) == (["waterbirds"], ["mini-waterbirds"])
    tasks, left_out = read_tasks("waterbirds", tmp_path, PARTIAL, with_drawn=True)
    assert ([task.name for task in tasks], left_out) == (["waterbirds", "mini-waterbirds"], [])


def test_a_data_set_of_a_suite_that_cannot_be_used_is_an_error(tmp_path, image_folder):
    image_folder.rename(tmp_path / "synthetic")
    (tmp_path / "rta100").mkdir()
    with pytest.raises(ConfigError, match="RTA-100"):
        read_tasks("all", tmp_path, PARTIAL)


def test_suites_name_readers():
    assert all(set(names) <= set(READERS) for names in SUITES.values())
    assert set(SUITES["all"]) == set(READERS)
