"""The size of things: modules that can be read at a sitting, functions that fit on a page."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_MODULE, MAX_FUNCTION = 450, 60
"""In lines; of a function, its docstring aside."""
REASON = "# Longer than functions here are: "
"""Begins the comment above a longer function; the rest of it says why it is one."""


def files() -> list[Path]:
    folders = ["defense", "export", "benchmarks", "demo", "tests"]
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")) if "build" not in path.parts]


def long_functions(source: str) -> list[str]:
    """The functions of more than MAX_FUNCTION lines without a reason above them."""
    lines = source.splitlines()
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        assert node.end_lineno is not None  # of a tree that was parsed
        size = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            docstring = node.body[0]
            size -= docstring.end_lineno - docstring.lineno + 1
        first = min([node.lineno, *(each.lineno for each in node.decorator_list)])
        above = lines[first - 2] if first > 1 else ""
        if size > MAX_FUNCTION and not above.strip().startswith(REASON):
            found.append(f"{node.name}: {size} lines")
    return found


def test_every_module_can_be_read_at_a_sitting():
    sizes = {path.relative_to(ROOT).as_posix(): len(path.read_text("utf-8").splitlines()) for path in files()}
    assert len(sizes) > 300
    too_long = {name: size for name, size in sizes.items() if size > MAX_MODULE}
    assert too_long == {}, f"split by subject what has more than {MAX_MODULE} lines: {too_long}"


def test_every_function_fits_on_a_page_or_says_why_not():
    found = {path.relative_to(ROOT).as_posix(): long_functions(path.read_text("utf-8")) for path in files()}
    assert {name: functions for name, functions in found.items() if functions} == {}


BODY = "    x = 1\n" * MAX_FUNCTION


@pytest.mark.parametrize(
    ("source", "n_found"),
    [
        (f"def f():\n{BODY}", 1),
        (f"async def f():\n{BODY}", 1),
        (f"class C:\n    @property\n    def f(self):\n{BODY.replace('    x', '        x')}", 1),
        (f"def f():\n{BODY.removesuffix(BODY[:10])}", 0),
        (f'def f():\n    """What.\n\n    More.\n    """\n{BODY.removesuffix(BODY[:10])}', 0),
        (f"{REASON}a list.\n@cache\ndef f():\n{BODY}", 0),
        (f"# Another comment.\ndef f():\n{BODY}", 1),
    ],
)
def test_a_long_function_is_found_wherever_it_stands_unless_a_reason_stands_above(source, n_found):
    assert len(long_functions(source)) == n_found


def test_where_to_put_something_is_a_place_that_is_there():
    table = (ROOT / "CONTRIBUTING.md").read_text("utf-8").split("Where do I put ...")[1].split("## ")[0]
    named = {name for name in re.findall(r"`([\w./]+)`", table) if "/" in name}
    assert len(named) > 25
    assert [
        name for name in sorted(named) if not any((root / name).exists() for root in (ROOT, ROOT / "defense"))
    ] == []
