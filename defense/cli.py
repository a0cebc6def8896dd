"""The command line: `defense classify`, `defense info`, `defense doctor`.

stdout is data, stderr is talk. Exit codes: 0 ok, 2 usage, 3 a package is missing, 4 some inputs failed, 5 a defense
was rejected, 130 interrupted.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from . import artefact
from .errors import CheckpointError, DefenseError, InvalidImageError, MissingDependencyError, NonFiniteError

if TYPE_CHECKING:
    from .classifier import Explanation, RobustClassifier

app = typer.Typer(
    help="Zero-shot image classification with CLIP that does not read the note on the apple.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_out = Console()
_err = Console(stderr=True)

EXIT_USAGE, EXIT_MISSING, EXIT_INPUTS, EXIT_ARTEFACT, EXIT_INTERRUPTED = 2, 3, 4, 5, 130
_PICTURE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"}
_PROGRESS_FROM = 20


class OnError(StrEnum):
    """What becomes of a picture that cannot be read."""

    skip = "skip"
    raise_ = "raise"
    return_ = "return"


def _say(text: str, style: str | None = None) -> None:
    """Print a line of talk on stderr, as it is."""
    _err.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def _put(text: str, style: str | None = None) -> None:
    """Print a line of data on stdout, as it is."""
    _out.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """Turn exceptions into one line on stderr and the exit code of their kind."""
    try:
        yield
    except KeyboardInterrupt:
        _say("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (DefenseError, OSError) as error:
        code = EXIT_USAGE
        for kind, value in (
            (MissingDependencyError, EXIT_MISSING),
            (CheckpointError, EXIT_ARTEFACT),
            (NonFiniteError, EXIT_ARTEFACT),
            (InvalidImageError, EXIT_INPUTS),
        ):
            code = value if isinstance(error, kind) else code
        _say(f"error: {error}", "red")
        raise typer.Exit(code) from None


@app.command()
def classify(
    pictures: Annotated[
        list[Path] | None, typer.Argument(help="Files or folders. By default the pictures that ship with the package.")
    ] = None,
    labels: Annotated[str | None, typer.Option(help='What to choose from, e.g. "dog,cat".')] = None,
    labels_file: Annotated[Path | None, typer.Option(help="The same, one label a line.")] = None,
    template: Annotated[str, typer.Option(help='"simple", "hf", "openai", or a template with {}.')] = "simple",
    defense: Annotated[str, typer.Option(help='"embedded", a folder, or a hub id.')] = "embedded",
    model: Annotated[str | None, typer.Option(help="open_clip model; by default the one the defense names.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of its weights.")] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Stock CLIP only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines.")] = False,
    on_error: Annotated[OnError, typer.Option(help="What becomes of a picture that cannot be read.")] = OnError.skip,
    top_k: Annotated[int, typer.Option(min=1, help="How many labels to print.")] = 3,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Classify pictures with plain and with defended CLIP, side by side."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with _exit_codes():
        from .classifier import EMBEDDED, RobustClassifier

        uses_embedded = defense == EMBEDDED and model in (None, EMBEDDED)
        chosen = _chosen_labels(labels, labels_file, uses_embedded)
        paths = _example_pictures() if not pictures else list(_expand(pictures))
        if not paths:
            raise typer.BadParameter(f"no pictures in {', '.join(map(str, pictures or []))}")
        clf = RobustClassifier.from_pretrained(defense, model=model, pretrained=pretrained, device=device)
        clf.set_labels(chosen, template)
        n_failed = _classify_all(clf, paths, plain=plain, as_json=as_json, on_error=on_error, top_k=top_k)
        if not pictures and not as_json:
            _print_next_step()
        if n_failed:
            _say(f"{n_failed} of {len(paths)} pictures could not be read")
            raise typer.Exit(EXIT_INPUTS)


def _chosen_labels(labels: str | None, labels_file: Path | None, uses_embedded: bool) -> Sequence[str]:
    if labels is not None and labels_file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both")
    if labels_file is not None:
        from .labels import read_labels

        return read_labels(labels_file)
    if labels is not None:
        return [label.strip() for label in labels.split(",")]
    if not uses_embedded:
        raise typer.BadParameter('--labels or --labels-file is missing, e.g. --labels "dog,cat"')
    from .embedded.scenes import OBJECTS

    return list(OBJECTS)


def _example_pictures() -> list[Path]:
    return sorted((Path(__file__).parent / "embedded" / "examples").glob("*.png"))


def _expand(pictures: Sequence[Path]) -> Iterator[Path]:
    """Yield files as they are, and the pictures below folders in sorted order."""
    for path in pictures:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in _PICTURE_SUFFIXES and p.is_file())
        else:
            yield path


def _classify_all(
    clf: RobustClassifier, paths: Sequence[Path], *, plain: bool, as_json: bool, on_error: OnError, top_k: int
) -> int:
    """Print an answer per picture; return how many could not be read."""
    n_failed = 0
    show_progress = len(paths) >= _PROGRESS_FROM and _err.is_terminal
    with Progress(console=_err, disable=not show_progress, transient=True) as progress:
        for path in progress.track(paths, description="classifying"):
            try:
                explanation = clf.explain(path, top_k=top_k)
            except InvalidImageError as error:
                if on_error is OnError.raise_:
                    raise
                n_failed += 1
                _say(f"{_shown(path)}: {error}", "red")
                if on_error is OnError.return_:
                    _print_json({"file": _shown(path), "error": {"code": error.code, "message": error.message}})
                continue
            if as_json:
                _print_json({"file": _shown(path), **_json_of(explanation, plain)})
            else:
                _print_table(path, explanation, plain)
    return n_failed


def _shown(path: Path) -> str:
    """Return a path as text that can be printed: bytes of a name that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _json_of(explanation: Explanation, plain: bool) -> dict[str, Any]:
    fields = explanation.to_dict()
    if plain:
        return {"plain": fields["plain"], "warnings": fields["warnings"]}
    del fields["heatmap"]
    return fields


