"""Matryoshka SAE for CLIP: `{d_sae}_{d_model}_{activation}[_{k}][_{weighting}]_{tied}_{normalize}_{soft cap}_....pth`.

What was saved is {"model": state dict, "mean_center", "scaling_factor", "target_norm"}.

    z = (x - mean_center) * scaling_factor
    f = act((z - pre_bias) @ encoder + latent_bias),  x^ = (f @ decoder + pre_bias) / scaling_factor + mean_center

`encoder` [d_model, d_sae] and `decoder` [d_sae, d_model] have our orientation; a tied decoder is `encoder.T`. Mean
and scale are folded into the weights. The activation, k, tied, normalize and the soft cap are in the file name alone: a
file that was renamed is refused. ReLU, TopK (no ReLU) and TopKReLU (top-k, then ReLU) are read; a soft cap above 0 and
normalize=True are not.

x is the pooled embedding of a picture or a text, so the SAE can be read and examined, but not put into a block.

Source: github.com/WolodjaZ/MSAE, sae.py at c0bf439.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from defense.core.config import SAEConfig
from defense.errors import CheckpointError
from defense.store.checkpoint import POOLED

from .common import Given, Imported, Source, fold, numpy_of, unsupported

_NAME = re.compile(
    r"(?P<d_sae>\d+)_(?P<d_model>\d+)_(?P<act>[A-Za-z0-9]+)(?:_(?P<k>\d+))?(?:_(?:UW|RW))?"
    r"_(?P<tied>True|False)_(?P<normalize>True|False)_(?P<cap>[\d.]+)(?:_.*)?\.pth?"
)
_ACTS = {"ReLU": ("relu", "before"), "TopK": ("topk", "none"), "TopKReLU": ("topk", "after")}


def detect(source: Source) -> bool:
    """Whether a model is there with the mean and scale of its inputs."""
    return {"model", "mean_center", "scaling_factor"} <= source.keys


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of MSAE's."""
    name = _NAME.fullmatch(source.path.name)
    if name is None:
        raise CheckpointError(
            f"{source} does not have the name it was published under, {{d_sae}}_{{d_model}}_{{activation}}_..., which "
            "is where its activation is stated; give it that name again"
        )
    if name["normalize"] == "True" or float(name["cap"]) > 0:
        raise unsupported(source, f"an SAE with normalize={name['normalize']} and the soft cap {name['cap']}")
    if name["act"] not in _ACTS:
        raise unsupported(source, f"an SAE with {name['act']}")
    act, topk_relu = _ACTS[name["act"]]
    tied = name["tied"] == "True"
    payload = source.payload if isinstance(source.payload, Mapping) else {}
    wanted = ("encoder", "latent_bias", "pre_bias", *(() if tied else ("decoder",)))
    tensors = source.tensors(payload.get("model"), wanted, ("latents_activation_frequency",))
    parameters = {
        "W_enc": tensors["encoder"],
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors["encoder"].T if tied else tensors["decoder"],
        "b_dec": tensors["pre_bias"],
    }
    d_model, d_sae = source.check_sizes(parameters["W_dec"], int(name["d_model"]), int(name["d_sae"]))
    mean = source.check_vector("mean_center", payload["mean_center"], d_model)
    parameters = fold(parameters, subtract_b_dec=True, mean=mean, scale=float(payload["scaling_factor"]))
    k = int(name["k"]) if act == "topk" and name["k"] else None
    return Imported(
        SAEConfig(
            d_model,
            d_sae,
            act,  # type: ignore[arg-type]
            given.value("k", k) if act == "topk" else None,
            topk_relu=topk_relu,  # type: ignore[arg-type]
            tokens=given.value("tokens", "cls"),
        ),
        numpy_of(parameters),
        POOLED,
    )
