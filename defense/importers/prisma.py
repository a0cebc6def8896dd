"""ViT-Prisma: `weights.pt` or `n_images_*.pt`, with `config.json` beside it.

What was saved is {"cfg": a pickled configuration, "state_dict"}, {"config", "autoencoder": {"state_dict"}} in the
oldest files, or a bare state dict. A configuration that the caller names counts first, then the one in the file, then
`config.json`.

    z = layer_norm(x)                        normalize_activations; unbiased std, eps on the way in only
    f = act((z - b_dec) @ W_enc + b_enc)     always minus b_dec, which lives in normalized space
    x^ = undo the norm of (f @ W_dec + b_dec)

Tensors have our orientation; nothing is folded. "topk" takes the largest h first and then their ReLU. In a gated SAE
`b_gate` is our b_enc, and its own `b_enc`, which its arithmetic does not use, is left out.

`quick_gelu` is False for every host, OpenAI's too: Prisma runs them all with the exact GELU.

Source: github.com/Prisma-Multimodal/ViT-Prisma, src/vit_prisma/sae/sae.py and config.py at aa5ff6a.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from defense.core.config import SAEConfig

from .common import Given, Imported, Source, fields_of, numpy_of, unsupported

_NORMS = {"none": "none", "layer_norm": "layer_norm", "constant_norm_rescale": "constant_norm_rescale"}


def detect(source: Source) -> bool:
    """Whether a configuration of Prisma's is in the file or beside it."""
    config, state = _parts(source)
    return source.path.suffix != ".safetensors" and "hook_point_layer" in config and "W_dec" in state


def _parts(source: Source) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return the configuration, {} where there is none, and the tensors."""
    payload = source.payload if isinstance(source.payload, Mapping) else {}
    state = payload.get("state_dict", payload)
    if isinstance(payload.get("autoencoder"), Mapping):
        state = payload["autoencoder"].get("state_dict", {})
    named = source.companion()
    return named or fields_of(payload.get("cfg", payload.get("config"))) or source.companion("config.json") or {}, state


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of Prisma's."""
    config, state = _parts(source)
    if config.get("is_transcoder") or {"b_dec_out", "W_skip"} & set(state):
        raise unsupported(source, "a transcoder")
    gated = config.get("architecture", "standard") == "gated"
    if config.get("architecture", "standard") not in ("standard", "gated"):
        raise unsupported(source, f"an SAE of architecture {config['architecture']!r}")
    bias = "b_gate" if gated else "b_enc"
    extra = ("r_mag", "b_mag") if gated else ()
    tensors = source.tensors(state, ("W_enc", bias, "W_dec", "b_dec", *extra), ("b_enc",) if gated else ())
    tensors["b_enc"] = tensors.pop(bias)
    d_model, d_sae = source.check_sizes(tensors["W_dec"], config.get("d_in"), _stated_d_sae(config))
    act, k = _activation(source, given, config)
    if gated and act != "relu":
        raise unsupported(source, f"a gated SAE with {act}")
    return Imported(
        SAEConfig(
            d_model,
            d_sae,
            "gated" if gated else act,
            k,
            topk_relu="after" if act == "topk" else "before",
            norm=given.value("norm", _norm(source, config)),
            subtract_b_dec=True,
            tokens=given.value("tokens", _tokens(config)),
        ),
        numpy_of(tensors),
        source.hook_point_of(_hook_point(config)),
        config.get("model_name"),
        False if "model_name" in config else None,
    )


def _stated_d_sae(config: Mapping[str, Any]) -> int | None:
    """Return d_sae as the file states it; current files state it as d_in and a factor. None where it does not."""
    stated: int | None = config.get("d_sae")
    if stated is not None:
        return stated
    d_in, factor = config.get("d_in"), config.get("expansion_factor")
    return d_in * factor if isinstance(d_in, int) and isinstance(factor, int) else None


def _activation(source: Source, given: Given, config: Mapping[str, Any]) -> tuple[Any, int | None]:
    act = given.value("act", config.get("activation_fn_str"))
    kwargs = config.get("activation_fn_kwargs") or {}
    if act == "relu":
        return "relu", None
    if act != "topk":
        raise unsupported(source, f"an SAE with {act}")
    if kwargs.get("postact_fn", "ReLU") not in ("ReLU", "relu") and "ReLU" not in repr(kwargs["postact_fn"]):
        raise unsupported(source, f"a topk SAE with {kwargs['postact_fn']!r} after it")
    return "topk", given.value("k", kwargs.get("k"))


def _norm(source: Source, config: Mapping[str, Any]) -> str | None:
    if "normalize_activations" not in config:
        return None
    norm = config["normalize_activations"] or "none"
    if norm not in _NORMS:
        raise unsupported(source, f"an SAE with normalize_activations={norm!r}")
    return _NORMS[norm]


def _tokens(config: Mapping[str, Any]) -> str | None:
    if config.get("cls_token_only"):
        return "cls"
    if config.get("use_patches_only"):
        return "patch"
    return "all" if "cls_token_only" in config else None


def _hook_point(config: Mapping[str, Any]) -> str | None:
    hook_point: str | None = config.get("hook_point")
    if hook_point:
        return hook_point
    if "hook_point_layer" in config and "layer_subtype" in config:
        return f"blocks.{config['hook_point_layer']}.{config['layer_subtype']}"
    return None