def _print_json(fields: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")


def _print_table(path: Path, explanation: Explanation, plain: bool) -> None:
    scores = {side: {p["label"]: p["score"] for p in getattr(explanation, side)} for side in ("plain", "robust")}
    table = Table("", "plain CLIP", *([] if plain else ["defended"]), box=None, pad_edge=False)
    shown = scores["plain"] if plain else {**scores["robust"], **scores["plain"]}
    for label in sorted(
        shown, key=lambda name: -max(scores["plain"].get(name, 0), 0 if plain else scores["robust"].get(name, 0))
    ):
        cells = [_cell(scores["plain"], label)] + ([] if plain else [_cell(scores["robust"], label)])
        table.add_row(f"  {label}", *cells)
    _put(_shown(Path(path.name)), "bold")
    _out.print(table)
    if not plain:
        _put(f"  {_what_was_removed(explanation)}\n")


def _cell(scores: dict[str, float], label: str) -> str:
    return f"{100 * scores[label]:5.1f} %" if label in scores else "      -"


def _what_was_removed(explanation: Explanation) -> str:
    if not explanation.removed:
        return "nothing was removed: the answer is stock CLIP's, bit for bit"
    names = ", ".join(dict.fromkeys(item.set_name for item in explanation.removed))
    n_patches = int((explanation.heatmap > 0).sum())
    return (
        f"removed: {names}; {len(explanation.removed)} latents on {n_patches} of {explanation.heatmap.size} patches, "
        f"{100 * explanation.fraction:.1f} % of the residual"
    )


def _print_next_step() -> None:
    _say(
        'Your own picture:     defense classify PICTURE --labels "dog,cat"\n'
        "This is the embedded model, a miniature CLIP that knows a hundred drawn things. For photographs, give a\n"
        "full-size one and a defense that was fitted on it:\n"
        "                      defense classify PICTURE --labels ... --defense DIR --model ViT-B-32 --pretrained TAG"
    )


@app.command()
def info(
    source: Annotated[str, typer.Argument(help='"embedded", a folder, or a hub id.')] = "embedded",
    expect: Annotated[str | None, typer.Option(help="sha256 that the manifest must have.")] = None,
    check: Annotated[bool, typer.Option(help="Load the host and recompute the golden vectors.")] = False,
    model: Annotated[str | None, typer.Option(help="open_clip model for --check.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag for --check.")] = None,
) -> None:
    """Say what a defense is, after checking every byte of it."""
    with _exit_codes():
        from .classifier import find_defense

        defense = find_defense(source)
        manifest = defense.manifest_sha256
        if expect is not None and expect != manifest:
            raise CheckpointError(
                f"the manifest's sha256 is {manifest}, not {expect}: it was changed, or is another defense"
            )
        tag = f", {defense.host.pretrained}" if defense.host.pretrained else ""
        _put(f"host        {defense.host.model}{tag}, weights {defense.host.sha256[:16]}")
        _put(f"manifest    {manifest}")
        _put(f"licence     {defense.licence}")
        for site in defense.sites:
            sae = site.sae_config
            _put(f"site        {site.hook_point}: {sae['act']} SAE, {sae['d_sae']} latents")
            for latent_set in site.sets:
                _put(
                    f"  set       {latent_set.name}: {len(latent_set.latents)} latents, edit {latent_set.edit}, "
                    f"tokens {latent_set.scope}"
                )
        for key, value in defense.provenance.items():
            _put(f"{key:11} {value}")
        if check:
            _check_golden(defense, source, model, pretrained)


def _check_golden(defense: artefact.Defense, source: str, model: str | None, pretrained: str | None) -> None:
    from .classifier import RobustClassifier, golden_difference

    if defense.golden is None:
        raise CheckpointError("this defense holds no golden vectors to check")
    difference = golden_difference(
        RobustClassifier.from_pretrained(source, model=model, pretrained=pretrained, device="cpu")
    )
    if not difference <= 1e-4:  # also where it is NaN
        raise CheckpointError(
            f"golden vectors differ by {difference:.2g}; expected at most 1e-4: this is not the host it was made with"
        )
    _put(f"golden      reproduced, max difference {difference:.1e}")


@app.command()
def doctor() -> None:
    """List what is installed and what is wrong with it."""
    for package in (
        "clip-defense",
        "torch",
        "torchvision",
        "open_clip_torch",
        "triton",
        "onnxruntime",
        "onnxruntime-gpu",
        "gradio",
        "pillow",
    ):
        try:
            found = version(package)
        except PackageNotFoundError:
            found = "not installed"
        _put(f"{package:18} {found}")
    problems = list(_problems())
    for problem in problems:
        _say(f"problem: {problem}", "red")
    if problems:
        raise typer.Exit(EXIT_MISSING)


def _problems() -> Iterator[str]:
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError:
        return  # not installed, which the list says
    except ImportError as error:
        yield f'torch cannot be imported ({error}); the torch backend needs: pip install "clip-defense[torch]"'
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError) as error:
        yield f"torch and torchvision do not belong together ({error}); reinstall both in one pip command"


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        _put(version("clip-defense"))
        raise typer.Exit


def main() -> None:
    """Run the command line."""
    app()
