"""`defense bench`: methods measured on data sets, and what a defense costs."""

from __future__ import annotations

import logging
import shlex
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from defense.cli.common import EXIT_INPUTS, app, exit_codes, put, say, stderr

if TYPE_CHECKING:
    from defense.benchmarks.datasets import Task
    from defense.hosts.defense import Defense


@app.command()
def bench(
    ctx: typer.Context,
    suite: Annotated[
        str,
        typer.Argument(
            help='"mini" (drawn, nothing to fetch), "typographic", "waterbirds", "celeba", "all", or one data set; '
            '"speed" or "latents".'
        ),
    ],
    data: Annotated[
        Path | None, typer.Option(help='The folder that holds the data sets\' folders; by default "data".')
    ] = None,
    model: Annotated[str | None, typer.Option(help="open_clip model; by default the one the defense names.")] = None,
    pretrained: Annotated[str | None, typer.Option(help='open_clip\'s tag of its weights, or "random".')] = None,
    defense: Annotated[
        str | None,
        typer.Option(help='"embedded", a folder, or a hub id; by default what ships for each of the "mini" data sets.'),
    ] = None,
    methods: Annotated[str, typer.Option(help='E.g. "zero-shot,defense,defense@0.5"; "all".')] = "zero-shot,defense",
    out: Annotated[Path, typer.Option(help="Where results, tables and plots go; a second run goes on there.")] = Path(
        "results"
    ),
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Take data that are not all there.")] = False,
    font: Annotated[Path | None, typer.Option(help="Font file for drawn words.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of what is drawn, and of intervals.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Measure methods on data sets that attack CLIP with words or spurious cues."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_codes():
        if suite == "speed":
            _refuse_options(ctx, suite, {"model", "out"})
            raise typer.Exit(_speed(model, out))
        if suite == "latents":
            _refuse_options(ctx, suite, {"out"})
            raise typer.Exit(_latents(out))
        from defense.benchmarks import datasets, named_clip, robust, tables
        from defense.benchmarks.methods import FACTORIES, make_methods
        from defense.hosts.clip import EMBEDDED
        from defense.store.defenses import find_defense

        options = datasets.Options(allow_partial, font, seed)
        tasks, missing = datasets.read_tasks(suite, data, options)
        if missing:
            say(f"not in {data or datasets.DATA}, left out: {', '.join(missing)}")
        found = None if defense is None else find_defense(defense)
        if model is None:
            if found is not None:
                model, pretrained = found.clip.model, found.clip.pretrained
            elif all(task.name in datasets.mini.DEFENSES for task in tasks):
                model = EMBEDDED
            else:
                raise typer.BadParameter("--model is missing, e.g. --model ViT-B-32 --pretrained openai")
        typed = [name.strip() for name in methods.split(",")]
        names = [each for name in typed for each in (FACTORIES if name == "all" else [name])]
        defenses = {task.name: found for task in tasks} if found or model != EMBEDDED else _shipped(tasks)
        jobs = [(task, make_methods(names, defenses[task.name])) for task in tasks]
        clip = named_clip.load_named_clip(model, pretrained, device=device)
        with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as progress:

            def track(chunks: Sequence[Any], what: str) -> Iterable[Any]:
                return progress.track(chunks, description=what)

            command = shlex.join(["defense", *sys.argv[1:]])
            results = robust.run(clip, jobs, out, seed=seed, command=command, track=track)
        put(tables.markdown(results))
        robust.lay_out(out)
        n_unreadable = sum(result["robust"]["n_unreadable"] for result in results)
        if n_unreadable:
            say("some pictures could not be read; the results name them", "red")
            raise typer.Exit(EXIT_INPUTS)


def _shipped(tasks: Sequence[Task]) -> dict[str, Defense | None]:
    """Return the embedded model's defense for each task, None where none ships for it."""
    from defense.benchmarks.datasets import mini
    from defense.hosts.clip import EMBEDDED
    from defense.store.defenses import embedded_defenses, find_defense

    there = embedded_defenses()
    names = {task.name: mini.DEFENSES.get(task.name) for task in tasks}
    return {task: find_defense(f"{EMBEDDED}:{name}") if name in there else None for task, name in names.items()}


def _refuse_options(ctx: typer.Context, suite: str, allowed: set[str]) -> None:
    """Raise for options that say nothing to a suite without data sets."""
    sources = {name: ctx.get_parameter_source(name) for name in ctx.params}
    given = {name for name, source in sources.items() if source is not None and source.name != "DEFAULT"}
    if others := sorted(given - {"suite", *allowed}):
        takes = " and ".join(f"--{name}" for name in sorted(allowed))
        raise typer.BadParameter(f"{suite} takes {takes} only, not --{others[0].replace('_', '-')}")


def _speed(model: str | None, out: Path) -> int:
    from defense.benchmarks import speed

    out.mkdir(parents=True, exist_ok=True)
    chosen = [] if model is None else ["--model", model]
    return speed.main([*chosen, "--out", str(out / "speed-cpu.json")])


def _latents(out: Path) -> int:
    from defense.benchmarks import latents

    command = shlex.join(["defense", *sys.argv[1:]])
    put(latents.table(latents.run(out / latents.FILE, command=command, report=say)))
    return 0
