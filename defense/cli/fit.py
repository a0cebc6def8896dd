"""`defense fit`: choose the latents to suppress, and save them as a defense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from defense.cli.common import (
    EXIT_INPUTS,
    MAX_PIXELS,
    Device,
    LabelsFile,
    MaxPixels,
    Model,
    Pretrained,
    Template,
    app,
    check_pretrained,
    check_there,
    chosen_labels,
    exit_codes,
    log_warnings,
    put,
    say,
    say_passed_over,
    separated,
    shown,
)
from defense.cli.progress import stages
from defense.core.latents import Removal, Scope
from defense.data.images import Limits
from defense.hosts.shipped import DEFAULT, ShippedClip, find_model

if TYPE_CHECKING:
    from defense.classify.classifier import RobustClassifier
    from defense.data.progress import Progress
    from defense.data.sources import Pictures
    from defense.fit.material import Material
    from defense.fit.metadata import Metadata
    from defense.fit.placing import Fitted
    from defense.fit.shipping import Shipped
    from defense.store.checkpoint import Checkpoint

FitTask = Literal["text", "group"]
"""What a defense is against: words in the picture, or what goes with a class."""


@dataclass(frozen=True)
class _Source:
    """The pictures to fit on, as they were asked for.

    Attributes:
        task: What the defense is against.
        pictures: Folders and files; with `metadata` at most the one folder that its paths start from.
        metadata: A csv file with a row per picture, or None.
        path_column: Its column of paths.
        label_column: Its column of classes.
        attribute_column: Its column of what should not count, or None.
        spurious: Prompts for what should not count, separated by commas, or None.
        limits: What is accepted of each picture at most.
    """

    task: FitTask
    pictures: Sequence[Path]
    metadata: Path | None
    path_column: str
    label_column: str
    attribute_column: str | None
    spurious: str | None
    limits: Limits


# Longer than functions here are: the options of a command are its parameters, one line each.
@app.command()
def fit(
    out: Annotated[Path, typer.Argument(help="Folder for the defense.")],
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(help="Folders with pictures, .tar or .parquet files. With --metadata: the pictures' folder."),
    ] = None,
    sae: Annotated[
        list[str] | None,
        typer.Option(
            help="SAE that `defense train` or `import` wrote, a folder or on the hub; again for more blocks, fitted in "
            "this order."
        ),
    ] = None,
    task: Annotated[FitTask, typer.Option(help="Against words in the picture, or what goes with a class.")] = "text",
    labels: Annotated[str | None, typer.Option(help="Text: what to choose from; by default common nouns.")] = None,
    labels_file: LabelsFile = None,
    classes: Annotated[str | None, typer.Option(help='Group: e.g. "landbird,waterbird".')] = None,
    metadata: Annotated[Path | None, typer.Option(help="Group: csv file, a row per picture; no test split.")] = None,
    path_column: Annotated[str, typer.Option(help="Column of paths in --metadata.")] = "path",
    label_column: Annotated[str, typer.Option(help="Column of classes in --metadata: names or numbers.")] = "label",
    attribute_column: Annotated[
        str | None,
        typer.Option(help="Column of what should not count in --metadata; by default plain CLIP's errors show it."),
    ] = None,
    spurious: Annotated[
        str | None, typer.Option(help='Group, without labels: e.g. "water background,land background".')
    ] = None,
    template: Template = "simple",
    model: Model = DEFAULT,
    pretrained: Pretrained = None,
    edit: Annotated[
        Removal, typer.Option(help="Take away what latents write, or the span of those that fire.")
    ] = "scale",
    scope: Annotated[Scope | None, typer.Option(help="Which tokens; by default those the SAE was trained on.")] = None,
    spare_high_norm: Annotated[
        bool, typer.Option("--spare-high-norm", help="Leave patches alone whose norm is far above their picture's.")
    ] = False,
    clean_budget: Annotated[
        float, typer.Option(min=0, max=1, help="Accuracy that may be lost where nothing is wrong, over all blocks.")
    ] = 0.01,
    n_pictures: Annotated[int, typer.Option(min=1, help="Pictures to use, at most.")] = 300,
    folds: Annotated[int, typer.Option(min=0, help="Folds of the cross-validation; 0 holds nothing out.")] = 3,
    steps: Annotated[
        int,
        typer.Option(
            min=1, help="Gradient steps of the joint fit, at most; it stops where held-out pictures gain no more."
        ),
    ] = 100,
    sweep: Annotated[
        bool, typer.Option("--sweep", help="Try each block alone, and each scope; take the best.")
    ] = False,
    bootstraps: Annotated[
        int, typer.Option(min=0, help="Choose S so often anew, to see how stable it is; each takes about as long.")
    ] = 0,
    calibrate: Annotated[
        bool | None,
        typer.Option(
            "--calibrate/--no-calibrate",
            help="Thresholds in place of a TopK rule; by default where at least 99 % of the answers stay.",
        ),
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a report with plots.")] = None,
    name: Annotated[str | None, typer.Option(help="Name of the latent set; by default the task's.")] = None,
    license: Annotated[
        str, typer.Option("--license", "--licence", help="License of the defense; SPDX identifier.")
    ] = "not stated",
    seed: Annotated[int, typer.Option(min=0, help="Seed of pictures, writing and folds.")] = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Choose the latents of SAEs that a cue speaks through, and save them as a defense.

    Words in the picture need no labels: plain CLIP's answer is right, until another label is written on the picture.
    """
    log_warnings()
    with exit_codes():
        import torch

        from defense.classify.classifier import RobustClassifier
        from defense.fit.config import FitConfig
        from defense.fit.placing import fit_defense
        from defense.fit.sites import plan_sites
        from defense.hosts.clip import load_clip, resolve_device
        from defense.store.cache import cache_folder
        from defense.store.hub import hub_source

        source = _Source(
            task, pictures or [], metadata, path_column, label_column, attribute_column, spurious,
            Limits(max_pixels=max_pixels),
        )  # fmt: skip
        answers = _answers(task, labels, labels_file, classes, template, own=find_model(model))
        _check_options(source, sae or [], scope=scope, is_swept=sweep, folds=folds)
        check_pretrained(model, pretrained)
        _check_targets(out, report)
        check_there(*(Path(each) for each in sae or () if hub_source(each) is None))
        checkpoints = _read_saes(sae or [], calibrate=calibrate)
        opened = _opened(source, answers)
        clip = load_clip(model, pretrained, device=resolve_device(device))
        config = FitConfig(
            clean_budget=clean_budget / len(checkpoints),
            edit=edit,
            spares_high_norm=spare_high_norm,
            seed=seed,
            steps=steps,
        )
        plans = plan_sites(clip, checkpoints, config, scope)
        clf = RobustClassifier(clip).set_labels(answers, template)
        with stages() as progress:
            material = _material(clf, source, opened, n=n_pictures, seed=seed, progress=progress)
            fitted = fit_defense(
                clip, clip.id_as(model, pretrained), plans, material, torch.from_numpy(clf.text_embeds()),
                name=name or task, folds=folds, seed=seed, is_swept=sweep, n_bootstraps=bootstraps, license=license,
                provenance=_record(task, answers, template, checkpoints), cache=cache_folder(), progress=progress,
            )  # fmt: skip
            shipped = _write(clf, fitted, material, out, report, calibrate=calibrate, progress=progress)
        fitted.forget()
        _print_fit(fitted)
        _print_shipped(shipped)
        put(f"written     {shown(out)}")
        say(f"Try it: defense classify PICTURE --labels ... --defense {shown(out)}")
        if material.unreadable:
            _print_unreadable(material.unreadable)
            raise typer.Exit(EXIT_INPUTS)


