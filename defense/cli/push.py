"""`defense push`: a defense onto the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from defense.cli.common import app, exit_codes, put, say


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="A defense that `defense protect` or `fit` wrote.")],
    repo: Annotated[str, typer.Argument(help="Where to on the hub: org/repo; made where it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make it for its owners alone.")] = False,
) -> None:
    """Publish a defense on the Hugging Face hub, with a card; log in first: hf auth login."""
    with exit_codes():
        from defense.store import pushing

        address = pushing.push(folder, repo, private=private, report=say)
        put(f"published   {address}")
        say(f"Anyone with the same weights: RobustClassifier.from_pretrained({repo!r})")
