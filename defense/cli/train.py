"""`defense train`: an SAE on a CLIP's residuals."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import Progress

from defense.cli.common import EXIT_INPUTS, app, exit_codes, put, say, stderr

if TYPE_CHECKING:
    pass


class Variant(StrEnum):
    """Which latents of an SAE count (train.py)."""

    topk = "topk"
    batchtopk = "batchtopk"
    matryoshka = "matryoshka"
    relu = "relu"


class Tokens(StrEnum):
    """Which tokens of a picture an SAE is trained on."""

    cls = "cls"
    patch = "patch"
    all = "all"


@app.command()
def train(
    pictures: Annotated[
        list[Path], typer.Argument(help="Folders with pictures, .tar (WebDataset) or .parquet files; or such files.")
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for the SAE.")],
    block: Annotated[int, typer.Option(min=0, help="Block after which residuals are taken, counted from 0.")],
    model: Annotated[str, typer.Option(help="open_clip model.")] = "embedded",
    pretrained: Annotated[str | None, typer.Option(help="open_clip's tag of its weights.")] = None,
    variant: Annotated[Variant, typer.Option(help="Which latents count.")] = Variant.batchtopk,
    d_sae: Annotated[int | None, typer.Option(help="Latents; by default 16 times the width of the residual.")] = None,
    k: Annotated[int, typer.Option(help="Latents kept per token. Not for relu.")] = 32,
    l1: Annotated[float, typer.Option(help="Weight of the penalty. For relu.")] = 0.01,
    tokens: Annotated[Tokens, typer.Option(help="Which tokens.")] = Tokens.all,
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
    license: Annotated[str, typer.Option("--license", "--licence", help="Of the SAE; SPDX identifier.")] = "not stated",
    seed: Annotated[int, typer.Option(min=0, help="Of weights, order and writing.")] = 0,
    device: Annotated[str, typer.Option(help='"auto", "cpu", "cuda".')] = "auto",
) -> None:
    """Train an SAE on a CLIP's residuals. Run again after an interruption, it goes on where it was saved last.

    On several GPUs or machines: torchrun --nproc-per-node 8 --no-python defense train ...
    """
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with exit_codes():
        from defense.data.labels import read_labels
        from defense.data.sources import open_pictures
        from defense.hosts.clip import load_clip, resolve_device
        from defense.store import checkpoint
        from defense.train import parallel
        from defense.train.residuals import Stream
        from defense.train.runs import train_checkpoint
        from defense.train.trainer import TrainConfig

        checkpoint.check_target(out)
        names = () if labels_file is None else read_labels(labels_file)
        source = open_pictures(pictures)
        place = parallel.local_device(resolve_device(device))
        with parallel.joined(place) as world:
            clip = load_clip(model, pretrained, device=place)
            stream = Stream(
                clip, f"blocks.{block}.hook_resid_post", source, tokens=tokens.value,
                buffer=buffer, text_rate=text_rate, seed=seed, world=world,
            )  # fmt: skip
            config = TrainConfig(
                d_sae=d_sae or 16 * stream.d_model,
                k=None if variant is Variant.relu else k,
                steps=-(-n_tokens // batch),
                batch=batch,
                lr=lr,
                seed=seed,
                variant=variant.value,
                l1=l1,
            )
            with Progress(
                console=stderr, disable=not (world.is_first and stderr.is_terminal), transient=True
            ) as progress:
                task = progress.add_task("training", total=config.steps)
                trained = train_checkpoint(
                    stream, config, clip.id_as(model, pretrained), names=names, shards=shards,
                    state=out.with_name(f"{out.name}.state.safetensors"), license=license,
                    report=lambda now: progress.update(
                        task, completed=now.step, description=f"loss {now.loss:.3f}, {now.n_dead} dead"
                    ),
                )  # fmt: skip
            if world.is_first:
                checkpoint.save(trained, out)
                _print_training(trained.provenance)
        if stream.unreadable and world.is_first:  # torchrun ends the others as soon as one gives an error code
            say(f"{len(stream.unreadable)} pictures could not be read and were left out")
            raise typer.Exit(EXIT_INPUTS)


def _print_training(provenance: Mapping[str, Any]) -> None:
    quality, zero_shot = provenance["quality"], provenance["zero_shot"]
    put(f"explained variance  {quality['explained_variance']:.4f}")
    put(f"latents per token   {quality['l0']:.1f}")
    put(f"latents that fire   {100 * quality['alive']:.1f} %")
    if zero_shot is not None:
        put(
            f"zero-shot           {100 * zero_shot['spliced']:.1f} % with the reconstruction, "
            f"{100 * zero_shot['plain']:.1f} % without, n = {zero_shot['n']}"
        )
