"""Folders and files under writers that are killed, that run out of space, and that are not alone."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.errors import CheckpointError
from defense.hosts.defense import ClipId, Defense, Site
from defense.store import atomic, defenses, folders

fcntl = pytest.importorskip("fcntl", reason="locks on files; runs on Linux and macOS")

COMMON = """
import os, signal, sys
from pathlib import Path
from defense.store import atomic, folders
target = Path(sys.argv[1])
def die(*_, **__): os.kill(os.getpid(), signal.SIGKILL)
"""
PUBLISH = (
    COMMON
    + """
rename, calls = Path.rename, []
def killed(path, to):
    calls.append(path)
    if len(calls) > {before}: die()
    return rename(path, to)
Path.rename = killed
with folders.publishing(target, read={read}) as staging:
    (staging / "a.txt").write_text("new")
    {body}
"""
)


def run_killed(code: str, target: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code, target], capture_output=True, text=True, timeout=60)
    assert done.returncode == -signal.SIGKILL, done.stderr


def below(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    (tmp_path / "made").mkdir()
    (tmp_path / "made" / "old.txt").write_text("old")
    return tmp_path / "made"


WHEN = {
    "in the body": {"before": 9, "read": "print", "body": "die()"},
    "while it is read back": {"before": 9, "read": "die", "body": ""},
    "before the first rename": {"before": 0, "read": "print", "body": ""},
    "between the renames": {"before": 1, "read": "print", "body": ""},
}


@pytest.mark.parametrize("when", WHEN.values(), ids=WHEN)
def test_fault_a_killed_publication_is_undone_at_the_next_start(target: Path, when: dict[str, object]) -> None:
    run_killed(PUBLISH.format(**when), target)
    assert len(list(target.parent.iterdir())) == 2 - (when["before"] == 1)
    folders.restore(target)
    assert below(target.parent) == {"made/old.txt": "old"}
    assert list(target.parent.iterdir()) == [target]


def test_fault_a_publication_that_was_killed_behind_its_renames_stays(target: Path) -> None:
    run_killed(
        COMMON
        + """
import shutil
shutil.rmtree = die
with folders.publishing(target, read=print) as staging:
    (staging / "a.txt").write_text("new")
""",
        target,
    )
    folders.restore(target)
    assert below(target.parent) == {"made/a.txt": "new"}
    assert list(target.parent.iterdir()) == [target]


def test_the_next_publication_cleans_up_too(target: Path) -> None:
    for _ in range(2):
        run_killed(PUBLISH.format(**WHEN["between the renames"]), target)
    with folders.publishing(target, read=below) as staging:
        (staging / "b.txt").write_text("newer")
    assert below(target.parent) == {"made/b.txt": "newer"}
    assert list(target.parent.iterdir()) == [target]


def test_what_another_process_is_writing_and_what_is_nobodys_workshop_stays(target: Path) -> None:
    kept = [".made-original", ".made-abcdefgh", ".made-x-abcdefgh", ".made.backup", ".made-abcdefg1"]
    for name in kept:
        (target.parent / name).mkdir()
        (target.parent / name / "mine.txt").write_text("mine")
    (target.parent / ".made-x-abcdefgh" / "mine.txt").rename(target.parent / ".made-x-abcdefgh" / "old")
    with folders.publishing(target, read=below) as staging:
        folders.restore(target)
        (staging / "a.txt").write_text("new")
        with folders.publishing(target, read=below) as other:
            (other / "b.txt").write_text("another's")
    assert below(target) == {"a.txt": "new"}
    assert {path.name for path in target.parent.iterdir()} == {"made", *kept}


def test_fault_what_a_killed_writer_of_a_file_left_is_removed_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "state.bin"
    path.write_text("old")
    body = "(partial.parent / '.tmpAb12').touch()\n    partial.write_text('half')\n    die()"
    run_killed(f"{COMMON}\nwith folders.replacing(target) as partial:\n    {body}", path)
    assert len(list(tmp_path.iterdir())) == 2
    with folders.replacing(path) as first, folders.replacing(path) as second:
        first.write_text("first")
        second.write_text("second")
    assert path.read_text() == "first"
    assert [each.name for each in tmp_path.iterdir()] == ["state.bin"]


# --- no space left ----------------------------------------------------------------------------------------------------


@contextmanager
def small_files() -> Iterator[None]:
    """No file may grow beyond 64 KiB, as if the disk were full. No fixture: the log of the tests is a file, too."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)


