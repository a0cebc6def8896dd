"""The README's table of what was measured on photographs, and which answers change there although nothing attacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from defense.benchmarks.environment import machine_words
from defense.benchmarks.method_tables import laid_out
from defense.benchmarks.tables import BASELINE, BEFORE, OURS, RANDOM, is_draw, mean_and_range
from defense.errors import ConfigError

Result = Mapping[str, Any]

_ATTACKED = "photo-100-attacked-"
_CLEAN, _PLATE = "photo-100-clean", "photo-100-neutral"
_UNATTACKED = (_CLEAN, _PLATE, "photo-100-look-alike", "photo-100-texture")
_REAL = "rta100-known-attacked"
_NO_RIVALS = {BASELINE, OURS, RANDOM, BEFORE, "defense-scale", "defense-project", "defense-delta", "naive-splice"}
"""Ours, with other edits too, what controls for it, and what it may reach."""
_NAMES = {BASELINE: "plain", OURS: "defended", RANDOM: "random latents", BEFORE: "before it could read"}
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

    def main_figures(self, method: str) -> list[float]:
        """Return clean accuracy, answers that stay, the empty plate's, attacked accuracy and success, in percent."""
        clean, plate = (self.figure(dataset, method, "accuracy") for dataset in (_CLEAN, _PLATE))
        return [clean, self.same(method), plate, self.mean(method, "accuracy"), self.mean(method, "attack_success")]

    def strongest_rival(self) -> str | None:
        """Return the method that is right most often on attacked photographs, our variants and controls aside."""
        rivals = [name for name in self.methods if name.partition("@")[0] not in _NO_RIVALS]
        return max(rivals, key=lambda name: self.mean(name, "accuracy"), default=None)


def short_table(results: Sequence[Result], seeds: Sequence[Mapping[str, Any]] = ()) -> str:
    """Return the README's rows: plain CLIP, ours, the strongest rival, random latents, the CLIP before reading.

    Args:
        results: Of all methods; of the control's draws the mean is shown, and the range.
        seeds: Rows of `photo_seeds`: the defense fitted with several seeds.

    Raises:
        ConfigError: Plain CLIP or ours was not measured on the photographs.
    """
    table = Table(results)
    if not table.attacked or any((_CLEAN, name) not in table.by_place for name in (BASELINE, OURS)):
        raise ConfigError("plain CLIP and the defense were not measured on photographs; run: defense bench photo")
    rows = [BASELINE, OURS, *filter(None, [table.strongest_rival()])]
    rows += [name for name in (RANDOM, BEFORE) if name in table.methods]
    has_real = (_REAL, OURS) in table.by_place
    headings = ["model", "clean", "answers that stay", "empty plate", "attacked", "attack success"]
    headings += ["real notes"] * has_real
    lines = []
    draws = [name for name in table.methods if is_draw(name)]
    for method in rows:
        same_row = draws if method == RANDOM else [method]
        columns = zip(*(table.main_figures(each) for each in same_row), strict=True)
        lines.append([_NAMES.get(method, method), *map(mean_and_range, columns)])
        if has_real:
            found = [table.figure(_REAL, each, "accuracy") for each in same_row if (_REAL, each) in table.by_place]
            lines[-1].append(mean_and_range(found) if found else "-")
    return "\n".join(
        [laid_out(headings, lines) + "\n", _caption(table, len(draws)), *_seeds(table, seeds), _made(table)]
    )


def _made(table: Table) -> str:
    return machine_words(table.by_place[_CLEAN, OURS]["run"]["environment"])


def _seeds(table: Table, seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line on the defense over seeds of its fit; none without."""
    if not seeds:
        return []
    sha256 = table.by_place[_CLEAN, OURS]["settings"]["defense_sha256"]
    shown = [f"; the table shows seed {row['seed']}" for row in seeds if row["sha256"] == sha256]
    attacked, success = (mean_and_range([row[name] for row in seeds]) for name in ("attacked", "success"))
    return [f"Over {len(seeds)} seeds of the fit: attacked {attacked}, attack success {success}{''.join(shown)}."]


def _caption(table: Table, n_draws: int) -> str:
    clean = table.by_place[_CLEAN, OURS]
    ways = ", ".join(dataset.removeprefix(_ATTACKED) for dataset in table.attacked)
    half = max(
        (f["high"] - f["low"]) / 2 for f in (table.by_place[d, OURS]["figures"]["accuracy"] for d in table.attacked)
    )
    n = clean["n"]
    lines = [
        f"Percent of {n:,} photographs of {len(clean['class_names'])} classes, enlarged from 64 pixels; attacked: mean "
        f"over {len(table.attacked)} ways to write a word ({ways}), {n:,} pictures each, in unseen typefaces; half of "
        f"a 95 % interval of one way at most {100 * half:.1f} points."
    ]
    if BEFORE in table.methods:
        lines.append(
            "Before it could read: the same CLIP before its training on words. Letters disturb its picture network all "
            "the same, as patterns do; taking out what was read can lead no further than there."
        )
    if (_REAL, OURS) in table.by_place:
        real = table.by_place[_REAL, OURS]
        lines.append(
            f"Real notes: {real['n']} photographs of RTA-100, handwritten, among {len(real['class_names'])} names."
        )
    if n_draws:
        lines.append(f"Random latents: {f'mean and range of {n_draws} draws' if n_draws > 1 else 'a single draw'}.")
    return "\n".join(lines)


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
