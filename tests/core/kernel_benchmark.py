"""The benchmark of the kernels, rehearsed on small shapes. Run by `test_fused.py`, as `kernel_cases.py` is."""

from __future__ import annotations

import pytest
import torch

from defense.benchmarks import kernel, kernel_cases, kernel_rows, kernel_sections, kernel_timing
from defense.benchmarks.kernel_cases import Case
from defense.benchmarks.kernel_parity import gate
from defense.core.ops import fused

from .kernel_setup import IS_INTERPRETED
from .kernel_setup import _poisoned_memory as _poisoned_memory  # autouse


@pytest.fixture
def small_benchmark(monkeypatch):
    """Let the benchmark of the kernels run here, on a small shape, for the given sections."""
    if not IS_INTERPRETED:
        pytest.skip("a GPU runs the benchmark itself")
    cases = [Case("ViT-B-32", 2, 5, 48, 300, 8)]
    gpu = kernel_rows.Gpu("interpreter", *["-"] * 5)
    names = ("tile_rows", "suppress_rows", "encode_rows", "relu_rows", "more_suppress_rows")
    sections = tuple(getattr(kernel_sections, name) for name in names)
    parity = [(cases[0], torch.float32, "topk", "none"), (cases[0], torch.bfloat16, "jumprelu", "layer_norm")]
    for module, changed in {
        kernel_cases: {
            "DEVICE": "cpu", "CASES": cases, "SET_SIZES": (8, 64), "SHARES": (0.05, 1.0), "PARITY": parity,
            "TILES": ((16, 16, 16, 4, 2, 1), (32, 64, 16, 4, 2, 1)),
        },
        kernel: {"check_gpu": lambda: None, "gpu_of": lambda: gpu, "SECTIONS": sections},
        kernel_sections: {"compiled": lambda job: job, "sparsify": lambda: None},
        kernel_timing: {"peak_mib": lambda _job: 0.5, "_finished": lambda job: job(), "_SQUARE": 8, "_WARM_S": 0.01},
    }.items():  # fmt: skip
        for name, value in changed.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(kernel_timing.Bench, "time", lambda _self, job: (job(), (2.0, 1.0, 3.0))[1])
    monkeypatch.setattr(kernel_timing.Bench, "graph_ms", lambda _self, job: (job(), 0.25)[1])


def test_the_benchmark_runs_on_small_shapes(small_benchmark, tmp_path, capsys):
    out = tmp_path / "kernel.json"
    assert kernel.main(["--out", str(out)]) == 0, capsys.readouterr().err
    rows, printed = kernel_rows.load_rows(out), capsys.readouterr().out
    assert kernel_rows.table(kernel_rows.short(rows)) in printed
    assert "rounding decides" in printed
    assert {row.arm for row in rows if row.operation == "encode_topk"} == {"kernels", "eager", "eager, compiled"}
    assert len({row.arm for row in rows if "tile" in row.arm}) == 2
    ours = [row for row in rows if row.operation == "suppress" and row.arm == "kernels"]
    assert all(row.graph_ms == 0.25 for row in ours)
    assert all(row.peak_floor_ms == pytest.approx(row.n_firing * 48 * 300 / 8**3 * 2) for row in ours)
    assert len(ours) == 2 * 3  # shares; two dtypes for one of two sizes of S
    assert all(row.unequal == 0 for row in ours)
    assert {row.n_firing for row in ours if row.share == 0.05} == {0}
    assert {row.arm for row in rows} >= {"eager dense", "eager sparse", "eager sparse, compiled", "reference, compiled"}
    assert {row.n_firing for row in ours if row.share == 1} == {10}


def test_fault_what_fails_leaves_the_rest_of_the_benchmark_standing(small_benchmark, monkeypatch, tmp_path, capsys):
    right = kernel_sections.n_unequal
    is_float16 = lambda got: got.dtype == torch.float16  # noqa: E731
    monkeypatch.setattr(kernel_sections, "n_unequal", lambda got, exact: 3 if is_float16(got) else right(got, exact))
    monkeypatch.setattr(kernel_sections, "encode", None)  # breaks encode_rows in the middle
    out = tmp_path / "kernel.json"
    assert kernel.main(["--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "3 of 10 tokens are wrong" in printed.err
    assert "encode_rows: TypeError" in printed.err
    rows = kernel_rows.load_rows(out)
    assert {row.dtype for row in rows} == {"bfloat16"}
    assert {row.operation for row in rows} == {"suppress", "suppress, relu"}
    assert kernel_rows.table(kernel_rows.short(rows)) in printed.out


def test_fault_nothing_is_begun_when_the_time_is_over(small_benchmark, tmp_path, capsys):
    assert kernel.main(["--out", str(tmp_path / "kernel.json"), "--minutes", "0"]) == 0
    assert "Out of time, and not measured:\nkernels, tile 16 x 16 x 16" in capsys.readouterr().out


@pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU runs the benchmark itself")
def test_the_gate_of_the_benchmark_sees_a_kernel_that_is_wrong(monkeypatch):
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_cases, "PARITY", [(Case("x", 2, 5, 48, 300, 8), torch.float32, "topk", "none")])
    assert gate() == []
    right = fused.suppress
    monkeypatch.setattr(fused, "suppress", lambda *args: right(*args[:-1], 1))
    assert "tokens are wrong" in gate()[0]