# --- what is refused, before anything long starts ---


def _check_options(source: _Source, saes: Sequence[str], *, scope: Scope | None, is_swept: bool, folds: int) -> None:
    """Refuse options that contradict each other or the task, or that are missing."""
    if not saes:
        raise typer.BadParameter("--sae is missing: a folder that `defense train` or `defense import` wrote")
    if source.task == "text" and (source.metadata is not None or source.spurious is not None):
        raise typer.BadParameter("--metadata and --spurious go with --task group")
    if source.task == "group" and (source.metadata is None) == (source.spurious is None):
        raise typer.BadParameter(
            "--task group needs either --metadata, which names the groups, or --spurious, which does without"
        )
    if source.spurious is not None and len(separated(source.spurious, "--spurious")) < 2:
        raise typer.BadParameter(f"--spurious {source.spurious} is one prompt; give two or more, separated by commas")
    if source.attribute_column is not None and source.metadata is None:
        raise typer.BadParameter("--attribute-column names a column of --metadata; give that too")
    if source.metadata is None and not source.pictures:
        raise typer.BadParameter("no pictures: give a folder, or --metadata FILE")
    if source.metadata is not None and len(source.pictures) > 1:
        raise typer.BadParameter("with --metadata there is one folder of pictures, which its paths start from")
    if is_swept and scope is not None:
        raise typer.BadParameter("--sweep tries every scope; leave out --scope")
    if folds == 1:
        raise typer.BadParameter("--folds 1 would leave nothing to fit on; give 2 or more, or 0 to hold nothing out")
    if is_swept and folds == 0:
        raise typer.BadParameter("--sweep compares on held-out pictures, and --folds 0 holds none out; give 2 or more")


