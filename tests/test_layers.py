"""The rooms of the library: an import never runs up, and no modules import each other in a circle."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "defense"

FLOORS = (
    ("errors",),
    ("core", "world"),
    ("data",),
    ("hosts",),
    ("store",),
    ("classify", "importers"),
    ("train", "fit", "explain"),
    ("embedded",),
    ("protect",),
    ("cli",),
)
"""From the ground up. A room may use those on lower floors, and itself."""

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

ABOVE = {"export", "benchmarks", "demo"}
"""Stand on top of the library; only a command may reach for them, in its body."""


def modules_of(root: Path) -> dict[str, Path]:
    """Return the modules below a folder by their dotted name; a package is named by its folder."""
    names = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return {name: path for name, path in names.items() if name and name != "__main__"}  # that calls the command line


def imports_of(name: str, source: str, modules: set[str], *, is_package: bool = False) -> set[str]:
    """Return the modules of the library that a source imports, wherever in it, for types too."""
    package = name.split(".") if is_package else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            bases = [alias.name.split(".")[1:] for alias in node.names if alias.name.startswith("defense.")]
            found |= {".".join(base) for base in bases}
        elif isinstance(node, ast.ImportFrom):
            stated = node.module.split(".") if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + stated
            elif stated[:1] == ["defense"]:
                base = stated[1:]
            else:
                continue
            found |= {
                whole if (whole := ".".join([*base, alias.name])) in modules else ".".join(base) for alias in node.names
            }
    return {each for each in found if each and each != name}


def runs_up(name: str, imported: str) -> bool:
    """Return whether an import leads to another room that is not on a lower floor."""
    room, other = name.split(".")[0], imported.split(".")[0]
    if other in ABOVE:
        return room != "cli"
    return room != other and FLOOR_OF[other] >= FLOOR_OF[room]


def circle_in(graph: dict[str, set[str]]) -> list[str]:
    """Return modules that import each other in a circle, in order; none where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for imported in sorted(graph.get(name, ())):
            if found := visit(imported, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := visit(name, []))), [])


MODULES = modules_of(ROOT)
GRAPH = {
    name: imports_of(name, path.read_text(encoding="utf-8"), set(MODULES), is_package=path.name == "__init__.py")
    for name, path in MODULES.items()
}


def test_every_room_has_a_floor() -> None:
    assert {name.split(".")[0] for name in MODULES} == set(FLOOR_OF)


@pytest.mark.parametrize("name", sorted(GRAPH))
def test_no_import_runs_up(name: str) -> None:
    assert not [imported for imported in GRAPH[name] if runs_up(name, imported)]


def test_there_is_no_circle() -> None:
    assert circle_in(GRAPH) == []


@pytest.mark.parametrize(
    ("name", "source", "expected"),
    [
        ("core.sae", "from defense.hosts.clip import Clip", "up"),
        ("hosts.clip", "def f():\n    from defense.classify import classifier", "up"),
        ("fit.sites", "import defense.explain.heat", "up"),
        ("store.folders", "from defense.export import bundle", "up"),
        ("hosts.clip", "from defense.core.sae import SparseAutoencoder", "down"),
        ("fit.sites", "from .material import Pairs", "down"),
        ("cli.export", "def f():\n    from defense.export.exporter import export_onnx", "down"),
    ],
)
def test_one_deliberate_import_in_each_direction_is_told_apart(name: str, source: str, expected: str) -> None:
    (imported,) = imports_of(name, source, set(MODULES))
    assert runs_up(name, imported) == (expected == "up")


def test_a_deliberate_circle_is_found_also_within_a_room_and_for_types_alone() -> None:
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .attach import wrap"
    back = imports_of("hosts.tower", source, set(MODULES))
    assert back == {"hosts.attach"}
    found = circle_in({**GRAPH, "hosts.tower": GRAPH["hosts.tower"] | back})
    assert {"hosts.attach", "hosts.tower"} <= set(found)
