"""The records of the benchmark of latents summed up, and in print as Markdown.

A record is one way of choosing S on the pictures of one seed, as JSON values; which test pictures were then answered
rightly is packed into it, one bit a picture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from defense.benchmarks.latents_choosing import ABLATIONS, CANDIDATES, RULES
from defense.benchmarks.metrics import mean_figure
from defense.errors import ConfigError

TEST_KINDS = ("clean", "attacked")
"""Kinds of pictures that are measured on."""


def packed(is_correct: np.ndarray) -> str:
    """Return bools [n] as hex digits, two for each eight."""
    return np.packbits(is_correct).tobytes().hex()


def unpacked(text: str, n: int) -> np.ndarray:
    """Return the n bools that `packed` made digits of."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(bool)


def summary(records: Sequence[Mapping[str, Any]], n_test: int) -> dict[str, Any]:
    """Return, by way of choosing, the shares of right answers and how they differ from ours.

    A picture's value is its mean over seeds; intervals are over pictures.

    Args:
        records: Of all ways and seeds.
        n_test: Pictures that each was measured on.
    """
    found: dict[str, Any] = {}
    ours = _values([record for record in records if record["arm"] == "ours"], n_test)
    for name in dict.fromkeys(record["arm"] for record in records):
        mine = [record for record in records if record["arm"] == name]
        values = _values(mine, n_test)
        found[name] = {
            "n_latents": [len(record["latents"]) for record in mine],
            **{kind: mean_figure(values[kind].mean(0), seed=0).to_dict() for kind in TEST_KINDS},
            "by_seed": {kind: values[kind].mean(1).tolist() for kind in TEST_KINDS},
            "less_ours": {
                kind: mean_figure(values[kind].mean(0) - ours[kind].mean(0), seed=0).to_dict() for kind in TEST_KINDS
            },
        }
    return found


def _values(records: Sequence[Mapping[str, Any]], n_test: int) -> dict[str, np.ndarray]:
    """Return which pictures were answered rightly, float [n_seeds, n_test], by kind."""
    return {
        kind: np.stack([unpacked(record["correct"][kind], n_test) for record in records]).astype(float)
        for kind in TEST_KINDS
    }


def verdict(less_ours: Mapping[str, Mapping[str, float]]) -> str:
    """Return whether an ingredient earns its place, in words.

    Args:
        less_ours: Kind of picture -> accuracy without the ingredient less that with it, a `Figure` as JSON values.
    """
    worse = [kind for kind in TEST_KINDS if less_ours[kind]["high"] < 0]
    better = [kind for kind in TEST_KINDS if less_ours[kind]["low"] > 0]
    if worse and better:
        return f"a trade: {' and '.join(worse)} for {' and '.join(better)}"
    return f"yes: {' and '.join(worse)}" if worse else "no: better without" if better else "no difference seen"


def table(result: Mapping[str, Any]) -> str:
    """Return a result of `latents.run` as Markdown: the rules, the ablations, and what they rest on.

    Raises:
        ConfigError: The run was interrupted.
    """
    rows = result["rows"]
    if rows is None:
        raise ConfigError("this run of the benchmark of latents was interrupted; run the same command again")
    lines = ["| rule | n | clean | attacked | n, own stop | clean | attacked |", "|---" * 7 + "|"]
    lines.append(f"| no defense | 0 | {_cells(rows['plain'])} | | | |")
    for rule in RULES:
        two = [rows[rule]] * 2 if rule == "ours" else [rows[f"{rule}, as many"], rows[f"{rule}, own stop"]]
        lines.append(f"| {rule} | " + " | ".join(f"{_count(row)} | {_cells(row)}" for row in two) + " |")
    lines += _candidate_lines(rows)
    lines += ["", "| ours without | n | clean | attacked | clean, less ours | attacked, less ours | earns its place |"]
    lines.append("|---" * 7 + "|")
    for ingredient in ABLATIONS:
        row = rows[f"without {ingredient}"]
        changes = " | ".join(_points(row["less_ours"][kind]) for kind in TEST_KINDS)
        lines.append(f"| {ingredient} | {_count(row)} | {_cells(row)} | {changes} | {verdict(row['less_ours'])} |")
    settings, seeds = result["settings"], result["seeds"]
    lines += [
        "",
        f"Percent of {settings['n_test']} pictures (95 % interval over pictures), mean of {len(seeds)} seeds; n is the "
        f"number of latents. Chosen at {result['hook_point']} on {settings['n_fit']} pictures a seed, of "
        f"{settings['fit']['n_candidates']} candidates, under a clean budget of "
        f'{100 * settings["fit"]["clean_budget"]:g} %. "No difference seen" means that the interval holds 0. '
        f"`{result['environment']['command']}`",
    ]
    return "\n".join(lines)


def _candidate_lines(rows: Mapping[str, Any]) -> list[str]:
    """Return the table of what ours comes to from other candidates; of runs before there was one, that they lack it."""
    found = {candidates: rows.get(f"ours, from {candidates}") for candidates in CANDIDATES}
    lines = [
        "",
        "| ours, chosen from | n | clean | attacked | clean, less ours | attacked, less ours |",
        "|---" * 6 + "|",
    ]
    for candidates, row in found.items():
        if row is None:
            lines.append(f"| {candidates} | not measured | | | | |")
        else:
            changes = " | ".join(_points(row["less_ours"][kind]) for kind in TEST_KINDS)
            lines.append(f"| {candidates} | {_count(row)} | {_cells(row)} | {changes} |")
    return lines


def _count(row: Mapping[str, Any]) -> str:
    least, most = min(row["n_latents"]), max(row["n_latents"])
    return str(least) if least == most else f"{least} to {most}"


def _cells(row: Mapping[str, Any]) -> str:
    figures = [row[kind] for kind in TEST_KINDS]
    return " | ".join(f"{100 * f['value']:.1f} ({100 * f['low']:.1f} to {100 * f['high']:.1f})" for f in figures)


def _points(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:+.1f} ({100 * figure['low']:+.1f} to {100 * figure['high']:+.1f})"
