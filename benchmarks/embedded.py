"""How robust the embedded model is, on pictures and typefaces that nothing was trained or chosen on.

    python -m defense.benchmarks.embedded --out benchmarks/results/embedded.json

Three versions of each picture: clean, with an empty plate where a word would be, and with another object's name
written on it. The plate hides a part of the object, so accuracy with the empty plate is the ceiling of any defense.
Three models: the plain CLIP, the defended one, and the CLIP with as many random latents suppressed, of like activity
(mean of three draws).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from defense.benchmarks.environment import environment_of, write_json
from defense.benchmarks.metrics import wilson
from defense.benchmarks.tables import mean_and_range
from defense.data.labels import resolve_templates
from defense.hosts.clip import EMBEDDED, embedded_folder, load_clip
from defense.store import defenses, folders
from defense.world.scenes import OBJECTS

COLUMNS = ("clean", "neutral", "attacked", "attack_success")
CONTROL = "random latents"
HEADINGS = ("clean", "empty plate", "attacked", "attack success")


def measure_embedded(n: int, seed: int, command: str) -> dict[str, Any]:
    """Return the accuracies of the three models, in percent, and how they were measured, as JSON values.

    Args:
        n: Pictures.
        seed: Of the pictures.
        command: What was typed, for the record.
    """
    from defense.embedded.build import full_report

    folder = embedded_folder("text")
    defense = defenses.load(folder)
    rows, draws = full_report(load_clip(EMBEDDED), defense, "text", n, seed)
    return {
        "n": n,
        "seed": seed,
        "environment": asdict(environment_of(command)),
        "versions": {name: version(name) for name in ("clip-defense", "pillow")},
        "dtype": "float32",
        "classes": len(OBJECTS),
        "templates": resolve_templates("simple"),
        "defense_sha256": folders.sha256_of(folder / defenses.MANIFEST),
        "latents": sum(len(latent_set.latents) for site in defense.sites for latent_set in site.sets),
        "rows": rows,
        "draws": draws,
    }


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result of `measure_embedded`, with Wilson's intervals.

    The control has the range of its draws; results that were stored before it was kept have the mean alone.
    """
    lines = ["| | " + " | ".join(HEADINGS) + " |", "|---" * (len(HEADINGS) + 1) + "|"]
    for name, row in result["rows"].items():
        cells = []
        for column in COLUMNS:
            if name == CONTROL:
                drawn = [each[column] for each in result.get("draws", [row])]
                cells.append(mean_and_range(drawn))
                continue
            low, high = wilson(row[column], result["n"])
            cells.append(f"{row[column]:.1f} ({low:.1f} to {high:.1f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write the JSON."""
    from defense.embedded.build import SEEDS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=SEEDS["benchmark"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result = measure_embedded(
        arguments.n, arguments.seed, shlex.join(["python", "-m", "defense.benchmarks.embedded", *sys.argv[1:]])
    )
    print(table(result))
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
