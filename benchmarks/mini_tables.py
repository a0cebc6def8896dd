"""The table of the miniatures that docs/results.md shows: one row per method, the main figures of all three."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from defense.benchmarks.environment import machine_words
from defense.benchmarks.method_tables import agreement_of
from defense.benchmarks.tables import CANNOT_WORK, RANDOM, cannot_work, is_draw, mean_and_range
from defense.errors import ConfigError

_ATTACKED, _CLEAN = "mini-typographic-attacked", "mini-typographic-clean"
_GROUPED = ("mini-waterbirds-test", "mini-celeba-test")
_COLUMNS = (
    ("clean", _CLEAN, "accuracy"),
    ("attacked", _ATTACKED, "accuracy"),
    ("attack success", _ATTACKED, "attack_success"),
    *((f"worst group, {name.removesuffix('-test')}", name, "worst_group") for name in _GROUPED),
)
"""Heading, data set and figure."""

Result = Mapping[str, Any]


class _Rows:
    """Results at full strength by data set and row; the draws of the control share one."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.results = [each for each in results if "@" not in each["method"] or is_draw(each["method"])]
        self.by_place: dict[tuple[str, str], list[Any]] = {}
        for each in self.results:
            self.by_place.setdefault((each["dataset"], self.row_of(each["method"])), []).append(each["robust"])
        self.unable = {
            dataset: set(cannot_work([each for each in self.results if each["dataset"] == dataset]))
            for dataset in {each["dataset"] for each in self.results}
        }

    @staticmethod
    def row_of(method: str) -> str:
        return RANDOM if is_draw(method) else method

    def names(self) -> list[str]:
        """Return the methods, the best on attacked pictures first, those without a figure last."""
        names = {name for _, name in self.by_place}.union(*self.unable.values())

        def rank(name: str) -> tuple[float, str]:
            values = self.values(_ATTACKED, name, "accuracy")
            return (-sum(values) / len(values) if values else 1.0), name

        return sorted(names, key=rank)

    def values(self, dataset: str, name: str, figure: str) -> list[float]:
        """Return a figure in percent, one for each draw; none where it was not measured."""
        return [100 * each["figures"][figure]["value"] for each in self.by_place.get((dataset, name), [])]

    def cell(self, dataset: str, name: str, figure: str) -> str:
        values = self.values(dataset, name, figure)
        if values:
            return mean_and_range(values)
        return CANNOT_WORK if name in self.unable.get(dataset, ()) else "-"

    def half_widths(self) -> list[float]:
        """Return half of the intervals of all figures shown, in points."""
        found = [(each, name) for _, place, name in _COLUMNS for (at, _), all_ in self.by_place.items() if at == place
                 for each in all_]  # fmt: skip
        return [50 * (each["figures"][name]["high"] - each["figures"][name]["low"]) for each, name in found]


def main_table(results: Sequence[Result]) -> str:
    """Return one row per method, the best on attacked pictures first, with the main figures of the miniatures.

    Methods at a part of their strength are left out. Of the control's draws the mean is shown, and the range.

    Raises:
        ConfigError: No result is left that has one of these figures.
    """
    rows = _Rows(results)
    half_widths = rows.half_widths()
    if not half_widths:
        raise ConfigError("no method was measured on the miniatures at full strength; run: defense bench mini")
    lines = [f"| method | {' | '.join(heading for heading, *_ in _COLUMNS)} |", "|---" * (len(_COLUMNS) + 1) + "|"]
    for name in rows.names():
        cells = [rows.cell(dataset, name, figure) for _, dataset, figure in _COLUMNS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n\n" + _caption(rows, max(half_widths))


def _caption(rows: _Rows, half_width: float) -> str:
    counts = ", ".join(f"{name} {n:,}" for name, n in {r["dataset"]: r["robust"]["n"] for r in rows.results}.items())
    text = f'Percent, half of a 95 % interval at most {half_width:.1f} points; pictures: {counts}. "-": not applicable.'
    n_draws = max((len(found) for (_, name), found in rows.by_place.items() if name == RANDOM), default=0)
    if n_draws:
        text += f" {RANDOM}: {f'mean and range of {n_draws} draws' if n_draws > 1 else 'a single draw'}."
    agreements = [agreement_of(found[0]) for (_, name), found in rows.by_place.items() if name == "defense-delta"]
    if known := sorted({f"{100 * each:.1f}" for each in agreements if each is not None}, key=float):
        text += f" defense-delta: its thresholds agree with the exact rule on {known[0]} % of answers or more."
    return (
        f"{text} Intervals, paired tests and each method's reasons, settings and cost: "
        f"[all results](../benchmarks/RESULTS.md).\n{machine_words(rows.results[0]['robust']['run']['environment'])}"
    )
