"""What the commands share: options, where text goes, exit codes, labels and paths."""

from __future__ import annotations

import io
import json
import logging
import os
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.text import Text

from defense.data.images import DEFAULT_LIMITS
from defense.data.labels import CONTROL_CHARACTER
from defense.data.listing import as_text, in_words
from defense.data.sources import Picture, Pictures, open_pictures
from defense.errors import (
    EXTRAS,
    CheckpointError,
    DefenseError,
    InvalidImageError,
    MissingDependencyError,
    NonFiniteError,
    NotThereError,
    cannot_import,
)
from defense.hosts import shipped
from defense.hosts.shipped import ShippedClip
from defense.store.defenses import find_defense
from defense.store.folders import restore

app = typer.Typer(
    help="Zero-shot image classification with CLIP that does not read the note on the apple.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def harmless(text: str, *, keep: str = "\n\t") -> str:
    """Return a text without what a terminal obeys: control characters, which names of files may hold, become escapes.

    Args:
        text: What to print.
        keep: Control characters that stay.
    """
    return CONTROL_CHARACTER.sub(lambda found: found[0] if found[0] in keep else repr(found[0])[1:-1], text)


class _Plain(Console):
    """Prints texts as they are, but for what a terminal obeys."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(harmless(text), **options)


class _Stdout(_Plain):
    """Where results go."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # rich would end the process here; `exit_codes` does


class _Stderr(_Plain):
    """Where talk goes."""

    def on_broken_pipe(self) -> None:
        self.quiet = True  # nobody listens any more; the work goes on


# Nothing is taken for markup or for the name of an emoji: labels and file names may look like either.
stdout = _Stdout(markup=False, emoji=False, highlight=False)
stderr = _Stderr(stderr=True, markup=False, emoji=False, highlight=False)

MAX_PIXELS = DEFAULT_LIMITS.max_pixels
EXIT_USAGE, EXIT_MISSING, EXIT_INPUTS, EXIT_ARTIFACT, EXIT_SYSTEM = 2, 3, 4, 5, 6
EXIT_INTERRUPTED, EXIT_UNREAD = 130, 141  # 128 and the number of the signal, as shells have it: SIGINT, SIGPIPE

# Options that several commands have.
Labels = Annotated[str | None, typer.Option(help='Labels to choose from, separated by commas, e.g. "dog,cat".')]
LabelsFile = Annotated[Path | None, typer.Option(help="Text file of labels to choose from, one a line.")]
Template = Annotated[str, typer.Option(help='"simple", "hf", "openai", or a template with {}.')]
DefenseSource = Annotated[str, typer.Option(help='"photo", "embedded", a folder, or a hub id.')]
Model = Annotated[str, typer.Option(help='open_clip model, or "transformers:" and a folder or hub id.')]
OtherModel = Annotated[
    str | None,
    typer.Option(
        help='open_clip model, or "transformers:" and a folder or hub id; by default the one that the defense names.'
    ),
]
Pretrained = Annotated[str | None, typer.Option(help="open_clip's tag of the model's weights.")]
MaxPixels = Annotated[int, typer.Option(min=1, help="Largest picture that is read, in pixels: width times height.")]
Device = Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')]


def say(text: str, style: str | None = None) -> None:
    """Print a line for people on stderr; nothing in it is taken for markup."""
    stderr.print(text, style=style, soft_wrap=True)


def log_warnings() -> None:
    """Let the package's warnings appear on stderr, a line each."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return harmless(super().format(record))


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
        text = error.strerror or text
        if isinstance(error.filename, (str, bytes, os.PathLike)):
            text = f"{shown(Path(os.fsdecode(error.filename)))}: {text}"
    say(f"error: {text}", "red")
    raise typer.Exit(exit_code(error)) from None


def exit_code(error: DefenseError | OSError) -> int:
    """Return the exit code for an error, of those that `defense.cli` lists."""
    if isinstance(error, OSError) and not isinstance(error, DefenseError):
        return EXIT_SYSTEM
    code = EXIT_USAGE
    for kind, value in (
        (MissingDependencyError, EXIT_MISSING),
        (CheckpointError, EXIT_ARTIFACT),
        (NotThereError, EXIT_USAGE),
        (NonFiniteError, EXIT_ARTIFACT),
        (InvalidImageError, EXIT_INPUTS),
    ):
        code = value if isinstance(error, kind) else code
    return code


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


def separated(text: str, option: str) -> list[str]:
    """Return the names that an option holds, separated by commas; refuse blank ones."""
    names = [name.strip() for name in text.split(",")]
    if blank := [place for place, name in enumerate(names, start=1) if not name]:
        what = f"name {blank[0]} of {len(names)} is blank: a comma too many" if len(names) > 1 else "there is no name"
        raise typer.BadParameter(f'{option} "{text}": {what}; give names separated by commas, as in "dog,pizza"')
    return names


def chosen_labels(
    labels: str | None,
    labels_file: Path | None,
    own: ShippedClip | None,
    defense: str | None = None,
    *,
    needs_own: bool = False,
) -> Sequence[str]:
    """Return the labels given by either option; else a shipped model's own, or common nouns for another one.

    Where labels are needed and none are given, a defense that is not there is told first.

    Args:
        labels: The labels, separated by commas.
        labels_file: A file of them.
        own: The shipped model that chooses, if it is one.
        defense: The option --defense, where there is one.
        needs_own: Refuse to choose labels for another model: they would be baked into something.
    """
    if labels is not None and labels_file is not None:
        raise typer.BadParameter("give --labels or --labels-file, not both")
    if labels_file is not None:
        from defense.data.labels import read_labels

        return read_labels(labels_file)
    if labels is not None:
        return separated(labels, "--labels")
    if own is not None:
        from defense.embedded.labels import own_labels

        return own_labels(own)
    if defense is not None:
        find_defense(defense)
    if needs_own:
        raise typer.BadParameter('--labels or --labels-file is missing, e.g. --labels "dog,cat"')
    from defense.data.labels import common_nouns

    nouns = common_nouns()
    say(f'labels: {len(nouns)} common nouns, for want of --labels "dog,cat"')
    return nouns


def shipped_model(defense: str, model: str | None) -> ShippedClip | None:
    """Return the shipped model that chooses with its own labels: where its first defense is in no other model."""
    found = shipped.find(defense)
    if found is None or found.defense != shipped.FIRST:
        return None
    return found.model if model is None or shipped.find_model(model) is found.model else None


def check_pretrained(model: str | None, pretrained: str | None, defense: str | None = None) -> None:
    """Refuse --pretrained without a --model that could have such weights, and an embedded defense for another model.

    Args:
        model: The option --model.
        pretrained: The option --pretrained.
        defense: The option --defense, where there is one that will be used.
    """
    if pretrained is not None and (model is None or shipped.find_model(model) is not None):
        raise typer.BadParameter(
            f"--pretrained {pretrained} says which weights a --model has, and there is none; give both, e.g. --model "
            "ViT-B-32 --pretrained openai, or neither"
        )
    if defense is not None:
        shipped.check_own_model(defense, model, pretrained)


def check_there(*paths: Path | None) -> None:
    """Refuse paths at which there is nothing, as misspelled ones."""
    for path in paths:
        if path is not None and not restore(path):
            raise typer.BadParameter(f"{shown(path)} is not there; check the path")


def expand(pictures: Sequence[Path]) -> Iterator[Picture]:
    """Return the pictures of folders, tar and Parquet files, and other files as they are, each with its path as name.

    What was passed over is said behind each folder. Nothing is read yet but what is there.

    Raises:
        ConfigError: See `sources.open_pictures`.
    """
    found = [
        open_pictures([path]) if path.is_dir() or path.suffix.lower() in (".tar", ".parquet") else None
        for path in pictures
    ]

    def each() -> Iterator[Picture]:
        for path, source in zip(pictures, found, strict=True):
            if source is None:
                yield Picture(shown(path), 0, path)
                continue
            folder = path if path.is_dir() else path.parent
            for picture in source:
                where = picture.source if isinstance(picture.source, Path) else folder / picture.name
                yield replace(picture, name=shown(where))
            say_passed_over(source)

    return each()


def say_passed_over(pictures: Pictures) -> None:
    """Say what was passed over when pictures were looked for, if anything was."""
    if pictures.passed_over:
        say(f"passed over: {in_words(pictures.passed_over)}")


def shown(path: Path) -> str:
    """Return a path as text that can be printed: bytes of a name that are no UTF-8 become escapes."""
    return as_text(path)


def one_line(name: str) -> str:
    """Return a file's name as it is printed for people: line breaks in it become escapes too."""
    return harmless(name, keep="")


def print_json(fields: dict[str, Any]) -> None:
    """Print a line of JSON on stdout, in ASCII where that cannot hold all characters."""
    file = stdout.file  # not sys.stdout: that is None where stdout is closed
    is_unicode = (getattr(file, "encoding", None) or "").replace("-", "").lower().startswith("utf")
    file.write(json.dumps(fields, ensure_ascii=not is_unicode) + "\n")
    file.flush()


def coding_lines(by_kind: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Return lines on how well an SAE codes each kind of token; none where that was not measured.

    Args:
        by_kind: As `Quality.by_kind` and catalogues hold it on disk: kind -> the fields of `core.coding.Coding`.
    """
    if not by_kind:
        return []
    lines = ["tokens            explained variance   latents per token   latents that fire"]
    for kind, found in by_kind.items():
        explained = "-" if found["explained_variance"] is None else f"{found['explained_variance']:.4f}"
        lines.append(f"  {kind:16}{explained:>18}{found['l0']:>20.1f}{100 * found['alive']:>18.1f} %")
    return lines
