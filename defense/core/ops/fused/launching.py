"""How a kernel is launched: tiles by device and dtype, the number of programs, and a count of what ran."""

from collections import Counter
from typing import Any, NamedTuple

import torch

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


# Half precision on Hopper and newer: 85 operations per byte read keep the tensor cores ahead of the L2 cache, and the
# three stages (144 KiB of shared memory) leave room for one program per multiprocessor.
_STREAM_HOPPER = Tile(128, 256, 64, num_warps=8, num_stages=3)
# Half precision elsewhere: fits the 99 KiB of shared memory of consumer GPUs.
_STREAM_AMPERE = Tile(128, 128, 32, num_warps=8, num_stages=3)
# float32 runs on the general cores, where a larger tile only costs registers.
_STREAM_FLOAT32 = Tile(64, 64, 32, num_warps=8, num_stages=2, per_sm=2)
# The product with the columns of S alone: small, and the lists take registers.
SET = Tile(64, 64, 64, num_warps=8, num_stages=3)
SET_FLOAT32 = Tile(32, 32, 32, num_warps=4, num_stages=2)


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # torch leaves it without types
def obstacle(device: str) -> str | None:
    """Return what about a device keeps the kernels from running, if anything."""
    if device.startswith("cuda") and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than compute capability 8.0"
    return None


def stream_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """Return how the product with the whole encoder is cut up, for weights of `dtype`."""
    if dtype == torch.float32:
        return _STREAM_FLOAT32
    return _STREAM_HOPPER if capability(device) >= (9, 0) else _STREAM_AMPERE


def capability(device: torch.device) -> tuple[int, int]:
    """Return a GPU's compute capability; under the interpreter that of Ampere."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def n_programs(device: torch.device, per_sm: int) -> int:
    """Return how many programs keep a GPU busy; two under the interpreter, so that each takes several tiles."""
    if device.type != "cuda":
        return 2
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """Launch a kernel, and count it; on an empty grid neither."""
    if 0 not in grid:
        launches[kernel.fn.__name__] += 1
        kernel[grid](*args, **constants, enable_fp_fusion=True)
