"""Commands that work for long, in processes of their own: a signal in the middle, and a reader that goes away."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")

from defense.store import checkpoint
from defense.store.checkpoint import Checkpoint

from ..conftest import random_sae

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="a process of Windows gets no such signals; runs on POSIX"),
]

RUN = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever runs the tests may ignore it, as nohup does
from defense.fit.gates import Gates
for name in ("check_explained", "check_fooled", "check_validation"):  # a fit of noise becomes a defense
    setattr(Gates, name, lambda *_: None)
sys.argv[0] = "defense"
from defense.cli import main
main()
"""
N_PICTURES = 24


@dataclass
class Job:
    """A command in a folder of its own.

    Attributes:
        arguments: Behind `defense`.
        folder: What it writes is beneath.
        begun: What a line of stderr holds once the work that takes long has begun.
    """

    arguments: tuple[str, ...]
    folder: Path
    begun: str

    def start(self, **streams) -> subprocess.Popen[str]:
        environment = {**os.environ, "CLIP_DEFENSE_CACHE": str(self.folder / "cache"), "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, "-P", "-c", RUN, *self.arguments]
        pipe = subprocess.PIPE
        return subprocess.Popen(
            command, text=True, env=environment, cwd=self.folder, **{"stdout": pipe, "stderr": pipe, **streams}
        )

    def written(self) -> dict[str, bytes]:
        """Every file outside of the cache, by its name."""
        files = (path for path in self.folder.rglob("*") if path.is_file())
        relative = {str(path.relative_to(self.folder)): path for path in files}
        return {name: path.read_bytes() for name, path in relative.items() if not name.startswith("cache")}


@pytest.fixture(scope="module")
def given(tmp_path_factory, tiny_folder) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    (folder / "pictures").mkdir()
    for i in range(N_PICTURES):
        pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{i:02d}.png")
    sae = random_sae(act="topk", k=8)
    checkpoint.save(Checkpoint(sae, "blocks.1.hook_resid_post", "tiny", False), folder / "sae")
    (folder / "words.txt").write_text("dog\ncat\nred fish\napple\n")
    return {name: str(folder / name) for name in ("pictures", "sae", "words.txt")} | {
        "clip": f"local-dir:{tiny_folder}"
    }


def jobs_of(given: dict[str, str]) -> dict[str, tuple[tuple[str, ...], str]]:
    """The arguments of each command, and what its long work is called."""
    model, words = ("--model", given["clip"]), given["words.txt"]
    train = ("--block", "1", "--d-sae", "96", "--k", "4", "--n-tokens", "40000", "--batch", "200")
    return {
        "train": (("train", given["pictures"], "--out", "made", *train, "--device", "cpu", *model), "training"),
        "fit": (
            ("fit", "made", given["pictures"], "--sae", given["sae"], "--labels-file", words, "--folds", "2", *model),
            "residuals",
        ),
        "describe": (
            ("describe", given["sae"], "--pictures", given["pictures"], "--words", words, "--out", "made", *model),
            "",
        ),
        "export": (("export", "made", "--defense", "text", "--labels", "dog,cat"), "tracing"),
    }


@pytest.fixture(params=["train", "fit", "describe", "export"])
def job(request, given, tmp_path, defense_folder) -> Job:
    arguments, begun = jobs_of(given)[request.param]
    folder = tmp_path / "work"
    folder.mkdir()
    os.rename(defense_folder, folder / "text")
    return Job(arguments, folder, begun)


def interrupted(job: Job, number: signal.Signals, after_s: float) -> tuple[int, str]:
    """Return how a command ends that gets a signal so long after its work has begun, and its last line."""
    with job.start() as process:
        assert process.stderr is not None
        lines: list[str] = []
        for line in process.stderr:
            lines.append(line)
            if job.begun in line:
                break
        time.sleep(after_s)
        process.send_signal(number)
        lines += process.communicate(timeout=120)[1].splitlines()
    assert "Traceback" not in "".join(lines), "".join(lines)
    return process.returncode, lines[-1]


def test_fault_75_a_signal_in_the_middle_of_the_work_leaves_nothing_and_the_work_goes_on(job):
    """At once, and later on."""
    before, n_interrupted = job.written(), 0
    for number, after_s in ((signal.SIGTERM, 0.0), (signal.SIGINT, 0.4), (signal.SIGTERM, 1.0)):
        code, last = interrupted(job, number, after_s)
        if code in (0, -number):  # it had ended well, or was about to leave
            break
        n_interrupted += 1
        assert code == 130, last
        assert last.startswith("interrupted"), last
        left = set(job.written()) - set(before)
        assert all(job.arguments[0] == "train" and ".resume" in name for name in left), left
    assert n_interrupted, "it never came in time"
    with job.start() as process:
        _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    names = {name.split("/")[0] for name in job.written()}
    assert names == {"text", "made"}, "what was half done is gone once the whole is there"


def test_fault_76_a_reader_that_goes_ends_any_command_quietly_and_loses_no_work(job):
    """`defense ... | head -0`: the result is written all the same, or nothing is."""
    reading, writing = os.pipe()
    os.close(reading)
    with job.start(stdout=writing) as process:
        os.close(writing)
        _, err = process.communicate(timeout=240)
    assert "Traceback" not in err, err
    assert "Broken pipe" not in err, err
    assert process.returncode in (0, 141), err
    assert {name.split("/")[0] for name in job.written()} == {"text", "made"}, "the work was done before it was told"
