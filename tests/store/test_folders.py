"""Files and folders that are written whole or not at all, and held against their manifest at any depth."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from defense.errors import CheckpointError, ConfigError, IntegrityError
from defense.store import folders

MANIFEST = "manifest.json"


def everything_below(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    """A umask that holds for the test."""
    if os.name != "posix":
        pytest.skip("permission bits; runs on Linux and macOS")
    old = os.umask(request.param)
    yield request.param
    os.umask(old)


# --- a folder ---------------------------------------------------------------------------------------------------------


def test_a_folder_is_read_back_under_another_name_and_then_given_its_own(tmp_path: Path) -> None:
    target, seen = tmp_path / "made", []
    with folders.publishing(target, read=lambda folder: seen.append(everything_below(folder))) as staging:
        assert list(staging.iterdir()) == []
        (staging / "a.txt").write_text("new")
        assert (seen, target.exists()) == ([], False)
    assert seen == [{"a.txt": "new"}]
    assert everything_below(tmp_path) == {"made/a.txt": "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_a_folder_that_is_there_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "made"
    target.mkdir()
    (target / "old.txt").write_text("old")
    with folders.publishing(target, read=everything_below) as staging:
        (staging / "a.txt").write_text("new")
        assert everything_below(target) == {"old.txt": "old"}
    assert everything_below(tmp_path) == {"made/a.txt": "new"}
    assert list(tmp_path.iterdir()) == [target]


def _refuse(_folder: Path) -> None:
    raise CheckpointError("this is not what it should be")


def _fill(target: Path, error: BaseException | None = None) -> None:
    """Write a folder that is refused when it is read back, or give up before that."""
    with folders.publishing(target, read=_refuse) as staging:
        (staging / "a.txt").write_text("new")
        if error is not None:
            raise error


@pytest.mark.parametrize("error", [None, OSError("No space left on device"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("is_there", [True, False], ids=["over another", "new"])
def test_a_failure_leaves_what_was_there_and_nothing_else(
    tmp_path: Path, error: BaseException | None, is_there: bool
) -> None:
    target = tmp_path / "made"
    if is_there:
        target.mkdir()
        (target / "old.txt").write_text("old")
    before = everything_below(tmp_path)
    with pytest.raises(CheckpointError if error is None else type(error)):
        _fill(target, error)
    assert everything_below(tmp_path) == before
    assert list(tmp_path.iterdir()) == [target] * is_there


def test_a_manifest_comes_with_its_schema_and_opens_the_other_files_to_its_readers(tmp_path: Path, mask: int) -> None:
    (tmp_path / "more").mkdir()
    safetensors.numpy.save_file({"x": np.zeros(2)}, tmp_path / "more" / "x.safetensors")
    (tmp_path / "more" / "x.safetensors").chmod(0o600)
    files = folders.file_entries(tmp_path)
    folders.write_manifest(tmp_path / MANIFEST, 3, {"name": "é", "files": files}, "the thing")
    manifest = json.loads((tmp_path / MANIFEST).read_text(encoding="utf-8"))
    assert list(manifest) == ["schema", "package_version", "name", "files"]
    assert (manifest["schema"], manifest["package_version"], manifest["name"]) == (3, folders.package_version(), "é")
    assert list(manifest["files"]) == ["more/x.safetensors"]
    assert stat.S_IMODE((tmp_path / "more" / "x.safetensors").stat().st_mode) == 0o666 & ~mask


def test_what_json_cannot_hold_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="the thing cannot be written as JSON"):
        folders.write_manifest(tmp_path / MANIFEST, 1, {"x": float("nan"), "files": {}}, "the thing")


# --- its files against its manifest -----------------------------------------------------------------------------------


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A folder with a file, and another two folders down."""
    folder = tmp_path / "deep"
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "top.txt").write_text("top")
    (folder / "a" / "b" / "low.txt").write_text("low")
    return folder


