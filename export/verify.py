"""A graph's answers against torch's, before the graph gets its name.

Compared in this order: names, axes, shapes, values, labels. All that differs is told at once. The graph runs in a
process of its own (probe.py): one that ends its process must not take the caller along.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from defense.errors import CheckpointError

BATCHES = (1, 2, 5, 32)
"""Sizes that a graph is run with; none is that of the trace."""
N_ROWS = sum(BATCHES)

_TIE = 1e-3
"""Logits closer than this count as equal for every dtype: which of two such labels wins is rounding."""
_TIMEOUT_S = 1800


class ExportError(CheckpointError):
    """A graph that cannot be used: it was not written."""


class ParityError(ExportError):
    """A graph that answers otherwise than torch.

    Attributes:
        failures: What differs, one sentence each.
        max_abs_diff: Largest difference of any output, NaN where none could be compared.
        atol: What was allowed.
        output: The output that differs most.
    """

    def __init__(self, failures: tuple[str, ...], max_abs_diff: float, atol: float, output: str) -> None:
        listed = "".join(f"\n  {failure}" for failure in failures)
        super().__init__(f"the graph does not answer as torch does, so nothing was written:{listed}")
        self.failures, self.max_abs_diff, self.atol, self.output = failures, max_abs_diff, atol, output

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.failures, self.max_abs_diff, self.atol, self.output)


@dataclass(frozen=True)
class Tolerance:
    """What a graph is allowed.

    Attributes:
        atol: Largest difference of an embedding's entry.
        cosine: Smallest cosine of an embedding with torch's.
        agreement: Share of pictures whose best label must be torch's.
        tie: Two labels whose cosines with a picture are closer than this count as equally good.
    """

    atol: float
    cosine: float
    agreement: float
    tie: float = 0.0


@dataclass(frozen=True)
class Parity:
    """How a graph's answers differ from torch's.

    Attributes:
        rows: Pictures or texts compared.
        batches: Batch sizes they came in.
        max_abs_diff: Largest difference of an embedding's entry.
        cosine: Smallest cosine of an embedding with torch's.
        agreement: Share of rows with the same best label; 1.0 for a graph without labels.
        batch_diff: Largest difference between a row's embedding in a batch and alone.
    """

    rows: int
    batches: tuple[int, ...]
    max_abs_diff: float
    cosine: float
    agreement: float
    batch_diff: float


@dataclass(frozen=True)
class Expected:
    """What a graph must answer.

    Attributes:
        inputs: Name -> rows, as many for each, and `N_ROWS` at least.
        input_axes: Name -> names and sizes of its axes.
        outputs: Name -> as many rows, embeddings first.
        output_axes: Name -> names and sizes of its axes.
        logits: Name of the output that holds logits, if one does.
        logit_scale: Logits over cosines.
    """

    inputs: Mapping[str, np.ndarray]
    input_axes: Mapping[str, list[str | int]]
    outputs: Mapping[str, np.ndarray]
    output_axes: Mapping[str, list[str | int]]
    logits: str | None = None
    logit_scale: float = 1.0

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.inputs.values())))


def batches(n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield first and last row of each batch: every row once, and then those of the batch of 5 again, one by one.

    Rows beyond `N_ROWS` come in further batches of 32.
    """
    start = 0
    for size in BATCHES:
        yield start, start + size
        start += size
    for start in range(N_ROWS, n_rows, BATCHES[-1]):
        yield start, min(start + BATCHES[-1], n_rows)
    first = BATCHES[0] + BATCHES[1]
    yield from ((row, row + 1) for row in range(first, first + BATCHES[2]))


def verify(model: Path, expected: Expected, tolerance: Tolerance, options: Mapping[str, Any] | None = None) -> Parity:
    """Return how far a graph is from what it must answer.

    Args:
        model: The graph.
        expected: What torch says.
        tolerance: What is allowed.
        options: See `sessions.make_options`.

    Raises:
        ParityError: It is too far.
        ExportError: ONNX Runtime refuses the graph, or dies of it.
    """
    with tempfile.TemporaryDirectory(prefix="clip-defense-") as folder:
        signature, answers = _run(Path(folder), model, expected, options or {})
    failures = _compare_signature(signature, expected)
    if failures:
        raise ParityError(tuple(failures), float("nan"), tolerance.atol, next(iter(expected.outputs)))
    return _compare_values(answers, expected, tolerance)


