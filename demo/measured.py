"""The third tab: the stored results of the benchmarks, as they stand in `benchmarks/results`."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import gradio as gr

from defense.errors import DefenseError

NOTHING = "No results are stored with this installation. `defense bench` measures them."
_NEEDS_PACKAGE = "`{file}` is there; a package is missing to put its table together: {error}."


def results_folder() -> Path:
    """Return where results are stored."""
    return Path(str(resources.files("defense.benchmarks").joinpath("results")))


def sections(folder: Path) -> list[str]:
    """Return the stored results as Markdown, one section each."""
    files = {file.name: file for file in sorted(folder.glob("*.json"))} if folder.is_dir() else {}
    renderers = _renderers()
    found = [
        f"## {title}\n\n{_rendered(files[name], render)}"
        for name, (title, render) in renderers.items()
        if name in files
    ]
    robust = [row for name, file in files.items() if name not in renderers for row in _robust_results(file)]
    if robust:
        found.append(_tables(robust))
    return [section.replace("@", "&#64;") for section in found] or [NOTHING]  # not the address of a mailbox


def _renderers() -> dict[str, tuple[str, Callable[[Path], str]]]:
    """Return, for each file that has a table of its own, its title and what makes the table, in the order to show."""

    def photo(path: Path) -> str:
        from defense.benchmarks.photo_tables import short_table
        from defense.benchmarks.robust_results import read_results

        return short_table(read_results(path))

    def mini(path: Path) -> str:
        from defense.benchmarks.mini_tables import main_table
        from defense.benchmarks.robust_results import read_results

        return main_table(read_results(path))

    def embedded(path: Path) -> str:
        from defense.benchmarks.report import embedded_table

        return embedded_table(path)

    def speed(path: Path) -> str:
        from defense.benchmarks.report import speed_table

        return speed_table(path)

    return {
        "photo.json": ("Photographs with another thing's name on them", photo),
        "embedded.json": ("The embedded model: objects with another object's name on them", embedded),
        "mini.json": ("Beside other methods, on the miniatures", mini),
        "speed-cpu.json": ("What it costs on a CPU", speed),
    }


def _rendered(file: Path, render: Callable[[Path], str]) -> str:
    try:
        named = re.sub(r"^\| \|", "| model |", render(file), flags=re.MULTILINE)  # no column without a heading
        return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", named)  # links go to files of the repository
    except ImportError as error:
        return _NEEDS_PACKAGE.format(file=file.name, error=error)
    except (DefenseError, ValueError, KeyError, TypeError) as error:
        return f"`{file.name}` is there and cannot be read ({type(error).__name__}: {error})."


def _robust_results(file: Path) -> list[dict[str, Any]]:
    """Return the results of `defense bench` in a file; none where it holds something else."""
    try:
        held = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return []
    rows = held if isinstance(held, list) else held.get("results", [held]) if isinstance(held, dict) else []
    return [row for row in rows if isinstance(row, dict) and "robust" in row]


def _tables(results: list[dict[str, Any]]) -> str:
    from defense.benchmarks.tables import markdown

    try:
        return re.sub("^### ", "## ", markdown(results), flags=re.MULTILINE)
    except (DefenseError, KeyError) as error:
        return f"The stored results cannot be shown in one table: {error}"


def plots(folder: Path) -> str:
    """Return the stored plots as HTML."""
    files = sorted(folder.glob("*.png")) if folder.is_dir() else []
    return "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(file.read_bytes()).decode("ascii")}" '
        f'alt="Plot: {file.stem.replace("-", " ")}"><figcaption>{file.stem.replace("-", " ")}</figcaption></figure>'
        for file in files
    )


def build(folder: Path | None = None) -> None:
    """Put the tab together."""
    folder = folder or results_folder()
    for section in sections(folder):
        gr.Markdown(section, elem_classes="measured")
    if drawn := plots(folder):
        gr.HTML(f'<details class="plots-below"><summary>Plots</summary><div class="plots">{drawn}</div></details>')
