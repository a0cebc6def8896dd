"""`defense explain`: what was removed from a picture, as a file to look at."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL import Image

from defense.cli.classify import print_explanation
from defense.cli.common import (
    EXIT_INPUTS,
    MAX_PIXELS,
    DefenseSource,
    Device,
    Labels,
    LabelsFile,
    MaxPixels,
    OtherModel,
    Pretrained,
    Template,
    app,
    check_pretrained,
    chosen_labels,
    exit_codes,
    log_warnings,
    say,
    say_passed_over,
    shipped_model,
    shown,
    stderr,
)
from defense.core.latents import Removal
from defense.errors import HookPointError
from defense.hosts.shipped import DEFAULT
from defense.store.folders import led_to, replacing

if TYPE_CHECKING:
    from defense.classify.classifier import RobustClassifier
    from defense.classify.explanation import Explanation
    from defense.explain.catalogue import Catalogue
    from defense.explain.patches import PatchLabels
    from defense.hosts.controls import Controls, LatentKey

_SUFFIXES = (".html", ".png", ".json")
_TOP_K = 3


# Longer than functions here are: the options of a command are its parameters, one line each.
@app.command()
def explain(
    picture: Annotated[Path, typer.Argument(help="The picture's file.")],
    out: Annotated[
        Path, typer.Option(help="What to write: a .html, .png or .json file. One that is there is replaced.")
    ],
    labels: Labels = None,
    labels_file: LabelsFile = None,
    template: Template = "simple",
    defense: DefenseSource = DEFAULT,
    model: OtherModel = None,
    pretrained: Pretrained = None,
    strength: Annotated[float, typer.Option(min=0, max=1, help="Factor on what is removed; 0 is stock CLIP.")] = 1.0,
    edit: Annotated[
        Removal | None, typer.Option(help="How latents are removed, in place of each latent set's own way.")
    ] = None,
    phrase: Annotated[str | None, typer.Option(help="Show where this is in the picture.")] = None,
    less: Annotated[str | None, typer.Option(help="Tell the phrase from this one instead of from the rest.")] = None,
    strengths: Annotated[
        bool, typer.Option("--strengths", help="Also the least parts of latents whose removal changes the answer.")
    ] = False,
    nearest: Annotated[
        Path | None, typer.Option(help="Folder, .tar or .parquet file: which of its pictures are nearest to this one.")
    ] = None,
    latent: Annotated[
        list[str] | None,
        typer.Option(
            help="With --nearest: by which latent, a number or e.g. blocks.2.hook_resid_post:17. May come again. By "
            "default those of the defense that fire most on the picture."
        ),
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Write what the defense removed from a picture, where, and what each patch says, to one HTML, PNG or JSON file."""
    log_warnings()
    with exit_codes():
        from defense.classify.classifier import RobustClassifier
        from defense.data import images
        from defense.data.sources import open_pictures
        from defense.explain.counterfactual import counterfactual
        from defense.explain.nearest import nearest as nearest_pictures
        from defense.explain.report_words import FIRES_ON
        from defense.explain.strengths import least_strengths
        from defense.export import bundle
        from defense.hosts.controls import Controls

        check_pretrained(model, pretrained, defense)
        _check_target(out, picture)
        if latent and nearest is None:
            raise typer.BadParameter(f"--latent {latent[0]}: say which pictures to compare with, by --nearest FOLDER")
        if less is not None and phrase is None:
            raise typer.BadParameter(f"--less {less!r}: say what is to be told from it, with --phrase")
        if bundle.is_bundle(defense):
            raise typer.BadParameter("a bundle cannot explain itself; give the defense that it was exported from")
        chosen = chosen_labels(labels, labels_file, shipped_model(defense, model), defense)
        limits = images.Limits(max_pixels=max_pixels)
        source = None if nearest is None else open_pictures([nearest], limits=limits)
        decoded = images.decode(picture, limits=limits)
        clf = RobustClassifier.from_pretrained(
            defense, model=model, pretrained=pretrained, device=device, limits=limits
        )
        clf.set_labels(chosen, template)
        controls, keys = Controls(strength=strength, edit=edit), _keys_of(clf, latent or ())
        with stderr.status("looking for what mattered") if stderr.is_terminal else nullcontext():
            explanation = replace(clf.explain(decoded.image, controls=controls), warnings=decoded.warnings)
            enough = counterfactual(clf, decoded.image, controls=controls) if explanation.changed else None
            wanted = strengths and explanation.changed
            least = least_strengths(clf, decoded.image, controls=controls) if wanted else None
            patches = _patches_of(clf, decoded.image, phrase, less, controls)
            near = None if source is None else nearest_pictures(clf, decoded.image, source, keys)
        parts = {"counterfactual": enough, "strengths": least, "patches": patches, "nearest": near}
        catalogues = _catalogues_of(clf, defense)
        _write(out, _page(out, decoded.image, explanation, shown(Path(picture.name)), clf, catalogues, parts))
        short = replace(explanation, plain=explanation.plain[:_TOP_K], robust=explanation.robust[:_TOP_K])
        print_explanation(shown(picture), short)
        say(f"wrote {shown(out)}")
        if explanation.removed and catalogues:
            say(FIRES_ON)
        if source is not None:
            say_passed_over(source)
        if near is not None and near.n_unreadable:
            say(f"{near.n_unreadable} pictures could not be read and were left out")
            raise typer.Exit(EXIT_INPUTS)


