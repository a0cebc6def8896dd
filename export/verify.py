"""A graph's answers against torch's, before the graph gets its name.

Compared in this order: names, axes, shapes, values, labels. All that differs is told at once. The graph runs in a
process of its own (probe.py): a graph can kill the process that runs it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from defense.errors import CheckpointError
from defense.store.folders import write_tensors

BATCHES = (1, 2, 5, 32)
"""Batch sizes that a graph is run with; the one that it was traced with is not among them."""
N_ROWS = sum(BATCHES)
"""How many rows it takes to fill a batch of each size."""

_TIE = 1e-3
"""Logits closer than this count as equal for every dtype: rounding decides which of two such labels wins."""
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
    """How far a graph's answers may be from torch's.

    Attributes:
        atol: Largest difference of an embedding's entry.
        cosine: Smallest cosine of an embedding with torch's.
        agreement: Share of pictures, in [0, 1], whose best label must be torch's.
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
        plain_diff: Largest difference of an embedding's entry, at strength 0, from the CLIP without its defense; 0.0
            for a graph without strength.
    """

    rows: int
    batches: tuple[int, ...]
    max_abs_diff: float
    cosine: float
    agreement: float
    batch_diff: float
    plain_diff: float = 0.0


@dataclass(frozen=True)
class Batch:
    """A batch of its own, and what a graph must answer to it.

    Attributes:
        inputs: Name -> all that is fed.
        outputs: Name -> rows.
        constants: Name of an initializer -> what stands in for it.
    """

    inputs: Mapping[str, np.ndarray]
    outputs: Mapping[str, np.ndarray]
    constants: Mapping[str, np.ndarray] = field(default_factory=dict)


PLAIN = "plain"
"""Name of the further batch that is fed strength 0."""


@dataclass(frozen=True)
class Expected:
    """What a graph must answer.

    Attributes:
        inputs: Name -> rows, as many for each, and `N_ROWS` at least.
        input_axes: Name -> names and sizes of its axes.
        outputs: Name -> as many rows; the first output are embeddings, float32 [n, d_embed], normalized.
        output_axes: Name -> names and sizes of its axes.
        logits: Name of the output that holds logits, [n, n_labels]; None where none does.
        logit_scale: Factor between cosines and logits.
        further: Name -> a batch that the rows above do not make, e.g. one of no rows, or one on which nothing fires.
    """

    inputs: Mapping[str, np.ndarray]
    input_axes: Mapping[str, list[str | int]]
    outputs: Mapping[str, np.ndarray]
    output_axes: Mapping[str, list[str | int]]
    logits: str | None = None
    logit_scale: float = 1.0
    further: Mapping[str, Batch] = field(default_factory=dict)

    @property
    def n_rows(self) -> int:
        """How many rows there are."""
        return len(next(iter(self.inputs.values())))


def batches(n_rows: int) -> Iterator[tuple[int, int]]:
    """Yield each batch as (first row, row after the last).

    Every row comes once: in batches of 1, 2, 5 and 32, and beyond `N_ROWS` in further ones of at most 32. The rows of
    the batch of 5 then come again, one by one.
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
    """Return what the graph says of its inputs and outputs, and its answers; both as `probe` writes them.

    Args:
        folder: For the files of that process.
        model: See `verify`.
        expected: See `verify`.
        options: See `verify`.

    Raises:
        ExportError: ONNX Runtime refuses the graph, dies of it, or takes longer than half an hour.
    """
    from defense.export.probe import INPUTS, JOB, OUTPUTS, SIGNATURE

    job = {
        "model": str(model.resolve()),
        "batches": list(batches(expected.n_rows)),
        "further": {
            name: {"inputs": list(batch.inputs), "constants": list(batch.constants)}
            for name, batch in expected.further.items()
        },
        "options": dict(options),
    }
    (folder / JOB).write_text(json.dumps(job), encoding="utf-8")
    inputs = dict(expected.inputs)
    for name, batch in expected.further.items():
        inputs |= {f"{name}.{each}": array for each, array in {**batch.inputs, **batch.constants}.items()}
    tensors = {name: np.ascontiguousarray(array) for name, array in inputs.items()}
    write_tensors(tensors, folder / INPUTS, save_file)
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
    """Return what inputs and outputs have another name, place or axis than is expected."""
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
    """Return how far a graph's answers are from what is expected.

    Args:
        answers: As `probe` names them, for each output and each of `batches` and of the further ones.
        expected: What torch says.
        tolerance: What is allowed.

    Raises:
        ParityError: They have another shape, are not finite, or are too far.
    """
    embeds = next(iter(expected.outputs))
    if failures := _malformed(answers, expected):
        raise ParityError(tuple(failures), float("nan"), tolerance.atol, embeds)
    parity = _measured(answers, expected, max(_TIE, tolerance.tie * expected.logit_scale))
    if failures := _excesses(parity, tolerance, embeds) + _further_excesses(answers, expected, tolerance):
        raise ParityError(tuple(failures), parity.max_abs_diff, tolerance.atol, embeds)
    return parity


