"""Environments that servers run in, made as the page and the Dockerfiles say, whatever runs the tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
_NOT_BUILT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "results")


def pip(*arguments: object) -> None:
    """Run pip; the test is skipped where no package index has what it is asked for."""
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"no package index that has what a server needs: {done.stderr.strip()[-300:]}")


def wheels_of(folder: Path) -> Path:
    """Make the folder of wheels that a bundle's files ask for, of a copy of this checkout, which stays as it is."""
    checkout = shutil.copytree(ROOT, folder / "checkout", ignore=_NOT_BUILT)
    wheels = folder / "wheels"
    pip("wheel", "--quiet", "--no-build-isolation", "-w", wheels, f"{checkout}[onnx]", "numpy<2")
    return wheels


def environment(folder: Path, *asked: object) -> Path:
    """Make a virtual environment of the Python that runs this, and install into it what pip is asked for."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    # Compiled are the modules that a server imports, when it does: to compile all takes longer than the tests.
    python = folder / "bin" / "python"
    pip("--python", python, "install", "--quiet", "--no-compile", "--only-binary", ":all:", *asked)
    return folder


def site_packages(folder: Path) -> Path:
    """The folder of the packages of an environment."""
    (found,) = folder.glob("lib/python*/site-packages")
    return found
