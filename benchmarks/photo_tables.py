"""The README's table of what was measured on photographs, and which answers change there although nothing attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from defense.benchmarks.environment import machine_words
from defense.benchmarks.tables import BASELINE, OURS, laid_out
from defense.errors import ConfigError

Result = Mapping[str, Any]

_ATTACKED = "photo-100-attacked-"
_CLEAN, _PLATE = "photo-100-clean", "photo-100-neutral"
_UNATTACKED = (_CLEAN, _PLATE, "photo-100-look-alike", "photo-100-texture")
_REAL = "rta100-known-attacked"
_RANDOM = "random-latents"
_NO_RIVALS = {BASELINE, OURS, _RANDOM, "defense-scale", "defense-project", "defense-delta", "naive-splice"}
"""Ours, with other edits too, and what controls for it."""
_NAMES = {BASELINE: "plain", OURS: "defended", _RANDOM: "random latents"}
_N_CLASSES = 3
"""Classes whose answers change most that a row names."""


class Table:
    """Results by data set and method."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.by_place = {(result["dataset"], result["method"]): result["robust"] for result in results}
        self.methods = list(dict.fromkeys(result["method"] for result in results))
        self.attacked = sorted({dataset for dataset, _ in self.by_place if dataset.startswith(_ATTACKED)})

    def figure(self, dataset: str, method: str, name: str) -> float:
        """Return a figure in percent."""
        return 100 * float(self.by_place[dataset, method]["figures"][name]["value"])

    def mean(self, method: str, name: str) -> float:
        """Return the mean of a figure over the ways to write, in percent."""
        return sum(self.figure(dataset, method, name) for dataset in self.attacked) / len(self.attacked)

    def same(self, method: str) -> float:
        """Return the share of plain CLIP's answers that stay on photographs without words, in percent."""
        found = self.by_place[_CLEAN, method]["versus"].get(BASELINE)
        return 100.0 if found is None else 100 * float(found["same"]["value"])

    def strongest_rival(self) -> str | None:
        """Return the method that is right most often on attacked photographs, our variants and controls aside."""
        rivals = [name for name in self.methods if name.partition("@")[0] not in _NO_RIVALS]
        return max(rivals, key=lambda name: self.mean(name, "accuracy"), default=None)


def short_table(results: Sequence[Result]) -> str:
    """Return the README's rows: plain CLIP, ours, the strongest rival, and random latents.

    Raises:
        ConfigError: Plain CLIP or ours was not measured on the photographs.
    """
    table = Table(results)
    if not table.attacked or any((_CLEAN, name) not in table.by_place for name in (BASELINE, OURS)):
        raise ConfigError("plain CLIP and the defense were not measured on photographs; run: defense bench photo")
    rows = [BASELINE, OURS, *filter(None, [table.strongest_rival()]), *({_RANDOM} & set(table.methods))]
    has_real = (_REAL, OURS) in table.by_place
    headings = ["model", "clean", "answers that stay", "empty plate", "attacked", "attack success"]
    headings += ["real notes"] * has_real
    lines = []
    for method in rows:
        cells = [table.figure(_CLEAN, method, "accuracy"), table.same(method), table.figure(_PLATE, method, "accuracy")]
        cells += [table.mean(method, "accuracy"), table.mean(method, "attack_success")]
        lines.append([_NAMES.get(method, method), *(f"{cell:.1f}" for cell in cells)])
        if has_real:
            is_there = (_REAL, method) in table.by_place
            lines[-1].append(f"{table.figure(_REAL, method, 'accuracy'):.1f}" if is_there else "-")
    return laid_out(headings, lines) + "\n\n" + _caption(table)


def _caption(table: Table) -> str:
    clean = table.by_place[_CLEAN, OURS]
    ways = ", ".join(dataset.removeprefix(_ATTACKED) for dataset in table.attacked)
    half = max(
        (f["high"] - f["low"]) / 2 for f in (table.by_place[d, OURS]["figures"]["accuracy"] for d in table.attacked)
    )
    n = clean["n"]
    lines = [
        f"Percent of {n:,} photographs of {len(clean['class_names'])} classes, enlarged from 64 pixels; attacked: mean "
        f"over {len(table.attacked)} ways to write a word ({ways}), {n:,} pictures each, in unseen typefaces; half of "
        f"a 95 % interval of one way at most {100 * half:.1f} points. The empty plate is the ceiling."
    ]
    if (_REAL, OURS) in table.by_place:
        real = table.by_place[_REAL, OURS]
        lines.append(
            f"Real notes: {real['n']} photographs of RTA-100, handwritten, among {len(real['class_names'])} names."
        )
    return "\n".join([*lines, machine_words(clean["run"]["environment"])])


def changed_table(results: Sequence[Result]) -> str:
    """Return how many answers differ from plain CLIP's where nothing attacks, and in which classes most do."""
    table = Table(results)
    datasets = [name for name in _UNATTACKED if (name, BASELINE) in table.by_place]
    headings = ["method", *(name.removeprefix("photo-100-") for name in datasets), "most in"]
    lines = []
    for method in table.methods:
        if method == BASELINE:
            continue
        cells: list[str] = []
        by_class: dict[str, tuple[int, int]] = {}
        for dataset in datasets:
            robust = table.by_place.get((dataset, method))
            cells.append("-" if robust is None else f"{100 * (1 - robust['versus'][BASELINE]['same']['value']):.1f}")
            for name, (n, share) in ({} if robust is None else robust["changed_per_class"]).items():
                known = by_class.get(name, (0, 0))
                by_class[name] = known[0] + round(n * share), known[1] + n
        worst = sorted(by_class.items(), key=lambda each: (-each[1][0], each[0]))[:_N_CLASSES]
        lines.append([method, *cells, ", ".join(f"{name} {k} of {n}" for name, (k, n) in worst) or "-"])
    return laid_out(headings, lines) + "\n\nPercent of answers, right or wrong, that are not plain CLIP's."
