"""A result: one method on one data set as JSON, in CLIP_benchmark's shape with a block `robust`; and files of results.

CLIP_benchmark's readers find what they know ("dataset", "model", "metrics", ...); "robust" holds all else. Its block
"run" alone differs between two runs of the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.benchmarks import metrics
from defense.benchmarks.datasets import Dataset, Task
from defense.benchmarks.environment import write_json
from defense.benchmarks.named_clip import NamedClip
from defense.benchmarks.robust_measuring import Measured
from defense.benchmarks.tables import BASELINE
from defense.errors import ConfigError
from defense.store.folders import replacing

if TYPE_CHECKING:
    from defense.benchmarks.methods import Method  # some import torch

SCHEMA = 1
_N_LISTED = 20
"""Unreadable pictures that a result names."""
_VERSIONS = ("clip-defense", "torch", "open_clip_torch", "pillow")
"""Packages whose versions a result records."""


@dataclass(frozen=True)
class Fit:
    """How a method was fitted on a task.

    Attributes:
        seconds: That it took.
        n_pictures: Pictures that it looked at, by variant; empty where it looked at none.
    """

    seconds: float
    n_pictures: Mapping[str, int]


@dataclass(frozen=True)
class Failed:
    """Methods that could not be fitted on a task.

    Attributes:
        reasons: By name.
        cannot_work: Names of those whose figure would mislead, since the CLIP lacks what they rest on.
    """

    reasons: dict[str, str] = field(default_factory=dict)
    cannot_work: list[str] = field(default_factory=list)


def result_of(
    named: NamedClip,
    task: Task,
    dataset: Dataset,
    method: Method,
    measured: Mapping[str, Measured],
    *,
    fit: Fit,
    failed: Failed,
    seed: int,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the result of one method on one data set, as JSON values.

    Args:
        named: The CLIP.
        task: What the data set belongs to.
        dataset: What was measured on.
        method: What was measured.
        measured: Name of a method -> its answers on this data set, this method's among them.
        fit: How the method was fitted.
        failed: Which methods could not be fitted on this task.
        seed: Of the intervals.
        environment: Machine, versions and command, as JSON values.
    """
    from defense.benchmarks.methods import FromDefense

    own = measured[method.name]
    others = {name: each.answers for name, each in measured.items() if name != method.name}
    figures = _figures(dataset, own, seed)
    run = {"fit_s": fit.seconds, "encode_ms": own.encode_ms, "peak_mib": own.peak_mib, "environment": dict(environment)}
    return {
        "dataset": dataset.full_name,
        "model": named.model,
        "pretrained": named.pretrained,
        "task": "zeroshot_classification",
        "metrics": _metrics(dataset, own, figures),
        "language": "en",
        "method": method.name,
        "robust": {
            "schema": SCHEMA,
            **_pictures(task, dataset, own),
            **figures,
            "not_applicable": dict(failed.reasons),
            "cannot_work": list(failed.cannot_work),
            "versus": {name: metrics.versus(own.answers, other, seed=seed) for name, other in others.items()},
            "changed_per_class": _changed(dataset, own, others),
            "settings": dict(method.settings()),
            "tuned_on": dict(fit.n_pictures),
            "fitted_before": dict(method.fitted_before()) if isinstance(method, FromDefense) else None,
            **_question(dataset),
            "data_sha256": own.data_sha256,
            "host_sha256": named.sha256,
            "has_random_weights": named.is_random,
            "preprocess": named.clip.preprocess.to_dict(),
            "exif": "not applied",
            "logit_scale": named.logit_scale,
            "seed": seed,
            "n_resamples": metrics.N_RESAMPLES,
            "versions": {name: version(name) for name in _VERSIONS},
            "run": run,
        },
    }