def _check_targets(out: Path, report: Path | None) -> None:
    """Refuse folders that could not be written."""
    from defense.fit import report as report_page
    from defense.store import defenses
    from defense.store.folders import led_to

    defenses.check_target(out)
    if report is None:
        return
    if led_to(report).is_relative_to(led_to(out)):
        raise typer.BadParameter(f"--report {report} lies in the defense's folder, which holds nothing else")
    report_page.check_target(report)


def _answers(
    task: FitTask,
    labels: str | None,
    labels_file: Path | None,
    classes: str | None,
    template: str,
    *,
    own: ShippedClip | None,
) -> tuple[str, ...]:
    """Return what to choose from, checked; the template, which it goes into, is checked too."""
    from defense.data.labels import check_labels, resolve_templates

    resolve_templates(template)
    if task == "group":
        if classes is None or labels is not None or labels_file is not None:
            raise typer.BadParameter('--task group takes its labels from --classes, e.g. "landbird,waterbird"')
        answers = check_labels(separated(classes, "--classes"))
    elif classes is not None:
        raise typer.BadParameter("--classes goes with --task group; --task text has --labels")
    else:
        answers = check_labels(chosen_labels(labels, labels_file, own))
    if len(answers) < 2:
        raise typer.BadParameter(f"{answers[0]!r} is all there is to choose from; give two or more")
    return answers


def _read_saes(sources: Sequence[str], *, calibrate: bool | None) -> list[Checkpoint]:
    """Return the SAEs, each of another block; where thresholds are asked for, one of them at least has a topk rule."""
    from defense.store import checkpoint
    from defense.store.hub import Hub

    found = [checkpoint.find(source, Hub(report=say)) for source in sources]
    points = [each.hook_point for each in found]
    if len(set(points)) < len(points):
        raise typer.BadParameter(f"the SAEs are at {', '.join(points)}; give one SAE per block")
    if calibrate and not any(each.sae.config.act == "topk" for each in found):
        raise typer.BadParameter("--calibrate is for SAEs with a topk rule, and there is none; leave it out")
    return found


def _opened(source: _Source, classes: Sequence[str]) -> Metadata | Pictures:
    """Return the rows of the csv file, or the pictures of the folders; none of them is read yet."""
    from defense.data.sources import open_pictures
    from defense.fit.metadata import read_metadata

    if source.metadata is None:
        return open_pictures(source.pictures, limits=source.limits)
    rows = read_metadata(
        source.metadata, classes, path_column=source.path_column, label_column=source.label_column,
        attribute_column=source.attribute_column, root=source.pictures[0] if source.pictures else None,
        limits=source.limits,
    )  # fmt: skip
    if rows.n_test:
        say(f"{rows.n_test} rows of the test split were left out")
    if not rows.has_split:
        say(f"{shown(source.metadata)} has no column 'split': if it lists test pictures, they are fitted on too")
    return rows


# --- the work ---


