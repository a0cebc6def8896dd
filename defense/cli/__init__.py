"""The command line: `defense classify`, `explain`, `export`, `info`, `import` and so on; a module each.

stdout is data, stderr is talk. Exit codes: 0 ok, 2 usage, 3 a package is missing, 4 some inputs failed, 5 a defense
was rejected, 130 interrupted.
"""

from __future__ import annotations

import signal
from importlib.metadata import version
from typing import Annotated

import typer

from defense.cli import (  # noqa: F401 - in the order of --help
    bench,
    classify,
    demo,
    describe,
    doctor,
    explain,
    export,
    fit,
    importing,
    info,
    protect,
    push,
    train,
)
from defense.cli.common import app, put

__all__ = ["app", "main"]


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if show_version:
        put(version("clip-defense"))
        raise typer.Exit


def main() -> None:
    """Run the command line. SIGTERM ends it as Ctrl-C does: nothing half done is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    app()
