"""`defense classify`: plain and defended CLIP side by side."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from defense.classify.zeroshot import OnError
from defense.cli.common import (
    EXIT_INPUTS,
    Device,
    Labels,
    LabelsFile,
    OtherModel,
    Pretrained,
    Template,
    app,
    check_pretrained,
    chosen_labels,
    exit_codes,
    expand,
    print_json,
    put,
    say,
    shown,
    stdout,
)
from defense.cli.stages import stages
from defense.data import images
from defense.errors import InvalidImageError

if TYPE_CHECKING:
    from defense.classify.classifier import RobustClassifier
    from defense.classify.explanation import Explanation
    from defense.classify.zeroshot import Prediction

_PROGRESS_FROM = 20


@app.command()
def classify(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders. By default the pictures that ship with the package.")
    ] = None,
    labels: Labels = None,
    labels_file: LabelsFile = None,
    template: Template = "simple",
    defense: Annotated[str, typer.Option(help='"embedded", a folder, a hub id, or an exported bundle.')] = "embedded",
    model: OtherModel = None,
    pretrained: Pretrained = None,
    plain: Annotated[bool, typer.Option("--plain", help="Stock CLIP only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
    on_error: Annotated[OnError, typer.Option(help="What becomes of a picture that cannot be read.")] = "skip",
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 3,
    device: Device = "auto",
) -> None:
    """Classify pictures with plain and with defended CLIP, side by side."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_codes():
        from defense.classify.classifier import RobustClassifier
        from defense.export import bundle
        from defense.hosts.clip import EMBEDDED

        check_pretrained(model, pretrained)
        paths = _example_pictures() if not pictures else list(expand(pictures))
        if not paths:
            raise typer.BadParameter(f"no pictures in {', '.join(map(str, pictures or []))}")
        if bundle.is_bundle(defense):
            if plain or model is not None:
                raise typer.BadParameter("a bundle holds one defended model; --plain and --model do not go with it")
            given = None if labels is None and labels_file is None else chosen_labels(labels, labels_file, False)
            _classify_with_bundle(defense, paths, given, template, as_json=as_json, on_error=on_error, top_k=top_k)
            return
        uses_embedded = defense == EMBEDDED and model in (None, EMBEDDED)
        chosen = chosen_labels(labels, labels_file, uses_embedded, defense)
        if plain:
            clf = _undefended(defense, model, pretrained, device)
        else:
            clf = RobustClassifier.from_pretrained(defense, model=model, pretrained=pretrained, device=device)
        clf.set_labels(chosen, template)
        n_failed = _classify_all(clf, paths, as_json=as_json, on_error=on_error, top_k=top_k)
        if not pictures and not as_json:
            _print_next_step()
        if n_failed:
            say(f"{n_failed} of {len(paths)} pictures could not be read")
            raise typer.Exit(EXIT_INPUTS)


def _undefended(defense: str, model: str | None, pretrained: str | None, device: str) -> RobustClassifier:
    """Return the stock CLIP that was given, or the one that a defense names."""
    from defense.classify.classifier import RobustClassifier
    from defense.hosts.clip import load_clip
    from defense.store.defenses import find_defense

    if model is None:
        spec = find_defense(defense).clip
        model, pretrained = spec.model, spec.pretrained
    return RobustClassifier(load_clip(model, pretrained, device=device))


def _example_pictures() -> list[Path]:
    return sorted((Path(__file__).parents[1] / "embedded" / "examples").glob("*.png"))


def _classify_all(clf: RobustClassifier, paths: Sequence[Path], *, as_json: bool, on_error: OnError, top_k: int) -> int:
    """Print an answer per picture; return how many could not be read."""
    n_failed = 0
    with stages(is_shown=len(paths) >= _PROGRESS_FROM) as progress:
        for path in progress.track(paths, "classifying"):
            try:
                _classify_one(clf, path, as_json=as_json, top_k=top_k)
            except InvalidImageError as error:
                if on_error == "raise":
                    raise
                n_failed += 1
                say(f"{shown(path)}: {error}", "red")
                if on_error == "return":
                    print_json({"file": shown(path), "error": {"code": error.code, "message": error.message}})
    return n_failed


