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


def measured(out: Path, seed: int, clock: float, **environment: str) -> dict[str, dict[str, Any]]:
    """Measure in a process of its own, and return the results by file, less what they say of the run."""
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
    done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {}
    for path in sorted(out.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        assert result["robust"].pop("run")["environment"]["timestamp"]
        found[path.name] = result
    return found


def test_fault_82_clock_locale_zone_hashes_and_global_seeds_change_no_result(tmp_path):
    here = measured(tmp_path / "a", 1, 0.0, TZ="UTC", LC_ALL="C", PYTHONHASHSEED="0")
    there = measured(tmp_path / "b", 2, 4e8, TZ="Pacific/Kiritimati", LC_ALL="C.UTF-8", PYTHONHASHSEED="4711")
    assert len(here) == 3
    assert json.dumps(here) == json.dumps(there)  # every digit, and the order of keys


@pytest.mark.slow
def test_fault_82_a_second_run_over_the_first_changes_nothing(tmp_path):
    first = measured(tmp_path / "a", 1, 0.0)
    assert json.dumps(measured(tmp_path / "a", 3, 1e5)) == json.dumps(first)
