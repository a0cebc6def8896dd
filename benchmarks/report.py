"""Put what was measured into the pages that show it: `python -m defense.benchmarks.report`.

Every figure there comes from the JSON in `benchmarks/results/`; nobody types them. In README.md and docs/results.md
they stand between `<!-- begin NAME -->` and `<!-- end NAME -->`; benchmarks/RESULTS.md is written as a whole, with a
section for each stored result and the command that made it. What has not been measured is said to be missing. Plots are
drawn beside the JSON.

A section imports the benchmark whose tables it shows, so that one of them needs no package that only another takes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defense.benchmarks import findings, method_tables, photo_tables, plots, publishing, speed_rows, tables
from defense.benchmarks.blocks import filled
from defense.benchmarks.environment import machine_words
from defense.benchmarks.findings import MINI, PHOTO
from defense.benchmarks.mini_tables import main_table
from defense.benchmarks.robust_results import read_results
from defense.store.folders import replacing

ROOT = Path(__file__).resolve().parents[1]
_LEAST_PLOTTED = 100
"""Pictures of a data set below which a plot would show noise."""


# --- the sections of RESULTS.md ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Section:
    """One stored result.

    Attributes:
        title: Heading.
        file: Below `benchmarks/results`.
        command: What measures it; shown where it has not been measured.
        render: From the file to Markdown.
    """

    title: str
    file: str
    command: str
    render: Callable[[Path], str]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _command_of(path: Path) -> str:
    """Return what was typed, of a result with one environment, of rows or of `defense bench`."""
    result = _json(path)
    first = result[0] if isinstance(result, list) else result
    environments = first["robust"]["run"] if "robust" in first else first
    return str(environments["environment"]["command"])


def embedded_table(path: Path) -> str:
    """Return the robustness table with a line that says what it rests on."""
    from defense.benchmarks import embedded

    result = _json(path)
    return (
        f"{embedded.table(result)}\n\n"
        f"Percent of {result['n']:,} pictures (95 % interval), {result['classes']} classes, "
        f"|S| = {result['latents']} latents; unseen seeds and unseen typefaces. Random latents: mean of "
        f"{'3 draws, and their range' if 'draws' in result else '3 draws, whose range was not kept'}."
    )


def _embedded_section(path: Path) -> str:
    return f"{embedded_table(path)}\n{machine_words(_json(path)['environment'])}"


def speed_table(path: Path) -> str:
    """Return the cost table with its caption."""
    rows = speed_rows.load_rows(path)
    return f"{speed_rows.table(rows)}\n\n{speed_rows.caption(rows)}"


def _mini_section(path: Path) -> str:
    results = read_results(path)
    return "\n\n".join([tables.markdown(results), *_pictures(path.parent, results)])


def _photo_section(path: Path) -> str:
    results = read_results(path)
    changed = f"### Answers that change where nothing attacks\n\n{photo_tables.changed_table(results)}"
    return "\n\n".join([tables.markdown(results), changed, *_pictures(path.parent, results)])


def _seeds_section(path: Path) -> str:
    from defense.benchmarks import photo_seeds  # brings torch

    return photo_seeds.section(_json(path))


def _pictures(folder: Path, results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines that show the plots in a folder, which are drawn from results."""
    tasks = sorted({result["robust"]["task"] for result in results})
    paths = [folder / f"{task}-{name}.png" for task in tasks for name in plots.KINDS]
    return [f"![{path.stem.replace('-', ' ')}]({folder.name}/{path.name})" for path in paths if path.exists()]


def _export_section(path: Path) -> str:
    from defense.benchmarks import export

    result = _json(path)
    parts = export.graph_table(result["graphs"]), export.runtime_table(result["runtime"]), export.caption(result)
    return "\n\n".join(parts)


def _train_section(path: Path) -> str:
    from defense.benchmarks import train

    result = _json(path)
    return f"{train.table(result)}\n\n{train.caption(result)}"


def _latents_section(path: Path) -> str:
    from defense.benchmarks import latents_report

    result = _json(path)
    if result["rows"] is None:
        return f"Not measured: the run in `benchmarks/results/{path.name}` was interrupted; the same command goes on."
    return f"{latents_report.table(result)}\n{machine_words(result['environment'])}"


def _demo_section(path: Path) -> str:
    from defense.benchmarks import demo

    result = _json(path)
    answer = f"The page's HTML in {result['page_ms']:.0f} ms, {result['start_s']:.1f} s after the command."
    return f"{demo.table(result)}\n\n{answer}\n{machine_words(result['environment'])}"


def _firing_section(path: Path) -> str:
    from defense.benchmarks import firing

    result = _json(path)
    return f"{firing.table(result)}\n\n{firing.caption(result)}\n{machine_words(result['environment'])}"


def _patches_section(path: Path) -> str:
    from defense.benchmarks import patches

    result = _json(path)
    return f"{patches.table(result)}\n\n{patches.caption(result)}\n{machine_words(result['environment'])}"


