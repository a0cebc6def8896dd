"""Every kernel that the benchmark is about to launch, compiled ahead into triton's cache, by several processes.

One after the other, as they are met, they would take longer to compile than there is time to measure.
"""

from __future__ import annotations

import itertools
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from defense.benchmarks import kernel_cases
from defense.benchmarks.kernel_cases import DEFAULT_SET, HALF, Case
from defense.benchmarks.kernel_compiling import Launch
from defense.benchmarks.kernel_static import launches_of
from defense.core.config import Act, Norm
from defense.core.ops.fused import Tile, launching

_ACTS: tuple[Act, ...] = ("topk", "relu")
_SLOWEST = ("_count_kernel", "_encode_kernel", "_threshold_kernel", "_candidates_kernel")
"""Begun first, so that the last process to end does not end long after the others."""


class CompileOnly:
    """Stands for triton's driver, and for a GPU of some architecture: enough to compile for it, without one.

    Args:
        capability: Of the architecture, times ten.
    """

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        """Return the number of the device."""
        return 0

    def get_current_stream(self, _device: int) -> int:
        """Return the stream, on which nothing will run."""
        return 0

    def get_current_target(self) -> Any:
        """Return what is compiled for."""
        return GPUTarget("cuda", self.capability, 32)


class Run(NamedTuple):
    """What the benchmark runs the kernels on; to be sent to another process."""

    case: Case
    dtype: torch.dtype
    norm: Norm
    n_set: int
    act: Act
    tile: tuple[int, ...] | None = None
    """Fields of `fused.Tile`; None for the one that the architecture has."""

    def launches(self, capability: int) -> list[Launch]:
        """Return what that launches on an architecture."""
        of_case = self.case, self.dtype, self.norm, capability, self.n_set, (self.act,)
        if self.tile is None:
            return launches_of(*of_case)
        with mock.patch.object(launching, "stream_tile", return_value=Tile(*self.tile)):
            return launches_of(*of_case)


def _runs() -> Iterator[Run]:
    for case, dtype, act, norm in kernel_cases.PARITY:
        yield Run(case, dtype, norm, min(DEFAULT_SET, case.d_sae), act)
    for case, act in itertools.product(kernel_cases.CASES, _ACTS):
        for n_set in kernel_cases.SET_SIZES:
            yield Run(case, HALF[0], "none", n_set, act)
    for case in kernel_cases.CASES:
        yield Run(case, HALF[1], "none", DEFAULT_SET, "topk")
    for tile in kernel_cases.TILES:
        yield Run(kernel_cases.CASES[0], HALF[0], "none", DEFAULT_SET, "topk", tile)


def kernels_ahead(capability: int) -> list[tuple[Run, int]]:
    """Return a run and the place among its launches of each kernel to compile, once each, the slowest first."""
    found: dict[tuple[Any, ...], tuple[str, Run, int]] = {}
    for run in _runs():
        for index, launch in enumerate(run.launches(capability)):
            found.setdefault(_what_is_compiled(launch), (launch.name, run, index))
    place = {name: rank for rank, name in enumerate(_SLOWEST)}
    ordered = sorted(found.values(), key=lambda each: place.get(each[0], len(place)))
    return [(run, index) for _, run, index in ordered]


def _what_is_compiled(launch: Launch) -> tuple[Any, ...]:
    """Return what tells kernels apart: the name, the constants, and of each argument what triton specializes for."""

    def kind(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.dtype
        return value if value is None else (value == 1, value % 16 == 0)

    return launch.name, *map(kind, launch.arguments), *sorted(launch.constants.items())


def compile_ahead(capability: int, jobs: int) -> list[str]:
    """Compile what the benchmark launches, say so on stderr, and return what failed, a line each.

    Args:
        capability: Of the architecture, times ten.
        jobs: Processes.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return []  # the interpreter compiles nothing
    start, wanted = time.monotonic(), kernels_ahead(capability)
    failures = []
    with ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (capability,)) as pool:
        futures = {pool.submit(compile_one, capability, *each): each for each in wanted}
        for future, (run, _) in futures.items():
            if (error := future.exception()) is not None:
                failures.append(f"compiling ahead, {run}: {type(error).__name__}: {error}")
    n = len(wanted) - len(failures)
    print(f"{n} kernels compiled in {time.monotonic() - start:.0f} s", file=sys.stderr)
    return failures


def _begin(capability: int) -> None:
    """Get a process ready: it compiles for a GPU that it leaves to the one that measures."""
    torch.set_num_threads(1)
    driver.set_active(CompileOnly(capability))


def compile_one(capability: int, run: Run, index: int) -> None:
    """Compile one of a run's kernels in the way that triton's launcher does; `CompileOnly` must be the driver."""
    launch = run.launches(capability)[index]
    launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.constants, enable_fp_fusion=True)
