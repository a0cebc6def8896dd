"""Results as PNG plots: nothing is measured here, each plot is a function of the JSON.

| file | what | where |
|---|---|---|
| `<task>-strength.png` | accuracies against the strength of a defense | a method at two strengths or more |
| `<task>-trade-off.png` | attacked against clean accuracy, or worst group against average | tasks that have both |
| `<task>-classes.png` | accuracy per group, or of the classes that changed most | two methods or more, or groups |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense.benchmarks.tables import BASELINE, check_comparable, host_name
from defense.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_N_CLASSES_SHOWN = 20

Result = Mapping[str, Any]


def draw(results: Sequence[Result], out: Path) -> list[Path]:
    """Write the plots of all tasks into a folder and return their paths.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: See `tables.check_comparable`.
    """
    check_comparable(results)
    paths = []
    tasks = list(dict.fromkeys((r["robust"]["task"], r["model"], r["pretrained"]) for r in results))
    for task in tasks:
        own = [r for r in results if (r["robust"]["task"], r["model"], r["pretrained"]) == task]
        for name, plot in (("strength", strength), ("trade-off", trade_off), ("classes", classes)):
            figure = plot(own)
            if figure is not None:
                path = out / f"{task[0]}-{name}.png"
                figure.savefig(path, dpi=120, metadata={"Software": None})  # the same bytes for the same figure
                paths.append(path)
    return paths


def _axes(results: Sequence[Result], x: str, y: str) -> tuple[Figure, Axes]:
    """Return a new figure whose title says what was measured, and on which weights."""
    try:
        from matplotlib.figure import Figure  # not pyplot: no global state, no screen
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "bench") from error
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    robust = results[0]["robust"]
    note = "" if robust["is_complete"] else " (data incomplete)"
    axes.set_title(f"{robust['title']}{note}\n{host_name(results[0]).replace('*', '')}", fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _points(figures: Sequence[Mapping[str, float]]) -> tuple[list[float], list[list[float]]]:
    """Return values and the lengths of their error bars, in percent."""
    values = [100 * figure["value"] for figure in figures]
    # A percentile interval need not hold the value itself.
    below = [max(0.0, 100 * (figure["value"] - figure["low"])) for figure in figures]
    above = [max(0.0, 100 * (figure["high"] - figure["value"])) for figure in figures]
    return values, [below, above]


def strength(results: Sequence[Result]) -> Figure | None:
    """Return accuracies against the strength of what was removed; the baseline stands at 0."""
    base = [r for r in results if r["method"] == BASELINE]
    swept = [r for r in results if "strength" in r["robust"]["settings"]]
    if len({r["robust"]["settings"]["strength"] for r in swept}) < 2:
        return None
    figure, axes = _axes(results, "strength (0: stock CLIP, 1: the full edit)", "accuracy, %")
    for dataset in dict.fromkeys(r["dataset"] for r in swept):
        for name in dict.fromkeys(r["method"].partition("@")[0] for r in swept):
            own = [r for r in swept if r["dataset"] == dataset and r["method"].partition("@")[0] == name]
            line = [(0.0, r) for r in base if r["dataset"] == dataset]
            line += [(r["robust"]["settings"]["strength"], r) for r in own]
            line.sort(key=lambda entry: entry[0])
            for what in ("accuracy", "worst_group"):
                if what in own[0]["robust"]["figures"]:
                    values, bars = _points([r["robust"]["figures"][what] for _, r in line])
                    label = f"{own[0]['robust']['variant']} {what.replace('_', ' ')}, {name}"
                    axes.errorbar([x for x, _ in line], values, yerr=bars, marker="o", capsize=3, label=label)
    axes.legend(fontsize=8)
    return figure


def trade_off(results: Sequence[Result]) -> Figure | None:
    """Return attacked accuracy against clean accuracy, or worst group against average: a point per method."""
    pairs: list[tuple[str, Mapping[str, float], Mapping[str, float]]] = []
    clean = {r["method"]: r["robust"]["figures"]["accuracy"] for r in results if r["robust"]["variant"] == "clean"}
    for result in results:
        figures, variant = result["robust"]["figures"], result["robust"]["variant"]
        if "worst_group" in figures:
            pairs.append((result["method"], figures["accuracy"], figures["worst_group"]))
        elif result["robust"]["is_attacked"] and result["method"] in clean:
            pairs.append((f"{result['method']}, {variant}", clean[result["method"]], figures["accuracy"]))
    if not pairs:
        return None
    x, y = ("clean accuracy, %", "attacked accuracy, %") if clean else ("average accuracy, %", "worst group, %")
    figure, axes = _axes(results, x, y)
    for name, across, up in pairs:
        (x_value,), x_bar = _points([across])
        (y_value,), y_bar = _points([up])
        axes.errorbar(x_value, y_value, xerr=x_bar, yerr=y_bar, marker="o", capsize=3, label=name)
    axes.legend(fontsize=8)
    return figure


def classes(results: Sequence[Result]) -> Figure | None:
    """Return the accuracy per group, or per class for the classes whose accuracy differs most between methods."""
    shown = [r for r in results if r["robust"]["groups"] or r["robust"]["is_attacked"]]
    if not shown:
        return None
    own = [r for r in shown if r["dataset"] == shown[0]["dataset"]]
    by_method = {r["method"]: r["robust"]["groups"] or r["robust"]["per_class"] for r in own}
    first = next(iter(by_method.values()))
    if len(by_method) < 2 and not own[0]["robust"]["groups"]:
        return None
    spread = {name: _spread([entries[name][1] for entries in by_method.values()]) for name in first}
    names = list(first) if own[0]["robust"]["groups"] else sorted(first, key=lambda name: -spread[name])
    names = names[:_N_CLASSES_SHOWN]
    figure, axes = _axes(own, "accuracy, %", "")
    figure.set_figheight(max(3.0, 1.5 + 0.12 * len(names) * len(by_method)))
    height = 0.8 / len(by_method)
    for place, (method, entries) in enumerate(by_method.items()):
        at = [row + place * height for row in range(len(names))]
        axes.barh(at, [100 * entries[name][1] for name in names], height, label=method)
    middle = (len(by_method) - 1) * height / 2
    axes.set_yticks([row + middle for row in range(len(names))], [f"{name} (n {first[name][0]:,})" for name in names])
    axes.set_xlim(0, 100)
    axes.invert_yaxis()
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)
    return figure


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)
