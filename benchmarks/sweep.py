"""Where is a defense best put: each block that has an SAE, each scope, against words and against a background.

    python -m defense.benchmarks.sweep --out benchmarks/results/sweep.json

On the embedded model. Each placement is fitted alone, on the same drawn pictures, under the same clean budget, and
measured on others, with unseen typefaces. Published is that middle layers are best (arXiv:2504.08729); the model has an
SAE at three blocks in its middle, so the ends are not asked here.

Each placement is written as soon as it is done; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from defense.benchmarks.environment import environment_of, machine_words, write_json
from defense.core.intervals import wilson
from defense.embedded import build
from defense.errors import ConfigError, MissingDependencyError
from defense.fit.config import FitConfig
from defense.fit.encoded import Encoded
from defense.fit.material import Pairs
from defense.fit.placing import placements
from defense.fit.sites import SitePlan, fit_sites
from defense.fit.validation import answers_of
from defense.hosts.clip import EMBEDDED, Clip, load_clip
from defense.hosts.shipped import MODELS
from defense.hosts.tower import block_of
from defense.store import checkpoint
from defense.store.folders import replacing
from defense.world import scenes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RESULTS = Path(__file__).with_name("results") / "sweep.json"
TASKS = {"text": ("clean", "attacked"), "waterbirds": ("average", "worst group")}
"""Task -> what is measured: what may not fall, and what is to rise."""
SEED_FIT, SEED_TEST = 400, 499
"""Of pictures; apart from each other's and from those of `build.SEEDS` and `latents.py`."""
Share = list[float]
"""A share with its 95 % interval."""


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
        n_fit: Pictures to fit on; of words each has two twins.
        n_test: Pictures to measure on.
        steps: Of the joint step, at most.
        n_candidates: That reach it, at most.
        clean_budget: See `FitConfig`.
    """

    n_fit: int = 200
    n_test: int = 400
    steps: int = 100
    n_candidates: int = 256
    clean_budget: float = 0.01


def rows_of(clip: Clip, task: str, settings: Settings, done: Sequence[Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each placement of a task that is not done yet, and first one without a defense.

    Args:
        clip: The embedded CLIP.
        task: One of `TASKS`.
        settings: How much of everything.
        done: Of the rows that are there, (task, block, scope).
    """
    config = FitConfig(n_candidates=settings.n_candidates, steps=settings.steps, clean_budget=settings.clean_budget)
    plans = [SitePlan(each.hook_point, each.sae, config) for each in checkpoint.shipped_saes(MODELS[EMBEDDED])]
    chosen = [group[0] for group in placements(clip.tower, plans) if len(group) == 1]
    data, text_embeds = build.task_data(task, settings.n_fit, SEED_FIT, scenes.TRAIN_FONTS, clip)
    test, _ = build.task_data(task, settings.n_test, SEED_TEST, scenes.TEST_FONTS, clip)
    fitted_on, measured_on = Encoded(clip, data), Encoded(clip, test)

    def figures(hook_point: str) -> dict[str, Share]:
        return figures_of(test, answers_of(measured_on.image_embeds(hook_point), text_embeds))

    if (task, None, None) not in done:
        yield {"task": task, "block": None, "scope": None, "n_latents": 0, **figures(chosen[0].hook_point)}
    for plan in chosen:
        key = task, block_of(plan.hook_point), plan.config.scope
        if key in done:
            continue
        (site,) = fit_sites(fitted_on, [plan], text_embeds, name=task)
        with clip.edited([site.site] if site.selection.latents else []):
            measured = figures(plan.hook_point)
        row = dict(zip(("task", "block", "scope"), key, strict=True))
        yield {**row, "n_latents": len(site.selection.latents), **measured}


def figures_of(data: Any, answers: dict[str, Any]) -> dict[str, Share]:
    """Return what is measured of a task, each with its 95 % interval (Wilson; of the worst group, that group's own)."""
    if isinstance(data, Pairs):
        label = data.label.numpy()
        return {kind: _share(answers[kind] == label) for kind in TASKS["text"]}
    right = answers["picture"] == data.y.numpy()
    groups = [right[((data.y == y) & (data.a == a)).numpy()] for y in (0, 1) for a in (0, 1)]
    return {"average": _share(right), "worst group": _share(min(groups, key=lambda group: float(group.mean())))}


def _share(hits: Any) -> Share:
    return [round(each, 4) for each in wilson(int(hits.sum()), len(hits))]


