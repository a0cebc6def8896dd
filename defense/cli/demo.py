"""`defense demo`: a page in the browser."""

from __future__ import annotations

import logging
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from defense.cli.common import (
    DefenseSource,
    Device,
    LabelsFile,
    OtherModel,
    Pretrained,
    app,
    check_pretrained,
    chosen_labels,
    exit_codes,
    log_warnings,
    say,
    shipped_model,
)
from defense.errors import MissingDependencyError
from defense.hosts.shipped import DEFAULT

if TYPE_CHECKING:
    from defense.demo.engine import Engine


@app.command()
def demo(
    defense: DefenseSource = DEFAULT,
    model: OtherModel = None,
    pretrained: Pretrained = None,
    bundle: Annotated[Path | None, typer.Option(help="An exported bundle in place of all this; without torch.")] = None,
    labels: Annotated[str | None, typer.Option(help='Labels to begin with, e.g. "dog,cat".')] = None,
    labels_file: LabelsFile = None,
    template: Annotated[str | None, typer.Option(help='A prompt with {}; "a photo of a {}." by default.')] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="By default the first free from 7860 on.")] = None,
    root_path: Annotated[str, typer.Option(help="Where a proxy shows it: /clip, or https://example.org/clip.")] = "",
    device: Device = "auto",
) -> None:
    """Open the demo: write a word on a picture, and see what falls, what stands, and what was removed."""
    log_warnings()
    logging.getLogger("defense").propagate = False  # notes on visitors' labels are for them alone
    with exit_codes():
        if find_spec("gradio") is None:
            raise MissingDependencyError("gradio", "demo")
        from defense.demo import guard
        from defense.demo.app import serving
        from defense.demo.loading import bundled, defended

        engine: Engine
        if bundle is not None:
            if model is not None or pretrained is not None or defense != DEFAULT:
                raise typer.BadParameter("a bundle holds its model and defense; give --bundle without these")
            given = None if labels is None and labels_file is None else chosen_labels(labels, labels_file, None)
            engine = bundled(bundle, given, template)
        else:
            check_pretrained(model, pretrained, defense)
            own = shipped_model(defense.partition(":")[0], model)
            is_given = labels is not None or labels_file is not None or own is None
            given = chosen_labels(labels, labels_file, own, defense) if is_given else None
            engine = defended(defense, given, template, model=model, pretrained=pretrained, device=device)
        if guard.is_open(host):
            say(
                f"warning: --host {host} opens the demo to everybody who can reach this machine, without a login and "
                "without TLS; a proxy with both belongs in front of it (see --root-path)"
            )
        with serving(engine, host=host, port=port, root_path=root_path) as address:
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the folder of uploads is deleted
            say(f"{engine.title}: {address}   Ctrl-C ends it.")
            while True:
                time.sleep(3600)
