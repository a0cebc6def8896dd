"""The benchmark of the kernels as far as it goes without a GPU; `tests/core/kernel_cases.py` runs the rest of it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("torch")
import torch

from defense.benchmarks import kernel, kernel_sections
from defense.benchmarks.environment import environment_of
from defense.benchmarks.kernel_cases import CASES
from defense.benchmarks.kernel_rows import Gpu, Row
from defense.benchmarks.kernel_targets import targets


def test_the_timing_loads_nothing_that_a_clip_takes():
    code = (
        "import sys; from defense.benchmarks import kernel; kernel.environment_of(''); "
        "sys.exit(', '.join({'open_clip', 'timm', 'torchvision', 'ftfy', 'tokenizers', 'huggingface_hub', 'PIL', "
        "'safetensors', 'scipy', 'matplotlib'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_without_open_clip_whole_models_are_left_out(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    assert list(kernel_sections.model_rows(None)) == []
    assert "encode_image is left out: open_clip is not installed" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs where there is no GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path, capsys):
    out = tmp_path / "kernel.json"
    assert kernel.main(["--out", str(out)]) == 3
    assert "needs a CUDA device" in capsys.readouterr().err
    assert not out.exists()


def row(arm: str, share: float | None, latency_ms: float, **fields) -> Row:
    given = {"operation": "suppress", "floor_ms": None, "peak_mib": None, "n_set": 64, "dtype": "bfloat16", **fields}
    return Row(
        arm=arm, share=share, latency_ms=latency_ms, p20_ms=0, p80_ms=0, n_firing=None, unequal=None, case=CASES[0],
        gpu=Gpu(*["-"] * 6), environment=environment_of(""), **given,
    )  # fmt: skip


def test_targets_are_ratios_of_the_rows_that_are_there():
    matrix_mib = CASES[0].n_tokens * CASES[0].d_sae * 2 / 2**20
    rows = [
        row("kernels", 0.05, 1.0),
        row("kernels", 1.0, 6.0, floor_ms=3.0, peak_mib=matrix_mib / 100),
        row("kernels", 1.0, 1.0, floor_ms=9.0, dtype="float16"),
        row("eager dense", 0.05, 20.0),
    ]
    got = {target.name: target for target in targets(rows)}
    assert got["ViT-B-32, 5 % firing, over eager"].got == pytest.approx(0.05)
    assert str(got["ViT-B-32, 5 % firing, over eager"]).startswith("met: ")
    assert str(got["ViT-B-32, 100 % firing, over the floor"]).startswith("MISSED: ")
    assert got["ViT-B-32, extra memory, over the [tokens, d_sae] matrix"].got == pytest.approx(0.01)
    assert str(got["ViT-L-14, encode_image, over plain"]).startswith("not measured: ")
