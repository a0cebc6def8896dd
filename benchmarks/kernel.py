"""What the Triton kernels cost on a GPU, beside PyTorch, torch.compile and the floor.

    python -m defense.benchmarks.kernel

All that only a GPU can tell, in one run of at most six minutes: every kernel is compiled, in as many processes as there
are cores; then a parity gate, then timings, then a table and how the targets were met. Where the gate fails, nothing is
timed. Rows go to benchmarks/results/kernel.json as they come.

| operation | variants |
|---|---|
| suppress | kernels; reference; eager dense (matmul, topk, scatter, matmul); eager sparse (matmul, topk, rows of S) |
| suppress, relu | kernels; reference |
| encode_topk, sparse_decode | kernels; eager; sparsify's, where it can be imported |
| encode_image | plain CLIP; defended by the kernels |

Reference and eager variants also run under torch.compile, and so do both of `encode_image`. Stored results and their
tables call a variant an "arm".

Gate: the kernels against float64, for odd sizes, every dtype, rule and norm, and for each shape that is timed. Left out
are tokens at which rounding decides what is among the k largest; they are counted. Every variant of the suppression
must agree with float64 too before it is timed; those other than the kernels may differ on a tenth of the tokens, as
they round pre-activations to the SAE's dtype and compare after that.

Timings: `triton.testing.do_bench`, the median with 20th and 80th percentile, the L2 cache cleared before each call;
each variant alone. Random weights and residuals. The encoder columns of S are longer than the others, so that about
half of the latents of S that fire are among the k largest, and the encoder biases of S are shifted until the wanted
share of tokens fires.

The floor of a TopK rule is the encoder matmul [n_firing, d_model] x [d_model, d_sae] at the rate that `torch.mm`
reaches on all tokens in the same run; for relu and `sparse_decode`, the bytes that must be moved at the measured rate
of a copy. Extra MiB is the peak of allocated memory during one call, above the inputs and the result.

Not measured: accuracy; float32 (its products run on the general cores); other GPUs than the one named.

For memory errors: compute-sanitizer python -m pytest tests/core/kernel_cases.py tests/core/kernel_encode.py

| file | what |
|---|---|
| `kernel_cases.py` | the shapes |
| `kernel_workloads.py` | random SAEs and residuals of these shapes |
| `kernel_variants.py` | who computes |
| `kernel_parity.py` | float64, and the gate |
| `kernel_timing.py` | times and memory |
| `kernel_sections.py` | what is timed with what; only whole models (`encode_image`) need open_clip |
| `kernel_static.py`, `kernel_static_tables.py` | `--static`: what the compiler makes of them |
| `kernel_compiling.py`, `kernel_slots.py` | how it is read, and followed on a CPU |
| `kernel_ahead.py` | all that it launches, compiled beforehand by as many processes as there are cores |
| `kernel_rows.py`, `kernel_targets.py` | the rows as JSON and as a table; how the targets were met |
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from defense.benchmarks import kernel_static_tables
from defense.benchmarks.environment import environment_of, installed_version, write_json
from defense.benchmarks.kernel_parity import gate
from defense.benchmarks.kernel_rows import Row, caption, save_rows, short, table
from defense.benchmarks.kernel_sections import SECTIONS
from defense.benchmarks.kernel_targets import targets
from defense.benchmarks.kernel_timing import Bench, capability, check_gpu, gpu_of
from defense.errors import BackendError

RESULTS = Path(__file__).with_name("results") / "kernel.json"
STATIC = RESULTS.with_name("kernel-static.json")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.kernel", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, help=f"where the rows go (default: {RESULTS}, or {STATIC.name} beside it)")
    parser.add_argument("--static", action="store_true", help="compile for every architecture; takes no GPU")
    parser.add_argument("--jobs", type=int, default=_cores(), help="processes that compile")
    parser.add_argument(
        "--minutes",
        type=float,
        default=5.5,
        help="nothing new is begun after, compiling included (default: %(default)s)",
    )
    return parser


def _cores() -> int:
    """Return the cores that this process may use; `defense.data` would load what the timing does without."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print; return 1 where the kernels are wrong, 3 where there is no GPU."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    command = shlex.join(["python", "-m", "defense.benchmarks.kernel", *argv])
    if arguments.static:
        return _static(command, arguments.out or STATIC, arguments.jobs)
    out = arguments.out or RESULTS
    try:
        check_gpu()
    except BackendError as error:
        print(error, file=sys.stderr)
        return 3
    from defense.benchmarks.kernel_ahead import compile_ahead  # takes triton

    start, environment = time.monotonic(), environment_of(command)
    rows: list[Row] = []
    with torch.no_grad():
        not_compiled = compile_ahead(capability(), arguments.jobs)
        bench = Bench(gpu_of(), environment, arguments.minutes - (time.monotonic() - start) / 60)
        bench.failures += not_compiled
        if failures := gate():
            print("The parity gate failed; nothing was timed.", *failures, sep="\n", file=sys.stderr)
            return 1
        for section in SECTIONS:
            try:
                for row in section(bench):
                    rows.append(row)
                    print(f"{row.operation}, {row.case.model}, {row.arm}: {row.latency_ms:.3f} ms", file=sys.stderr)
                    save_rows(rows, out)
            except Exception as error:  # what was measured stays, and the other sections are measured
                bench.failures.append(f"{section.__name__}: {type(error).__name__}: {error}")
    if rows:
        print(table(short(rows)), caption(rows), "\n".join(map(str, targets(rows))), sep="\n\n")
    if bench.skipped:
        print("\nOut of time, and not measured:", *bench.skipped, sep="\n")
    if bench.failures:
        print("\nFailed, and not in the table:", *bench.failures, sep="\n", file=sys.stderr)
    return 1 if bench.failures else 0


def _static(command: str, out: Path, jobs: int) -> int:
    """Compile, write, print; return 3 where there is no triton to compile with."""
    try:
        from defense.benchmarks import kernel_static
    except ImportError as error:
        print(f"this needs triton: {error}", file=sys.stderr)
        return 3
    environment = asdict(environment_of(command))
    result = {"environment": environment, "triton": installed_version("triton")}
    result |= kernel_static.measure_static(kernel_static.ARCHITECTURES, jobs)
    write_json(out, result)
    print(kernel_static_tables.static_table(result), kernel_static_tables.static_caption(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