def _keys_of(clf: RobustClassifier, latents: Sequence[str]) -> list[LatentKey]:
    """Return the hook points and numbers of latents as they were typed; those that the defense does not have raise."""
    points = [] if clf.defense is None else list(dict.fromkeys(site.hook_point for site in clf.defense.sites))
    keys = [_key_of(each, points) for each in latents]
    for point, latent in keys:
        clf.sae(point).columns([latent])
    return keys


def _key_of(text: str, points: Sequence[str]) -> LatentKey:
    """Return the hook point and the number of a latent as it was typed."""
    point, _, number = text.rpartition(":")
    if not (number.isascii() and number.isdigit()) or (point and point not in points):
        where = ", ".join(f"{each}:17" for each in points)
        raise typer.BadParameter(f"--latent {text!r}: want a number, or where it is as well, as in {where}")
    if not point and len(points) > 1:
        raise typer.BadParameter(
            f"--latent {text}: this defense has latents at {', '.join(points)}; say which, as in {points[0]}:{number}"
        )
    return point or points[0], int(number)


def _patches_of(
    clf: RobustClassifier, image: Image.Image, phrase: str | None, less: str | None, controls: Controls
) -> PatchLabels | None:
    """Return what each patch says; nothing where this tower cannot be read so and no phrase was asked for."""
    from defense.explain.patches import patch_labels

    try:
        return patch_labels(clf, image, phrase=phrase, less=less, controls=controls)
    except HookPointError as error:
        if phrase is not None:
            raise
        say(f"no map of labels: {error}")
        return None


def _page(
    out: Path,
    image: Image.Image,
    explanation: Explanation,
    name: str,
    clf: RobustClassifier,
    catalogues: Mapping[str, Catalogue],
    parts: dict[str, Any],
) -> str | Image.Image:
    """Return what is to be written, in the form that the name of the file asks for."""
    from defense.explain.report_html import report_html
    from defense.explain.report_png import report_png

    suffix = out.suffix.lower()
    if suffix == ".json":
        values = {key: None if part is None else part.to_dict() for key, part in parts.items()}
        return json.dumps({"picture": name, **explanation.to_dict(), **values}, indent=1) + "\n"
    draw = report_png if suffix == ".png" else report_html
    return draw(image, explanation, name=name, defense=clf.defense, catalogues=catalogues, **parts)


def _check_target(out: Path, picture: Path) -> None:
    """Refuse what could not be written, before anything is computed."""
    if out.suffix.lower() not in _SUFFIXES:
        raise typer.BadParameter(
            f"--out {shown(out)}: the name must end in {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}"
        )
    if not out.parent.is_dir():
        raise typer.BadParameter(f"--out {shown(out)}: there is no folder {shown(out.parent)}; make it first")
    if out.exists() and not out.is_file():
        raise typer.BadParameter(f"--out {shown(out)} is there and is no file; choose another name")
    if led_to(out) == Path(os.path.realpath(picture)):
        raise typer.BadParameter(f"--out {shown(out)} is the picture itself, which would be lost; choose another name")


def _catalogues_of(clf: RobustClassifier, source: str) -> dict[str, Catalogue]:
    """Return the catalogues that go with a defense; one of another SAE is left out, and that is said."""
    from defense.explain import catalogue

    found = catalogue.find(source)
    sites = clf.defense.sites if clf.defense is not None else ()
    kept = {point: each for point, each in found.items() if any(map(each.is_of, sites))}
    if others := sorted(found.keys() - kept.keys()):
        say(f"no names at {', '.join(others)}: the catalogue is of another SAE; make it anew with `defense describe`")
    return kept


def _write(out: Path, page: str | Image.Image) -> None:
    """Write a page or a picture; a failure leaves what was there before."""
    with replacing(out) as partial:
        if isinstance(page, str):
            partial.write_text(page, encoding="utf-8")
        else:
            page.save(partial, "PNG")