def made_defense(seed: int, d_sae: int = 2) -> Defense:
    """A defense whose numbers are all the seed's."""
    config = SAEConfig(d_model=2, d_sae=d_sae, act="relu")
    parameters = {name: np.full(shape, seed, np.float32) for name, shape in config.parameter_shapes.items()}
    site = Site("blocks.0.hook_resid_post", config, parameters, (LatentSet(f"set {seed}", (0,)),))
    preprocess = Preprocess((8, 8), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    return Defense(ClipId("x", None, "0" * 64, False, 2, 1), preprocess, (site,))


def test_fault_75_a_full_disk_is_one_clear_error_and_loses_nothing(tmp_path: Path) -> None:
    folder = defenses.save(made_defense(1), tmp_path / "defense")
    with small_files(), pytest.raises(OSError, match="unchanged") as caught:
        defenses.save(made_defense(2, d_sae=20_000), folder)
    assert caught.value.errno == errno.EFBIG
    assert caught.value.filename == str(folder)
    assert list(tmp_path.iterdir()) == [folder]
    assert defenses.load(folder).sets == ("set 1",)
    path = tmp_path / "state.bin"
    with small_files(), pytest.raises(OSError, match="unchanged"), folders.replacing(path) as partial:
        partial.write_bytes(bytes(2**17))
    assert list(tmp_path.iterdir()) == [folder]


def test_a_tensor_that_cannot_be_written_for_another_reason_keeps_its_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file") as caught:
        folders.write_tensors({"x": np.zeros(2)}, tmp_path / "not there" / "x", safetensors.numpy.save_file)
    assert caught.value.errno == errno.ENOENT


def test_other_errors_of_the_system_pass_as_they_are(target: Path) -> None:
    with pytest.raises(FileNotFoundError) as caught, folders.publishing(target, read=below):
        Path("/not/there").read_text()
    assert caught.value.filename == "/not/there"


# --- not alone --------------------------------------------------------------------------------------------------------

WRITER = """
import sys
sys.path.insert(0, sys.argv[3])
from test_atomic import made_defense
from defense.store import defenses
for _ in range(int(sys.argv[4])):
    defenses.save(made_defense(int(sys.argv[2])), sys.argv[1])
"""


def test_fault_readers_see_one_whole_folder_whoever_writes_it(tmp_path: Path) -> None:
    folder = defenses.save(made_defense(1), tmp_path / "defense")
    command = [sys.executable, "-c", WRITER, folder]
    here = str(Path(__file__).parent)
    writers = [subprocess.Popen([*command, str(seed), here, "40"], stderr=subprocess.PIPE) for seed in (1, 2, 3)]
    n_read, seen = 0, set()
    while any(writer.poll() is None for writer in writers) or n_read < 20:
        found = defenses.load(folder)
        (name,) = found.sets
        assert name == f"set {int(found.sites[0].parameters['b_dec'][0])}"
        seen.add(name)
        n_read += 1
    for writer in writers:
        assert writer.communicate()[1] == b""
        assert writer.returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["defense"]
    assert len(seen) > 1


def test_a_folder_that_is_replaced_while_it_is_read_is_read_again(tmp_path: Path, monkeypatch) -> None:
    folder = defenses.save(made_defense(1), tmp_path / "defense")
    read_files = folders.read_files

    def replaced(*arguments):
        monkeypatch.undo()
        defenses.save(made_defense(2), folder)
        return read_files(*arguments)

    monkeypatch.setattr(folders, "read_files", replaced)
    assert defenses.load(folder).sets == ("set 2",)


def test_damage_is_told_as_such_and_not_read_again(tmp_path: Path, monkeypatch) -> None:
    folder = defenses.save(made_defense(1), tmp_path / "defense")
    (folder / "site-0.safetensors").write_bytes(b"x")
    calls = []
    read_files = folders.read_files
    monkeypatch.setattr(folders, "read_files", lambda *a: calls.append(a) or read_files(*a))
    with pytest.raises(CheckpointError, match="bytes"):
        defenses.load(folder)
    assert len(calls) == 1


def test_fault_a_defense_that_a_killed_process_took_away_is_found_again(tmp_path: Path) -> None:
    folder = defenses.save(made_defense(1), tmp_path / "defense")
    run_killed(PUBLISH.format(**WHEN["between the renames"]), folder)
    assert not folder.exists()
    assert defenses.find_defense(str(folder)).sets == ("set 1",)


def test_a_place_that_may_not_be_written_is_left_alone(target: Path, monkeypatch) -> None:
    run_killed(PUBLISH.format(**WHEN["in the body"]), target)
    monkeypatch.setattr(atomic.shutil, "rmtree", lambda *_: (_ for _ in ()).throw(PermissionError(errno.EACCES, "no")))
    folders.restore(target)
    assert below(target) == {"old.txt": "old"}
    assert os.path.isdir(target)
