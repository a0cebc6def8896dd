"""How much the defense on photographs depends on the seed of its fit: `python -m defense.benchmarks.photo_seeds A B C`.

A, B and C are defenses of the photo model that differ in `--seed` of `defense fit`: in the pictures, the words that
are written on them, the folds and the order. All are measured on the same photographs.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from defense.benchmarks import robust
from defense.benchmarks.datasets import DATA, Options, read_tasks
from defense.benchmarks.environment import environment_of, machine_words, write_json
from defense.benchmarks.method_tables import laid_out
from defense.benchmarks.methods import make_methods
from defense.benchmarks.named_clip import load_named_clip
from defense.benchmarks.photo_tables import Table
from defense.benchmarks.tables import BASELINE, OURS
from defense.hosts.defense import Defense
from defense.hosts.shipped import PHOTO
from defense.store.defenses import find_defense

TASK = "photo-100"


def measure(sources: Sequence[str], data: Path, command: str) -> dict[str, Any]:
    """Return a row per defense, as JSON values: its seed, the number of its latents, and its figures in percent."""
    tasks, _ = read_tasks(TASK, data, Options())
    clip = load_named_clip(PHOTO, None)
    rows = []
    with tempfile.TemporaryDirectory() as folder:  # one store: the pictures of plain CLIP are encoded once
        for source in sources:
            defense = find_defense(source)
            jobs = [(task, make_methods([BASELINE, OURS], defense)) for task in tasks]
            rows.append(_row(defense, Table(robust.run(clip, jobs, Path(folder), command=command))))
    return {"rows": rows, "environment": asdict(environment_of(command))}


def _row(defense: Defense, table: Table) -> dict[str, Any]:
    return {
        "seed": defense.provenance.get("seed"),
        "latents": sum(len(each.latents) for site in defense.sites for each in site.sets),
        "sha256": defense.manifest_sha256,
        "clean": table.figure("photo-100-clean", OURS, "accuracy"),
        "stay": table.same(OURS),
        "attacked": table.mean(OURS, "accuracy"),
        "success": table.mean(OURS, "attack_success"),
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the Markdown of a result: a row per seed, then mean and range."""
    rows = result["rows"]
    columns = ("clean", "stay", "attacked", "success")
    headings = ["seed", "latents", "clean", "answers that stay", "attacked", "attack success"]
    lines = [[str(row["seed"]), str(row["latents"]), *(f"{row[name]:.1f}" for name in columns)] for row in rows]
    lines.append(["mean", "", *(f"{sum(row[name] for row in rows) / len(rows):.1f}" for name in columns)])
    spans = (f"{min(row[name] for row in rows):.1f} to {max(row[name] for row in rows):.1f}" for name in columns)
    lines.append(["range", "", *spans])
    return laid_out(headings, lines) + "\n\nPercent, on photo-100; attacked: mean over six ways to write a word."


def section(result: Mapping[str, Any]) -> str:
    """Return the table with the machine that it was measured on."""
    return f"{table(result)}\n{machine_words(result['environment'])}"


def main() -> None:
    """Measure, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("defenses", nargs="+", help="folders of defenses")
    parser.add_argument("--data", type=Path, default=DATA, help="the folder that holds photos100")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/photo-seeds.json"))
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "defense.benchmarks.photo_seeds", *sys.argv[1:]])
    write_json(arguments.out, measure(arguments.defenses, arguments.data, command))


if __name__ == "__main__":
    main()