def _units_section(path: Path) -> str:
    from defense.benchmarks import units

    result = _json(path)
    return f"{units.table(result)}\n\n{units.caption(result)}\n{machine_words(result['environment'])}"


def _sweep_section(path: Path) -> str:
    from defense.benchmarks import sweep

    result = _json(path)
    shown = path.with_suffix(".png")
    picture = [f"![sweep]({path.parent.name}/{shown.name})"] if shown.exists() else []
    return "\n\n".join(
        [sweep.table(result), *picture, f"{sweep.caption(result)}\n{machine_words(result['environment'])}"]
    )


def _kernel_section(path: Path) -> str:
    from defense.benchmarks import kernel_rows

    rows = kernel_rows.load_rows(path)
    return f"{kernel_rows.table(rows)}\n\n{kernel_rows.caption(rows)}"


def _static_section(path: Path) -> str:
    from defense.benchmarks import kernel_static_tables

    result = _json(path)
    return f"{kernel_static_tables.static_table(result)}\n\n{kernel_static_tables.static_caption(result)}"


def _serving_section(path: Path) -> str:
    from defense.benchmarks import serving

    result = _json(path)
    told = (
        "Each client asks for one picture at a time, on the machine that serves it. `triton` batches what comes in, "
        "`unbatched` is the same server without that. Files are JPEGs of 1600 x 1200 pixels."
    )
    return f"{serving.table(result)}\n\n{told}\n{machine_words(result['environment'])}"


def _fitting_section(path: Path) -> str:
    from defense.benchmarks import fitting  # brings torch

    return fitting.table(_json(path))


SECTIONS = (
    Section(
        "Methods, on photographs",
        PHOTO,
        "defense bench photo --data DATA --methods all,defense@0.5 --out results/photo && "
        "python -m defense.benchmarks.robust results/photo --into benchmarks/results/photo.json",
        _photo_section,
    ),
    Section(
        "Seeds of the fit, on photographs",
        "photo-seeds.json",
        "python -m defense.benchmarks.photo_seeds DEFENSE DEFENSE DEFENSE --data DATA",
        _seeds_section,
    ),
    Section(
        "Methods, on the miniatures",
        MINI,
        "defense bench mini --methods all,defense@0.25,defense@0.5,defense@0.75 --out results/mini && "
        "python -m defense.benchmarks.robust results/mini --into benchmarks/results/mini.json",
        _mini_section,
    ),
    Section(
        "Semantic attacks, on drawn pictures",
        "semantic.json",
        "defense bench mini-semantic --out results/semantic && "
        "python -m defense.benchmarks.robust results/semantic --into benchmarks/results/semantic.json",
        _mini_section,
    ),
    Section(
        "The embedded model, with the empty plate as the ceiling",
        "embedded.json",
        "python -m defense.benchmarks.embedded --out benchmarks/results/embedded.json",
        _embedded_section,
    ),
    Section(
        "How S is chosen",
        "latents.json",
        "defense bench latents --out benchmarks/results",
        _latents_section,
    ),
    Section(
        "Where the defense is put: block and tokens",
        "sweep.json",
        "python -m defense.benchmarks.sweep --out benchmarks/results/sweep.json",
        _sweep_section,
    ),
    Section(
        "What the defense costs, CPU",
        "speed-cpu.json",
        "python -m defense.benchmarks.speed --out benchmarks/results/speed-cpu.json",
        speed_table,
    ),
    Section(
        "How many tokens fire",
        "firing.json",
        "python -m defense.benchmarks.firing",
        _firing_section,
    ),
    Section(
        "Where a phrase is, by patches",
        "patches.json",
        "python -m defense.benchmarks.patches",
        _patches_section,
    ),
    Section(
        "Latents beside neurons, channels and random directions",
        "units.json",
        "python -m defense.benchmarks.units",
        _units_section,
    ),
    Section(
        "The Triton kernels, GPU",
        "kernel.json",
        "python -m defense.benchmarks.kernel  # needs a CUDA device",
        _kernel_section,
    ),
    Section(
        "The Triton kernels, compiled and not run",
        "kernel-static.json",
        "python -m defense.benchmarks.kernel --static",
        _static_section,
    ),
    Section(
        "Exported graphs, CPU",
        "export-cpu.json",
        "python -m defense.benchmarks.export --out benchmarks/results/export-cpu.json",
        _export_section,
    ),
    Section(
        "Training an SAE, CPU",
        "train-cpu.json",
        "python -m defense.benchmarks.train --out benchmarks/results/train-cpu.json",
        _train_section,
    ),
    Section(
        "A fit, CPU",
        "fit-cpu.json",
        "python -m defense.benchmarks.fitting --out benchmarks/results/fit-cpu.json",
        _fitting_section,
    ),
    Section(
        "A fit of a large CLIP, CPU",
        "fit-l14-cpu.json",
        "python -m defense.benchmarks.fitting --model ViT-L-14 --block 12 --n 8 --steps 2 --folds 2 "
        "--out benchmarks/results/fit-l14-cpu.json",
        _fitting_section,
    ),
    Section(
        "Served, CPU",
        "serving-cpu.json",
        "python -m defense.benchmarks.serving BUNDLE --server NAME=HOST:PORT --out benchmarks/results/serving-cpu.json",
        _serving_section,
    ),
    Section(
        "The demo under load",
        "demo.json",
        "python -m defense.benchmarks.demo --out benchmarks/results/demo.json",
        _demo_section,
    ),
)


