"""How a defense was chosen, as a folder: `report.md` and PNG plots. Nothing is measured here.

| file | what |
|---|---|
| `contrast-<block>.png` | contrast and causal effect of every latent; the chosen ones stand out |
| `budget-<block>.png` | loss where the pictures were fooled and accuracy kept, by the number of latents |
| `sweep.png` | points gained and lost on held-out pictures, by block and tokens |
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.errors import CheckpointError, cannot_import
from defense.hosts.tower import block_of
from defense.store import folders

from . import stability
from .placing import Fitted, Option
from .sites import FittedSite

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


REPORT = "report.md"
_PLOTS = ("contrast-*.png", "budget-*.png", "sweep.png")
_COLUMNS = ("contrast", "effect")
_MEANING = {
    "clean": "right on clean pictures",
    "neutral": "right with an empty plate",
    "attacked": "right with a wrong word on it",
    "attack_success": "answers the wrong word",
    "average": "average over groups",
    "weighted": "average over groups by their share",
    "worst": "worst group",
}


def check_target(folder: Path) -> None:
    """Raise where a report could not be written, before anything is computed.

    Raises:
        MissingDependencyError: matplotlib is not installed.
        ConfigError: `folder` is there and is no report, or its parent is not there.
    """
    try:
        import matplotlib  # noqa: F401 - only to see whether it is there
    except ImportError as error:
        raise cannot_import("matplotlib", error) from error
    folders.writable_target(folder, "report", REPORT, _own_plots)


def _own_plots(folder: Path) -> list[str]:
    """Return the names of the plots of a report that is there.

    Raises:
        CheckpointError: The folder holds no report.
    """
    if not (folder / REPORT).is_file():
        raise CheckpointError(f"{folder} holds no {REPORT}")
    return [path.name for pattern in _PLOTS for path in folder.glob(pattern)]


def write(fitted: Fitted, folder: Path) -> Path:
    """Write the report, replacing one that is there, and return the folder. A failure leaves what was there.

    Raises:
        MissingDependencyError, ConfigError: See `check_target`.
    """
    check_target(folder)
    with folders.publishing(folders.led_to(folder), read=_own_plots) as staging:
        _write(fitted, staging)
    return folder


def _write(fitted: Fitted, folder: Path) -> None:
    figures = {}
    for each in fitted.sites:
        block = block_of(each.site.hook_point)
        figures[f"contrast-{block}.png"] = contrast(each)
        figures[f"budget-{block}.png"] = budget(each)
    if fitted.options:
        figures["sweep.png"] = sweep(fitted.options)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=120, metadata={"Software": None})  # the same bytes for the same figure
    (folder / REPORT).write_text(markdown(fitted), encoding="utf-8")


def markdown(fitted: Fitted) -> str:
    """Return the report's text."""
    provenance: Any = fitted.defense.provenance
    pictures = provenance["pictures"]
    folds = fitted.validation.folds
    lines = [
        "# How this defense was chosen",
        "",
        f"{pictures['n']:,} pictures ({pictures['kind']}; sha256 of their names {pictures['pictures_sha256'][:16]}), "
        f"{pictures['n_unreadable']} could not be read. Seed {provenance['seed']}.",
        "",
        f"## On pictures that it was not fitted on ({folds} folds)" if folds else "## On the pictures it was fitted on",
        "",
        "| percent of the pictures | plain CLIP | defended | change |",
        "|---|---|---|---|",
    ]
    for key, row in fitted.validation.summary().items():
        plain, defended, spread, change, change_spread = (
            100 * row[column] for column in ("plain", "defended", "spread", "change", "change_spread")
        )
        lines.append(
            f"| {_MEANING.get(key, f'group {key}')} | {plain:.1f} | {defended:.1f} ± {spread:.1f} "
            f"| {change:+.1f} ± {change_spread:.1f} |"
        )
    lines += ["", _spread_of(fitted)]
    if fitted.options:
        lines += ["## Layers and tokens", "", "| place | points gained | points lost | latents |", "|---|---|---|---|"]
        lines += [_option_row(option) for option in fitted.options]
        lines += ["", "![points gained and lost](sweep.png)", ""]
        lines += ["The place was chosen by these figures, so those of the chosen one flatter it a little.", ""]
    for each in fitted.sites:
        lines += _site_lines(each)
        if runs := fitted.defense.provenance.get("stability"):
            lines += [f"{stability.words_on(runs, each.site.hook_point, each.selection.latents)}.", ""]
    return "\n".join(lines)


def _spread_of(fitted: Fitted) -> str:
    low, high = (100 * end for end in fitted.validation.gain_interval)
    gain = f"The gain of {100 * fitted.validation.gain:+.1f} points has the 95 % interval {low:+.1f} to {high:+.1f}."
    if not fitted.validation.folds:
        return f"Nothing was held out, so all of this flatters the defense. {gain}\n"
    return f"± is the standard deviation over the folds. Each fold is fitted on the others. {gain}\n"


