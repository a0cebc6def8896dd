"""openai/sparse_autoencoder: one `.pt`, a state dict with "activation" and "activation_state_dict".

    z = layer_norm(x) where the activation is TopK, else x     unbiased std, eps on the way in only
    f = act((z - pre_bias) @ encoder.weight.T + latent_bias)
    x^ = undo the norm of (f @ decoder.weight.T + pre_bias)

`encoder.weight` [d_sae, d_model] and `decoder.weight` [d_model, d_sae] are transposed; a tied decoder,
`decoder.linear.weight`, is the encoder's weight and is not. `pre_bias` is b_dec, `latent_bias` b_enc. TopK takes the
largest h, then its `postact_fn`: ReLU or nothing. Nothing is folded.

Source: github.com/openai/sparse_autoencoder, sparse_autoencoder/model.py at 4965b94.
"""

from __future__ import annotations

from collections.abc import Mapping

from defense.core.config import SAEConfig

from .common import Given, Imported, Source, numpy_of, unsupported

_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_ACTS = {"ReLU": "relu", "TopK": "topk"}
_RELU_AT = {"ReLU": "after", "Identity": "none"}


def detect(source: Source) -> bool:
    """Whether a linear encoder and the two biases are there."""
    return {"encoder.weight", "pre_bias", "latent_bias"} <= source.keys


def read(source: Source, given: Given) -> Imported:
    """Return the SAE of a file of that repository's."""
    state = source.payload if isinstance(source.payload, Mapping) else {}
    decoder = "decoder.linear.weight" if "decoder.linear.weight" in state else "decoder.weight"
    tensors = source.tensors(
        state,
        ("encoder.weight", decoder, "pre_bias", "latent_bias"),
        ("activation", "activation_state_dict", *_STATISTICS),
    )
    stated = state.get("activation")
    if stated is not None and stated not in _ACTS:
        raise unsupported(source, f"an SAE with {stated}")
    act = given.value("act", _ACTS.get(str(stated)))
    if act not in _ACTS.values():
        raise unsupported(source, f"an SAE with {act}")
    settings = state.get("activation_state_dict") or {}
    relu_at = settings.get("postact_fn", "ReLU")
    if relu_at not in _RELU_AT:
        raise unsupported(source, f"a TopK SAE with {relu_at} after it")
    parameters = {
        "W_enc": tensors["encoder.weight"].T,
        "b_enc": tensors["latent_bias"],
        "W_dec": tensors[decoder] if decoder == "decoder.linear.weight" else tensors[decoder].T,
        "b_dec": tensors["pre_bias"],
    }
    d_model, d_sae = source.check_sizes(parameters["W_dec"])
    topk = act == "topk"
    return Imported(
        SAEConfig(
            d_model,
            d_sae,
            act,
            given.value("k", settings.get("k")) if topk else None,
            topk_relu=_RELU_AT[relu_at] if topk else "before",  # type: ignore[arg-type]
            norm="layer_norm" if topk else "none",
            tokens=given.value("tokens"),
        ),
        numpy_of(parameters),
    )