def results_page(results: Path) -> str:
    """Return RESULTS.md for a folder of results."""
    parts = [
        "# Results",
        "Made from the JSON in [results](results) by `python -m defense.benchmarks.report`; no figure here was typed.",
        "## What was found",
        findings.as_list(results),
        "## The methods: where they come from",
        method_tables.sources(),
        "What each was tuned on and set to stands below the tables of each task.",
    ]
    for section in SECTIONS:
        path = results / section.file
        parts.append(f"## {section.title}")
        if path.exists():
            text, command = section.render(path), f"`{_command_of(path)}`"
            parts += [f"**Provisional: {problem}.**" for problem in publishing.problems(_json(path))]
            parts += [text] if command in text else [text, command]
        else:
            parts.append(f"Not measured: `benchmarks/results/{section.file}` is missing. To measure:")
            parts.append(f"`{section.command}`")
    return "\n\n".join(parts) + "\n"


# --- the tables of README and docs ------------------------------------------------------------------------------------


def robustness(results: Path) -> str:
    """Return the tables of robustness of the embedded model."""
    mini, path = next(each for each in SECTIONS if each.file == MINI), results / MINI
    if path.exists():
        beside = f"{main_table(read_results(path))}\n\n`{_command_of(path)}`"
    else:
        beside = f"Not measured: `benchmarks/results/{mini.file}` is missing. To measure: `{mini.command}`"
    return f"{embedded_table(results / 'embedded.json')}\n\nBeside other methods, on the miniatures:\n\n{beside}"


def photographs(results: Path) -> str:
    """Return the README's table on photographs, with what it rests on."""
    section, path = next(each for each in SECTIONS if each.file == PHOTO), results / PHOTO
    if not path.exists():
        return f"Not measured: `benchmarks/results/{PHOTO}` is missing. To measure: `{section.command}`"
    seeds = results / "photo-seeds.json"
    rows = _json(seeds)["rows"] if seeds.exists() else []
    return f"{photo_tables.short_table(read_results(path), rows)}\n\n`{_command_of(path)}`"


TABLES: dict[str, Callable[[Path], str]] = {
    "photo": photographs,
    "cost": lambda results: speed_rows.short_table(speed_rows.load_rows(results / "speed-cpu.json")),
    "embedded": robustness,
    "speed": lambda results: speed_table(results / "speed-cpu.json"),
    "found": findings.as_list,
    "limits": lambda results: findings.as_list(results, findings.LIMITS),
}
PAGES = {
    ROOT / "README.md": ("photo", "cost"),
    ROOT / "docs" / "results.md": ("photo", "embedded", "found", "speed"),
    ROOT / "docs" / "limits.md": ("limits",),
}
"""Page -> the tables that it shows."""
_PUBLISHED = (MINI, PHOTO, "photo-seeds.json", "embedded.json", "speed-cpu.json")
"""What the tables of these pages rest on."""


def pages(results: Path) -> dict[Path, str]:
    """Return every page that shows results, as it has to be.

    Raises:
        ConfigError: A result that README or docs show is not for publication; RESULTS.md calls such provisional.
    """
    for name in _PUBLISHED:
        if (results / name).exists():
            publishing.check_publishable(_json(results / name), name)
    made = {
        page: filled(page.read_text(encoding="utf-8"), {name: TABLES[name](results) for name in names})
        for page, names in PAGES.items()
    }
    return {**made, ROOT / "benchmarks" / "RESULTS.md": results_page(results)}


def main() -> None:
    """Rewrite the pages in place, or say with --check whether they are up to date."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 where a figure is stale")
    arguments = parser.parse_args()
    results = ROOT / "benchmarks" / "results"
    for measured in [] if arguments.check else [results / MINI, results / PHOTO]:
        if measured.exists():
            found = read_results(measured)
            # The real sets hold too few pictures for a plot.
            plots.draw([each for each in found if each["robust"]["n"] >= _LEAST_PLOTTED], results)
    after = pages(results)
    before = {path: path.read_text(encoding="utf-8") if path.exists() else "" for path in after}
    if arguments.check:
        raise SystemExit(int(before != after))
    for path, text in after.items():
        with replacing(path) as partial:
            partial.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
