"""What is to be written, or was, in the wrong place: found before the work, and told in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

from defense.errors import CheckpointError, NotThereError
from defense.explain import catalogue
from defense.export.exporter import free_target
from defense.fit import report
from defense.store import checkpoint, defenses

CHECKS = [defenses.check_target, checkpoint.check_target, catalogue.check_target, report.check_target, free_target]


@pytest.mark.parametrize("read", [defenses.load, checkpoint.load, catalogue.load], ids=lambda read: read.__module__)
def test_a_file_in_place_of_a_folder_is_called_one(tmp_path: Path, read: Callable[[Path], object]) -> None:
    path = tmp_path / "picture.jpg"
    path.write_bytes(b"no folder")
    with pytest.raises(CheckpointError, match=r"picture\.jpg is a file; an? (defense|SAE|catalogue) is a folder"):
        read(path)
    with pytest.raises(NotThereError, match=r"nothing is not there"):
        read(tmp_path / "nothing")


NO_PLACE = Path("/proc")
"""A folder that takes no file from anybody, root included."""


@pytest.mark.skipif(not NO_PLACE.is_dir(), reason="runs on Linux")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__module__)
def test_a_folder_that_takes_no_file_is_found_before_the_work(tmp_path: Path, check: Callable[[Path], object]) -> None:
    with pytest.raises(OSError, match=r"nothing can be written into this folder .*: '/proc'"):
        check(NO_PLACE / "made")
    check(tmp_path / "made")
    assert list(tmp_path.iterdir()) == []