def _run(
    folder: Path, model: Path, expected: Expected, options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    from defense.export.probe import INPUTS, JOB, OUTPUTS, SIGNATURE

    job = {"model": str(model.resolve()), "batches": list(batches(expected.n_rows)), "options": dict(options)}
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    save_file({name: np.ascontiguousarray(rows) for name, rows in expected.inputs.items()}, folder / INPUTS)
    try:
        done = subprocess.run(
            # -P: a checkout that is the working folder must not stand in for what is installed.
            [sys.executable, "-P", "-m", "defense.export.probe", str(folder)],
            capture_output=True, text=True, errors="replace", timeout=_TIMEOUT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ExportError(f"the graph was still running after {_TIMEOUT_S} s; nothing was written") from error
    if done.returncode < 0:
        raise ExportError(f"the graph killed ONNX Runtime (signal {-done.returncode}); nothing was written")
    if done.returncode > 0:
        raise ExportError(f"ONNX Runtime refuses the graph; nothing was written:\n{done.stderr.strip()[-2000:]}")
    return json.loads((folder / SIGNATURE).read_text(encoding="utf-8")), load_file(folder / OUTPUTS)


def _compare_signature(signature: dict[str, Any], expected: Expected) -> list[str]:
    failures = []
    for kind, want in (("inputs", expected.input_axes), ("outputs", expected.output_axes)):
        got = signature[kind]
        if list(got) != list(want):
            failures.append(f"its {kind} are {list(got)}, want {list(want)}")
        else:
            failures += [
                f"{name} has the axes {got[name]}, want {list(axes)}"
                for name, axes in want.items()
                if got[name] != list(axes)
            ]
    return failures


def _compare_values(answers: Mapping[str, np.ndarray], expected: Expected, tolerance: Tolerance) -> Parity:
    failures: list[str] = []
    embeds_name = next(iter(expected.outputs))
    together: dict[str, np.ndarray] = {}
    every = list(batches(expected.n_rows))
    ranges, singles = every[: -BATCHES[2]], every[-BATCHES[2] :]
    for name, rows in expected.outputs.items():
        parts = [answers[f"{name}.{start}.{stop}"] for start, stop in ranges]
        for (start, stop), part in zip(ranges, parts, strict=True):
            if part.shape != (shape := rows[start:stop].shape):
                failures.append(f"{name} is {list(part.shape)} at batch {stop - start}, want {list(shape)}")
            elif not np.isfinite(part).all():
                failures.append(f"{name} holds NaN or infinity at batch {stop - start}")
        together[name] = np.concatenate(parts)
    if failures:
        raise ParityError(tuple(failures), float("nan"), tolerance.atol, embeds_name)

    got, want = together[embeds_name], expected.outputs[embeds_name]
    alone = np.concatenate([answers[f"{embeds_name}.{start}.{stop}"] for start, stop in singles])
    first = singles[0][0]
    parity = Parity(
        rows=expected.n_rows,
        batches=BATCHES,
        max_abs_diff=float(np.abs(got - want).max()),
        cosine=float((got * want).sum(1).min()),
        agreement=_agreement(together, expected, max(_TIE, tolerance.tie * expected.logit_scale)),
        batch_diff=float(np.abs(alone - got[first : first + len(alone)]).max()),
    )
    if parity.max_abs_diff > tolerance.atol:
        failures.append(f"{embeds_name} differs by {parity.max_abs_diff:.2g}, allowed are {tolerance.atol:.2g}")
    if parity.cosine < tolerance.cosine:
        failures.append(f"{embeds_name} has a cosine of {parity.cosine:.6f} with torch's, want {tolerance.cosine}")
    if parity.agreement < tolerance.agreement:
        flips = round((1 - parity.agreement) * parity.rows)
        failures.append(f"{flips} of {parity.rows} rows get another label; {tolerance.agreement:.1%} must be the same")
    if parity.batch_diff > tolerance.atol:
        failures.append(
            f"a row alone and in a batch differ by {parity.batch_diff:.2g}, allowed are {tolerance.atol:.2g}"
        )
    if failures:
        raise ParityError(tuple(failures), parity.max_abs_diff, tolerance.atol, embeds_name)
    return parity


def _agreement(got: Mapping[str, np.ndarray], expected: Expected, tie: float) -> float:
    """Return the share of rows whose best label torch puts first too, or by no more than `tie` behind the first."""
    if expected.logits is None:
        return 1.0
    want = expected.outputs[expected.logits]
    chosen = want[np.arange(len(want)), got[expected.logits].argmax(1)]
    return float((want.max(1) - chosen <= tie).mean())
