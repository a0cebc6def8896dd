"""`defense classify`: plain and defended CLIP side by side."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from defense.classify.answers import OnError
from defense.cli.common import (
    EXIT_INPUTS,
    MAX_PIXELS,
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
    expand,
    log_warnings,
    one_line,
    print_json,
    put,
    say,
    shipped_model,
    stdout,
)
from defense.cli.progress import stages
from defense.data import images
from defense.data.listing import kind_of
from defense.data.notes import NOTES
from defense.data.sources import Picture
from defense.errors import InvalidImageError
from defense.hosts.shipped import DEFAULT, MODELS

if TYPE_CHECKING:
    from defense.classify.answers import Prediction
    from defense.classify.classifier import RobustClassifier
    from defense.classify.explanation import Explanation
    from defense.export.runtime import OnnxClassifier

_PROGRESS_FROM = 20


@app.command()
def classify(
    pictures: Annotated[
        list[Path] | None,
        typer.Argument(help="Pictures; folders, .tar or .parquet files with some. By default the shipped examples."),
    ] = None,
    labels: Labels = None,
    labels_file: LabelsFile = None,
    template: Template = "simple",
    defense: Annotated[
        str, typer.Option(help='"photo", "embedded", a folder, a hub id, or an exported bundle.')
    ] = DEFAULT,
    model: OtherModel = None,
    pretrained: Pretrained = None,
    plain: Annotated[bool, typer.Option("--plain", help="Stock CLIP only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
    on_error: Annotated[OnError, typer.Option(help="What becomes of a picture that cannot be read.")] = "skip",
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 3,
    strength: Annotated[
        float | None, typer.Option(min=0, max=1, help="With a bundle: factor on what is removed; 0 is plain CLIP.")
    ] = None,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Classify pictures with plain and with defended CLIP, side by side."""
    log_warnings()
    with exit_codes():
        from defense.classify.classifier import RobustClassifier
        from defense.export import bundle
        from defense.export.runtime import OnnxClassifier

        check_pretrained(model, pretrained, None if plain else defense)
        limits = images.Limits(max_pixels=max_pixels)
        found = expand(pictures or _example_pictures())
        if bundle.is_bundle(defense):
            if plain or model is not None:
                raise typer.BadParameter(
                    "a bundle holds one defended model; --plain and --model do not go with it, --strength 0 does"
                )
            given = None if labels is None and labels_file is None else chosen_labels(labels, labels_file, None)
            used = 1.0 if strength is None else strength
            bundled = OnnxClassifier(defense, strength=used, limits=limits)
            if given is not None:
                bundled.set_labels(given, template)
            _exit(*_classify_with_bundle(bundled, found, used, as_json=as_json, on_error=on_error, top_k=top_k))
            return
        if strength is not None:
            raise typer.BadParameter("--strength is a bundle's; a defense is shown beside plain CLIP, or see --plain")
        chosen = chosen_labels(labels, labels_file, shipped_model(defense, model), defense)
        if plain:
            clf = _undefended(defense, model, pretrained, device, limits)
        else:
            clf = RobustClassifier.from_pretrained(
                defense, model=model, pretrained=pretrained, device=device, limits=limits
            )
        clf.set_labels(chosen, template)
        counts = _classify_all(clf, found, as_json=as_json, on_error=on_error, top_k=top_k)
        if not pictures and not as_json:
            _print_next_step()
        _exit(*counts)


def _exit(n_pictures: int, n_failed: int) -> None:
    """Leave with the exit code for pictures that could not be read, if there are some."""
    if n_failed:
        say(f"{n_failed} of {n_pictures} pictures could not be read")
        raise typer.Exit(EXIT_INPUTS)


def _undefended(
    defense: str, model: str | None, pretrained: str | None, device: str, limits: images.Limits
) -> RobustClassifier:
    """Return the stock CLIP that was given, or the one that a defense names."""
    from defense.classify.classifier import RobustClassifier
    from defense.hosts.clip import load_clip
    from defense.store.defenses import find_defense

    if model is None:
        spec = find_defense(defense).clip
        model, pretrained = spec.model, spec.pretrained
    return RobustClassifier(load_clip(model, pretrained, device=device), limits=limits)


def _example_pictures() -> list[Path]:
    return sorted(path for path in MODELS[DEFAULT].folder("examples").iterdir() if kind_of(path) == "pictures")


def _called(name: str) -> str:
    """Return what a picture is called in text: as it was named, but those that ship by their file's name alone."""
    return Path(name).name if Path(name).parent == MODELS[DEFAULT].folder("examples") else name


def _classify_all(
    clf: RobustClassifier, pictures: Iterable[Picture], *, as_json: bool, on_error: OnError, top_k: int
) -> tuple[int, int]:
    """Print an answer per picture; return how many there were and how many could not be read."""
    n = n_failed = 0
    with stages() as progress:
        for picture in pictures:
            n += 1
            if n == _PROGRESS_FROM:
                progress.start("classifying")
            if n >= _PROGRESS_FROM:
                progress.done(n)
            try:
                _classify_one(clf, picture, as_json=as_json, top_k=top_k)
            except InvalidImageError as error:
                if on_error == "raise":
                    raise
                n_failed += 1
                _print_error(picture, error, on_error, as_json=as_json)
    return n, n_failed


