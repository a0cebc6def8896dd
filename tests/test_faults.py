"""FAULTS.md and the tests agree: each row is held by a test, each numbered test has a row."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
ROW = re.compile(r"\| (\d+) \| ([^|]+) \| ([^|]+) \| ([^|]+) \|")
HELD = re.compile(r"`(test_fault_\d+_\w+)` \(([\w/.]+)\)")


def rows() -> list[tuple[int, str]]:
    text = (TESTS / "FAULTS.md").read_text(encoding="utf-8")
    return [(int(number), held) for number, _, _, held in ROW.findall(text)]


def numbered() -> set[tuple[int, str, str]]:
    """Each test with a number: number, name, file."""
    found = set()
    for path in TESTS.rglob("test_*.py"):
        for name, number in re.findall(r"def (test_fault_(\d+)_\w+)", path.read_text(encoding="utf-8")):
            found.add((int(number), name, path.relative_to(TESTS).as_posix()))
    return found


def test_rows_are_numbered_on_without_a_gap() -> None:
    numbers = [number for number, _ in rows()]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert len(numbers) >= 93


def test_every_row_names_tests_that_are_there() -> None:
    there = numbered()
    for number, held in rows():
        named = HELD.findall(held)
        assert named, f"row {number} names no test"
        for name, file in named:
            assert (number, name, file) in there, f"row {number} names {name} in {file}"


def test_every_numbered_test_has_a_row() -> None:
    assert {number for number, _, _ in numbered()} <= {number for number, _ in rows()}
