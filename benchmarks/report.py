"""Put the measured tables into README.md: `python -m defense.benchmarks.report`.

The README's figures stand between `<!-- begin NAME -->` and `<!-- end NAME -->` and come from `benchmarks/results/`;
nobody types them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from defense.benchmarks import embedded, speed

ROOT = Path(__file__).resolve().parents[1]


def embedded_table(path: Path) -> str:
    """Return the robustness table with a line that says what it rests on."""
    result = json.loads(path.read_text(encoding="utf-8"))
    return (
        f"{embedded.table(result)}\n\n"
        f"Percent of {result['n']:,} pictures (95 % interval), {result['classes']} classes, "
        f"|S| = {result['latents']} latents; unseen seeds and unseen typefaces."
    )


def speed_table(path: Path) -> str:
    """Return the cost table with its caption."""
    rows = speed.load_rows(path)
    return f"{speed.table(rows)}\n\n{speed.caption(rows)}"


TABLES: dict[str, tuple[str, Callable[[Path], str]]] = {
    "embedded": ("embedded.json", embedded_table),
    "speed": ("speed-cpu.json", speed_table),
}


def filled(text: str, results: Path) -> str:
    """Return a README with every table regenerated from the results.

    Raises:
        ValueError: The text lacks the markers of a table.
    """
    for name, (file, render) in TABLES.items():
        begin, end = f"<!-- begin {name} -->\n", f"<!-- end {name} -->"
        head, found, rest = text.partition(begin)
        _, closed, tail = rest.partition(end)
        if not (found and closed):
            raise ValueError(f"the README has no {begin.strip()} ... {end}")
        text = head + begin + render(results / file) + "\n" + end + tail
    return text


def main() -> None:
    """Rewrite the README in place, or say with --check whether it is up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a figure is stale")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    after = filled(before, ROOT / "benchmarks" / "results")
    if arguments.check:
        raise SystemExit(int(before != after))
    readme.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
