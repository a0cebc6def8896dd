"""`defense train`: an SAE on a CLIP's residuals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from defense.cli.common import (
    EXIT_INPUTS,
    MAX_PIXELS,
    Device,
    MaxPixels,
    Model,
    Pretrained,
    app,
    check_pretrained,
    coding_lines,
    exit_codes,
    log_warnings,
    put,
    say,
    say_passed_over,
)
from defense.cli.progress import stages
from defense.core.config import Variant
from defense.core.latents import Scope
from defense.hosts.shipped import DEFAULT

if TYPE_CHECKING:
    from defense.data.sources import Pictures

_N_HELD_OUT = 1000
"""Pictures that are kept from training, to measure on."""


# Longer than functions here are: the options of a command are its parameters, one line each.
@app.command()
def train(
    pictures: Annotated[
        list[Path], typer.Argument(help="Folders with pictures, .tar (WebDataset) or .parquet files; or such files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the SAE.")],
    block: Annotated[int, typer.Option(min=0, help="Block after which residuals are taken, counted from 0.")],
    model: Model = DEFAULT,
    pretrained: Pretrained = None,
    variant: Annotated[Variant, typer.Option(help="Which latents count.")] = "batchtopk",
    d_sae: Annotated[int | None, typer.Option(help="Latents; by default 16 times the width of the residual.")] = None,
    k: Annotated[int, typer.Option(help="Latents kept per token. Not for relu.")] = 32,
    l1: Annotated[float, typer.Option(help="Weight of the penalty. For relu.")] = 0.01,
    tokens: Annotated[Scope, typer.Option(help="Which tokens.")] = "all",
    n_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens to train on; pictures come again as needed.")
    ] = 10_000_000,
    batch: Annotated[int, typer.Option(min=1, help="Tokens per step, over all processes.")] = 4096,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate; by default it follows from --d-sae.")] = None,
    buffer: Annotated[int, typer.Option(min=1, help="Tokens in the shuffle buffer, over all processes.")] = 2**17,
    text_rate: Annotated[float, typer.Option(min=0, max=1, help="Share of pictures to write a word on.")] = 0.0,
    shards: Annotated[Path | None, typer.Option(help="Keep the residuals in this folder and read them there.")] = None,
    labels_file: Annotated[
        Path | None, typer.Option(help="Classes, one a line: measure what the SAE costs in zero-shot accuracy.")
    ] = None,
    license: Annotated[
        str, typer.Option("--license", "--licence", help="License of the SAE; SPDX identifier.")
    ] = "not stated",
    seed: Annotated[int, typer.Option(min=0, help="Seed of weights, order and writing.")] = 0,
    max_pixels: MaxPixels = MAX_PIXELS,
    device: Device = "auto",
) -> None:
    """Train an SAE on a CLIP's residuals. Run again after an interruption, it goes on where it was saved last.

    On several GPUs or machines: torchrun --nproc-per-node 8 --no-python defense train ...
    """
    log_warnings()
    with exit_codes("run the same command again to go on from the last step that was saved"):
        from defense.data.images import Limits
        from defense.data.sources import open_pictures
        from defense.hosts.clip import load_clip, resolve_device
        from defense.store import checkpoint
        from defense.train import parallel
        from defense.train.residuals import Stream
        from defense.train.runs import train_checkpoint
        from defense.train.trainer import TrainConfig

        check_pretrained(model, pretrained)
        checkpoint.check_target(out)
        source = open_pictures(pictures, limits=Limits(max_pixels=max_pixels))
        names = _class_names(labels_file, source)
        state = out.with_name(f"{out.name}.state.safetensors")
        place = parallel.local_device(resolve_device(device))
        with parallel.joined(place) as world:
            clip = load_clip(model, pretrained, device=place)
            stream = Stream(
                clip, f"blocks.{block}.hook_resid_post", source, tokens=tokens, buffer=buffer, text_rate=text_rate,
                seed=seed, world=world,
            )  # fmt: skip
            config = TrainConfig(
                d_sae=16 * stream.d_model if d_sae is None else d_sae, k=None if variant == "relu" else k,
                steps=-(-n_tokens // batch),
                batch=batch, lr=lr, seed=seed, variant=variant, l1=l1,
            )  # fmt: skip
            with stages(is_shown=world.is_first) as progress:
                progress.start("training", config.steps)
                trained = train_checkpoint(
                    stream, config, clip.id_as(model, pretrained), names=names, n_held_out=_N_HELD_OUT, shards=shards,
                    state=state, license=license,
                    report=lambda now: progress.done(now.step, f"loss {now.loss:.3f}, {now.n_dead} dead"),
                )  # fmt: skip
            if world.is_first:
                checkpoint.save(trained, out)
                state.unlink(missing_ok=True)  # only now: it is all there is until the SAE is on disk
                _print_training(trained.provenance)
                say_passed_over(source)
        if stream.unreadable and world.is_first:  # torchrun ends the others as soon as one gives an error code
            say(f"{len(stream.unreadable)} pictures could not be read and were left out")
            raise typer.Exit(EXIT_INPUTS)


def _class_names(labels_file: Path | None, source: Pictures) -> Sequence[str]:
    """Return the classes to measure zero-shot accuracy with, after holding the pictures' labels against them."""
    if labels_file is None:
        return ()
    from defense.data.labels import read_labels

    names = read_labels(labels_file)
    for picture in source.held_out(_N_HELD_OUT):
        source.class_of(picture, names)
    return names


def _print_training(provenance: Mapping[str, Any]) -> None:
    quality, zero_shot = provenance["quality"], provenance["zero_shot"]
    put(f"explained variance  {quality['explained_variance']:.4f}")
    put(f"latents per token   {quality['l0']:.1f}")
    put(f"latents that fire   {100 * quality['alive']:.1f} %")
    for line in coding_lines(quality["by_kind"]):
        put(line)
    if zero_shot is not None:
        put(
            f"zero-shot           {100 * zero_shot['spliced']:.1f} % with the reconstruction, "
            f"{100 * zero_shot['plain']:.1f} % without, n = {zero_shot['n']}"
        )
