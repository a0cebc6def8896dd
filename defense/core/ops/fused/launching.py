# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False, disallow-untyped-decorators=False
# (Triton itself reads the annotations of a kernel's arguments, so they hold no Python types; its decorators have none.)
"""How a kernel is launched: whether a device can, tiles by device and dtype, the number of programs, what ran."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from defense.errors import BackendError

launches: Counter[str] = Counter()
"""How often each kernel was launched, by name: tests ask which path ran."""


class Tile(NamedTuple):
    """How a product is cut up."""

    m: int
    """Tokens per program."""
    n: int
    """Latents per program."""
    k: int
    """Steps along d_model."""
    num_warps: int
    num_stages: int
    per_sm: int = 1
    """Programs that share a multiprocessor, where their number is fixed."""
    max_registers: int | None = None
    """Of a thread; where it is given, the assembler may not take more."""


# Half precision, by architecture; `tests/core/test_fused_aot.py` holds what each takes against what there is.
# A100: as many columns as its registers hold. Consumer GPUs (86, 89, 120) have less shared memory, and fewer tensor
# cores to keep busy.
_STREAM_80 = Tile(128, 256, 32, num_warps=8, num_stages=4)
_STREAM_SMALL = Tile(128, 128, 32, num_warps=8, num_stages=3)
# Hopper: 85 operations per byte read keep the tensor cores ahead of the L2 cache, and the three stages (144 KiB of
# shared memory) leave room for one program per multiprocessor. Unbounded, the assembler takes registers up to the last
# that there is, without need: 192 do without a spill.
_STREAM_90 = Tile(128, 256, 64, num_warps=8, num_stages=3, max_registers=240)
# Blackwell's data center GPUs: the sums lie in a memory of their own, and 256 columns of them spill when they are read.
_STREAM_100 = Tile(128, 128, 64, num_warps=8, num_stages=4)
# float32 runs on the general cores, where a larger tile only costs registers; two programs have 128 each.
_STREAM_FLOAT32 = Tile(64, 64, 16, num_warps=8, num_stages=2, per_sm=2, max_registers=128)
# The product with the columns of S alone: small, and the lists take registers.
SET = Tile(64, 64, 64, num_warps=8, num_stages=3)
SET_FLOAT32 = Tile(32, 32, 32, num_warps=4, num_stages=2)


@torch.compiler.assume_constant_result
def obstacle(device: str) -> str | None:
    """Return what about a device keeps the kernels from running, if anything.

    A device that looks right has to run a small kernel, once: without a C compiler, Python's headers or a driver that
    goes with triton, only that tells.
    """
    if device.startswith("cuda"):
        if torch.version.hip is not None:
            return f"the kernels are for NVIDIA GPUs; this torch is built for ROCm {torch.version.hip}"
        if torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0):
            return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return None  # to read a result would end the capture; what is captured has run before
    return _failure(device)


@functools.cache
def _failure(device: str) -> str | None:
    """Return how a small kernel fails on a device, if it does."""
    try:
        x = torch.eye(16, dtype=torch.float16, device=device)
        out = torch.zeros_like(x)
        with torch.cuda.device_of(x):
            _trial_kernel[(1,)](x, out)
        is_right = torch.equal(out, x)
    except Exception as error:
        return f"a small kernel fails on {device} ({_cause(error)})"
    return None if is_right else f"a small kernel computes a wrong result on {device}"


@triton.jit
def _trial_kernel(x_ptr, out_ptr):
    """Write the product of x with itself, [16, 16]."""
    offs = tl.arange(0, 16)
    at = offs[:, None] * 16 + offs[None, :]
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, tl.dot(x, x))


def set_tile(dtype: torch.dtype) -> Tile:
    """Return how the product with the columns of S is cut up, for weights of `dtype`."""
    return SET_FLOAT32 if dtype == torch.float32 else SET


def stream_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """Return how the product with the whole encoder is cut up, for weights of `dtype`."""
    if dtype == torch.float32:
        return _STREAM_FLOAT32
    major, minor = capability(device)
    tiles = {8: _STREAM_SMALL if minor else _STREAM_80, 9: _STREAM_90, 10: _STREAM_100}
    return tiles.get(major, _STREAM_SMALL)


def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; under the interpreter that of Ampere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def n_programs(device: torch.device, per_sm: int) -> int:
    """Return how many programs keep a GPU busy; two under the interpreter, so that each takes several tiles."""
    if device.type != "cuda":
        return 2
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel, and count it; on an empty grid neither.

    Raises:
        BackendError: It does not compile, or the device lacks what it takes.
    """
    if 0 in grid:
        return
    name = kernel.fn.__name__
    try:
        kernel[grid](*args, **constants, enable_fp_fusion=True)
    except Exception as error:
        raise BackendError(f"{name} cannot be launched ({_cause(error)})") from error
    launches[name] += 1


def _cause(error: Exception) -> str:
    """Return an error in a line: its kind and the first line of what it says."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
