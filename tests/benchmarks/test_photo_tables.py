"""The tables of what was measured on photographs, from results made up by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")

from defense.benchmarks import photo_seeds, photo_tables
from defense.errors import ConfigError

ENVIRONMENT = {
    "cpu": "a CPU", "cores": 2, "threads": 1, "load": 0.1, "python": "3.11", "torch": "2.15.0", "open_clip": "3.3.0",
    "commit": "0" * 40, "is_dirty": False, "timestamp": "2026-01-01T00:00:00+00:00", "command": "typed",
}  # fmt: skip
ACCURACY = {
    "zero-shot": {"clean": 0.6, "neutral": 0.5, "attacked-print": 0.1, "attacked-turned": 0.3},
    "defense": {"clean": 0.6, "neutral": 0.5, "attacked-print": 0.3, "attacked-turned": 0.5},
    "defense-delta": {"clean": 0.6, "neutral": 0.5, "attacked-print": 0.9, "attacked-turned": 0.9},
    "defense-prefix": {"clean": 0.5, "neutral": 0.4, "attacked-print": 0.2, "attacked-turned": 0.3},
    "leace": {"clean": 0.5, "neutral": 0.4, "attacked-print": 0.2, "attacked-turned": 0.2},
    "random-latents": {"clean": 0.6, "neutral": 0.5, "attacked-print": 0.1, "attacked-turned": 0.3},
    "before-reading": {"clean": 0.6, "neutral": 0.5, "attacked-print": 0.4, "attacked-turned": 0.5},
}


def figure(value: float) -> dict:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 400}


def result(method: str, variant: str, accuracy: float, task: str = "photo-100") -> dict:
    figures = {"accuracy": figure(accuracy)}
    if variant.startswith("attacked"):
        figures["attack_success"] = figure(1 - accuracy)
    same = 1.0 if method == "random-latents" else 0.9
    versus = {} if method == "zero-shot" else {"zero-shot": {"same": figure(same)}}
    changed = {} if same == 1 or variant != "clean" else {"wok": [10, 0.3], "cat": [20, 0.05]}
    robust = {
        "n": 400, "class_names": ["cat", "wok"], "figures": figures, "versus": versus, "changed_per_class": changed,
        "run": {"environment": ENVIRONMENT},
    }  # fmt: skip
    return {"dataset": f"{task}-{variant}", "method": method, "robust": robust}


@pytest.fixture
def results() -> list[dict]:
    return [result(method, variant, value) for method, row in ACCURACY.items() for variant, value in row.items()]


def rows_of(text: str) -> dict[str, list[str]]:
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {cells[0]: cells[1:] for cells in lines}


def test_the_short_table_has_ours_the_strongest_method_of_others_and_the_control(results):
    text = photo_tables.short_table(results)
    rows = rows_of(text)
    assert list(rows)[2:] == ["plain", "defended", "defense-prefix", "random latents", "before it could read"]
    assert rows["plain"] == ["60.0", "100.0", "50.0", "20.0", "80.0"]
    assert rows["defended"] == ["60.0", "90.0", "50.0", "40.0", "60.0"]
    assert "mean over 2 ways to write a word (print, turned), 400 pictures each" in text
    assert "at most 5.0 points" in text


def test_real_notes_have_a_column_where_they_were_measured(results):
    """The strongest rival needs pictures to tune on, which there are none of."""
    fitted = ["zero-shot", "defense", "random-latents", "before-reading"]
    real = [result(name, "attacked", 0.4 + i / 10, "rta100-known") for i, name in enumerate(fitted)]
    rows = rows_of(photo_tables.short_table([*results, *real]))
    assert [cells[-1] for cells in rows.values()] == ["real notes", "---", "40.0", "50.0", "-", "60.0", "70.0"]


def test_a_table_without_ours_is_refused(results):
    for left in ([], [each for each in results if each["method"] != "defense"]):
        with pytest.raises(ConfigError, match="defense bench photo"):
            photo_tables.short_table(left)


def test_answers_that_change_are_counted_by_class_the_worst_first(results):
    rows = rows_of(photo_tables.changed_table(results))
    assert rows["method"] == ["clean", "neutral", "most in"]
    assert rows["defense"] == ["10.0", "10.0", "wok 3 of 10, cat 1 of 20"]
    assert rows["random-latents"] == ["0.0", "0.0", "-"]
    assert "zero-shot" not in rows


def test_seeds_have_a_row_each_their_mean_and_their_range():
    rows = [
        {"seed": seed, "latents": 90, "clean": 60.0, "stay": 99.0, "attacked": 30.0 + seed, "success": 2.0}
        for seed in (1, 2, 6)
    ]
    shown = rows_of(photo_seeds.table({"rows": rows}))
    assert shown["6"] == ["90", "60.0", "99.0", "36.0", "2.0"]
    assert shown["mean"] == ["", "60.0", "99.0", "33.0", "2.0"]
    assert shown["range"][3] == "31.0 to 36.0"
