"""The command `defense bench`, on small data sets and with a full-size model."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks.named_clip import load_named_clip
from defense.benchmarks.robust_results import read_results
from defense.core.latents import LatentSet
from defense.store import defenses

from ..command import run
from .runs import NAMES, without_run, write_pictures


@pytest.fixture
def data(tmp_path, small_minis):
    """A folder with two small data sets: RTA-100 in part, and pictures to draw words on."""
    folder = tmp_path / "data"
    (folder / "rta100").mkdir(parents=True)
    paths = write_pictures(tmp_path / "pictures", 6)
    for i, path in enumerate(paths):
        label, word = NAMES[i % 3], NAMES[(i + 1) % 3]
        (folder / "rta100" / f"label={label}_text={word}.png").write_bytes(path.read_bytes())
        (folder / "synthetic" / label).mkdir(parents=True, exist_ok=True)
        (folder / "synthetic" / label / path.name).write_bytes(path.read_bytes())
    return folder


def test_bench_prints_tables_and_writes_results(data, tmp_path, defense):
    pytest.importorskip("matplotlib")
    arguments = ("bench", "typographic", "--data", data, "--defense", tmp_path / "defense", "--out", tmp_path / "out")
    code, out, err = run(*arguments, "--allow-partial", "--device", "cpu")
    assert code == 0, err
    assert "left out: paint, disentangling, scam" in err
    assert "### RTA-100" in out
    assert "Not the published data: 3 of 1,000 pictures; 3 of 100 classes" in out
    assert "### drawn words on synthetic" in out
    assert (tmp_path / "out" / "results.md").read_text() == out
    assert "Mini-typographic" not in out, "nobody asked for drawn pictures"
    assert "drawn, left out beside real pictures: mini-typographic; --with-drawn adds them" in err
    assert len(list((tmp_path / "out").glob("*.json"))) == 6  # three data sets, two methods
    assert len(list((tmp_path / "out").glob("*.png"))) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rta100"], "not the published RTA-100"),
        (["waterbirds"], "metadata.csv is missing"),
        (["nothing"], "no data set 'nothing'"),
        (["rta100", "--allow-partial", "--methods", "magic"], "no method 'magic'"),
        (["synthetic", "--font", "nothing.ttf"], "nothing.ttf"),
        (["synthetic", "--n", "5"], "--n is for the miniatures"),
        (["speed", "--n", "5"], "not --"),
    ],
)
def test_bench_usage_errors_exit_with_2(data, tmp_path, defense, arguments, message):
    code, out, err = run(
        "bench", *arguments, "--data", data, "--defense", tmp_path / "defense", "--out", tmp_path / "out"
    )
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_bench_without_a_model_is_a_usage_error(data, tmp_path):
    code, _, err = run("bench", "synthetic", "--data", data, "--methods", "zero-shot", "--out", tmp_path / "out")
    assert code == 2
    assert "--model is missing" in err


def test_bench_tells_of_unreadable_pictures_by_its_exit_code(data, tmp_path, defense):
    pytest.importorskip("matplotlib")
    next((data / "synthetic" / NAMES[0]).iterdir()).write_bytes(b"no picture")
    code, out, err = run(
        "bench", "synthetic", "--data", data, "--defense", tmp_path / "defense", "--out", tmp_path / "out"
    )
    assert code == 4
    assert "Incomplete: pictures that could not be read: 1 of synthetic-clean, 1 of synthetic-attacked" in out
    assert "could not be read" in err


def test_readers_metrics_and_reports_load_no_torch():
    code = (
        "import sys; import defense.benchmarks.datasets, defense.benchmarks.metrics, defense.benchmarks.tables, "
        "defense.benchmarks.plots, defense.benchmarks.robust; "
        "sys.exit(bool({'torch', 'open_clip', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- a full-size model ------------------------------------------------------------------------------------------------


@pytest.fixture
def rehearsal(shared_data, tmp_path) -> list[str]:
    """Arguments to measure ViT-B-32 with random weights, and a defense for just these, on a part of RTA-100."""
    from defense.core.config import SAEConfig
    from defense.hosts.defense import ClipId, Defense, Site
    from defense.hosts.families import tower_of

    from ..conftest import random_parameters

    (tmp_path / "data" / "rta100").mkdir(parents=True)
    for path in sorted((shared_data / "rta100").rglob("label=*"))[:70]:
        shutil.copy(path, tmp_path / "data" / "rta100")
    named = load_named_clip("ViT-B-32", "random")
    assert load_named_clip("ViT-B-32", "random").sha256 == named.sha256
    tower = tower_of(named.clip.model)
    spec = ClipId("ViT-B-32", "random", tower.fingerprint(), tower.quick_gelu, 768, 12)
    config = SAEConfig(d_model=768, d_sae=1024, act="topk", k=32)
    site = Site(
        "blocks.8.hook_resid_post", config.to_dict(), random_parameters(config), (LatentSet("text", range(99)),)
    )
    defenses.save(Defense(spec, named.clip.preprocess, (site,)), tmp_path / "defense")
    return [
        "bench", "rta100", "--data", str(tmp_path / "data"), "--model", "ViT-B-32", "--pretrained", "random",
        "--device", "cpu", "--defense", str(tmp_path / "defense"), "--allow-partial", "--out",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="memory of another process is told by POSIX systems only")
def test_a_rehearsal_with_a_full_size_model_that_is_interrupted(rehearsal, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"

    def started() -> subprocess.Popen:
        command = [sys.executable, "-P", "-c", "from defense.cli import main; main()", *rehearsal, str(out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in out.glob("embeddings/*.safetensors")}

    with started() as process:
        while process.poll() is None and len(kept()) < 2:  # the prompts and the first chunk of pictures
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert not list(out.glob("*.json"))
    before = kept()
    with started() as process:
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss < 3 * 2**20  # KiB: the model holds 0.6 GiB, torch and its libraries about as much
    assert "random weights: a rehearsal" in printed
    assert "70 of 1,000 pictures" in printed
    assert before.items() <= kept().items()
    assert len(kept()) == 5  # the prompts, and two chunks by two methods
    code, _, err = run(*rehearsal, tmp_path / "fresh")
    assert code == 0, err
    assert without_run(read_results(out)) == without_run(read_results(tmp_path / "fresh"))
