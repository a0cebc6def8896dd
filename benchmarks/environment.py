"""Where, when and with what a result was measured: machine, versions, the checkout's commit and the command.

Every stored result holds an `Environment`. To read or show one takes neither torch nor open_clip.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Environment:
    """Where, when and with what a result was measured.

    Attributes:
        cpu: Model of the CPU.
        cores: Cores that this process may use.
        load: Load average over a minute before the run: what else was busy. NaN where the system does not tell.
        python: Version.
        torch: Version; None where it is not installed.
        open_clip: Version; None where it is not installed.
        commit: Full hash of the checkout's git commit; None outside of a checkout.
        is_dirty: Whether the checkout differed from that commit, by changed or by untracked files; None outside of one.
        timestamp: Start of the run, UTC, ISO 8601.
        command: What was typed.
    """

    cpu: str
    cores: int
    load: float
    python: str
    torch: str | None
    open_clip: str | None
    commit: str | None
    is_dirty: bool | None
    timestamp: str
    command: str


def environment_of(command: str) -> Environment:
    """Return what this machine and checkout are at the moment.

    Args:
        command: What was typed, for the record.
    """
    commit, is_dirty = checkout_of(Path(__file__).resolve())
    return Environment(
        cpu=_cpu_model(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        load=os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan"),
        python=platform.python_version(),
        torch=_torch_version(),
        open_clip=installed_version("open_clip_torch"),
        commit=commit,
        is_dirty=is_dirty,
        timestamp=datetime.now(UTC).isoformat(timespec="seconds"),
        command=command,
    )


def busy_words(environment: Environment, limit: float = 0.5) -> str | None:
    """Return a warning where something else kept the machine busy before a run; None where it was quiet.

    Args:
        environment: Of the run.
        limit: Load average that is still quiet.
    """
    if not environment.load > limit:
        return None
    return (
        f"the load before this run was {environment.load:.1f}: other programs are at work, and times taken now compare "
        f"with nothing. Wait until it is below {limit}"
    )


def _torch_version() -> str | None:
    """Return the version with its build, which the index does not tell; None where torch is not installed."""
    try:
        import torch
    except ImportError:
        return None
    return str(torch.__version__)


def installed_version(package: str) -> str | None:
    """Return the version of a package by its name in the index, without importing it; None where it is missing."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def checkout_of(file: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the git checkout that tracks a file, and whether the checkout differs from that commit.

    Both are None where git does not track the file: a package that is installed inside of some other checkout does not
    belong to it. Untracked files count as a difference unless git ignores them, whatever the user's settings.
    """
    is_tracked = _git(file.parent, "ls-files", "--error-unmatch", file.name) is not None
    commit = _git(file.parent, "rev-parse", "HEAD") if is_tracked else None
    if commit is None:
        return None, None
    return commit, bool(_git(file.parent, "status", "--porcelain", "--untracked-files=normal"))


def machine_words(environment: Mapping[str, Any]) -> str:
    """Return a sentence for a caption: the machine, the versions, the checkout and the time of a result.

    Args:
        environment: An `Environment` as JSON values; beside them it may hold the number of "threads" of torch.
    """
    here = environment
    threads = f"{here['threads']} threads, " if "threads" in here else ""
    return (
        f"{here['cpu']}, {here['cores']} cores, {threads}load before the run {here['load']:.1f}, "
        f"torch {here['torch']}, open_clip {here['open_clip']}, {checkout_words(here)}, {here['timestamp']}."
    )


def checkout_words(environment: Mapping[str, Any]) -> str:
    """Return the first digits of the commit of a result, and whether there were changes on top of it.

    Args:
        environment: An `Environment` as JSON values.
    """
    commit = environment["commit"]
    return "no commit" if commit is None else commit[:12] + (" + changes" if environment["is_dirty"] else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """Return what a git command prints in a folder; None where it fails or there is no git."""
    try:
        done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def write_json(path: Path, value: Any) -> None:
    """Write a result as JSON, making its folder where it is missing; what was there is replaced only by a whole one.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    from defense.store.folders import replacing  # loads safetensors, which the timing of kernels does without

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")
