"""Tables that say of each method where it comes from, and what it was tuned on and set to.

    sources     a row per method: source and differences, from the records beside the methods' code
    tuning      a row per method of one task: pictures it was tuned on, settings, agreement, from results

A result that was stored before pictures were counted says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_N_SHOWN = 6
"""Entries of a setting up to which they are shown; of longer ones the number is."""

Result = Mapping[str, Any]


def laid_out(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (headings, ["---"] * len(headings), *rows))


def sources() -> str:
    """Return where each method comes from, and how it differs from there."""
    from defense.benchmarks.methods import FACTORIES  # some import torch

    rows = []
    for name, factory in FACTORIES.items():
        record = factory.record
        where = ", ".join(part for part in (record.source, record.section) if part)
        rows.append([name, where, record.differences or "-"])
    return laid_out(["method", "source", "how it differs"], rows)


def tuning(results: Sequence[Result]) -> str:
    """Return what each method of a task was tuned on and set to; all results are of that task."""
    by_method = {result["method"]: result["robust"] for result in results}
    rows = [[name, pictures_words(robust), settings_words(robust)] for name, robust in by_method.items()]
    return laid_out(["method", "tuned on", "settings"], rows)


def pictures_words(robust: Mapping[str, Any]) -> str:
    """Return how many pictures a method was tuned on: here, and where it starts from a defense, before."""
    if "tuned_on" not in robust:
        return "not recorded"
    before = (robust["fitted_before"] or {}).get("n_pictures", {})
    parts = [f"before: {_counts(before)}"] if before else []
    return "; ".join([*parts, *([_counts(robust["tuned_on"])] if robust["tuned_on"] else [])]) or "nothing"


def _counts(n_pictures: Mapping[str, int]) -> str:
    if n_pictures and all(re.fullmatch(r"\d+-\d+", kind) for kind in n_pictures):  # groups: label and attribute
        return f"{sum(n_pictures.values()):,} in {len(n_pictures)} groups"
    return ", ".join(f"{n:,} {kind}" for kind, n in n_pictures.items())


def agreement_of(robust: Mapping[str, Any]) -> float | None:
    """Return how often thresholds and the exact rule agree, in [0, 1]: those set here, else those of the defense."""
    found = robust["settings"].get("agreement")
    return (robust.get("fitted_before") or {}).get("agreement") if found is None else found


def agreement_words(robust: Mapping[str, Any]) -> str:
    """Return that as words; empty where nothing was calibrated."""
    agreement = agreement_of(robust)
    return "" if agreement is None else f"thresholds agree with the exact rule on {100 * agreement:.1f} % of answers"


def settings_words(robust: Mapping[str, Any]) -> str:
    """Return the settings of a method, less hashes; of long ones the number of entries."""
    parts = [
        _setting(name.replace("_", " "), value)
        for name, value in robust["settings"].items()
        if not name.endswith("sha256") and name not in ("agreement", "n_train")
    ]
    return "; ".join([*parts, *filter(None, [agreement_words(robust)])]) or "-"


def _setting(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        return "; ".join(
            _setting(f"{name} at {place.removesuffix('.hook_resid_post')}", value[place]) for place in value
        )
    if isinstance(value, list):
        entries = value[0] if len(value) == 1 and isinstance(value[0], list) else value
        if len(entries) > _N_SHOWN or any(isinstance(each, str) for entry in entries for each in _flat(entry)):
            return f"{name}: {len(entries)} in number"
        return f"{name} {', '.join('/'.join(map(str, _flat(each))) for each in entries) or 'none'}"
    return f"{name} {'none' if value is None else f'{value:g}' if isinstance(value, float) else value}"


def _flat(entry: Any) -> list[Any]:
    return entry if isinstance(entry, list) else [entry]
