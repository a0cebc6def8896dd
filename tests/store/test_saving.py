"""A defense is written whole or not at all, and over nothing that is not one."""

import json
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from defense.errors import ConfigError
from defense.hosts.defense import Defense
from defense.store import defenses
from defense.store.defenses import MANIFEST, SCHEMA, load, save

from .defense_folders import SITE_0, SITE_1, are_equal, everything_below, flip_byte


def test_an_existing_defense_is_replaced_whole(defense: Defense, folder: Path) -> None:
    smaller = replace(defense, sites=defense.sites[:1], golden=None)
    assert save(smaller, folder) == folder
    assert sorted(path.name for path in folder.iterdir()) == [MANIFEST, SITE_0]
    assert are_equal(load(folder), smaller)
    assert list(folder.parent.iterdir()) == [folder]


def test_a_damaged_defense_may_be_replaced(defense: Defense, folder: Path) -> None:
    (folder / SITE_1).unlink()
    flip_byte(folder / SITE_0, 0)
    assert are_equal(load(save(defense, folder)), defense)


def test_a_defense_can_be_saved_over_the_one_it_was_loaded_from(folder: Path) -> None:
    before = everything_below(folder)
    save(load(folder), folder)
    assert everything_below(folder) == before


def test_an_empty_folder_is_filled(defense: Defense, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert are_equal(load(save(defense, tmp_path / "empty")), defense)


def test_saving_through_a_link_keeps_the_link(defense: Defense, folder: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    smaller = replace(defense, golden=None)
    assert save(smaller, link) == link
    assert link.is_symlink()
    assert are_equal(load(folder), smaller)
    assert sorted(tmp_path.iterdir()) == [link, folder]


def test_a_relative_path_is_taken_from_the_working_directory(
    defense: Defense, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert save(defense, "text") == Path("text")
    assert are_equal(load("text"), defense)


@pytest.mark.parametrize("failing", ["save_file", "load"])
@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk full", "Ctrl-C"]
)
def test_a_failure_while_writing_leaves_the_old_defense_and_no_debris(
    defense: Defense, folder: Path, monkeypatch: pytest.MonkeyPatch, failing: str, error: BaseException
) -> None:
    before = everything_below(folder.parent)
    real, n_calls = getattr(defenses, failing), 0

    def fail_late(*args: Any, **options: Any) -> Any:
        nonlocal n_calls
        n_calls += 1
        real(*args, **options)
        if failing == "load" or n_calls == 2:
            raise error

    monkeypatch.setattr(defenses, failing, fail_late)
    with pytest.raises(type(error)):
        save(replace(defense, license="other"), folder)
    assert n_calls > 0
    assert everything_below(folder.parent) == before
    assert list(folder.parent.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError("busy"), KeyboardInterrupt()], ids=["OSError", "Ctrl-C"])
def test_a_failure_while_renaming_puts_the_old_defense_back(
    defense: Defense, folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    before = everything_below(folder.parent)
    real = Path.rename

    def fail_into_place(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise error
        return real(path, target)

    monkeypatch.setattr(Path, "rename", fail_into_place)
    with pytest.raises(type(error)):
        save(replace(defense, license="other"), folder)
    assert everything_below(folder.parent) == before
    assert list(folder.parent.iterdir()) == [folder]


def _file(target: Path) -> None:
    target.write_text("mine")


def _other_folder(target: Path) -> None:
    target.mkdir()
    (target / "thesis.tex").write_text("mine")


def _web_app(target: Path) -> None:
    target.mkdir()
    (target / MANIFEST).write_text('{"name": "a browser extension has such a file too", "manifest_version": 3}')


def _newer_defense(target: Path) -> None:
    target.mkdir()
    (target / MANIFEST).write_text(json.dumps({"schema": SCHEMA + 1, "files": {}}))


@pytest.mark.parametrize("make", [_file, _other_folder, _web_app, _newer_defense])
def test_a_target_that_is_no_defense_is_refused_and_untouched(
    defense: Defense, tmp_path: Path, make: Callable[[Path], None]
) -> None:
    target = tmp_path / "target"
    make(target)
    before = everything_below(tmp_path)
    with pytest.raises(ConfigError, match="target exists and is no defense, or holds other files too"):
        save(defense, target)
    assert everything_below(tmp_path) == before
    assert list(tmp_path.iterdir()) == [target]


def test_a_defense_with_files_of_others_beside_it_is_refused_and_untouched(defense: Defense, folder: Path) -> None:
    (folder / "notes.md").write_text("mine")
    before = everything_below(folder.parent)
    with pytest.raises(ConfigError, match="holds other files too"):
        save(defense, folder)
    assert everything_below(folder.parent) == before


@pytest.mark.skipif(os.name != "posix", reason="permission bits; runs on Linux and macOS")
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_permission_bits_follow_the_umask(defense: Defense, tmp_path: Path, mask: int) -> None:
    before = stat.S_IMODE(tmp_path.stat().st_mode)
    old = os.umask(mask)
    try:
        folder = save(defense, tmp_path / "text")
    finally:
        os.umask(old)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o777 & ~mask
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o666 & ~mask}
    assert stat.S_IMODE(tmp_path.stat().st_mode) == before


@pytest.mark.parametrize(
    "value", [Path("x"), np.float32(1), float("nan"), {1, 2}], ids=["path", "numpy scalar", "NaN", "set"]
)
def test_provenance_that_json_cannot_hold_is_refused(defense: Defense, tmp_path: Path, value: object) -> None:
    with pytest.raises(ConfigError, match="cannot be written as JSON"):
        save(replace(defense, provenance={"value": value}), tmp_path / "text")
    assert list(tmp_path.iterdir()) == []
