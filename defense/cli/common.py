"""What the commands share: options, where text goes, exit codes, labels and paths."""

from __future__ import annotations

import io
import json
import os
import select
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from defense.data.sources import PICTURE_SUFFIXES
from defense.errors import (
    EXTRAS,
    CheckpointError,
    DefenseError,
    InvalidImageError,
    MissingDependencyError,
    NonFiniteError,
    cannot_import,
)
from defense.store.defenses import find_defense
from defense.store.folders import restore

app = typer.Typer(
    help="Zero-shot image classification with CLIP that does not read the note on the apple.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _Stdout(Console):
    """Where results go."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process here; `exit_codes` does


class _Stderr(Console):
    """Where talk goes."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # nobody listens any more; the work goes on


# Nothing is taken for markup or for the name of an emoji: labels and file names may look like either.
stdout = _Stdout(markup=False, emoji=False, highlight=False)
stderr = _Stderr(stderr=True, markup=False, emoji=False, highlight=False)

EXIT_USAGE, EXIT_MISSING, EXIT_INPUTS, EXIT_ARTIFACT, EXIT_SYSTEM = 2, 3, 4, 5, 6
EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141  # 128 and the number of the signal, as shells have it: SIGINT, SIGPIPE

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
    stderr.print(text, style=style, soft_wrap=True)


def put(text: str, style: str | None = None) -> None:
    """Print a line of the result on stdout; nothing in it is taken for markup."""
    stdout.print(text, style=style, soft_wrap=True)


@contextmanager
def exit_codes(when_interrupted: str = "") -> Iterator[None]:
    """Turn exceptions into one line on stderr and the exit code of their kind.

    Args:
        when_interrupted: What to say after Ctrl-C or SIGTERM, of what is kept.
    """
    try:
        yield
    except KeyboardInterrupt:
        say(f"interrupted{when_interrupted and '; '}{when_interrupted}")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    except BrokenPipeError as error:
        if not _is_unread():
            _end(error)
        raise typer.Exit(EXIT_UNREAD) from None
    except (DefenseError, OSError) as error:
        _end(error)
    except ModuleNotFoundError as error:  # of a package that only some commands need
        package = (error.name or "").partition(".")[0]
        if package not in EXTRAS:
            raise
        _end(cannot_import(package, error))


def _end(error: DefenseError | OSError) -> NoReturn:
    """Say what went wrong, and end with its exit code."""
    text = str(error)
    if isinstance(error, OSError) and not isinstance(error, DefenseError):
        code = EXIT_SYSTEM
        text = error.strerror or text
        if isinstance(error.filename, (str, bytes, os.PathLike)):
            text = f"{shown(Path(os.fsdecode(error.filename)))}: {text}"
    else:
        code = EXIT_USAGE
        for kind, value in (
            (MissingDependencyError, EXIT_MISSING),
            (CheckpointError, EXIT_ARTIFACT),
            (NonFiniteError, EXIT_ARTIFACT),
            (InvalidImageError, EXIT_INPUTS),
        ):
            code = value if isinstance(error, kind) else code
    say(f"error: {text}", "red")
    raise typer.Exit(code) from None


def _is_unread() -> bool:
    """Return whether the reader of stdout is gone, as `head` is after ten lines; nothing more is written then."""
    try:
        number = sys.stdout.fileno()
        poll = select.poll()
    except (AttributeError, ValueError, OSError):  # it is closed, is no file, or this is Windows
        return False
    poll.register(number, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)  # else the interpreter complains at its end
    return True


def make_printable() -> None:
    """Let stdout and stderr write escapes for the characters that their encoding does not have."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def chosen_labels(
    labels: str | None, labels_file: Path | None, uses_embedded: bool, defense: str | None = None
) -> Sequence[str]:
    """Return the labels given by either option, or the embedded model's own.

    Args:
        labels: Separated by commas.
        labels_file: One a line.
        uses_embedded: Whether the embedded model's own will do.
        defense: What goes with them: where they are missing and it is too, that is said first.
    """
    if labels is not None and labels_file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both")
    if labels_file is not None:
        from defense.data.labels import read_labels

        return read_labels(labels_file)
    if labels is not None:
        return [label.strip() for label in labels.split(",")]
    if not uses_embedded:
        if defense is not None:
            find_defense(defense)
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


def check_there(*paths: Path | None) -> None:
    """Refuse paths at which there is nothing, as misspelled ones."""
    for path in paths:
        if path is not None and not restore(path):
            raise typer.BadParameter(f"{shown(path)} is not there; check the path")


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
    """Print a line of JSON on stdout, in ASCII where that cannot hold all characters."""
    file = stdout.file  # not sys.stdout: that is None where stdout is closed
    is_unicode = (getattr(file, "encoding", None) or "").replace("-", "").lower().startswith("utf")
    file.write(json.dumps(fields, ensure_ascii=not is_unicode) + "\n")
    file.flush()