def _classify_one(clf: RobustClassifier, path: Path, *, as_json: bool, top_k: int) -> None:
    """Print the answer for one picture: both sides, or stock CLIP's alone where there is no defense."""
    if clf.defense is not None:
        explanation = clf.explain(path, top_k=top_k)
        if as_json:
            print_json({"file": shown(path), **_json_of(explanation)})
        else:
            print_explanation(path, explanation)
        return
    decoded = images.decode(path)
    plain = clf(decoded.image, top_k=top_k)
    if as_json:
        print_json({"file": shown(path), "plain": plain, "warnings": list(decoded.warnings)})
    else:
        _print_table(path, {"plain CLIP": plain})


def _classify_with_bundle(
    folder: str,
    paths: Sequence[Path],
    chosen: Sequence[str] | None,
    template: str,
    *,
    as_json: bool,
    on_error: OnError,
    top_k: int,
) -> None:
    """Print an answer per picture, without torch."""
    from defense.export.runtime import OnnxClassifier

    clf = OnnxClassifier(folder)
    if chosen is not None:
        clf.set_labels(chosen, template)
    n_failed = 0
    answers = clf.stream(paths, on_error="raise" if on_error == "raise" else "return", top_k=top_k)
    for path, answer in zip(paths, answers, strict=True):
        if isinstance(answer, InvalidImageError):
            n_failed += 1
            say(f"{shown(path)}: {answer}", "red")
            if on_error == "return":
                print_json({"file": shown(path), "error": {"code": answer.code, "message": answer.message}})
        elif as_json:
            print_json({"file": shown(path), "robust": answer})
        else:
            put(shown(Path(path.name)), "bold")
            for row in answer:
                put(f"  {100 * row['score']:5.1f} %  {row['label']}")
    if n_failed:
        say(f"{n_failed} of {len(paths)} pictures could not be read")
        raise typer.Exit(EXIT_INPUTS)


def _json_of(explanation: Explanation) -> dict[str, Any]:
    """Return an explanation as JSON values without its maps, which are longer than all the rest."""
    fields = explanation.to_dict()
    del fields["heatmap"]
    for item in fields["removed"]:
        del item["map"]
    return fields


def print_explanation(path: Path, explanation: Explanation) -> None:
    """Print both answers side by side, and what was removed in a line."""
    _print_table(path, {"plain CLIP": explanation.plain, "defended": explanation.robust})
    put(f"  {_what_was_removed(explanation)}\n")


def _print_table(path: Path, answers: dict[str, Prediction]) -> None:
    """Print answers in columns, labels in the order of their best score."""
    scores = {side: {entry["label"]: entry["score"] for entry in answer} for side, answer in answers.items()}
    best: dict[str, float] = {}
    for column in reversed(scores.values()):
        for label, score in column.items():
            best[label] = max(score, best.get(label, 0))
    table = Table("", *scores, box=None, pad_edge=False)
    for label in sorted(best, key=lambda name: -best[name]):
        table.add_row(f"  {label}", *(_cell(column, label) for column in scores.values()))
    put(shown(Path(path.name)), "bold")
    stdout.print(table)


def _cell(scores: dict[str, float], label: str) -> str:
    return f"{100 * scores[label]:5.1f} %" if label in scores else "      -"


def _what_was_removed(explanation: Explanation) -> str:
    if not explanation.removed:
        return "nothing was removed: the answer is stock CLIP's, bit for bit"
    names = ", ".join(dict.fromkeys(item.set_name for item in explanation.removed))
    n_latents = f"{len(explanation.removed)} latent{'s' * (len(explanation.removed) != 1)}"
    n_patches = int((explanation.heatmap > 0).sum())
    return (
        f"removed: {names}; {n_latents} on {n_patches} of {explanation.heatmap.size} patches, "
        f"{100 * explanation.fraction:.1f} % of the residual"
    )


def _print_next_step() -> None:
    say(
        'Your own picture:     defense classify PICTURE --labels "dog,cat"\n'
        "This is the embedded model, a miniature CLIP that knows a hundred drawn things. For photographs, give a\n"
        "full-size one and a defense that was fitted on it:\n"
        "                      defense classify PICTURE --labels ... --defense DIR --model ViT-B-32 --pretrained TAG"
    )