def _material(
    clf: RobustClassifier,
    source: _Source,
    opened: Metadata | Pictures,
    *,
    n: int,
    seed: int,
    progress: Progress,
) -> Material:
    """Read up to `n` of the pictures, and say of each what is right and what is wrong with it."""
    from defense.data.sources import Pictures
    from defense.fit import from_pictures

    if not isinstance(opened, Pictures):
        return from_pictures.metadata_material(clf, opened, n=n, seed=seed, progress=progress)
    if source.spurious is None:
        material = from_pictures.text_material(clf, opened, n=n, seed=seed, progress=progress)
    else:
        spurious = separated(source.spurious, "--spurious")
        material = from_pictures.spurious_material(clf, opened, spurious, n=n, seed=seed, progress=progress)
    say_passed_over(opened)
    return material


def _record(task: FitTask, answers: Sequence[str], template: str, checkpoints: Sequence[Checkpoint]) -> dict[str, Any]:
    """Return what was asked for, for the defense's provenance."""
    return {
        "task": task,
        "labels": list(answers),
        "template": template,
        "saes": [{"hook_point": each.hook_point, **dict(each.provenance)} for each in checkpoints],
    }


def _write(
    clf: RobustClassifier,
    fitted: Fitted,
    material: Material,
    out: Path,
    report: Path | None,
    *,
    calibrate: bool | None,
    progress: Progress,
) -> Shipped:
    """Write the defense, and a report on it where that is asked for."""
    from defense.errors import CalibrationError
    from defense.fit import report as report_page
    from defense.fit.shipping import ship
    from defense.store import defenses

    def shipped(calibrate: bool | None) -> Shipped:
        found = ship(clf.clip, fitted.defense, material, clf.text_embeds(), calibrate=calibrate, progress=progress)
        defenses.save(found.defense, out)
        return found

    if report is not None:
        report_page.write(fitted, report)
    try:
        return shipped(calibrate)
    except CalibrationError:
        shipped(False)
        say(f"{shown(out)} holds the defense with its exact rule, which is not lost:")
        raise


# --- what is printed ---


def _print_fit(fitted: Fitted) -> None:
    """Print S and what it does to pictures that it was not fitted on."""
    from defense.fit.stability import words_on

    for site in fitted.defense.sites:
        (latent_set,) = site.sets
        put(
            f"site        {site.hook_point}: {len(latent_set.latents)} latents, edit {latent_set.edit}, tokens "
            f"{latent_set.tokens}"
        )
        if runs := fitted.defense.provenance.get("stability"):
            put(f"stability   {words_on(runs, site.hook_point, latent_set.latents)}")
    kept = {site.hook_point for site in fitted.defense.sites}
    for each in fitted.sites:
        if each.site.hook_point not in kept:
            say(f"nothing helps at {each.site.hook_point}: that block is not edited")
    for option in fitted.options:
        put(f"tried       {option.name}: {100 * option.result.gain:+.1f} points for {100 * option.result.loss:.1f}")
    folds = fitted.validation.folds
    if folds:
        put(f"held out    in percent, {folds} folds; spread is the standard deviation over them")
    else:
        put("fitted on   in percent; nothing was held out, so this flatters the defense")
    for key, row in fitted.validation.summary().items():
        put(
            f"  {key:16} {100 * row['plain']:5.1f} without, {100 * row['defended']:5.1f} with the defense "
            f"(spread {100 * row['spread']:.1f})"
        )


def _print_shipped(shipped: Shipped) -> None:
    """Print in which form the defense is stored, and what that costs."""
    found = shipped.calibration
    if found is not None:
        put(
            f"calibrated  {100 * found.agreement:.1f} % of {found.n_held_out} held-out pictures get the same label, "
            f"cosine {found.cosine_mean:.4f} on average, {found.cosine_worst:.4f} at worst"
        )
    for site in shipped.defense.sites:
        if site.part is not None:
            n = len(site.part.latents)
            put(f"slim        {site.hook_point}: {n} of {site.sae_config.d_sae} latents are stored")
    if shipped.whole_because is not None:
        say(shipped.whole_because)


def _print_unreadable(names: Sequence[str]) -> None:
    say(f"{len(names)} pictures could not be read and were left out:")
    for name in names:
        say(f"  {name}")