def _metrics(dataset: Dataset, own: Measured, figures: Mapping[str, Any]) -> dict[str, float | None]:
    """Return CLIP_benchmark's own figures; acc5 is None where there are fewer than five names to choose from."""
    has_five = dataset.choice == "all" and len(dataset.class_names) >= 5
    return {
        "acc1": figures["figures"]["accuracy"]["value"],
        "acc5": float(own.answers.in_top5.mean()) if has_five else None,
        "mean_per_class_recall": float(np.mean([accuracy for _, accuracy in figures["per_class"].values()])),
    }


def _pictures(task: Task, dataset: Dataset, own: Measured) -> dict[str, Any]:
    """Return what was shown, and how much of it could be read."""
    return {
        "task": task.name,
        "title": task.title,
        "variant": dataset.variant,
        "is_attacked": dataset.is_attacked,
        "choice": dataset.choice,
        "shortfall": dataset.shortfall,
        "is_complete": dataset.shortfall is None and not own.unreadable,
        "n": len(own.answers.label),
        "n_unreadable": len(own.unreadable),
        "unreadable": list(own.unreadable[:_N_LISTED]),
    }


def _figures(dataset: Dataset, own: Measured, seed: int) -> dict[str, Any]:
    """Return how right the answers are: of all pictures, and (n, accuracy) of each group, class and kind."""
    answers, unreadable = own.answers, set(own.unreadable)
    found = metrics.figures(answers, seed=seed, train_counts=dataset.train_counts)
    by_group = metrics.group_accuracies(answers) if dataset.group_names else {}
    by_class = metrics.per_class(answers)
    by_kind = metrics.per_kind(answers, [each.kind for each in dataset.examples if each.key not in unreadable])
    return {
        "figures": {name: figure.to_dict() for name, figure in found.items()},
        "groups": {dataset.group_names[group]: list(entry) for group, entry in by_group.items()},
        "train_counts": list(dataset.train_counts),
        "per_class": {dataset.class_names[label]: list(entry) for label, entry in by_class.items()},
        "kinds": {kind: list(entry) for kind, entry in by_kind.items()},
    }


def _changed(dataset: Dataset, own: Measured, others: Mapping[str, metrics.Answers]) -> dict[str, list[float]]:
    """Return (n, share of answers that plain CLIP does not give) of each class, where nothing attacks it."""
    if dataset.is_attacked or BASELINE not in others:
        return {}
    found = metrics.changed_per_class(own.answers, others[BASELINE])
    return {dataset.class_names[label]: list(entry) for label, entry in found.items()}


def _question(dataset: Dataset) -> dict[str, Any]:
    """Return what was asked, and what else the data set records."""
    return {
        "class_names": list(dataset.class_names),
        "templates": list(dataset.templates),
        "normalise_each": dataset.normalize_each,
        "facts": dict(dataset.facts),
    }


def write_result(result: Mapping[str, Any], out: Path) -> Path:
    """Write a result into a folder, under a name made of what it is, and return the path."""
    parts = (result["dataset"], result["model"], result["pretrained"], result["method"])
    path = out / ("_".join(re.sub(r"[^\w.@-]+", "-", part) for part in parts) + ".json")
    write_json(path, result)
    return path


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a folder, by file name, or those in one file that `collect` wrote.

    Other JSON files in the folder are passed over.

    Raises:
        ConfigError: One was written by a newer version.
    """
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
    else:
        results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))]
    results = [result for result in results if isinstance(result, dict) and "robust" in result]
    for result in results:
        if result["robust"]["schema"] > SCHEMA:
            raise ConfigError(
                f"{path} holds a result of schema {result['robust']['schema']}; this version reads up to {SCHEMA}"
            )
    return results


def collect(folder: Path, path: Path) -> None:
    """Write all results of a folder into one file.

    Raises:
        ConfigError: See `read_results`.
    """
    lines = [json.dumps(result, allow_nan=False) for result in read_results(folder)]
    with replacing(path) as partial:
        partial.write_text("[" + ",\n".join(lines) + "]\n", encoding="utf-8")
