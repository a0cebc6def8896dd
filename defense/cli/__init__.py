"""The command line: `defense classify`, `explain`, `export`, `info`, `import` and so on; a module each.

stdout is data, stderr is talk. Exit codes: 0 ok, 2 usage (an option, or a path or name at which there is nothing), 3 a
package is missing, 4 some pictures could not be read or are not there, 5 a defense, bundle or SAE is there and was
rejected, 6 reading or writing failed (a full disk, no permission), 130 interrupted (Ctrl-C, SIGTERM), 141 the reader of
stdout is gone.
"""

from __future__ import annotations

import math
import os
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
from defense.cli.common import app, exit_codes, make_printable, put
from defense.data.threads import cpu_quota, usable_cores

__all__ = ["app", "main"]


@app.callback(invoke_without_command=True)
def _root(
    show_version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    make_printable()
    if show_version:
        put(version("clip-defense"))
        raise typer.Exit


def main() -> None:
    """Run the command line. SIGTERM ends it as Ctrl-C does: nothing half done is left."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    quota = cpu_quota()
    if quota is not None and usable_cores() == math.ceil(quota):
        os.environ.setdefault("OMP_NUM_THREADS", str(usable_cores()))  # torch, not imported yet, sees no quota
    with exit_codes():
        app(prog_name="defense")
