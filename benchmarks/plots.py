"""Results as PNG plots: nothing is measured here, each plot is a function of the JSON.

| file | what | where |
|---|---|---|
| `<task>-strength.png` | accuracies against the strength of a defense | a method at two strengths or more |
| `<task>-trade-off.png` | attacked accuracy, or that of the worst group, against what it costs | tasks with both |
| `<task>-classes.png` | accuracy per group, or of the classes that changed most | two methods or more, or groups |

A method has one color in all of them. What a method costs is the clean accuracy that it loses against the baseline, on
the same pictures; of groups, the average. Lines run through the strengths of one method alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zlib import crc32

from defense.benchmarks.tables import BASELINE, check_comparable, clip_name, in_order, is_draw
from defense.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_N_CLASSES_SHOWN = 20
_MARKERS = "os^Dv"
_LINES = ("-", "--", ":", "-.")
_SHOWN = ("accuracy", "worst_group")
_WIDE, _LINEAR = 20, 5
"""Points of loss from which on the axis is logarithmic, and where it begins to be."""
_COLORS = (*range(0, 20, 2), *range(1, 20, 2))
"""Of matplotlib's "tab20": the strong ones first, then the pale."""
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
    """Return accuracies against the strength of what was removed, of methods at several; the baseline stands at 0.

    A line runs through the strengths of one method on one data set: strength 0 is the stock CLIP bit for bit.
    """
    names = [name for name in dict.fromkeys(_base_of(r) for r in results) if name in _swept(results)]
    if not names:
        return None
    figure, axes = _axes(results, f"strength of {', '.join(names)} (0: stock CLIP, 1: the full edit)", "accuracy, %")
    shown = [r for r in results if r["method"] == BASELINE or _base_of(r) in names]
    for place, (label, what, own) in enumerate(_series(shown)):
        for name in names:
            of_line = [r for r in own if r["method"] == BASELINE or _base_of(r) == name]
            at = {r["robust"]["settings"].get("strength", 0.0) for r in of_line}
            figures = [
                _mean_and_range([r["robust"]["figures"][what] for r in of_line
                                 if r["robust"]["settings"].get("strength", 0.0) == x])
                for x in sorted(at)
            ]  # fmt: skip
            values, bars = _points(figures)
            axes.errorbar(
                sorted(at), values, yerr=bars, capsize=3, color=color_of(name),
                marker=_MARKERS[place % len(_MARKERS)], linestyle=_LINES[place % len(_LINES)],
                label=label if len(names) == 1 else f"{label}, {name}",
            )  # fmt: skip
    _legend(figure, len(axes.get_legend_handles_labels()[1]))
    return figure


def _series(results: Sequence[Result]) -> list[tuple[str, str, list[Result]]]:
    """Return what strength is drawn against: a label, the figure, and the results; ways to attack are one."""
    ways = {r["dataset"] for r in results if r["robust"]["is_attacked"]}
    found: dict[tuple[str, str], list[Result]] = {}
    for result in results:
        variant = result["robust"]["variant"]
        is_one_of_many = result["robust"]["is_attacked"] and len(ways) > 1
        kind = f"attacked, mean and range of {len(ways)} ways" if is_one_of_many else variant
        for what in _SHOWN:
            if what in result["robust"]["figures"]:
                name = what.replace("_", " ")
                label = f"{name}, {kind}" if is_one_of_many else f"{kind} {name}"
                found.setdefault((label, what), []).append(result)
    return [(label, what, own) for (label, what), own in found.items()]


def _base_of(result: Result) -> str:
    """Return the method of a result, without strength or seed."""
    return str(result["method"].partition("@")[0])


def _swept(results: Sequence[Result]) -> set[str]:
    """Return the methods that were measured at two strengths or more."""
    strengths: dict[str, set[float]] = {}
    for result in results:
        if "strength" in result["robust"]["settings"] and not is_draw(result["method"]):
            strengths.setdefault(_base_of(result), set()).add(result["robust"]["settings"]["strength"])
    return {name for name, found in strengths.items() if len(found) > 1}


