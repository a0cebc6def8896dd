"""EleutherAI's sparsify: `<hook point>/sae.safetensors` with `cfg.json`.

    f = topk(relu((x - b_dec) @ encoder.weight.T + encoder.bias))
    x^ = f @ W_dec + b_dec

`encoder.weight` is [d_sae, d_model] and is transposed; `W_dec` is [d_sae, d_model] already. Nothing is folded. The hook
point is the name of the folder, where that is the path of a layer ("layers.11"). `num_latents` is 0 on disk where
d_sae is `d_in * expansion_factor`.

Source: github.com/EleutherAI/sparsify, sparsify/sparse_coder.py, 1.3.3.
"""

from __future__ import annotations

from defense.core.config import SAEConfig
from defense.errors import CheckpointError, HookPointError

from .common import Given, Imported, Source, numpy_of, unsupported


def detect(source: Source) -> bool:
    """Whether a linear encoder and W_dec are in one safetensors file."""
    return source.path.suffix == ".safetensors" and {"encoder.weight", "W_dec"} <= source.keys


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a sparse coder."""
    config = source.companion("cfg.json")
    if config is None:
        raise CheckpointError(f"{source} has no cfg.json beside it; put it there, or pass --config")
    if config.get("transcode"):
        raise unsupported(source, "a transcoder")
    if config.get("skip_connection") or "W_skip" in source.keys:
        raise unsupported(source, "an SAE with a skip connection (W_skip)")
    if (act := config.get("activation", "topk")) != "topk":
        raise unsupported(source, f"an SAE with {act}")
    if config.get("signed"):
        raise unsupported(source, "a signed SAE, whose latents are ranked by size")
    tensors = source.tensors(source.payload, ("encoder.weight", "encoder.bias", "W_dec", "b_dec"))
    d_in, factor = config.get("d_in"), config.get("expansion_factor")
    stated = config.get("num_latents") or (d_in * factor if d_in is not None and factor is not None else None)
    d_model, d_sae = source.check_sizes(tensors["W_dec"], d_in, stated)
    parameters = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["encoder.bias"],
        "W_dec": tensors["W_dec"],
        "b_dec": tensors["b_dec"],
    }
    return Imported(
        SAEConfig(d_model, d_sae, "topk", given.value("k", config.get("k")), tokens=given.value("tokens")),
        numpy_of(parameters),
        _hook_point(source),
    )


def _hook_point(source: Source) -> str | None:
    try:
        return source.hook_point_of(source.path.absolute().parent.name)
    except HookPointError:  # a folder may have any name
        return None
