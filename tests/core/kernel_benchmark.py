"""The benchmark of the kernels, rehearsed on small shapes. Run by `test_fused.py`, as `kernel_cases.py` is."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from defense.benchmarks import (
    kernel,
    kernel_cases,
    kernel_rows,
    kernel_sections,
    kernel_timing,
    kernel_variants,
    speed_workloads,
)
from defense.benchmarks.kernel_cases import Case
from defense.benchmarks.kernel_parity import gate
from defense.core.ops import fused

from .kernel_setup import IS_INTERPRETED
from .kernel_setup import _poisoned_memory as _poisoned_memory  # autouse


@pytest.fixture
def small_benchmark(monkeypatch):
    """Let the benchmark of the kernels run here on a small shape, as it runs on a GPU but for the clock."""
    if not IS_INTERPRETED:
        pytest.skip("a GPU runs the benchmark itself")
    case = Case("ViT-B-32", 2, 5, 48, 130, 8)
    gpu = kernel_rows.Gpu("interpreter", *["-"] * 5)
    parity = [(case, torch.float32, "topk", "none"), (case, torch.bfloat16, "jumprelu", "layer_norm")]
    for module, changed in {
        kernel_cases: {
            "DEVICE": "cpu", "CASES": [case], "SET_SIZES": (8, 64), "PARITY": parity,
            "END_TO_END": ((case, 1), (case, 0)),
            "TILES": ((16, 16, 16, 4, 2, 1), (32, 64, 16, 4, 2, 1)),
        },
        kernel: {"check_gpu": lambda: None, "gpu_of": lambda: gpu, "capability": lambda: 90},
        kernel_sections: {"sparsify": lambda: None},
        kernel_timing: {"peak_mib": lambda _job: 0.5, "_finished": lambda job: job(), "_SQUARE": 8, "_WARM_S": 0.01},
    }.items():  # fmt: skip
        for name, value in changed.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(kernel_timing.Bench, "time", lambda _self, job: (job(), (2.0, 1.0, 3.0))[1])
    monkeypatch.setattr(kernel_timing.Bench, "graph_ms", lambda _self, job: (job(), 0.25)[1])


@pytest.fixture
def whole_benchmark(small_benchmark, tiny_clip, monkeypatch):
    """The same with all that it times: torch.compile, without its code generator, and whole models."""
    monkeypatch.setattr(kernel_variants.torch, "compile", partial(torch.compile, backend="aot_eager"))
    monkeypatch.setattr(speed_workloads, "create_model", lambda _case: tiny_clip)
    kernel_sections._models.cache_clear()
    yield
    kernel_sections._models.cache_clear()


@pytest.mark.slow
def test_the_whole_benchmark_runs_on_a_small_shape(whole_benchmark, tmp_path, capsys):
    out = tmp_path / "kernel.json"
    assert kernel.main(["--out", str(out)]) == 0, capsys.readouterr().err
    rows, printed = kernel_rows.load_rows(out), capsys.readouterr().out
    assert kernel_rows.table(kernel_rows.short(rows)) in printed
    assert "rounding decides" in printed
    arms = {row.operation: {other.arm for other in rows if other.operation == row.operation} for row in rows}
    assert arms["encode_topk"] == {"kernels", "eager", "eager, compiled"}
    assert arms["suppress"] >= {
        "eager dense", "eager sparse", "eager sparse, compiled", "reference", "reference, compiled", "kernels"
    }  # fmt: skip
    assert len([arm for arm in arms["suppress"] if "tile" in arm]) == 2
    models = {"plain CLIP", "defended after block 1", "defended after block 0"}
    assert arms["encode_image"] == models | {f"{name}, compiled" for name in models}
    assert {row.dtype for row in rows if row.operation == "encode_image"} == {"bfloat16", "float16"}
    ours = [row for row in rows if row.operation == "suppress" and row.arm == "kernels"]
    assert all(row.graph_ms == 0.25 for row in ours)
    assert all(row.peak_floor_ms == pytest.approx(row.n_firing * 48 * 130 / 8**3 * 2) for row in ours)
    assert len(ours) == len(kernel_cases.SHARES) * 3  # two dtypes for one of two sizes of S
    assert all(row.unequal == 0 for row in ours)
    assert {(row.share, row.n_firing) for row in ours} == {(share, round(10 * share)) for share in kernel_cases.SHARES}


def test_fault_what_fails_leaves_the_rest_of_the_benchmark_standing(small_benchmark, monkeypatch, tmp_path, capsys):
    names = ("more_suppress_rows", "encode_rows", "relu_rows")
    monkeypatch.setattr(kernel, "SECTIONS", tuple(getattr(kernel_sections, name) for name in names))
    monkeypatch.setattr(kernel_sections, "compiled", lambda job: job)
    monkeypatch.setattr(kernel_cases, "SHARES", (1.0,))
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
    monkeypatch.setattr(kernel_cases, "PARITY", [(Case("x", 2, 5, 48, 130, 8), torch.float32, "topk", "none")])
    assert gate() == []
    right = fused.suppress
    monkeypatch.setattr(fused, "suppress", lambda *args: right(*args[:-1], 1))
    assert "tokens are wrong" in gate()[0]