def color_of(method: str) -> tuple[float, float, float]:
    """Return the color of a method, the same in every plot; its strengths and draws share it. RGB, in [0, 1]."""
    from matplotlib import colormaps

    from defense.benchmarks.methods import FACTORIES

    base, known = method.partition("@")[0], list(FACTORIES)
    place = known.index(base) if base in known else len(known) + crc32(base.encode())
    n = len(_COLORS)
    return colormaps["tab20"](_COLORS[place % n])[:3]


def trade_off(results: Sequence[Result]) -> Figure | None:
    """Return attacked accuracy, or that of the worst group, against the accuracy that is lost: a point per method.

    Of several ways to attack it is their mean, with a bar from the lowest to the highest. A line runs through the
    strengths of one method, from the baseline on, and nowhere else.
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
    points = {
        method: _point([r for r in shown if r["method"] == method], costs[method])
        for method in dict.fromkeys(r["method"] for r in shown)
    }
    names = list(dict.fromkeys(method.partition("@")[0] for method in points))
    is_wide = max(abs(lost) for (lost, _), _ in points.values()) > _WIDE
    note = f" (logarithmic beyond {_LINEAR})" if is_wide else ""
    figure, axes = _axes(shown, f"{x} lost against {BASELINE}, points{note}", y)
    if is_wide:  # else one method that loses nearly all would press the others into a line
        axes.set_xscale("symlog", linthresh=_LINEAR, linscale=2)
        axes.xaxis.set_major_formatter("{x:g}")
    for name in names:
        own = [method for method in points if method.partition("@")[0] == name]
        for method in own:
            (x_value, x_bar), (y_value, y_bar) = points[method]
            axes.errorbar(
                x_value, y_value, xerr=x_bar, yerr=y_bar, capsize=3, linestyle="", color=color_of(name),
                marker=_marker_of(name), label=name if method == own[0] else None,
            )  # fmt: skip
        if name in _swept(shown):
            _join(axes, name, {method: (points[method][0][0], points[method][1][0]) for method in [BASELINE, *own]
                               if method in points}, shown)  # fmt: skip
    _legend(figure, len(names))
    return figure


def _point(gains: Sequence[Result], cost: Result) -> tuple[tuple[float, list[list[float]]], ...]:
    """Return what a method loses and what it reaches: values and the lengths of their error bars, in percent."""
    what = "worst_group" if gains[0]["robust"]["groups"] else "accuracy"
    reached = [r["robust"]["figures"][what] for r in gains]
    (lost,), lost_bar = _points([_lost(cost) or _NOTHING])
    (value,), bar = _points([_mean_and_range(reached)])
    return (lost, lost_bar), (value, bar)


def _join(axes: Axes, name: str, places: Mapping[str, tuple[float, float]], results: Sequence[Result]) -> None:
    """Draw a line through the strengths of a method, and write each but the full one beside its point."""
    strengths = {r["method"]: r["robust"]["settings"].get("strength", 0.0) for r in results}
    order = sorted(places, key=lambda method: strengths[method])
    axes.plot(*zip(*(places[method] for method in order), strict=True), color=color_of(name), linewidth=1)
    for method in order:
        if 0 < strengths[method] < 1:
            axes.annotate(f"{strengths[method]:g}", places[method], (5, -9), textcoords="offset points", size=7)


def _marker_of(method: str) -> str:
    """Return the marker of a method; methods with like colors have others."""
    from defense.benchmarks.methods import FACTORIES

    known = list(FACTORIES)
    return _MARKERS[known.index(method) % len(_MARKERS)] if method in known else _MARKERS[-1]


def _mean_and_range(figures: Sequence[Mapping[str, float]]) -> Mapping[str, float]:
    """Return the mean of several ways with their range in place of an interval; a single one as it is."""
    if len(figures) == 1:
        return figures[0]
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
