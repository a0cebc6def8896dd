"""Results are the same whenever, wherever and by whomever they are measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")
pytest.importorskip("matplotlib")

BENCH = """
import random, sys, time
seed, clock = int(sys.argv[1]), float(sys.argv[2])
import numpy as np, torch
random.seed(seed); np.random.seed(seed); torch.manual_seed(seed)
now = time.time
time.time = lambda: now() + clock
from defense.benchmarks.datasets import mini
mini.N_TEST = mini.N_TRAIN = 24
from defense.cli import main
sys.argv = ["defense", *sys.argv[3:]]
main()
"""


def begun(out: Path, seed: int, clock: float, **environment: str) -> subprocess.Popen[str]:
    """Begin to measure in a process of its own."""
    arguments = [
        "bench",
        "mini-waterbirds",
        "--methods",
        "zero-shot,defense,random-latents",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    command = [sys.executable, "-P", "-c", BENCH, str(seed), str(clock), *arguments]
    return subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def measured(out: Path, process: subprocess.Popen[str]) -> dict[str, dict[str, Any]]:
    """Await a measurement, and return the results by file, less what they say of the run."""
    _, said = process.communicate()
    assert process.returncode == 0, said
    found = {}
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["robust"].pop("run")["environment"]["timestamp"]
        found[path.name] = result
    return found


def test_fault_82_clock_locale_zone_hashes_and_global_seeds_change_no_result(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    with (
        begun(a, 1, 0.0, TZ="UTC", LC_ALL="C", PYTHONHASHSEED="0") as first,
        begun(b, 2, 4e8, TZ="Pacific/Kiritimati", LC_ALL="C.UTF-8", PYTHONHASHSEED="4711") as second,
    ):
        here, there = measured(a, first), measured(b, second)
    assert len(here) == 3
    assert json.dumps(here) == json.dumps(there)  # every digit, and the order of keys


@pytest.mark.slow
def test_fault_82_a_second_run_over_the_first_changes_nothing(tmp_path):
    out = tmp_path / "a"
    with begun(out, 1, 0.0) as process:
        first = measured(out, process)
    with begun(out, 3, 1e5) as process:
        assert json.dumps(measured(out, process)) == json.dumps(first)
