"""PatchSAE, HugoFry's and ConceptScope's: one `.pt` file.

What was saved is {"cfg" or "config": a pickled or plain configuration, "state_dict"}.

    f = relu((x - b_dec) @ W_enc + b_enc)
    x^ = f @ W_dec + b_dec

Tensors have our orientation; nothing is folded. `block_layer` counts Hugging Face encoder layers and is usually -2: it
is resolved for the CLIPs of OpenAI and LAION by the name of the model. OpenAI's ran with QuickGELU.

Source: github.com/dynamical-inference/patchsae, src/sae_training/sparse_autoencoder.py at 763eceb; its forks at
f828b49 (HugoFry) and 2d77365 (ConceptScope).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from defense.core.config import SAEConfig
from defense.errors import HookPointError

from .common import Given, Imported, Source, fields_of, numpy_of, unsupported

_N_LAYERS = {"base": 12, "large": 24}


def detect(source: Source) -> bool:
    """Whether the configuration of a vision SAE is beside the tensors in the file."""
    return "block_layer" in _config(source) and "state_dict" in source.keys


def _config(source: Source) -> Mapping[str, Any]:
    payload = source.payload if isinstance(source.payload, Mapping) else {}
    return fields_of(payload.get("cfg", payload.get("config")))


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of one of the three."""
    config = _config(source)
    state = source.payload.get("state_dict", source.payload) if isinstance(source.payload, Mapping) else {}
    if config.get("gated_sae") or "r_mag" in state:
        raise unsupported(source, "a gated SAE of a project that has no arithmetic for it")
    tensors = source.tensors(state, ("W_enc", "b_enc", "W_dec", "b_dec"))
    d_in, factor = config.get("d_in"), config.get("expansion_factor")
    stated = d_in * factor if isinstance(d_in, int) and isinstance(factor, int) else None
    d_model, d_sae = source.check_sizes(tensors["W_dec"], d_in, stated)
    tokens = {True: "cls", False: "all", None: None}[config.get("class_token")]
    model = config.get("model_name")
    return Imported(
        SAEConfig(d_model, d_sae, "relu", tokens=given.value("tokens", tokens)),
        numpy_of(tensors),
        _hook_point(source, config),
        model,
        True if str(model).startswith("openai/") else None,
    )


def _hook_point(source: Source, config: Mapping[str, Any]) -> str | None:
    if config.get("module_name", "resid") != "resid":
        raise HookPointError(
            f"{source} was trained at module {config['module_name']!r}; a defense edits the residual after a block"
        )
    layer = config.get("block_layer")
    if layer is None:
        return None
    if layer < 0:
        size = re.search(r"vit-(base|large)", str(config.get("model_name")).lower())
        if size is None:
            return None
        layer += _N_LAYERS[size.group(1)]
    return f"blocks.{layer}.hook_resid_post"
