"""clipscope: `<layer>_resid/<n>.pt`.

What was saved is {"k", "n_features", "d_in", "model_state_dict"}, or a bare state dict.

    f = topk((x - pre_b) @ enc),  x^ = f @ dec + pre_b

`enc` [d_model, d_sae], `dec` [d_sae, d_model] and `pre_b` are our W_enc, W_dec and b_dec; b_enc is zero. There is no
ReLU: a negative h among the k largest counts. A class without k has the same tensors and a plain ReLU, so that a file
without k needs `act` or `k`. The folder's number is a Hugging Face encoder layer, our block.

Source: github.com/Lewington-pitsos/clipscope, clipscope/sae.py and hookedvit.py at 4b8c199.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from defense.core.config import SAEConfig

from .common import Given, Imported, Source, numpy_of, unsupported

_FOLDER = re.compile(r"(\d+)_resid")


def detect(source: Source) -> bool:
    """Whether pre_b, enc and dec are there."""
    state = source.payload.get("model_state_dict", source.payload) if isinstance(source.payload, Mapping) else {}
    return {"pre_b", "enc", "dec"} <= set(state)


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of clipscope's."""
    payload = source.payload if isinstance(source.payload, Mapping) else {}
    state = payload.get("model_state_dict", payload)
    if "router" in state:
        raise unsupported(source, "a switch SAE, which has several experts")
    tensors = source.tensors(state, ("pre_b", "enc", "dec"), ("k", "n_features", "d_in"))
    d_model, d_sae = source.check_sizes(tensors["dec"], payload.get("d_in"), payload.get("n_features"))
    parameters = {
        "W_enc": tensors["enc"],
        "b_enc": torch.zeros(d_sae),
        "W_dec": tensors["dec"],
        "b_dec": tensors["pre_b"],
    }
    k = given.optional("k", payload.get("k"))
    act = given.value("act", "topk" if k is not None else None)
    if act not in ("relu", "topk"):
        raise unsupported(source, f"an SAE with {act}")
    folder = _FOLDER.fullmatch(source.path.absolute().parent.name)
    return Imported(
        SAEConfig(
            d_model,
            d_sae,
            act,
            given.value("k", k) if act == "topk" else None,
            topk_relu="none" if act == "topk" else "before",
            tokens=given.value("tokens"),
        ),
        numpy_of(parameters),
        f"blocks.{folder.group(1)}.hook_resid_post" if folder else None,
    )
