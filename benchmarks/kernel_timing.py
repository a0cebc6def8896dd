"""Times and memory of jobs on a GPU, as rows of the benchmark of the kernels.

Needs torch, triton and numpy; neither open_clip nor anything that a CLIP takes.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from defense.benchmarks import kernel_cases
from defense.benchmarks.cost import MIB
from defense.benchmarks.environment import Environment
from defense.benchmarks.kernel_cases import Case
from defense.benchmarks.kernel_rows import Gpu, Row
from defense.benchmarks.kernel_workloads import Workload
from defense.errors import BackendError

_SQUARE, _WARM_S = 8192, 1.0
_REP_MS, _SAMPLES = 60, 20


class Bench:
    """Times jobs and turns them into rows, as long as there is time.

    Args:
        gpu: Goes into every row.
        environment: Goes into every row.
        minutes: After these, `has_time` says no.
    """

    def __init__(self, gpu: Gpu, environment: Environment, minutes: float) -> None:
        self.gpu, self.environment = gpu, environment
        self.deadline = time.monotonic() + 60 * minutes
        self.skipped: list[str] = []
        self.failures: list[str] = []
        square = torch.randn(_SQUARE, _SQUARE, dtype=torch.bfloat16, device=kernel_cases.DEVICE)
        until = time.monotonic() + _WARM_S  # clocks rise under load
        while time.monotonic() < until:
            _finished(lambda: square @ square)
        self.flop_per_ms = 2 * _SQUARE**3 / self.time(lambda: torch.mm(square, square))[0]
        source, target = (torch.empty(2**29, dtype=torch.int8, device=kernel_cases.DEVICE) for _ in range(2))
        self.bytes_per_ms = 2 * source.nbytes / self.time(lambda: target.copy_(source))[0]

    def has_time(self, what: str) -> bool:
        """Return whether there is time left; where not, note in `skipped` what is left out for that."""
        if time.monotonic() < self.deadline:
            return True
        self.skipped.append(what)
        return False

    def time(self, job: Callable[[], object]) -> tuple[float, float, float]:
        """Return the median, the 20th and the 80th percentile in ms."""
        from triton.testing import do_bench

        estimate_ms = do_bench(job, warmup=5, rep=10, return_mode="median")
        rep_ms = max(_REP_MS, _SAMPLES * estimate_ms)
        p50, p20, p80 = do_bench(job, warmup=10, rep=rep_ms, quantiles=[0.5, 0.2, 0.8])
        return p50, p20, p80

    def graph_ms(self, job: Callable[[], object]) -> float | None:
        """Return the median of a job replayed from a CUDA graph; None where it cannot be captured."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                job()
            return self.time(graph.replay)[0]
        except RuntimeError as error:  # it waits for the GPU, as the reference does
            print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
            return None

    def row(
        self, operation: str, variant: str, case: Case, dtype: torch.dtype, job: Callable[[], Any], **more: Any
    ) -> Row:
        """Time a job, take its memory, and return the row.

        Args:
            operation: What is computed; see `Row`.
            variant: Who computes it.
            case: The shape.
            dtype: Of weights and residual.
            job: Computes it once.
            **more: Other fields of `Row`.
        """
        latency_ms, p20_ms, p80_ms = self.time(job)
        missing = dict.fromkeys(("floor_ms", "n_set", "n_firing", "share", "unequal"))
        return Row(
            operation=operation,
            arm=variant,
            latency_ms=latency_ms,
            p20_ms=p20_ms,
            p80_ms=p80_ms,
            peak_mib=peak_mib(job),
            graph_ms=self.graph_ms(job) if variant.startswith("kernels") else None,
            dtype=str(dtype).removeprefix("torch."),
            case=case,
            gpu=self.gpu,
            environment=self.environment,
            **(missing | more),
        )

    def matmul_ms(self, workload: Workload) -> float:
        """Return the time of the encoder's product for all tokens, by `torch.mm`."""
        W_enc = workload.encoder.W_enc
        assert W_enc is not None
        product = torch.empty(workload.case.n_tokens, W_enc.shape[1], dtype=W_enc.dtype, device=kernel_cases.DEVICE)
        return self.time(lambda: torch.mm(workload.rows, W_enc, out=product))[0]


def _finished(job: Callable[[], object]) -> None:
    """Run a job, and wait for it."""
    job()
    torch.cuda.synchronize()


def peak_mib(job: Callable[[], Any]) -> float:
    """Return the memory that a job needs on the GPU above its inputs and its result, in MiB."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = job()
    torch.cuda.synchronize()
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    held = sum(tensor.nbytes for tensor in outputs if isinstance(tensor, Tensor))
    return (torch.cuda.max_memory_allocated() - before - held) / MIB


def check_gpu() -> None:
    """Raise where there is nothing to measure on.

    Raises:
        BackendError: No CUDA device, or no triton.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            f"this benchmark needs a CUDA device, and torch {torch.__version__} sees none; nothing was measured. "
            "The CPU's figures: python -m defense.benchmarks.speed"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise BackendError(f"this benchmark needs triton: {error}") from error


def capability() -> int:
    """Return the compute capability of the first CUDA device, times ten."""
    major, minor = torch.cuda.get_device_capability()
    return 10 * major + minor


def gpu_of() -> Gpu:
    """Return what the first CUDA device is."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        driver, power, clock = (field.strip() for field in line.split(","))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        driver = power = clock = "?"
    name = torch.cuda.get_device_name()
    return Gpu(name, driver, power, clock, torch.version.cuda or "none", triton.__version__)
