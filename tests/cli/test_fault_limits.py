"""--max-pixels: one limit for every command that reads a user's pictures."""

from __future__ import annotations

from pathlib import Path
from typing import get_type_hints

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")

from defense.cli import app
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.data.preprocess import Preprocess
from defense.data.sources import Pictures, decoded, open_pictures, prepared
from defense.errors import InvalidImageError

SMALL = Limits(max_pixels=1000)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two pictures, one of them beyond `SMALL`, 51 times, so that some are held out."""
    for name, side in (("a", 30), ("b", 40)):
        for index in range(51):
            Image.new("RGB", (side, side), "red").save(tmp_path / f"{name}{index}.png")
    return tmp_path


def test_fault_115_every_command_that_reads_pictures_has_the_option() -> None:
    commands = {each.name or each.callback.__name__: each.callback for each in app.registered_commands if each.callback}
    reads = {name for name, each in commands.items() if {"picture", "pictures", "data"} & get_type_hints(each).keys()}
    assert reads == {"bench", "classify", "describe", "explain", "fit", "protect", "train"}
    for name in reads:
        assert "max_pixels" in get_type_hints(commands[name]), name


def test_fault_115_each_way_of_reading_a_source_keeps_to_its_limits(folder: Path) -> None:
    def read(source: Pictures) -> list[set[str]]:
        preprocess = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
        found = []
        for pictures in (list(source), [picture for picture, _ in source.epoch(0)], list(source.held_out(9))):
            for batches in (decoded(pictures, 64), prepared(preprocess, pictures)):
                found.append({picture.name[0] for batch in batches for picture, pixels in batch if pixels is not None})
        return found

    assert read(open_pictures([folder])) == [{"a", "b"}] * 6
    assert read(open_pictures([folder], limits=SMALL)) == [{"a"}] * 6
    assert open_pictures([folder]).fingerprint == open_pictures([folder], limits=DEFAULT_LIMITS).fingerprint
    assert open_pictures([folder]).fingerprint != open_pictures([folder], limits=SMALL).fingerprint


def test_fault_115_pictures_of_a_csv_file_keep_to_them(folder: Path) -> None:
    from defense.fit.metadata import read_metadata

    (folder / "table.csv").write_text("path,label\na0.png,0\nb0.png,1\n")
    rows = read_metadata(folder / "table.csv", ["x", "y"], path_column="path", label_column="label", limits=SMALL)
    assert {picture.limits for picture in rows.pictures} == {SMALL}


def test_fault_115_data_sets_keep_to_them(tmp_path: Path) -> None:
    from defense.benchmarks.datasets import Options, read_tasks

    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name / "0.png")
    for limits, is_read in ((DEFAULT_LIMITS, True), (SMALL, False)):
        (task,), _ = read_tasks("synthetic", tmp_path, Options(limits=limits))
        for test in task.tests:
            for example in test.examples:
                if is_read:
                    assert example.load().size == (224, 224)
                else:
                    with pytest.raises(InvalidImageError, match="more than 1000"):
                        example.load()
