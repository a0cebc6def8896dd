"""A row of the benchmark of the kernels: on disk as JSON and in print as Markdown.

`kernel.py` says what is measured.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from defense.benchmarks.environment import Environment, checkout_words, write_json
from defense.benchmarks.kernel_cases import DEFAULT_SET, SEED, Case


@dataclass(frozen=True)
class Gpu:
    """The device of a row.

    Attributes:
        name: Its model.
        driver: Version.
        power_limit_w: As set, in watts, as text; "?" where nvidia-smi does not tell.
        sm_clock_mhz: Highest clock of the multiprocessors, as text.
        cuda: Version that torch was built for.
        triton: Version.
    """

    name: str
    driver: str
    power_limit_w: str
    sm_clock_mhz: str
    cuda: str
    triton: str


@dataclass(frozen=True)
class Row:
    """One variant's figures; the names of the fields are the keys of the stored result.

    Attributes:
        operation: "suppress", "suppress, relu", "encode_topk", "sparse_decode" or "encode_image".
        arm: Name of the variant: who computes it.
        latency_ms: Median.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        floor_ms: What cannot be undercut, see `kernel.py`; None where there is none.
        peak_mib: Extra memory; None where it was not measured.
        n_set: Latents in S; None where there is no S.
        n_firing: Tokens at which one of them has a positive pre-activation; None where they were not counted.
        share: Wanted share of such tokens.
        unequal: Tokens at which the variant differs from float64, of those that rounding does not decide.
        dtype: Of weights and residual.
        case: The shape.
        gpu: The device.
        environment: Where and when it was measured.
        graph_ms: Median replayed from a CUDA graph, without what Python takes; None where it cannot be captured.
        peak_floor_ms: The floor at the rate of a large square matmul, whose output is small beside its work; None
            where there is no such floor.
    """

    operation: str
    arm: str
    latency_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float | None
    peak_mib: float | None
    n_set: int | None
    n_firing: int | None
    share: float | None
    unequal: int | None
    dtype: str
    case: Case
    gpu: Gpu
    environment: Environment
    graph_ms: float | None = None
    peak_floor_ms: float | None = None


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list; a file that was there is replaced only by a whole one."""
    write_json(path, [asdict(row) for row in rows])


def load_rows(path: Path) -> list[Row]:
    """Return the rows that `save_rows` wrote into a file."""
    rows = []
    for fields in json.loads(path.read_text(encoding="utf-8")):
        kinds = {"case": Case, "gpu": Gpu, "environment": Environment}
        rows.append(Row(**fields | {name: kind(**fields[name]) for name, kind in kinds.items()}))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = [
        "| shape | operation | S | firing | arm | ms (p20-p80) | ms in a graph | x floor | x peak floor | extra MiB |",
        "|---" * 10 + "|",
    ]
    for row in rows:
        firing = "-" if row.share is None else f"{row.share:.0%}".replace("%", " %")
        x_floor, x_peak = (
            f"{row.latency_ms / floor_ms:.2f}" if floor_ms else "-" for floor_ms in (row.floor_ms, row.peak_floor_ms)
        )
        graph = "-" if row.graph_ms is None else f"{row.graph_ms:.3f}"
        extra = "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"
        lines.append(
            f"| {row.case.model}, {row.dtype} | {row.operation} | {row.n_set or '-'} | {firing} | {row.arm} "
            f"| {row.latency_ms:.3f} ({row.p20_ms:.3f}-{row.p80_ms:.3f}) | {graph} | {x_floor} | {x_peak} | {extra} |"
        )
    return "\n".join(lines)


def short(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that belong into a README: the default S where tokens fire, and whole models, in bfloat16."""
    return [
        row
        for row in rows
        if row.dtype == "bfloat16" and row.n_set in (None, DEFAULT_SET) and row.share != 0 and "tile" not in row.arm
    ]


def caption(rows: Sequence[Row]) -> str:
    """Return what a reader of the table has to know, in a few lines of Markdown."""
    gpu, here = rows[0].gpu, rows[0].environment
    shapes = "; ".join(
        f"{case.model}: {case.batch} x {case.pos} tokens, d_model {case.d_model}, d_sae {case.d_sae}, k {case.k}"
        for case in dict.fromkeys(row.case for row in rows)
    )
    return (
        f"{shapes}. Random weights, seed {SEED}.\n"
        f"{gpu.name}, driver {gpu.driver}, power limit {gpu.power_limit_w} W, at most {gpu.sm_clock_mhz} MHz, torch "
        f"{here.torch}, CUDA {gpu.cuda}, Triton {gpu.triton}, {checkout_words(asdict(here))}, {here.timestamp}.\n"
        "The floor is the encoder's matmul for the firing tokens at torch's own rate (relu, sparse_decode: the bytes "
        "to be moved); at peak: at the rate of an 8192 x 8192 x 8192 matmul."
    )
