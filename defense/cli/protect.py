"""`defense protect`: from a CLIP's name to a defended one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.progress import Progress

from defense.cli.common import (
    EXIT_ARTIFACT,
    MAX_PIXELS,
    Device,
    LabelsFile,
    MaxPixels,
    app,
    exit_codes,
    log_warnings,
    put,
    say,
    shown,
    stderr,
)
from defense.data.images import Limits
from defense.errors import MissingDependencyError

if TYPE_CHECKING:
    from defense.hosts.defense import Defense
    from defense.store.hub import Hub
    from defense.store.registry import HostRow
    from defense.train import trainer


# Longer than functions here are: the options of a command are its parameters, one line each.
@app.command()
def protect(
    name: Annotated[str | None, typer.Argument(help="open_clip model, e.g. ViT-B-32.")] = None,
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of the model's weights.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Folder to write the defense to, too.")] = None,
    pictures: Annotated[
        list[Path] | None, typer.Option(help="Fit on these: a folder, .tar or .parquet files; again for more.")
    ] = None,
    labels_file: LabelsFile = None,
    train: Annotated[
        bool, typer.Option("--train", help="Train an SAE where there is none, which takes hours.")
    ] = False,
    registry: Annotated[
        str | None, typer.Option(help="A registry of your own, a file or a hub id; its rows come first.")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print what the registry has, and end.")] = False,
    verify_registry: Annotated[
        bool, typer.Option("--verify-registry", help="Ask the hub about every row, print what is missing, and end.")
    ] = False,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Give a CLIP a defense against words in pictures: a ready one, else one fitted here with a published SAE.

    Each step says its cost before it starts. Run again after an interruption, it goes on where it was.
    """
    log_warnings()
    with exit_codes():
        from defense.store import registry as registries
        from defense.store.hub import Hub

        hub = Hub(report=say)
        if sum((name is not None, list_, verify_registry)) != 1:
            raise typer.BadParameter("give the name of a model, or --list, or --verify-registry")
        rows = registries.rows(registry, hub)
        if list_:
            _print_rows(rows)
        elif verify_registry:
            _verify(rows, hub)
        else:
            assert name is not None
            _protect(
                name, pretrained, pictures or [], labels_file, rows, hub, may_train=train, out=out, device=device,
                limits=Limits(max_pixels=max_pixels),
            )  # fmt: skip


def _protect(
    name: str,
    pretrained: str | None,
    pictures: Sequence[Path],
    labels_file: Path | None,
    rows: Sequence[HostRow],
    hub: Hub,
    *,
    may_train: bool,
    out: Path | None,
    device: str,
    limits: Limits,
) -> None:
    try:
        from defense import protect as room
    except ModuleNotFoundError as error:
        raise MissingDependencyError(error.name or "torch", "torch") from error
    from defense.data.labels import read_labels

    labels = None if labels_file is None else read_labels(labels_file)
    request = room.Request(name, pretrained, tuple(pictures), labels, may_train, out, device, limits=limits)
    with _progress() as report:
        defense = room.protect(request, rows, hub, say=say, report=report)
    _print_defense(defense, name, pretrained, out)


@contextmanager
def _progress() -> Iterator[Callable[[trainer.Progress], None]]:
    """Yield what moves the bar of a training on stderr, which appears with the first step, on a terminal only."""
    with Progress(console=stderr, disable=not stderr.is_terminal, transient=True) as progress:
        bar = progress.add_task("training", total=None, visible=False)
        yield lambda now: progress.update(
            bar, completed=now.step, visible=True, description=f"step {now.step}, loss {now.loss:.3f}"
        )


def _print_defense(defense: Defense, name: str, pretrained: str | None, out: Path | None) -> None:
    for site in defense.sites:
        for each in site.sets:
            put(f"site        {site.hook_point}: {len(each.latents)} latents, tokens {each.tokens}")
    if "weak" in defense.provenance:
        put(f"weak        {defense.provenance['weak']}")
    if out is not None:
        put(f"written     {shown(out)}")
    tag = "" if pretrained is None else f", pretrained={pretrained!r}"
    put(f"ready       RobustClassifier.from_pretrained({name!r}{tag})")
    if out is not None:
        say(f"Try it: defense classify PICTURE --labels ... --defense {shown(out)}")


# --- the registry ---


def _print_rows(rows: Sequence[HostRow]) -> None:
    """Print what the registry has; what nobody has checked is marked."""
    for host in rows:
        put(host.name + _marked(host.unverified), "bold")
        put(f"  weights   {host.sha256 or 'sha256 not known'}, quick_gelu {_known(host.quick_gelu)}")
        if host.defense is not None:
            put(f"  defense   {host.defense.repo}@{_known(host.defense.revision)}{_marked(host.defense.unverified)}")
        usable = host.candidates()
        for sae in host.saes:
            place = f"{sae.repo or 'repository not known'}/{_known(sae.file)}@{_known(sae.revision)}"
            put(f"  SAE       {place}{_marked(sae.unverified)}")
            use = "" if sae in usable else "; not used: too little is known of it"
            put(f"            {sae.format}, {_known(sae.hook_point)}, tokens {_known(sae.tokens)}{use}")
            put(f"            license {_known(sae.license)}. {sae.note or ''}".rstrip())
        if not usable and host.defense is None:
            put("  to train  no SAE can be used as it is: --pictures DIR --train trains one")
        if host.note:
            put(f"  note      {host.note}")


def _known(value: object) -> str:
    return "not known" if value is None else str(value)


def _marked(unverified: Sequence[str]) -> str:
    return f"  (unverified: {', '.join(unverified)})" if unverified else ""


def _verify(rows: Sequence[HostRow], hub: Hub) -> None:
    """Print what the hub says of every row; end with an error where it contradicts one."""
    from defense.store.registry import verify

    n_wrong = 0
    for finding in verify(rows, hub):
        n_wrong += finding.is_wrong
        put(
            f"{'WRONG' if finding.is_wrong else 'ok   '} {finding.row}: {finding.text}",
            "red" if finding.is_wrong else None,
        )
    say("The fingerprint of a CLIP is not on the hub: `defense protect NAME --pretrained TAG` prints it.")
    if n_wrong:
        say(f"{n_wrong} rows are wrong, or could not be looked up")
        raise typer.Exit(EXIT_ARTIFACT)