def test_files_are_accounted_for_at_any_depth(deep: Path) -> None:
    entries = folders.file_entries(deep)
    assert list(entries) == ["a/b/low.txt", "top.txt"]
    assert entries["a/b/low.txt"] == folders.file_entry(deep / "a" / "b" / "low.txt")
    (deep / MANIFEST).write_text("{}")
    folders.check_files(deep / MANIFEST, entries, "sha256")


def _longer(folder: Path) -> None:
    (folder / "a" / "b" / "low.txt").write_text("lower")


def _changed(folder: Path) -> None:
    (folder / "a" / "b" / "low.txt").write_text("lox")


def _missing(folder: Path) -> None:
    (folder / "a" / "b" / "low.txt").unlink()


def _one_more(folder: Path) -> None:
    (folder / "a" / "more.txt").write_text("")


def _empty_folder(folder: Path) -> None:
    (folder / "a" / "empty").mkdir()


def _linked_folder(folder: Path) -> None:
    (folder / "a" / "link").symlink_to(folder / "a" / "b")


def _link_out(folder: Path) -> None:
    (folder / "a" / "b" / "low.txt").rename(folder.parent / "low.txt")
    (folder / "a" / "b" / "low.txt").symlink_to(folder.parent / "low.txt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_longer, r"a/b/low\.txt has 5 bytes, the manifest says 3"),
        (_changed, r"a/b/low\.txt: sha256 is"),
        (_missing, r"a/b/low\.txt is missing, though the manifest lists it"),
        (_one_more, r"a/more\.txt is not in the manifest; remove it"),
        (_empty_folder, r"a/empty is not in the manifest; remove it"),
        (_linked_folder, r"a/link is not in the manifest; remove it"),
        (_link_out, r"a/b/low\.txt is a link that leads out of the folder"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_whatever_changed_below_is_named(deep: Path, change: Callable[[Path], None], message: str) -> None:
    entries = folders.file_entries(deep)
    change(deep)
    with pytest.raises(IntegrityError if change is _changed else CheckpointError, match=message):
        folders.check_files(deep / MANIFEST, entries, "sha256")
    if change is _changed:
        folders.check_files(deep / MANIFEST, entries, "size")


# --- a file -----------------------------------------------------------------------------------------------------------


def test_a_file_takes_its_place_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    for text in ("first", "second"):
        before = everything_below(tmp_path)
        with folders.replacing(path) as partial:
            assert (partial.suffix, partial.read_bytes()) == (".partial", b"")
            assert partial.stat().st_dev == tmp_path.stat().st_dev  # so that a rename will do
            partial.write_text(text)
            assert everything_below(tmp_path) == {**before, partial.relative_to(tmp_path).as_posix(): text}
        assert everything_below(tmp_path) == {"result.json": text}


def _give_up(path: Path, error: BaseException) -> None:
    with folders.replacing(path) as partial:
        partial.write_text("half")
        raise error


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()], ids=repr)
def test_a_failure_leaves_the_old_file_and_no_debris(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "result.json"
    for before in ({}, {"result.json": "old"}):
        for name, text in before.items():
            (tmp_path / name).write_text(text)
        with pytest.raises(type(error)):
            _give_up(path, error)
        assert everything_below(tmp_path) == before


def test_two_writers_of_one_file_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    with folders.replacing(path) as one, folders.replacing(path) as other:
        assert one != other
        one.write_text("one")
        other.write_text("other")
    assert everything_below(tmp_path) == {"result.json": "one"}  # whose context ended last


def test_permission_bits_follow_the_umask_whatever_the_writer_did(tmp_path: Path, mask: int) -> None:
    path = tmp_path / "x.safetensors"
    with folders.replacing(path) as partial:
        safetensors.numpy.save_file({"x": np.zeros(2)}, partial)
        partial.chmod(0o600)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "result.json").write_text("old")
    (tmp_path / "link.json").symlink_to(tmp_path / "there" / "result.json")
    with folders.replacing(tmp_path / "link.json") as partial:
        partial.write_text("new")
    assert (tmp_path / "link.json").is_symlink()
    assert everything_below(tmp_path / "there") == {"result.json": "new"}
