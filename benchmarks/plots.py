"""Results as PNG plots: nothing is measured here, each plot is a function of the JSON.

| file | what | where |
|---|---|---|
| `<task>-strength.png` | accuracies against the strength of a defense | a method at two strengths or more |
| `<task>-trade-off.png` | attacked accuracy, or that of the worst group, against what it costs | tasks with both |
| `<task>-classes.png` | accuracy per group, or of the classes that changed most | two methods or more, or groups |

What a method costs is the clean accuracy that it loses against the baseline, on the same pictures; of groups, the
average.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense.benchmarks.tables import BASELINE, check_comparable, clip_name, in_order
from defense.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_N_CLASSES_SHOWN = 20
_MARKERS = "os^D"
_NOTHING: Mapping[str, float] = {"value": 0.0, "low": 0.0, "high": 0.0}

Result = Mapping[str, Any]


def draw(results: Sequence[Result], out: Path) -> list[Path]:
    """Write the plots of all tasks into a folder and return their paths.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: See `tables.check_comparable`.
    """
    check_comparable(results)
    paths = []
    for task in sorted({(r["robust"]["task"], r["model"], r["pretrained"]) for r in results}):
        own = [r for r in in_order(results) if (r["robust"]["task"], r["model"], r["pretrained"]) == task]
        for name, plot in KINDS.items():
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
    axes.set_title(f"{robust['title']}{note}\n{clip_name(results[0]).replace('*', '')}", fontsize=10)
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
    """Return accuracies against the strength of what was removed, of methods at several; the baseline stands at 0."""
    base = [r for r in results if r["method"] == BASELINE]
    strengths: dict[str, set[float]] = {}
    for result in results:
        if "strength" in result["robust"]["settings"]:
            found = strengths.setdefault(result["method"].partition("@")[0], set())
            found.add(result["robust"]["settings"]["strength"])
    swept = [r for r in results if len(strengths.get(r["method"].partition("@")[0], ())) > 1]
    if not swept:
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
    _legend(figure, len(axes.get_legend_handles_labels()[1]))
    return figure


def trade_off(results: Sequence[Result]) -> Figure | None:
    """Return attacked accuracy, or that of the worst group, against the accuracy that is lost: a point per method.

    Of several ways to attack it is their mean, with a bar from the lowest to the highest.
    """
    costs = {r["method"]: r for r in results if r["robust"]["variant"] == "clean" or r["robust"]["groups"]}
    gains = [r for r in results if r["robust"]["is_attacked"] or r["robust"]["groups"]]
    shown = [r for r in gains if r["method"] in costs and _lost(costs[r["method"]]) is not None]
    if len(shown) < 2:
        return None
    is_grouped = bool(shown[0]["robust"]["groups"])
    n_ways = len({r["dataset"] for r in shown})
    attacked = "attacked accuracy, %" if n_ways == 1 else f"attacked accuracy, %, mean and range of {n_ways} ways"
    x, y = ("average", "worst group, %") if is_grouped else ("clean accuracy", attacked)
    figure, axes = _axes(shown, f"{x} lost against {BASELINE}, points", y)
    what = "worst_group" if is_grouped else "accuracy"
    methods = list(dict.fromkeys(r["method"] for r in shown))
    for place, method in enumerate(methods):
        own = [r["robust"]["figures"][what] for r in shown if r["method"] == method]
        (x_value,), x_bar = _points([_lost(costs[method]) or _NOTHING])
        (y_value,), y_bar = _points([own[0] if len(own) == 1 else _mean_and_range(own)])
        marker = _MARKERS[place // 10 % len(_MARKERS)]  # colors come again after ten
        axes.errorbar(x_value, y_value, xerr=x_bar, yerr=y_bar, marker=marker, capsize=3, linestyle="", label=method)
    _legend(figure, len(methods))
    return figure


def _mean_and_range(figures: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    values = [figure["value"] for figure in figures]
    return {"value": sum(values) / len(values), "low": min(values), "high": max(values)}


def _lost(result: Result) -> Mapping[str, float] | None:
    """Return the accuracy that a method loses against the baseline, as a figure; None where that was not measured."""
    if result["method"] == BASELINE:
        return _NOTHING
    found = result["robust"]["versus"].get(BASELINE)
    if found is None:
        return None
    change = found["difference"]
    return {"value": -change["value"], "low": -change["high"], "high": -change["low"]}


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
    figure.set_size_inches(2.5 + 0.45 * len(names), 2.5 + 0.25 * len(by_method))
    axes.grid(visible=False)
    shares = [[100 * entries[name][1] for name in names] for entries in by_method.values()]
    axes.imshow(shares, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for row, values in enumerate(shares):
        for column, value in enumerate(values):
            axes.text(column, row, f"{value:.0f}", ha="center", va="center", color="w" if value < 60 else "k", size=7)
    axes.set_xticks(range(len(names)), [f"{name} (n {first[name][0]:,})" for name in names], rotation=90, size=8)
    axes.set_yticks(range(len(by_method)), list(by_method), size=8)
    return figure


def _legend(figure: Figure, n: int) -> None:
    """Put a legend of n entries below the axes."""
    rows = -(-n // 3)
    figure.set_figheight(4.5 + 0.2 * rows)
    figure.legend(fontsize=8, loc="outside lower center", ncols=3)


KINDS: Mapping[str, Callable[[Sequence[Result]], Figure | None]] = {
    "strength": strength,
    "trade-off": trade_off,
    "classes": classes,
}
"""End of the file's name -> function that draws the plot, or returns None where it would show nothing."""


def _spread(values: Sequence[float]) -> float:
    return max(values) - min(values)
