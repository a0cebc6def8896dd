"""What a result says of the machine and of the checkout that it was measured with."""

from __future__ import annotations

import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from defense.benchmarks.environment import busy_words, checkout_of, checkout_words, environment_of, machine_words

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="runs where git is installed")


def git(folder: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    command = ["git", *identity, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one commit: `package/module.py`, and a rule that ignores `*.log`."""
    folder = tmp_path / "checkout"
    (folder / "package").mkdir(parents=True)
    (folder / "package" / "module.py").write_text("")
    (folder / ".gitignore").write_text("*.log\n")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "Begin")
    return folder


@needs_git
def test_a_checkout_without_changes_is_clean(checkout):
    (checkout / "run.log").write_text("ignored")
    assert checkout_of(checkout / "package" / "module.py") == (git(checkout, "rev-parse", "HEAD"), False)


@needs_git
@pytest.mark.parametrize("place", ["package/module.py", "package/other.py", "new/other.py"])
@pytest.mark.parametrize("shown", ["normal", "no"], ids=["default", "untracked files hidden by the user's settings"])
def test_a_changed_or_untracked_file_anywhere_makes_a_checkout_dirty(checkout, place, shown):
    git(checkout, "config", "status.showUntrackedFiles", shown)
    (checkout / place).parent.mkdir(exist_ok=True)
    (checkout / place).write_text("changed")
    assert checkout_of(checkout / "package" / "module.py")[1] is True


@needs_git
def test_a_file_that_git_does_not_track_has_no_checkout(checkout, tmp_path):
    installed = checkout / "site-packages.log"
    installed.write_text("")
    assert checkout_of(installed) == (None, None)
    assert checkout_of(tmp_path / "module.py") == (None, None)


@needs_git
def test_a_checkout_without_a_commit_has_no_state(tmp_path):
    git(tmp_path, "init", "-q")
    (tmp_path / "module.py").write_text("")
    git(tmp_path, "add", ".")
    assert checkout_of(tmp_path / "module.py") == (None, None)


def test_captions_name_the_checkout():
    commit = "0123456789abcdef"
    assert checkout_words({"commit": None, "is_dirty": None}) == "no commit"
    assert checkout_words({"commit": commit, "is_dirty": False}) == "0123456789ab"
    assert checkout_words({"commit": commit, "is_dirty": True}) == "0123456789ab + changes"


def test_the_environment_holds_the_versions_that_are_installed():
    torch, open_clip = pytest.importorskip("torch"), pytest.importorskip("open_clip")
    here = environment_of("typed")
    assert (here.torch, here.open_clip, here.command) == (torch.__version__, open_clip.__version__, "typed")
    assert here.cores >= 1
    assert ", 3 threads, load before the run " in machine_words({**asdict(here), "threads": 3})


def test_to_take_down_the_environment_loads_no_open_clip():
    pytest.importorskip("torch")
    code = (
        "import sys; from defense.benchmarks import environment; assert 'torch' not in sys.modules; "
        "environment.environment_of(''); assert 'open_clip' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("load", "is_busy"), [(0.1, False), (2.3, True), (float("nan"), False)])
def test_a_busy_machine_is_told(load, is_busy):
    words = busy_words(replace(environment_of("test"), load=load))
    assert (words is not None) == is_busy
    assert words is None or f"{load}: other programs" in words
