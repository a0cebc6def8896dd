"""What the kernels were meant to reach, and whether they did."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from defense.benchmarks import kernel_cases
from defense.benchmarks.cost import MIB
from defense.benchmarks.kernel_cases import DEFAULT_SHARE
from defense.benchmarks.kernel_rows import Row, short


@dataclass(frozen=True)
class Target:
    """A ratio that the kernels were meant to reach.

    Attributes:
        name: What is divided by what, in words.
        got: The ratio that was measured; None where a row for it is missing.
        limit: What it may be at most.
    """

    name: str
    got: float | None
    limit: float

    def __str__(self) -> str:
        if self.got is None:
            return f"not measured: {self.name}"
        return f"{'met' if self.got <= self.limit else 'MISSED'}: {self.name}: {self.got:.3g}, at most {self.limit:.3g}"


def targets(rows: Sequence[Row]) -> list[Target]:
    """Return the targets with what was reached: bfloat16, the default S."""
    found = {(row.operation, row.arm, row.case.model, row.share): row for row in short(rows)}

    def ratio(ours: tuple[Any, ...], theirs: tuple[Any, ...] | None) -> float | None:
        """Return our time over theirs, or over our floor where `theirs` is None; None where a row is missing."""
        row, other = found.get(ours), found.get(ours if theirs is None else theirs)
        if row is None or other is None:
            return None
        base = other.floor_ms if theirs is None else other.latency_ms
        return row.latency_ms / base if base else None

    result = []
    for case in kernel_cases.CASES:
        name = case.model
        sparse, dense = ("suppress", "kernels", name, DEFAULT_SHARE), ("suppress", "kernels", name, 1.0)
        eager = ("suppress", "eager dense", name, DEFAULT_SHARE)
        compiled_reference = ("suppress", "reference, compiled", name, 1.0)
        encode = ("encode_topk", "kernels", name, None)
        row = found.get(dense)
        share = row.peak_mib / _matrix_mib(row) if row is not None and row.peak_mib is not None else None
        result += [
            Target(f"{name}, 5 % firing, over eager", ratio(sparse, eager), 0.1),
            Target(f"{name}, 100 % firing, over the floor", ratio(dense, None), 1.5),
            Target(f"{name}, 100 % firing, over eager", ratio(dense, eager), 0.25),
            Target(f"{name}, 100 % firing, over torch.compile", ratio(dense, compiled_reference), 0.5),
            Target(f"{name}, extra memory, over the [tokens, d_sae] matrix", share, 0.02),
            Target(f"{name}, encode_topk, over the floor", ratio(encode, None), 2.0),
            Target(f"{name}, encode_topk, over eager", ratio(encode, ("encode_topk", "eager", name, None)), 1 / 3),
        ]
    for (case, block), limit in zip(kernel_cases.END_TO_END, (1.03, 1.01), strict=True):
        for suffix in ("", ", compiled"):
            defended = ("encode_image", f"defended after block {block}{suffix}", case.model, DEFAULT_SHARE)
            plain = ("encode_image", f"plain CLIP{suffix}", case.model, None)
            result.append(Target(f"{case.model}, encode_image{suffix}, over plain", ratio(defended, plain), limit))
    return result


def _matrix_mib(row: Row) -> float:
    """Return the size of the [tokens, d_sae] matrix in the dtype of a row, which eager code holds in memory."""
    return row.case.n_tokens * row.case.d_sae * getattr(torch, row.dtype).itemsize / MIB
