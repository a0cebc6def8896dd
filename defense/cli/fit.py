"""`defense fit`: choose the latents to suppress, and save them as a defense."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from defense.cli.common import EXIT_INPUTS, app, chosen_labels, exit_codes, put, say, shown, stderr

if TYPE_CHECKING:
    from defense.classify.classifier import RobustClassifier
    from defense.fit.material import Material
    from defense.fit.placing import Fitted
    from defense.hosts.defense import Defense


class Task(StrEnum):
    """What a defense is against."""

    text = "text"
    group = "group"


class Edit(StrEnum):
    """What becomes of the latents."""

    scale = "scale"
    project = "project"


class Scope(StrEnum):
    """Which tokens are edited."""

    cls = "cls"
    patch = "patch"
    all = "all"


@app.command()
def fit(
    out: Annotated[Path, typer.Argument(help="Folder for the defense.")],
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders with pictures, .tar or .parquet files. With --metadata: the pictures' folder."),
    ] = None,
    sae: Annotated[
        list[Path] | None,
        typer.Option(help="SAE that `defense train` or `import` wrote; again for more blocks, fitted in this order."),
    ] = None,
    task: Annotated[Task, typer.Option(help="Against words in the picture, or what goes with a class.")] = Task.text,
    labels: Annotated[str | None, typer.Option(help="Text: what to choose from; by default 102 things.")] = None,
    labels_file: Annotated[Path | None, typer.Option(help="The same, one label a line.")] = None,
    classes: Annotated[str | None, typer.Option(help='Group: e.g. "landbird,waterbird".')] = None,
    metadata: Annotated[Path | None, typer.Option(help="Group: csv file, a row per picture; no test split.")] = None,
    path_column: Annotated[str, typer.Option(help="Its column of paths.")] = "path",
    label_column: Annotated[str, typer.Option(help="Its column of classes: names or numbers.")] = "label",
    attribute_column: Annotated[
        str | None, typer.Option(help="Its column of what should not count; by default plain CLIP's errors show it.")
    ] = None,
    spurious: Annotated[
        str | None, typer.Option(help='Group, without labels: e.g. "water background,land background".')
    ] = None,
    template: Annotated[str, typer.Option(help='"simple", "hf", "openai", or a template with {}.')] = "simple",
    model: Annotated[str, typer.Option(help="open_clip model.")] = "embedded",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of its weights.")] = None,
    edit: Annotated[
        Edit, typer.Option(help="Take away what latents write, or the span of those that fire.")
    ] = Edit.scale,
    scope: Annotated[Scope | None, typer.Option(help="Which tokens; by default those the SAE was trained on.")] = None,
    clean_budget: Annotated[
        float, typer.Option(min=0, max=1, help="Accuracy that may be lost where nothing is wrong, over all blocks.")
    ] = 0.01,
    n_pictures: Annotated[int, typer.Option(min=1, help="Pictures to use, at most.")] = 300,
    folds: Annotated[int, typer.Option(min=2, help="Of the cross-validation.")] = 3,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try each block alone, and each scope; take the best.")
    ] = False,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Turn a TopK rule into thresholds at the end.")
    ] = False,
    report: Annotated[Path | None, typer.Option(help="Folder for a report with plots.")] = None,
    name: Annotated[str | None, typer.Option(help="Of the latent set; by default the task's.")] = None,
    license: Annotated[
        str, typer.Option("--license", "--licence", help="Of the defense; SPDX identifier.")
    ] = "not stated",
    seed: Annotated[int, typer.Option(min=0, help="Of pictures, writing and folds.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Choose the latents of SAEs that a cue speaks through, and save them as a defense.

    Words in the picture need no labels: plain CLIP's answer is right, until another label is written on the picture.
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_codes():
        import torch

        from defense.classify.classifier import RobustClassifier
        from defense.errors import CalibrationError
        from defense.fit import report as report_page
        from defense.fit.config import FitConfig
        from defense.fit.placing import fit_defense, with_golden
        from defense.fit.sites import plan_sites
        from defense.hosts.clip import load_clip, resolve_device
        from defense.store import checkpoint, defenses

        if not sae:
            raise typer.BadParameter("--sae is missing: a folder that `defense train` or `defense import` wrote")
        chosen = _choices(task, labels, labels_file, classes)
        _check_sources(task, pictures, metadata, attribute_column, spurious)
        if sweep and scope is not None:
            raise typer.BadParameter("--sweep tries every scope; leave out --scope")
        defenses.check_target(out)
        if report is not None:
            if report.resolve().is_relative_to(out.resolve()):
                raise typer.BadParameter(f"--report {report} lies in the defense's folder, which holds nothing else")
            report_page.check_target(report)
        checkpoints = [checkpoint.load(folder) for folder in sae]
        if calibrate and not any(each.sae.config.act == "topk" for each in checkpoints):
            raise typer.BadParameter("--calibrate is for SAEs with a topk rule, and there is none; leave it out")
        clip = load_clip(model, pretrained, device=resolve_device(device))
        config = FitConfig(clean_budget=clean_budget / len(sae), edit=edit.value, seed=seed)
        plans = plan_sites(clip, checkpoints, config, None if scope is None else scope.value)
        clf = RobustClassifier(clip).set_labels(chosen, template)
        with _progress() as told:
            told("reading pictures")
            material = _material(
                clf, pictures or [], metadata, (path_column, label_column, attribute_column), spurious,
                task=task, n=n_pictures, seed=seed,
            )  # fmt: skip
            record: dict[str, Any] = {
                "task": task.value,
                "labels": list(chosen),
                "template": template,
                "saes": [{"hook_point": each.hook_point, **dict(each.provenance)} for each in checkpoints],
            }
            fitted = fit_defense(
                clip, clip.id_as(model, pretrained), plans, material, torch.from_numpy(clf.text_embeds()),
                name=name or task.value, folds=folds, seed=seed, is_swept=sweep, license=license, provenance=record,
                report=told,
            )  # fmt: skip
            defenses.save(with_golden(clip, fitted.defense), out)
            if report is not None:
                report_page.write(fitted, report)
            if calibrate:
                told("calibrating")
                try:
                    defense = _calibrated(clf, fitted.defense, material)
                except CalibrationError:
                    say(f"{shown(out)} holds the defense with its exact rule, which is not lost:")
                    raise
                defenses.save(with_golden(clip, defense), out)
        _print_fit(fitted)
        put(f"written     {shown(out)}")
        say(f"Try it: defense classify PICTURE --labels ... --defense {shown(out)}")
        if material.unreadable:
            say(f"{len(material.unreadable)} pictures could not be read and were left out:")
            for picture in material.unreadable:
                say(f"  {picture}")
            raise typer.Exit(EXIT_INPUTS)


def _choices(task: Task, labels: str | None, labels_file: Path | None, classes: str | None) -> tuple[str, ...]:
    """Return what to choose from."""
    from defense.data.labels import check_labels

    if task is Task.group:
        if classes is None or labels is not None or labels_file is not None:
            raise typer.BadParameter('--task group takes its labels from --classes, e.g. "landbird,waterbird"')
        return check_labels(_split(classes))
    if classes is not None:
        raise typer.BadParameter("--classes goes with --task group; --task text has --labels")
    return check_labels(chosen_labels(labels, labels_file, labels is None and labels_file is None))


def _split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def _check_sources(
    task: Task, pictures: list[Path] | None, metadata: Path | None, attribute_column: str | None, spurious: str | None
) -> None:
    """Refuse sources that contradict each other or the task."""
    if task is Task.text and (metadata is not None or spurious is not None):
        raise typer.BadParameter("--metadata and --spurious go with --task group")
    if task is Task.group and (metadata is None) == (spurious is None):
        raise typer.BadParameter(
            "--task group needs either --metadata, which names the groups, or --spurious, which does without"
        )
    if attribute_column is not None and metadata is None:
        raise typer.BadParameter("--attribute-column names a column of --metadata; give that too")
    if metadata is None and not pictures:
        raise typer.BadParameter("no pictures: give a folder, or --metadata FILE")
    if metadata is not None and len(pictures or []) > 1:
        raise typer.BadParameter("with --metadata there is one folder of pictures, which its paths start from")


def _material(
    clf: RobustClassifier,
    pictures: list[Path],
    metadata: Path | None,
    columns: tuple[str, str, str | None],
    spurious: str | None,
    *,
    task: Task,
    n: int,
    seed: int,
) -> Material:
    """Read what to fit on."""
    from defense.data.sources import open_pictures
    from defense.fit import from_pictures
    from defense.fit.metadata import read_metadata

    if metadata is not None:
        path_column, label_column, attribute_column = columns
        rows = read_metadata(
            metadata, [str(label) for label in clf.classes_], path_column=path_column, label_column=label_column,
            attribute_column=attribute_column, root=pictures[0] if pictures else None,
        )  # fmt: skip
        if rows.n_test:
            say(f"{rows.n_test} rows of the test split were left out")
        if not rows.has_split:
            say(f"{shown(metadata)} has no column 'split': if it lists test pictures, they are fitted on too")
        return from_pictures.metadata_material(clf, rows, n=n, seed=seed)
    source = open_pictures(pictures)
    if task is Task.text:
        return from_pictures.text_material(clf, source, n=n, seed=seed)
    assert spurious is not None, "checked before"
    return from_pictures.spurious_material(clf, source, _split(spurious), n=n, seed=seed)


def _calibrated(clf: RobustClassifier, defense: Defense, material: Material) -> Defense:
    """Replace TopK rules by thresholds, and print how well those stand in for them."""
    import numpy as np

    from defense.fit.calibrate import calibrated

    pixel_values = material.data.all_pixel_values()
    twins = np.arange(len(pixel_values)) % len(material.strata)
    result, calibration = calibrated(clf.clip, defense, pixel_values, text_embeds=clf.text_embeds(), groups=twins)
    put(
        f"calibrated  {100 * calibration.agreement:.1f} % of {calibration.n_held_out} held-out pictures get the same "
        f"label, cosine {calibration.cosine_mean:.4f} on average, {calibration.cosine_worst:.4f} at worst"
    )
    return result


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    """Yield what shows a line of progress on stderr: in place on a terminal, else one after the other."""
    if not stderr.is_terminal:
        yield say
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as progress:
        task = progress.add_task("", total=None)
        yield lambda line: progress.update(task, description=line)


def _print_fit(fitted: Fitted) -> None:
    """Print S and what it does to pictures that it was not fitted on."""
    for site in fitted.defense.sites:
        (latent_set,) = site.sets
        put(
            f"site        {site.hook_point}: {len(latent_set.latents)} latents, edit {latent_set.edit}, tokens "
            f"{latent_set.scope}"
        )
    kept = {site.hook_point for site in fitted.defense.sites}
    for each in fitted.sites:
        if each.site.hook_point not in kept:
            say(f"nothing helps at {each.site.hook_point}: that block is not edited")
    for option in fitted.options:
        put(f"tried       {option.name}: {100 * option.result.gain:+.1f} points for {100 * option.result.loss:.1f}")
    put(f"held out    in percent, {len(fitted.validation.plain)} folds; spread is the standard deviation over them")
    for key, row in fitted.validation.summary().items():
        put(
            f"  {key:16} {100 * row['plain']:5.1f} without, {100 * row['defended']:5.1f} with the defense "
            f"(spread {100 * row['spread']:.1f})"
        )