def run(
    out: Path, settings: Settings, *, command: str, report: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Measure all placements, or go on with it, and return the result.

    Raises:
        ConfigError: `out` holds a run with other settings.
    """
    result: dict[str, Any] = {"settings": asdict(settings), "rows": []}
    if out.exists():
        stored = json.loads(out.read_text(encoding="utf-8"))
        if stored.get("settings") != result["settings"]:
            raise ConfigError(f"{out} holds a run with other settings; give another file")
        result = stored
    else:
        result["environment"] = asdict(environment_of(command))
        result["saes"] = {
            str(block_of(each.hook_point)): each.sae.config.d_sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])
        }
    clip = load_clip(EMBEDDED)
    for task in TASKS:
        done = [(row["task"], row["block"], row["scope"]) for row in result["rows"]]
        for row in rows_of(clip, task, settings, done):
            result["rows"].append(row)
            write_json(out, result)
            report(f"{task}, block {row['block']}, {row['scope']}: {row['n_latents']} latents")
    return result


# --- what it comes to -------------------------------------------------------------------------------------------------


def table(result: dict[str, Any]) -> str:
    """Return a result as a Markdown table, a row for each placement."""
    columns = [(task, name) for task, names in TASKS.items() for name in names[::-1]]
    found = {(row["task"], row["block"], row["scope"]): row for row in result["rows"]}
    headings = " | ".join(f"{name}{', n' * (name == TASKS[task][1])}" for task, name in columns)
    lines = [f"| block | tokens | {headings} |", "|---" * (2 + len(columns)) + "|"]
    for _, block, scope in dict.fromkeys((None, row["block"], row["scope"]) for row in result["rows"]):
        cells = []
        for task, name in columns:
            row = found.get((task, block, scope))
            n = f", {row['n_latents']}" if row is not None and name == TASKS[task][1] else ""
            cells.append("-" if row is None else f"{_percent(row[name])}{n}")
        place = "no defense | -" if block is None else f"{block} | {scope}"
        lines.append(f"| {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _percent(figure: Share) -> str:
    share, low, high = (100 * each for each in figure)
    return f"{share:.1f} ({low:.1f}-{high:.1f})"


def caption(result: dict[str, Any]) -> str:
    """Return what a reader of the table has to know."""
    settings = result["settings"]
    sizes = ", ".join(f"{n:,} at block {block}" for block, n in result["saes"].items())
    limits = f"{settings['steps']} steps and {settings['n_candidates']} candidates"
    return (
        f"Percent of {settings['n_test']} drawn pictures (95 % interval), and the number of latents; each placement "
        f"fitted alone on {settings['n_fit']}, at most {limits}, clean budget {100 * settings['clean_budget']:g} %. "
        f"{best_words(result)} The SAEs are the ones that ship ({sizes} latents; that of the last one was trained on "
        "the pictures with backgrounds, too), so blocks differ by their SAEs as well."
    )


def best_words(result: dict[str, Any]) -> str:
    """Return which placement is best at each task, and which others cannot be told from it."""
    parts = []
    for task, (_, name) in TASKS.items():
        rows = [row for row in result["rows"] if row["task"] == task and row["block"] is not None]
        if not rows:
            continue
        best = max(rows, key=lambda row: float(row[name][0]))
        alike = [_place(row) for row in rows if row is not best and row[name][2] >= best[name][1]]
        beside = f"; its interval overlaps with that of {', '.join(alike)}" if alike else ""
        parts.append(f"Best by {name}: {_place(best)}{beside}.")
    return " ".join(parts)


def _place(row: dict[str, Any]) -> str:
    return f"block {row['block']}, {row['scope']}"


def plot(result: dict[str, Any]) -> Figure:
    """Return a figure with a panel for each thing that is measured: blocks across, a line for each scope.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "bench") from error
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    panels = [(task, name) for task, names in TASKS.items() for name in names[::-1]]
    for axes, (task, name) in zip(figure.subplots(1, len(panels), sharey=True), panels, strict=True):
        rows = [row for row in result["rows"] if row["task"] == task]
        for marker, scope in zip("os^", ("cls", "patch", "all"), strict=True):
            own = [row for row in rows if row["scope"] == scope]
            values = [row[name] for row in own]
            errors = [[100 * (v[0] - v[1]) for v in values], [100 * (v[2] - v[0]) for v in values]]
            blocks = [row["block"] for row in own]
            axes.errorbar(blocks, [100 * v[0] for v in values], errors, marker=marker, capsize=3, label=scope)
            axes.set_xticks(blocks)
        for row in rows:
            if row["block"] is None:
                axes.axhline(100 * row[name][0], color="0.6", linestyle="--", label="no defense")
        axes.set_title(f"{task}: {name}", fontsize=10)
        axes.set_xlabel("block")
    figure.axes[0].set_ylabel("percent right")
    figure.axes[0].legend(fontsize=8)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, write, draw and print."""
    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.sweep", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the result goes, with a plot beside it")
    parser.add_argument("--n-fit", type=int, default=Settings.n_fit, help="pictures to fit on")
    parser.add_argument("--n-test", type=int, default=Settings.n_test, help="pictures to measure on")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of the joint step, at most")
    parser.add_argument("--n-candidates", type=int, default=Settings.n_candidates, help="that reach it, at most")
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    settings = Settings(options.n_fit, options.n_test, options.steps, options.n_candidates)
    command = shlex.join(["python", "-m", "defense.benchmarks.sweep", *argv])
    result = run(options.out, settings, command=command, report=lambda line: print(line, file=sys.stderr, flush=True))
    with replacing(options.out.with_suffix(".png")) as partial:
        plot(result).savefig(partial, format="png", dpi=120, metadata={"Software": None})
    print(table(result), caption(result), machine_words(result["environment"]), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
