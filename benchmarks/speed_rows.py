"""A row of the benchmark of speed: the case, what S did, the figures; on disk as JSON and in print as Markdown.

`speed.py` says what is measured. Reading this module loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from defense.benchmarks.environment import Environment, machine_words, write_json
from defense.errors import ConfigError


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: open_clip's name.
        batch: Pictures per call.
        d_sae: Latents of the SAE.
        k: Latents kept per token by the TopK rule.
        n_set: Latents in S.
        block: Block L whose output is edited, from 0; not the last.
        rounds: How often each variant is timed.
        threads: Threads of torch.
        seed: Of model weights, pictures, SAE and order of the variants.
        dtype: Of everything; only "float32".

    Raises:
        ConfigError: A number is below 1, S or k exceed d_sae, or another dtype.
    """

    model: str = "ViT-B-32"
    batch: int = 16
    d_sae: int = 49_152
    k: int = 64
    n_set: int = 64
    block: int = 8
    rounds: int = 10
    threads: int = 1
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("batch", "d_sae", "k", "n_set", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1")
        if max(self.n_set, self.k) > self.d_sae:
            raise ConfigError(f"n_set={self.n_set} and k={self.k} must not exceed d_sae={self.d_sae}")
        if self.dtype != "float32":
            raise ConfigError(f"dtype={self.dtype!r}; only 'float32' is measured")

    @property
    def hook_point(self) -> str:
        """Where the residual is edited."""
        return f"blocks.{self.block}.hook_resid_post"


@dataclass(frozen=True)
class Firing:
    """What the latents of S do on the pictures of the benchmark.

    Attributes:
        share: Wanted share of tokens with a positive pre-activation in S.
        n_tokens: All tokens of the batch.
        n_firing: Tokens that have one, as the library itself computes it.
        n_surviving: Tokens at which a latent of S also passes the activation rule.
    """

    share: float
    n_tokens: int
    n_firing: int
    n_surviving: int


@dataclass(frozen=True)
class Row:
    """One variant's figures; the names of the fields are the keys of the stored result.

    Attributes:
        arm: Name of the variant.
        latency_ms: Median over rounds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        x_plain: Median over rounds of the ratio to plain CLIP.
        added_ms: Median over rounds of the difference to plain CLIP.
        floor_ms: The encoder matmul for the firing tokens; None where the variant is not ours, or needs none.
        matmul_gflops: Measured rate behind `floor_ms`, in 1e9 operations per second.
        weights_mib: Weights held above the model's own.
        peak_mib: Rise of resident memory during one call; None where it was not measured.
        extra_mib: Weights and rise together, above plain CLIP; None where it was not measured.
        firing: What S did; None for plain CLIP.
        rounds_ms: Every single time, in order of the rounds.
        d_model: Width of the residual stream.
        case: What was measured.
        environment: Where and when it was measured.
    """

    arm: str
    latency_ms: float
    p20_ms: float
    p80_ms: float
    x_plain: float
    added_ms: float
    floor_ms: float | None
    matmul_gflops: float
    weights_mib: float
    peak_mib: float | None
    extra_mib: float | None
    firing: Firing | None
    rounds_ms: tuple[float, ...]
    d_model: int
    case: Case
    environment: Environment


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list."""
    write_json(path, [asdict(row) for row in rows])


def load_rows(path: Path) -> list[Row]:
    """Return the rows that `save_rows` wrote into a file."""
    rows = []
    for fields in json.loads(path.read_text(encoding="utf-8")):
        fields["firing"] = fields["firing"] and Firing(**fields["firing"])
        fields["rounds_ms"] = tuple(fields["rounds_ms"])
        fields["case"], fields["environment"] = Case(**fields["case"]), Environment(**fields["environment"])
        rows.append(Row(**fields))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{max(value, 0.0):.{digits}f}"

    lines = ["| arm | ms (p20-p80) | x plain | floor ms | extra MiB |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row.latency_ms:.1f} ({row.p20_ms:.1f}-{row.p80_ms:.1f})"
        lines.append(
            f"| {row.arm} | {spread} | {row.x_plain:.2f} | {cell(row.floor_ms, 1)} | {cell(row.extra_mib, 1)} |"
        )
    return "\n".join(lines)


def caption(rows: Sequence[Row]) -> str:
    """Return what a reader of the table has to know, in a few lines of Markdown."""
    row, case = rows[0], rows[0].case
    survivors = "; ".join(
        f"{other.firing.n_firing} of {other.firing.n_tokens} ({other.firing.n_surviving})"
        for other in rows
        if other.firing is not None and other.arm.startswith("ours")
    )
    return (
        f"{case.model}, random weights, batch {case.batch}, block {case.block}, d_model {row.d_model}, "
        f"d_sae {case.d_sae}, k {case.k}, |S| {case.n_set}, {case.dtype}, seed {case.seed}, {case.rounds} rounds.\n"
        f"{machine_words({**asdict(row.environment), 'threads': case.threads})}\n"
        f"The floor (at {row.matmul_gflops:.0f} GFLOP/s) stands against the time that an arm adds to plain CLIP.\n"
        f"Tokens firing (of these, with a latent of S that passes the activation rule), for our arms: {survivors}."
    )


_SHORT = {
    "thresholds, acting on every patch (what ships)": "ours, relu, scale, 100 % of tokens firing",
    "a TopK rule, acting on 5 % of the patches": "ours, TopK, scale, 5 % of tokens firing",
    "a TopK rule, acting on every patch": "ours, TopK, scale, 100 % of tokens firing",
    "instead: the whole autoencoder inside the model": "naive splice",
}
"""What a row of the README's table says -> the variant that was measured."""


def short_table(rows: Sequence[Row]) -> str:
    """Return the README's table: times, where plain CLIP's is 1.

    Raises:
        ConfigError: One of its variants was not measured.
    """
    times = {row.arm: row.x_plain for row in rows}
    if missing := [arm for arm in _SHORT.values() if arm not in times]:
        raise ConfigError(f"{missing[0]!r} was not measured; run: python -m defense.benchmarks.speed")
    lines = [f"| {words} | {times[arm]:.2f} |" for words, arm in _SHORT.items()]
    case = rows[0].case
    caption = f"{case.model}, an autoencoder of {case.d_sae:,} latents of which {case.n_set} are removed, on a CPU."
    return "\n".join(["| defense with | time, plain CLIP = 1 |", "| --- | --- |", *lines, "", caption])