def _print_error(picture: Picture, error: InvalidImageError, on_error: OnError, *, as_json: bool) -> None:
    """Say why a picture has no answer: on stderr, or with "return" among the answers, in the form that they have."""
    quoted, text = repr(picture.name), str(error)
    rest = text.removeprefix(quoted) if text.startswith(quoted) else f": {text}"  # the name stands there once
    among_answers = on_error == "return" and not as_json
    (put if among_answers else say)(f"{one_line(picture.name)}{rest}", "red")
    if on_error == "return" and as_json:
        print_json({"file": picture.name, "error": {"code": error.code, "message": error.message}})


def _classify_one(clf: RobustClassifier, picture: Picture, *, as_json: bool, top_k: int) -> None:
    """Print the answer for one picture: both sides, or stock CLIP's alone where there is no defense."""
    if clf.defense is not None:
        explanation = clf.explain(picture.open(), top_k=top_k)
        if as_json:
            print_json({"file": picture.name, **_json_of(explanation)})
        else:
            print_explanation(picture.name, explanation)
        return
    (answer,) = clf.answers([picture.open()], on_error="raise", top_k=top_k)
    if as_json:
        print_json({"file": picture.name, "plain": answer.prediction, "warnings": list(answer.warnings)})
    else:
        _print_table(picture.name, {"plain CLIP": answer.prediction or []})
        _print_notes(answer.warnings)


def _classify_with_bundle(
    clf: OnnxClassifier,
    pictures: Iterable[Picture],
    strength: float,
    *,
    as_json: bool,
    on_error: OnError,
    top_k: int,
) -> tuple[int, int]:
    """Print an answer per picture, without torch; return how many there were and how many could not be read."""
    n = n_failed = 0
    named, opened = itertools.tee(pictures)
    answers = clf.answers(
        (picture.open() for picture in opened), on_error="raise" if on_error == "raise" else "return", top_k=top_k
    )
    for picture, answer in zip(named, answers, strict=True):
        n += 1
        if isinstance(answer.error, InvalidImageError):
            n_failed += 1
            _print_error(picture, answer.error, on_error, as_json=as_json)
        elif as_json:
            print_json({"file": picture.name, "robust": answer.prediction, "warnings": list(answer.warnings)})
        else:
            side = "defended" if strength > 0 else "plain CLIP"
            _print_table(picture.name, {side: answer.prediction or []})
            _print_notes(answer.warnings)
    return n, n_failed


def _print_notes(warnings: Iterable[str]) -> None:
    for warning in warnings:
        say(f"  note: {NOTES[warning]} ({warning})")


def _json_of(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON values without its maps, which are longer than all the rest."""
    fields = explanation.to_dict()
    del fields["heatmap"]
    for item in fields["removed"]:
        del item["map"]
    return fields


def print_explanation(name: str, explanation: Explanation) -> None:
    """Print both answers side by side, and what was removed in a line."""
    _print_table(name, {"plain CLIP": explanation.plain, "defended": explanation.robust})
    put(f"  {_what_was_removed(explanation)}\n")
    _print_notes(explanation.warnings)


def _print_table(name: str, answers: dict[str, Prediction]) -> None:
    """Print a picture's name and its answers in columns, labels in the order of their best score."""
    scores = {side: {entry["label"]: entry["score"] for entry in answer} for side, answer in answers.items()}
    best: dict[str, float] = {}
    for column in reversed(scores.values()):
        for label, score in column.items():
            best[label] = max(score, best.get(label, 0))
    table = Table("", *scores, box=None, pad_edge=False)
    for label in sorted(best, key=lambda each: -best[each]):
        table.add_row(f"  {label}", *(_cell(column, label) for column in scores.values()))
    put(one_line(_called(name)), "bold")
    stdout.print(table)


def _cell(scores: dict[str, float], label: str) -> str:
    return f"{100 * scores[label]:5.1f} %" if label in scores else "      -"


def _what_was_removed(explanation: Explanation) -> str:
    if not explanation.removed:
        return "nothing was removed: the answer is stock CLIP's, bit for bit"
    names = ", ".join(dict.fromkeys(item.set_name for item in explanation.removed))
    n_latents = f"{len(explanation.removed)} latent{'s' * (len(explanation.removed) != 1)}"
    return f"removed: {names}; {n_latents} on {explanation.where}, {100 * explanation.fraction:.1f} % of the residual"


def _print_next_step() -> None:
    say(
        'Your own picture:  defense classify PICTURE [--labels "dog,cat"]\n'
        "This is the photo model, a small CLIP that knows the thousand names of ImageNet and what is above them.\n"
        "Your own CLIP:     defense protect ViT-B-32 --pretrained TAG --pictures DIR"
    )
