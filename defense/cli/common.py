"""What the commands share: options, where text goes, exit codes, labels and paths."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from defense.data.sources import PICTURE_SUFFIXES
from defense.errors import CheckpointError, DefenseError, InvalidImageError, MissingDependencyError, NonFiniteError

app = typer.Typer(
    help="Zero-shot image classification with CLIP that does not read the note on the apple.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
stdout = Console()
stderr = Console(stderr=True)

EXIT_USAGE, EXIT_MISSING, EXIT_INPUTS, EXIT_ARTIFACT, EXIT_INTERRUPTED = 2, 3, 4, 5, 130

# Options that several commands have.
Labels = Annotated[str | None, typer.Option(help='What to choose from, e.g. "dog,cat".')]
LabelsFile = Annotated[Path | None, typer.Option(help="The same, one label a line.")]
Template = Annotated[str, typer.Option(help='"simple", "hf", "openai", or a template with {}.')]
DefenseSource = Annotated[str, typer.Option(help='"embedded", a folder, or a hub id.')]
Model = Annotated[str, typer.Option(help="open_clip model.")]
OtherModel = Annotated[str | None, typer.Option(help="open_clip model; by default the one the defense names.")]
Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag of its weights.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')]


def say(text: str, style: str | None = None) -> None:
    """Print a line for people on stderr; nothing in it is taken for markup."""
    stderr.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def put(text: str, style: str | None = None) -> None:
    """Print a line of the result on stdout; nothing in it is taken for markup."""
    stdout.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turn exceptions into one line on stderr and the exit code of their kind."""
    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except (DefenseError, OSError) as error:
        code = EXIT_USAGE
        for kind, value in (
            (MissingDependencyError, EXIT_MISSING),
            (CheckpointError, EXIT_ARTIFACT),
            (NonFiniteError, EXIT_ARTIFACT),
            (InvalidImageError, EXIT_INPUTS),
        ):
            code = value if isinstance(error, kind) else code
        say(f"error: {error}", "red")
        raise typer.Exit(code) from None


def chosen_labels(labels: str | None, labels_file: Path | None, uses_embedded: bool) -> Sequence[str]:
    """Return the labels given by either option, or the embedded model's own."""
    if labels is not None and labels_file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both")
    if labels_file is not None:
        from defense.data.labels import read_labels

        return read_labels(labels_file)
    if labels is not None:
        return [label.strip() for label in labels.split(",")]
    if not uses_embedded:
        raise typer.BadParameter('--labels or --labels-file is missing, e.g. --labels "dog,cat"')
    from defense.world.scenes import OBJECTS

    return list(OBJECTS)


def check_pretrained(model: str | None, pretrained: str | None) -> None:
    """Refuse --pretrained without a --model that could have such weights; the embedded model has its own."""
    if pretrained is not None and model in (None, "embedded"):
        raise typer.BadParameter(
            f"--pretrained {pretrained} says which weights a --model has, and there is none; give both, e.g. --model "
            "ViT-B-32 --pretrained openai, or neither"
        )


def expand(pictures: Sequence[Path]) -> Iterator[Path]:
    """Yield files as they are, and the pictures below folders in sorted order."""
    for path in pictures:
        if path.is_dir():
            yield from sorted(p for p in path.rglob("*") if p.suffix.lower() in PICTURE_SUFFIXES and p.is_file())
        else:
            yield path


def shown(path: Path) -> str:
    """Return a path as text that can be printed: bytes of a name that are no UTF-8 become escapes."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def print_json(fields: dict[str, Any]) -> None:
    """Print a line of JSON on stdout."""
    sys.stdout.write(json.dumps(fields, ensure_ascii=False) + "\n")
