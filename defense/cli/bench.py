"""`defense bench`: methods measured on data sets."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from .common import EXIT_INPUTS, app, exit_codes, put, say, stderr

if TYPE_CHECKING:
    pass


@app.command()
def bench(
    suite: Annotated[str, typer.Argument(help='"typographic", "waterbirds", "celeba", "all", or one data set.')],
    data: Annotated[Path, typer.Option(help="The folder that holds the data sets' folders.")] = Path("data"),
    model: Annotated[str | None, typer.Option(help="open_clip model; by default the one the defense names.")] = None,
    pretrained: Annotated[str | None, typer.Option(help='open_clip\'s tag of its weights, or "random".')] = None,
    defense: Annotated[str | None, typer.Option(help='"embedded", a folder, or a hub id.')] = None,
    methods: Annotated[str, typer.Option(help='E.g. "zero-shot,defense,defense@0.5".')] = "zero-shot,defense",
    out: Annotated[Path, typer.Option(help="Where results, tables and plots go; a second run goes on there.")] = Path(
        "results"
    ),
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Take data that are not all there.")] = False,
    font: Annotated[Path | None, typer.Option(help="Font file for drawn words.")] = None,
    seed: Annotated[int, typer.Option(help="Of drawn words and intervals.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Measure methods on data sets that attack CLIP with words or spurious cues."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_codes():
        from defense.benchmarks import datasets, robust, tables
        from defense.benchmarks.methods import make_methods
        from defense.classifier import find_defense

        options = datasets.Options(allow_partial, font, seed)
        tasks, missing = datasets.read_tasks(suite, data, options)
        if missing:
            say(f"not in {data}, left out: {', '.join(missing)}")
        found = None if defense is None else find_defense(defense)
        chosen = make_methods([name.strip() for name in methods.split(",")], found)
        if model is None:
            if found is None:
                raise typer.BadParameter("--model is missing, e.g. --model ViT-B-32 --pretrained openai")
            model, pretrained = found.host.model, found.host.pretrained
        host = robust.load_named_host(model, pretrained, device=device)
        with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as progress:

            def track(chunks: Sequence[Any], what: str) -> Iterable[Any]:
                return progress.track(chunks, description=what)

            command = shlex.join(sys.argv)
            results = robust.run(host, tasks, chosen, out, seed=seed, command=command, track=track)
        put(tables.markdown(results))
        robust.report(out)
        n_unreadable = sum(result["robust"]["n_unreadable"] for result in results)
        if n_unreadable:
            say("some pictures could not be read; the results name them", "red")
            raise typer.Exit(EXIT_INPUTS)