def _option_row(option: Option) -> str:
    n_latents = ", ".join(map(str, option.result.n_latents))
    return f"| {option.name} | {100 * option.result.gain:+.1f} | {100 * option.result.loss:.1f} | {n_latents} |"


def _site_lines(fitted: FittedSite) -> list[str]:
    (latent_set,) = fitted.site.sets
    block = block_of(fitted.site.hook_point)
    before, after = fitted.selection.before, fitted.selection.after
    columns = [column for column in (*_COLUMNS, stability.COLUMN) if column in latent_set.scores]
    lines = [
        f"## {fitted.site.hook_point}",
        "",
        f"{len(latent_set.latents)} of {len(fitted.ranking.contrast):,} latents, edit {latent_set.edit}, tokens "
        f"{latent_set.tokens}. On the pictures it was fitted on, the loss where they were fooled went from "
        f"{before.fooled_loss:.3f} to {after.fooled_loss:.3f} nats, the accuracy kept from "
        f"{100 * before.kept_accuracy:.1f} to {100 * after.kept_accuracy:.1f} %.",
        "",
        f"![contrast and effect](contrast-{block}.png)",
        f"![loss and accuracy](budget-{block}.png)",
        "",
        f"| latent | gain | {' | '.join(columns)} |",
        f"|---|---|{'---|' * len(columns)}",
    ]
    for row, latent in enumerate(latent_set.latents):
        cells = [f"{latent_set.scores[column][row]:.4g}" for column in columns]
        lines.append(f"| {latent} | {latent_set.gains[row]:.2f} | {' | '.join(cells)} |")
    return [*lines, ""]


# --- plots --------------------------------------------------------------------------------------------------------


def _axes(title: str, x: str, y: str) -> tuple[Figure, Axes]:
    from matplotlib.figure import Figure  # not pyplot: no global state, no screen

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def contrast(fitted: FittedSite) -> Figure:
    """Return contrast against causal effect, a point per latent."""
    ranking, chosen = fitted.ranking, np.array(fitted.selection.latents, dtype=int)
    figure, axes = _axes(
        f"{fitted.site.hook_point}: what the cue does to latents, and they to the answer",
        "contrast: activation that the cue adds, per picture",
        "effect: fall of the wrong answer's margin, in logits",
    )
    axes.set_xscale("symlog", linthresh=1.0)
    axes.scatter(ranking.contrast, ranking.effect, s=6, color="0.6", label=f"all {len(ranking.contrast):,}")
    axes.scatter(ranking.contrast[chosen], ranking.effect[chosen], s=18, label=f"chosen {len(chosen)}")
    axes.legend(fontsize=8)
    return figure


def budget(fitted: FittedSite) -> Figure:
    """Return the loss of fooled pictures and the accuracy on kept ones, by how many of the candidates are removed."""
    (latent_set,) = fitted.site.sets
    tried = fitted.selection.tried
    n = [each.n for each in tried]
    figure, axes = _axes(
        f"{fitted.site.hook_point}: {len(latent_set.latents)} latents are chosen",
        "latents removed, most removed first",
        "loss of the right answer where fooled, nats",
    )
    axes.plot(n, [each.fooled_loss for each in tried], marker=".", label="loss where fooled")
    axes.axvline(len(latent_set.latents), color="0.6", lw=0.8, label="chosen")
    kept = axes.twinx()
    floor = tried[0].kept_accuracy - latent_set.provenance["config"]["clean_budget"]
    kept.plot(n, [100 * each.kept_accuracy for each in tried], marker=".", color="C1", label="accuracy kept")
    kept.axhline(100 * floor, color="C1", ls=":", label="budget")
    kept.set_ylabel("accuracy kept, %")
    figure.legend(fontsize=8, loc="outside lower center", ncols=4)
    return figure


def sweep(options: Sequence[Option]) -> Figure:
    """Return points gained and lost on held-out pictures, a pair of bars per placement."""
    figure, axes = _axes("held-out pictures, by block and tokens", "points", "")
    at = np.arange(len(options))
    figure.set_figheight(max(3.0, 1.2 + 0.45 * len(options)))
    for offset, what, sign in ((-0.2, "gain", 1), (0.2, "loss", -1)):
        key = options[0].result.gain_key if what == "gain" else options[0].result.loss_key
        spread = [100 * option.result.summary()[key]["change_spread"] for option in options]
        values = [100 * sign * option.result.summary()[key]["change"] for option in options]
        axes.barh(at + offset, values, 0.38, xerr=spread, capsize=2, label="gained" if what == "gain" else "lost")
    axes.set_yticks(at, [option.name for option in options])
    axes.invert_yaxis()
    axes.legend(fontsize=8)
    return figure
