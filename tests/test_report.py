"""Figures in the README are generated, and licences of shipped artwork are stated."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("open_clip")

from defense.benchmarks import report
from defense.benchmarks.embedded import wilson

ROOT = Path(__file__).parents[1]


def test_the_readme_holds_exactly_the_measured_tables():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme == report.filled(readme, ROOT / "benchmarks" / "results")


def test_a_readme_without_markers_is_refused():
    with pytest.raises(ValueError, match="begin embedded"):
        report.filled("no markers", ROOT / "benchmarks" / "results")


def test_wilson_interval_equals_the_textbook():
    # Newcombe 1998, table I: 81 of 263.
    low, high = wilson(100 * 81 / 263, 263)
    assert low == pytest.approx(25.53, abs=0.01)
    assert high == pytest.approx(36.62, abs=0.01)


def test_every_shipped_font_is_in_the_notice():
    folder = ROOT / "defense" / "embedded"
    notice = (folder / "NOTICE.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in notice.splitlines() if line.startswith("| `fonts/")}
    assert listed == {f"fonts/{path.name}" for path in (folder / "fonts").iterdir()}
