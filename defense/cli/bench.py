"""`defense bench`: methods measured on data sets, and what a defense costs."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from defense.cli.common import (
    EXIT_INPUTS,
    MAX_PIXELS,
    Device,
    MaxPixels,
    OtherModel,
    app,
    check_pretrained,
    check_there,
    exit_codes,
    log_warnings,
    put,
    say,
    separated,
    shown,
)
from defense.cli.progress import stages
from defense.store.folders import led_to

if TYPE_CHECKING:
    from defense.benchmarks.datasets import Options, Task
    from defense.benchmarks.methods import Method
    from defense.hosts.defense import Defense
    from defense.hosts.shipped import ShippedClip

_WITHOUT_DATA = {"speed": {"model", "out"}, "latents": {"out"}}
"""Suites that measure no data set, and the options that each of them takes."""

Suite = Annotated[
    str,
    typer.Argument(
        help='Several data sets: "mini" (drawn, nothing to fetch), "typographic", "waterbirds", "celeba", '
        '"semantic", "photo", "all". One: rta100, paint, disentangling, scam, synthetic, semantic, waterbirds, '
        "celeba-blond, celeba-male, photo-100, photo-1000, rta100-known, paint-known, scam-known, "
        'mini-typographic, mini-waterbirds, mini-celeba, mini-semantic. None: "speed", "latents".'
    ),
]

Quick = Annotated[
    int | None,
    typer.Option("--n", min=1, help="Pictures of each split of the miniatures, for a quick look; not for publication."),
]


@app.command()
def bench(
    ctx: typer.Context,
    suite: Suite,
    data: Annotated[
        Path | None, typer.Option(help='The folder that holds the data sets\' folders; by default "data".')
    ] = None,
    model: OtherModel = None,
    pretrained: Annotated[
        str | None, typer.Option(help="open_clip's tag of the model's weights, or \"random\".")
    ] = None,
    defense: Annotated[
        str | None,
        typer.Option(
            help='"photo", "embedded", a folder, or a hub id; by default what ships for each of "mini" and "photo".'
        ),
    ] = None,
    methods: Annotated[str, typer.Option(help='E.g. "zero-shot,defense,defense@0.5"; "all".')] = "zero-shot,defense",
    out: Annotated[Path, typer.Option(help="Where results, tables and plots go; a second run goes on there.")] = Path(
        "results"
    ),
    with_drawn: Annotated[
        bool, typer.Option("--with-drawn", help="Add the drawn pictures of a suite to the real ones that are there.")
    ] = False,
    allow_partial: Annotated[bool, typer.Option("--allow-partial", help="Take data that are not all there.")] = False,
    font: Annotated[Path | None, typer.Option(help="Font file for drawn words.")] = None,
    n: Quick = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn, and of intervals.")] = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Measure methods on data sets that attack CLIP with words or spurious cues."""
    log_warnings()
    with exit_codes(f"run the same command again to go on: what was measured is in {shown(out)}"):
        led_to(out)  # refused before the work where it is none
        if suite in _WITHOUT_DATA:
            _refuse_options(ctx, suite, _WITHOUT_DATA[suite])
            raise typer.Exit(_speed(model, out) if suite == "speed" else _latents(out))
        from defense.benchmarks import datasets, named_clip, robust, tables
        from defense.data.images import Limits
        from defense.store.defenses import find_defense

        check_pretrained(model, pretrained, defense)
        check_there(font)
        found = None if defense is None else find_defense(defense)
        options = datasets.Options(allow_partial, font, seed, Limits(max_pixels=max_pixels), n)
        tasks = _tasks(suite, data, options, with_drawn=with_drawn)
        model, pretrained = (model, pretrained) if model is not None else _named_by(found, tasks)
        jobs = _jobs(tasks, methods, found, model)
        clip = named_clip.load_named_clip(model, pretrained, device=device)
        with stages() as progress:
            results = robust.run(clip, jobs, out, seed=seed, command=_command(), track=progress.track)
        put(tables.markdown(results))
        robust.lay_out(out)
        if any(result["robust"]["n_unreadable"] for result in results):
            say("some pictures could not be read; the results name them", "red")
            raise typer.Exit(EXIT_INPUTS)


def _tasks(suite: str, data: Path | None, options: Options, *, with_drawn: bool) -> list[Task]:
    """Return the data sets of a suite that are there; say which are left out."""
    from defense.benchmarks import datasets

    tasks, left_out = datasets.read_tasks(suite, data, options, with_drawn=with_drawn)
    others = [task.name for task in tasks if task.name not in datasets.mini.DEFENSES]
    if options.n is not None and others:
        raise typer.BadParameter(f"--n is for the miniatures, as in bench mini, not for {', '.join(others)}")
    drawn = [name for name in left_out if datasets.READERS[name].folder is None]
    if missing := [name for name in left_out if name not in drawn]:
        say(f"not in {data or datasets.DATA}, left out: {', '.join(missing)}")
    if drawn:
        say(f"drawn, left out beside real pictures: {', '.join(drawn)}; --with-drawn adds them")
    return tasks


def _named_by(defense: Defense | None, tasks: Sequence[Task]) -> tuple[str, str | None]:
    """Return model and weights where none are given: those of the defense, or the shipped ones for their suites."""
    from defense.benchmarks.datasets import PHOTO_SUITE, mini
    from defense.hosts.shipped import EMBEDDED, PHOTO

    if defense is not None:
        return defense.clip.model, defense.clip.pretrained
    if all(task.name in mini.DEFENSES for task in tasks):
        return EMBEDDED, None
    if all(task.name in PHOTO_SUITE for task in tasks):
        return PHOTO, None
    raise typer.BadParameter("--model is missing, e.g. --model ViT-B-32 --pretrained openai")


def _jobs(
    tasks: Sequence[Task], methods: str, defense: Defense | None, model: str
) -> list[tuple[Task, Sequence[Method]]]:
    """Return each data set with the methods to measure on it, and the defense that is given or ships for it."""
    from defense.benchmarks.methods import all_names, make_methods
    from defense.hosts.shipped import find_model

    names = [each for name in separated(methods, "--methods") for each in (all_names() if name == "all" else [name])]
    own = find_model(model) if defense is None else None
    defenses = _shipped(tasks, own) if own is not None else {task.name: defense for task in tasks}
    return [(task, make_methods(names, defenses[task.name])) for task in tasks]


def _shipped(tasks: Sequence[Task], own: ShippedClip) -> dict[str, Defense | None]:
    """Return a shipped model's defense for each task, None where none ships for it."""
    from defense.benchmarks.datasets import mini
    from defense.hosts.shipped import EMBEDDED, FIRST
    from defense.store.defenses import find_defense

    names = {task.name: mini.DEFENSES.get(task.name) if own.name == EMBEDDED else FIRST for task in tasks}
    return {task: find_defense(f"{own.name}:{name}") if name in own.defenses else None for task, name in names.items()}


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
    from defense.benchmarks import latents, latents_report

    put(latents_report.table(latents.run(out / latents.FILE, command=_command(), report=say)))
    return 0


def _command() -> str:
    """Return the command line as it was typed, for the record of a result."""
    return shlex.join(["defense", *sys.argv[1:]])
