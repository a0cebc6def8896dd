"""Run methods over data sets: one JSON file per data set and method, in CLIP_benchmark's shape with a `robust` block.

    data set --datasets--> pictures --method's encoder, 64 at a time--> image_embeds --cosine--> logits
             --metrics.answers_of--> answers --metrics.figures, versus--> result

Embeddings are kept, each chunk in a file that is named by all that decides its content: the CLIP's weights, the method
and its settings, the bytes of the pictures. A run that was interrupted goes on from there, a changed picture is encoded
anew, and more methods or figures cost no second pass. Memory holds one chunk of pictures at a time.

Two runs give equal results but for the block `run`. `defense bench` runs it; what was measured is laid out anew, from
the JSON alone, by

    python -m defense.benchmarks.robust results
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense.benchmarks import plots, tables
from defense.benchmarks.datasets import Task
from defense.benchmarks.environment import environment_of
from defense.benchmarks.named_clip import NamedClip
from defense.benchmarks.publishing import check_publishable
from defense.benchmarks.robust_measuring import Measured, Track, check_present, measure_method
from defense.benchmarks.robust_results import Failed, Fit, collect, read_results, result_of, write_result
from defense.benchmarks.robust_store import Store
from defense.benchmarks.tuning import counted
from defense.errors import ConfigError, InvalidImageError, MissingDependencyError
from defense.store.folders import replacing

if TYPE_CHECKING:
    from defense.benchmarks.methods import Method  # some import torch


def run(
    named: NamedClip,
    jobs: Sequence[tuple[Task, Sequence[Method]]],
    out: Path,
    *,
    seed: int = 0,
    command: str | None = None,
    track: Track = lambda items, _what: items,
) -> list[dict[str, Any]]:
    """Measure, write a JSON file for each data set and method, and return what was written.

    A method that cannot be fitted on a task is named there as not applicable, with the reason.

    Args:
        named: The CLIP.
        jobs: Each task with the methods to measure on it; all of them are compared with each other.
        out: Folder for the results; `out/embeddings` holds what a second run starts from.
        seed: Of the intervals.
        command: What was typed, for the results.
        track: Shows progress.

    Raises:
        ConfigError: See `measure_method`; or no method can be fitted on a task.
        MissingDependencyError: scipy, which compares methods, is not installed.
    """
    for task, _ in jobs:
        for dataset in task.tests:
            check_present(dataset)
    store = Store(out / "embeddings")
    where = _environment(command)
    results = []
    for task, methods in jobs:
        measured, fits, failed = _measure_task(named, task, methods, store, track)
        for dataset in task.tests:
            for method in methods:
                if method.name in failed.reasons:
                    continue
                result = result_of(
                    named, task, dataset, method, measured[dataset.variant],
                    fit=fits[method.name], failed=failed, seed=seed, environment=where,
                )  # fmt: skip
                write_result(result, out)
                results.append(result)
    return results


def _measure_task(
    named: NamedClip, task: Task, methods: Sequence[Method], store: Store, track: Track
) -> tuple[dict[str, dict[str, Measured]], dict[str, Fit], Failed]:
    """Fit each method on a task and measure it on the task's data sets.

    Returns:
        Answers by variant of the data set and by method; by method, how it was fitted; which could not be.
    """
    from defense.benchmarks.methods import CannotWorkError

    measured: dict[str, dict[str, Measured]] = {dataset.variant: {} for dataset in task.tests}
    fits: dict[str, Fit] = {}
    failed = Failed()
    for method in methods:
        start = time.perf_counter()
        watched, seen = counted(task)
        try:
            method.fit(named.clip, watched)
        except (ConfigError, InvalidImageError, MissingDependencyError) as error:
            failed.reasons[method.name] = str(error)
            if isinstance(error, CannotWorkError):
                failed.cannot_work.append(method.name)
            continue
        fits[method.name] = Fit(time.perf_counter() - start, {kind: len(keys) for kind, keys in seen.items() if keys})
        with method.apply(named.clip) as encoder:
            for dataset in task.tests:
                measured[dataset.variant][method.name] = measure_method(named, method, encoder, dataset, store, track)
    if not fits:
        listed = "; ".join(f"{name}: {reason}" for name, reason in failed.reasons.items())
        raise ConfigError(f"nothing to measure on {task.title}: {listed}")
    return measured, fits, failed


def _environment(command: str | None) -> dict[str, Any]:
    import torch

    return {**asdict(environment_of(command or "")), "threads": torch.get_num_threads()}


def lay_out(out: Path) -> None:
    """Write `results.md` and the plots of all results in a folder, from their JSON alone.

    Raises:
        ConfigError: See `tables.check_comparable`.
        MissingDependencyError: matplotlib is not installed.
    """
    results = read_results(out)
    with replacing(out / "results.md") as partial:
        partial.write_text(tables.markdown(results) + "\n", encoding="utf-8")
    plots.draw(results, out)


def main() -> None:
    """Write tables and plots of the results in a folder."""
    parser = argparse.ArgumentParser(description="Lay out the results of `defense bench` anew, from their JSON.")
    parser.add_argument("folder", type=Path, help="what `defense bench --out` wrote")
    parser.add_argument(
        "--into",
        type=Path,
        help="put all of them into this file as well, for publication: from a clean checkout, without --n",
    )
    arguments = parser.parse_args()
    lay_out(arguments.folder)
    if arguments.into is not None:
        check_publishable(read_results(arguments.folder), str(arguments.folder))
        collect(arguments.folder, arguments.into)


if __name__ == "__main__":
    main()
