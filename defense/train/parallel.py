"""One training on several processes: who this process is, and the three collectives that training takes.

`torchrun` starts the processes and says so in the environment. Without it there is one process, and nothing here
touches `torch.distributed`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class World:
    """The processes that train together.

    Attributes:
        rank: Which of them this is, from 0.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this is the process that reports and writes."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place, and return it."""
        if self.size > 1:
            distributed.all_reduce(tensor)
        return tensor

    def any(self, mask: Tensor) -> Tensor:
        """Return where a bool tensor is true on some process."""
        if self.size == 1:
            return mask
        flags = mask.to(torch.uint8)
        distributed.all_reduce(flags, distributed.ReduceOp.MAX)
        return flags.bool()

    def gather(self, tensor: Tensor) -> Tensor:
        """Return the tensors of all processes, which have one shape, as [size, ...]."""
        if self.size == 1:
            return tensor[None]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        distributed.all_gather(parts, tensor.contiguous())
        return torch.stack(parts)

    def wait(self) -> None:
        """Return once every process is here."""
        if self.size > 1:
            distributed.barrier()


@contextmanager
def joined(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, for as long as the context lasts; alone without torchrun.

    Args:
        device: "cpu" (gloo) or a CUDA device (nccl).
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield World()
        return
    distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield World(distributed.get_rank(), size)
    finally:
        distributed.destroy_process_group()


def local_device(device: str) -> str:
    """Return "cuda:N" of this process where several share a machine's GPUs, else `device` as it is."""
    rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{rank}" if device == "cuda" and rank is not None else device