def _malformed(answers: Mapping[str, np.ndarray], expected: Expected) -> list[str]:
    """Return what is wrong with the answers whatever their values should be: shapes, and numbers that are none."""
    failures: dict[str, None] = {}  # in order, and each once: several batches have one row
    wanted = {
        (f"{name}.{start}.{stop}", f"batch {stop - start}", name): rows[start:stop].shape
        for name, rows in expected.outputs.items()
        for start, stop in batches(expected.n_rows)
    }
    for kind, batch in expected.further.items():
        wanted |= {(f"{name}.{kind}", f"the {kind} batch", name): rows.shape for name, rows in batch.outputs.items()}
    for (key, words, name), shape in wanted.items():
        if answers[key].shape != shape:
            failures[f"{name} is {list(answers[key].shape)} at {words}, want {list(shape)}"] = None
        elif not np.isfinite(answers[key]).all():
            failures[f"{name} holds NaN or infinity at {words}"] = None
    return list(failures)


def _further_excesses(answers: Mapping[str, np.ndarray], expected: Expected, tolerance: Tolerance) -> list[str]:
    """Return in what well-formed answers to the further batches are farther from torch than is allowed."""
    failures = []
    embeds = next(iter(expected.outputs))
    for kind, batch in expected.further.items():
        got, want = answers[f"{embeds}.{kind}"], batch.outputs[embeds]
        difference = _largest_difference(got, want)
        if difference > tolerance.atol:
            failures.append(
                f"{embeds} differs by {difference:.2g} at the {kind} batch, allowed are {tolerance.atol:.2g}"
            )
    return failures


def _largest_difference(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max(initial=0))


def _measured(answers: Mapping[str, np.ndarray], expected: Expected, tie: float) -> Parity:
    """Return how far well-formed answers are from what is expected; for `tie` see `_agreement`."""
    every = list(batches(expected.n_rows))
    ranges, singles = every[: -BATCHES[2]], every[-BATCHES[2] :]

    def rows_of(name: str, parts: list[tuple[int, int]]) -> np.ndarray:
        return np.concatenate([answers[f"{name}.{start}.{stop}"] for start, stop in parts])

    together = {name: rows_of(name, ranges) for name in expected.outputs}
    embeds = next(iter(expected.outputs))
    got, want, alone = together[embeds], expected.outputs[embeds], rows_of(embeds, singles)
    first = singles[0][0]
    plain = expected.further.get(PLAIN)
    return Parity(
        rows=expected.n_rows,
        batches=BATCHES,
        max_abs_diff=_largest_difference(got, want),
        cosine=float((got * want).sum(1).min()),
        agreement=_agreement(together, expected, tie),
        batch_diff=_largest_difference(alone, got[first : first + len(alone)]),
        plain_diff=_largest_difference(answers[f"{embeds}.{PLAIN}"], plain.outputs[embeds]) if plain else 0.0,
    )


def _excesses(parity: Parity, tolerance: Tolerance, embeds: str) -> list[str]:
    """Return in what a graph is farther from torch than is allowed; `embeds` is the name of its embeddings."""
    failures = []
    if parity.max_abs_diff > tolerance.atol:
        failures.append(f"{embeds} differs by {parity.max_abs_diff:.2g}, allowed are {tolerance.atol:.2g}")
    if parity.cosine < tolerance.cosine:
        failures.append(f"{embeds} has a cosine of {parity.cosine:.6f} with torch's, want {tolerance.cosine}")
    if parity.agreement < tolerance.agreement:
        flips = round((1 - parity.agreement) * parity.rows)
        failures.append(f"{flips} of {parity.rows} rows get another label; {tolerance.agreement:.1%} must be the same")
    if parity.batch_diff > tolerance.atol:
        failures.append(
            f"a row alone and in a batch differ by {parity.batch_diff:.2g}, allowed are {tolerance.atol:.2g}"
        )
    return failures


def _agreement(got: Mapping[str, np.ndarray], expected: Expected, tie: float) -> float:
    """Return the share of rows whose best label torch puts first too, or by no more than `tie` behind the first."""
    if expected.logits is None:
        return 1.0
    want = expected.outputs[expected.logits]
    chosen = want[np.arange(len(want)), got[expected.logits].argmax(1)]
    return float((want.max(1) - chosen <= tie).mean())
