"""What the compiler makes of the kernels, and what that lets expect: `python -m defense.benchmarks.kernel --static`.

No GPU is needed, and nothing here is a measurement of time. Three parts:

- kernels: every kernel, compiled for every architecture, shape and dtype (`kernel_compiling.py`);
- slots: visits to candidates per tile, followed on a CPU (`kernel_slots.py`);
- model: the count kernel's time on an H200, on paper, beside the floor, which is the encoder's matmul at cuBLAS's rate.

The model takes a tile to be the slowest of its tensor cores, its reads from the L2 cache and its instructions, and
after that, with nothing to overlap, the instructions of its slots and of the rest. A multiprocessor issues four
instructions a clock; barriers and waiting are not in it, so that a measured time will be longer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from multiprocessing import get_context
from typing import Any

import torch
from torch import Tensor

from defense.benchmarks import kernel_cases, kernel_slots
from defense.benchmarks.kernel_cases import DEFAULT_SET, Case
from defense.benchmarks.kernel_compiling import LIMITS, Launch, compile_launch, noted
from defense.core.config import Act
from defense.core.ops.fused import Tile, encode, launching, sparse_decode, suppress
from defense.errors import MissingDependencyError

NORMS = {torch.bfloat16: ("none", "layer_norm"), torch.float32: ("none",)}
"""What is compiled: dtypes, each with these input normalizations. float16 is compiled as bfloat16 is."""
ARCHITECTURES = tuple(LIMITS)
H200 = {"sms": kernel_slots.N_PROGRAMS, "flop_per_ms": 790e9, "flop_per_clock": 4096, "l2_bytes_per_ms": 7.5e9}
"""bf16 of an H200: cuBLAS's rate, a multiprocessor's peak, and the rate of reads from the L2 cache (inferred)."""


def launches_of(
    case: Case, dtype: torch.dtype, norm: str, capability: int, n_set: int = DEFAULT_SET,
    acts: Sequence[Act] = ("topk", "jumprelu"),
) -> list[Launch]:  # fmt: skip
    """Return what the operators launch for a shape, on an architecture; nothing runs, and no memory is taken.

    Args:
        case: The shape.
        dtype: Of weights and residual.
        norm: Input normalization.
        capability: Of the architecture, times ten.
        n_set: Latents in S.
        acts: Rules of SAEs that are suppressed; with "topk" and no norm, also `encode_topk` and `sparse_decode`.
    """

    def meta(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    resid, W_enc, b = meta(case.batch, case.pos, case.d_model), meta(case.d_model, case.d_sae), meta(case.d_sae)
    W_dec, b_dec = meta(case.d_sae, case.d_model), meta(case.d_model)
    of_set = resid, resid, 0, case.pos, norm, meta(case.d_model, n_set), meta(n_set), meta(n_set, case.d_model)
    with noted(capability) as launches:
        for act in acts:
            threshold = meta(n_set, dtype=torch.float32) if act == "jumprelu" else None
            of_rule = (None, W_enc, b, case.k) if act == "topk" else (threshold, None, None, 0)
            suppress._init_fn(*of_set, meta(n_set), *of_rule)
        if norm == "none" and "topk" in acts:
            some = resid.flatten(0, 1)[: encode._CHUNK_ELEMENTS // case.d_sae]
            kept, indices = encode.encode_topk._init_fn(some, W_enc, b, case.k)
            sparse_decode._init_fn(kept, indices, W_dec, b_dec)
    return launches


def measure_static(capabilities: Sequence[int], jobs: int) -> dict[str, Any]:
    """Return the three parts as JSON values.

    Args:
        capabilities: Architectures, keys of `kernel_compiling.LIMITS`.
        jobs: Processes that compile.
    """
    combinations = [
        (capability, case, dtype) for capability in capabilities for case in kernel_cases.CASES for dtype in NORMS
    ]
    slots = _slots()
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        kernels = [row for rows in pool.map(_compiled, *zip(*combinations, strict=True)) for row in rows]
    return {"kernels": kernels, "slots": slots, "model": _model(kernels, slots) if 90 in capabilities else []}


def _compiled(capability: int, case: Case, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Return a row for each kernel; one that does not depend on the norm, or is launched twice, is there once."""
    rows: dict[str, dict[str, Any]] = {}
    for norm in NORMS[dtype]:
        for launch in launches_of(case, dtype, norm, capability):
            does_norm = launch.constants.get("NORM", "none") != "none"
            name = launch.name.strip("_").removesuffix("_kernel") + (f", {norm}" if does_norm else "")
            if name in rows:
                continue
            found = asdict(compile_launch(launch, capability))
            del found["sass"]
            declared = _declared(launch.name, dtype, capability)
            rows[name] = found | {
                "kernel": name, "capability": capability, "model": case.model,
                "dtype": str(dtype).removeprefix("torch."), "declared_per_sm": declared,
            }  # fmt: skip
    return list(rows.values())


