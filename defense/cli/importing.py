"""`defense import`: published SAE checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from defense.cli.common import app, check_there, exit_codes, put, say, shown
from defense.errors import cannot_import

if TYPE_CHECKING:
    from defense.store.checkpoint import Checkpoint


@app.command("import")
def import_(
    file: Annotated[
        str,
        typer.Argument(help='The weights, the folder that they are alone in, or "hf://org/repo[/file][@revision]".'),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write the SAE to.")],
    format_: Annotated[
        str,
        typer.Option(
            "--format",
            help="auto, prisma, saelens, sparsify, dictionary_learning, patchsae, sae-for-vlm, overcomplete, saev, "
            "clipscope, msae or openai.",
        ),
    ] = "auto",
    config: Annotated[Path | None, typer.Option(help="Configuration of the SAE, where that has another place.")] = None,
    hook_point: Annotated[str | None, typer.Option(help='"blocks.{L}.hook_resid_post", or "pooled".')] = None,
    tokens: Annotated[str | None, typer.Option(help='What the SAE was trained on: "cls", "patch" or "all".')] = None,
    act: Annotated[str | None, typer.Option(help='"relu", "jumprelu", "topk", "batchtopk" or "gated".')] = None,
    k: Annotated[int | None, typer.Option(help="Latents kept per token.")] = None,
    threshold: Annotated[float | None, typer.Option(help="Above which activation a latent counts.")] = None,
    norm: Annotated[str | None, typer.Option(help='"none", "layer_norm" or "constant_norm_rescale".')] = None,
    subtract_b_dec: Annotated[bool | None, typer.Option(help="Whether b_dec is subtracted before the encoder.")] = None,
    scaling_factor: Annotated[float | None, typer.Option(help="Residuals are multiplied by it (SAELens).")] = None,
    act_mean: Annotated[Path | None, typer.Option(help="Mean residual, .npy or .safetensors (saev).")] = None,
    scalar: Annotated[float | None, typer.Option(help="Centered residuals are divided by it (saev).")] = None,
    host_model: Annotated[str | None, typer.Option(help="The CLIP it was trained on.")] = None,
    quick_gelu: Annotated[bool | None, typer.Option(help="Whether that CLIP ran with QuickGELU.")] = None,
    license: Annotated[str, typer.Option("--license", "--licence", help="License of the weights.")] = "not stated",
) -> None:
    """Convert a published SAE checkpoint once, to safetensors and JSON.

    The options state what a file does not say. None is guessed: where one is missing, the import is refused by name.
    """
    with exit_codes():
        try:
            from defense import importers
            from defense.store import checkpoint
            from defense.store.hub import Hub, hub_source
        except (ImportError, OSError) as error:
            raise cannot_import("torch", error) from error
        checkpoint.check_target(out)
        check_there(None if hub_source(file) else Path(file), config, act_mean)
        stated = {
            "hook_point": hook_point, "tokens": tokens, "act": act, "k": k, "threshold": threshold, "norm": norm,
            "subtract_b_dec": subtract_b_dec, "scaling_factor": scaling_factor, "scalar": scalar,
            "act_mean": None if act_mean is None else importers.read_vector(act_mean),
            "host_model": host_model, "quick_gelu": quick_gelu,
        }  # fmt: skip
        converted = importers.read(file, format_, config=config, license=license, hub=Hub(report=say), **stated)
        checkpoint.save(converted, out)
        _print_import(converted, out)


def _print_import(converted: Checkpoint, out: Path) -> None:
    put(f"written     {shown(out)}")
    put(f"format      {converted.provenance['format']}")
    for key, value in converted.sae.config.to_dict().items():
        put(f"{key:11} {value}")
    put(f"hook point  {converted.hook_point}")
    put(f"host        {converted.host_model or 'not stated'}")
    put("golden      residuals, acts and reconstructions stored, and reproduced from the files")
