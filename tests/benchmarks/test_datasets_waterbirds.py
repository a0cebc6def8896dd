"""Waterbirds: the real tables give the right answer or the right refusal, and so do made-up ones."""

from __future__ import annotations

import numpy as np
import pytest

from defense.benchmarks.datasets import File, waterbirds
from defense.errors import ConfigError

from .datasets_made import PARTIAL, SMALL, read, waterbird_lines, write_waterbirds


def test_the_published_waterbirds_have_no_shortfall(tmp_path):
    counts = {0: waterbirds.TRAIN_COUNTS, 1: (467, 466, 133, 133), 2: waterbirds.TEST_COUNTS}
    task = read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(counts)))
    (test,) = task.tests
    assert test.shortfall is None
    assert len(test.examples) == 5794
    assert test.group_counts() == (2255, 2255, 642, 642)
    assert test.train_counts == (3498, 184, 56, 1057)
    assert task.train is not None
    assert task.train.group_counts() == test.train_counts
    assert task.val is not None
    assert len(task.val.examples) == 1199


def test_one_row_more_is_not_waterbirds(tmp_path):
    counts = {0: waterbirds.TRAIN_COUNTS, 1: (467, 466, 133, 133), 2: (2255, 2255, 642, 643)}
    with pytest.raises(ConfigError, match=r"test groups of \(2255, 2255, 642, 643\)"):
        read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(counts)))


def test_waterbirds_groups_and_pictures(tmp_path):
    (test,) = read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(SMALL)), PARTIAL).tests
    assert test.class_names == ("landbird", "waterbird")
    assert test.group_counts() == (2, 3, 1, 2)
    assert test.group_names[1] == "landbird on water"
    third = test.examples[2]
    assert (third.label, third.attribute, third.group, third.word) == (0, 1, 1, None)
    assert third.picture == File(tmp_path / "001.Bird" / "Bird_16.jpg")
    assert not test.is_attacked


@pytest.mark.parametrize(("end", "head"), [("\r\n", ""), ("\n", "\ufeff"), ("\r\n", "\ufeff")])
def test_line_ends_and_byte_order_marks_change_nothing(tmp_path, end, head):
    lines = [line.partition(",")[2] for line in waterbird_lines(SMALL)]  # a column that matters comes first
    plain = waterbirds.read_metadata(write_waterbirds(tmp_path / "a", lines) / "metadata.csv")
    other = waterbirds.read_metadata(
        write_waterbirds(tmp_path / "b", [head + lines[0], *lines[1:]], end) / "metadata.csv"
    )
    assert plain == other


def test_columns_are_read_by_name(tmp_path):
    lines = waterbird_lines(SMALL)
    plain = waterbirds.read_metadata(write_waterbirds(tmp_path / "a", lines) / "metadata.csv")
    turned = [",".join(["extra", *reversed(line.split(","))]) for line in lines]
    assert waterbirds.read_metadata(write_waterbirds(tmp_path / "b", turned) / "metadata.csv") == plain


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("1,a.jpg,2,0,0,x", r"line 2: y is '2'"),
        ("1,a.jpg,0,3,0,x", r"line 2: split is '3'"),
        ("1,a.jpg,0,0,land,x", r"line 2: place is 'land'"),
        ("1,a.jpg,0,0", "line 2: 4 cells; want 6"),
        ("1,a.jpg,0,0,0,x,y", "line 2: 7 cells; want 6"),
        ("1,/etc/passwd,0,2,0,x", "inside of"),
        ("1,../a.jpg,0,2,0,x", "inside of"),
        ("1,C:\\a.jpg,0,2,0,x", "inside of"),
        ("9,001.Bird/Bird_1.jpg,0,2,0,x", r"Bird_1\.jpg' twice"),
    ],
)
def test_waterbirds_rows_that_cannot_be_right_are_refused(tmp_path, row, message):
    head, *rest = waterbird_lines(SMALL)
    with pytest.raises(ConfigError, match=message):
        read("waterbirds", write_waterbirds(tmp_path, [head, row, *rest]), PARTIAL)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({**SMALL, 2: (2, 3, 0, 2)}, "'waterbird on land' is empty"),
        ({**SMALL, 2: (0, 0, 0, 0)}, "waterbirds-test holds no pictures"),
        ({**SMALL, 0: (0, 0, 0, 0)}, "waterbirds-train holds no pictures"),
    ],
    ids=["group", "test", "train"],
)
def test_an_empty_group_or_split_is_refused_by_name(tmp_path, counts, message):
    with pytest.raises(ConfigError, match=message):
        read("waterbirds", write_waterbirds(tmp_path, waterbird_lines(counts)), PARTIAL)


def test_a_missing_column_is_named(tmp_path):
    lines = [line.rpartition(",")[0].rpartition(",")[0] for line in waterbird_lines(SMALL)]
    with pytest.raises(ConfigError, match=r"\['place'\] are missing"):
        read("waterbirds", write_waterbirds(tmp_path, lines), PARTIAL)


def test_the_real_variant_is_not_waterbirds(shared_data, tmp_path):
    (tmp_path / "metadata.csv").write_bytes((shared_data / "waterbirds" / "metadata-variant.csv").read_bytes())
    with pytest.raises(ConfigError, match=r"not the published Waterbirds: train groups of \(2054, 109, 105, 1992\)"):
        read("waterbirds", tmp_path)
    task = read("waterbirds", tmp_path, PARTIAL)
    assert task.tests[0].group_counts() == (123, 124, 144, 143)
    assert task.tests[0].train_counts == (2054, 109, 105, 1992)
    assert task.val is not None
    assert task.val.group_counts() == (126, 127, 140, 139)
    assert "test groups of (123, 124, 144, 143)" in task.tests[0].shortfall


def test_published_test_counts_are_those_of_the_official_labels(shared_data):
    labels = np.load(shared_data / "waterbirds" / "test_labels_y_place.npy")[..., 0]
    assert tuple(np.bincount(2 * labels[:, 0] + labels[:, 1])) == waterbirds.TEST_COUNTS