def _declared(kernel: str, dtype: torch.dtype, capability: int) -> int:
    """Return how many programs per multiprocessor a kernel is launched with, where their number is fixed; else 1."""
    return tile_of(dtype, capability).per_sm if kernel == "_count_kernel" else 1


def tile_of(dtype: torch.dtype, capability: int) -> Tile:
    """Return how an architecture cuts up the product with the whole encoder."""
    with noted(capability):
        return launching.stream_tile(torch.device("cuda"), dtype)


def _slots() -> list[dict[str, Any]]:
    tile = tile_of(torch.bfloat16, 90)
    found = kernel_slots.of_workloads(tile)
    try:
        found += kernel_slots.of_defenses(tile)
    except MissingDependencyError as error:
        print(f"the shipped defenses are left out: {error}")
    return [asdict(each) for each in found]


def _model(kernels: Sequence[Mapping[str, Any]], slots: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the modelled time of the count kernel, bf16 on an H200, for each shape and share of firing tokens."""
    rows = []
    for case, visited in zip(kernel_cases.CASES, slots, strict=False):
        count = next(
            row for row in kernels
            if (row["kernel"], row["model"], row["dtype"], row["capability"]) == ("count", case.model, "bfloat16", 90)
        )  # fmt: skip
        for share in kernel_cases.SHARES[1:]:
            n_firing = round(share * case.n_tokens)
            floor_ms = 2 * n_firing * case.d_model * case.d_sae / H200["flop_per_ms"]
            count_ms = count_kernel_ms(count, case, n_firing, visited["slots"])
            rows.append({"model": case.model, "share": share, "slots": visited["slots"], "floor_ms": floor_ms,
                         "count_ms": count_ms})  # fmt: skip
    return rows


def count_kernel_ms(count: Mapping[str, Any], case: Case, n_firing: int, slots: float) -> float:
    """Return the modelled time of the count kernel, bf16 on an H200, in ms.

    Args:
        count: Its row among the kernels.
        case: The shape.
        n_firing: Tokens at which a latent of S has a positive pre-activation.
        slots: Visited per tile.
    """
    tile = tile_of(torch.bfloat16, 90)
    clocks_per_ms = H200["flop_per_ms"] / H200["flop_per_clock"] / H200["sms"]
    steps = math.ceil(case.d_model / tile.k)
    issued = tile.num_warps / 4
    product = max(
        2 * tile.m * tile.n * case.d_model / H200["flop_per_clock"],
        (tile.m + tile.n) * case.d_model * 2 / (H200["l2_bytes_per_ms"] / H200["sms"] / clocks_per_ms),
        steps * count["per_step"] * issued,
    )
    rest = count["n_instructions"] - count["per_step"] - count["per_slot"]
    clocks = product + (slots * count["per_slot"] + rest) * issued
    n_tiles = math.ceil(n_firing / tile.m) * math.ceil(case.d_sae / tile.n)
    return math.ceil(n_tiles / H200["sms"]) * clocks / clocks_per_ms
