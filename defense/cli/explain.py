"""`defense explain`: what was removed from a picture, as a file to look at."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from PIL import Image

from defense.cli.classify import print_explanation
from defense.cli.common import (
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
    shipped_model,
    shown,
    stderr,
)
from defense.core.latents import Removal
from defense.hosts.shipped import DEFAULT
from defense.store.folders import led_to, replacing

if TYPE_CHECKING:
    from defense.classify.classifier import RobustClassifier
    from defense.explain.catalogue import Catalogue

_SUFFIXES = (".html", ".png")
_TOP_K = 3


@app.command()
def explain(
    picture: Annotated[Path, typer.Argument(help="The file.")],
    out: Annotated[Path, typer.Option(help="What to write: a .html or a .png file. One that is there is replaced.")],
    labels: Labels = None,
    labels_file: LabelsFile = None,
    template: Template = "simple",
    defense: DefenseSource = DEFAULT,
    model: OtherModel = None,
    pretrained: Pretrained = None,
    strength: Annotated[float, typer.Option(min=0, max=1, help="Factor on what is removed; 0 is stock CLIP.")] = 1.0,
    edit: Annotated[Removal | None, typer.Option(help="In place of each latent set's own.")] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Write what the defense removed from a picture, and where, to one HTML file or PNG that needs nothing else."""
    log_warnings()
    with exit_codes():
        from defense.classify.classifier import RobustClassifier
        from defense.data import images
        from defense.explain.counterfactual import counterfactual
        from defense.explain.report_html import report_html
        from defense.explain.report_png import report_png
        from defense.export import bundle
        from defense.hosts.controls import Controls

        check_pretrained(model, pretrained, defense)
        _check_target(out, picture)
        if bundle.is_bundle(defense):
            raise typer.BadParameter("a bundle cannot explain itself; give the defense that it was exported from")
        chosen = chosen_labels(labels, labels_file, shipped_model(defense, model), defense)
        limits = images.Limits(max_pixels=max_pixels)
        decoded = images.decode(picture, limits=limits)
        clf = RobustClassifier.from_pretrained(
            defense, model=model, pretrained=pretrained, device=device, limits=limits
        )
        clf.set_labels(chosen, template)
        catalogues = _catalogues_of(clf, defense)
        controls = Controls(strength=strength, edit=edit)
        with stderr.status("looking for what mattered") if stderr.is_terminal else nullcontext():
            explanation = replace(clf.explain(decoded.image, controls=controls), warnings=decoded.warnings)
            enough = counterfactual(clf, decoded.image, controls=controls) if explanation.changed else None
        draw = report_png if out.suffix.lower() == ".png" else report_html
        page = draw(
            decoded.image,
            explanation,
            name=shown(Path(picture.name)),
            defense=clf.defense,
            catalogues=catalogues,
            counterfactual=enough,
        )
        _write(out, page)
        short = replace(explanation, plain=explanation.plain[:_TOP_K], robust=explanation.robust[:_TOP_K])
        print_explanation(picture, short)
        say(f"wrote {shown(out)}")


def _check_target(out: Path, picture: Path) -> None:
    """Refuse what could not be written, before anything is computed."""
    if out.suffix.lower() not in _SUFFIXES:
        raise typer.BadParameter(f"--out {shown(out)}: the name must end in {' or '.join(_SUFFIXES)}")
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
