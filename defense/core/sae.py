"""The sparse autoencoder: its parameters, its input normalization and its activation rule.

Nothing here suppresses anything. `suppress.py` takes from an SAE the columns and rows it needs; `fit.py` and
explanations use the full `encode`. Shapes are SAELens': W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae,
d_model], b_dec [d_model].

    z  = normalize(resid)                     norm: none, layer_norm or constant_norm_rescale
    h  = (z - b_dec) @ W_enc + b_enc          the subtraction only where `subtract_b_dec`
    f  = act(h)                               relu, jumprelu, topk, batchtopk (as a threshold) or gated
    x^ = undo the norm of (f @ W_dec + b_dec)
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from defense.errors import ShapeError

from .config import Norm, SAEConfig, check_parameters

_LAYER_NORM_EPS = 1e-5


class Normalized(NamedTuple):
    """A residual as the encoder sees it, and the way back: resid = scale * z + shift."""

    z: Tensor
    """[..., d_model]"""
    scale: Tensor | None
    """s of the formula, [..., 1]; None where it is 1."""
    shift: Tensor | None
    """[..., 1]; None where it is 0."""


def normalize(resid: Tensor, norm: Norm) -> Normalized:
    """Return the encoder's input for a residual [..., d_model], in the residual's dtype.

    layer_norm follows Prisma: unbiased standard deviation, eps on the way in and none on the way out, so that
    scale * z + shift differs from resid by about 1e-5 / std.
    """
    if norm == "none":
        return Normalized(resid, None, None)
    if norm == "layer_norm":
        mean = resid.mean(-1, keepdim=True)
        std = resid.std(-1, keepdim=True)
        return Normalized((resid - mean) / (std + _LAYER_NORM_EPS), std, mean)
    scale = resid.norm(dim=-1, keepdim=True) / resid.shape[-1] ** 0.5
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # a zero token stays zero
    return Normalized(resid / scale, scale, None)


class SparseAutoencoder(nn.Module):
    """An SAE with frozen parameters.

    Args:
        config: What the numbers mean.
        parameters: The tensors of `config.parameter_shapes`, as numpy arrays of any float type; held in float32.

    Attributes:
        folded_bias: b such that h = z @ W_enc + b, [d_sae].

    Raises:
        CheckpointError, ShapeError, NonFiniteError: See `check_parameters`.
    """

    folded_bias: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(self, config: SAEConfig, parameters: dict[str, np.ndarray]) -> None:
        super().__init__()
        check_parameters(config, parameters)
        self.config = config
        for name, array in parameters.items():
            # In C order: a transposed checkpoint would be copied at every call of the kernels.
            self.register_buffer(name, torch.from_numpy(np.array(array, dtype=np.float32, order="C")))
        bias = self.b_enc - self.b_dec @ self.W_enc if config.subtract_b_dec else self.b_enc
        self.register_buffer("folded_bias", bias, persistent=False)

    def parameters_numpy(self, dtype: type[np.floating] = np.float32) -> dict[str, np.ndarray]:
        """Return the tensors as numpy arrays of `dtype`."""
        return {name: getattr(self, name).detach().cpu().numpy().astype(dtype) for name in self.config.parameter_shapes}

    def activate(self, pre_acts: Tensor, magnitudes: Tensor | None = None) -> Tensor:
        """Apply the activation rule to pre_acts [..., d_sae]; `magnitudes` only for "gated"."""
        config = self.config
        if config.act == "relu":
            return pre_acts.relu()
        if config.act in ("jumprelu", "batchtopk"):
            return pre_acts.relu() * (pre_acts > self.threshold)
        if config.act == "gated":
            assert magnitudes is not None
            return magnitudes.relu() * (pre_acts > 0)
        assert config.k is not None
        values, indices = (pre_acts.relu() if config.topk_relu == "before" else pre_acts).topk(config.k, dim=-1)
        kept = values if config.topk_relu == "none" else values.relu()
        return torch.zeros_like(pre_acts).scatter(-1, indices, kept)

    def encode(self, resid: Tensor) -> Tensor:
        """Return acts [..., d_sae] of a residual [..., d_model]; mostly zeros.

        Which of several tied latents a "topk" rule keeps is unspecified.

        Raises:
            ShapeError: `resid` is not d_model wide.
        """
        if resid.shape[-1] != self.config.d_model:
            raise ShapeError(f"this SAE expects d_model={self.config.d_model}; the residual is {resid.shape[-1]} wide")
        z = normalize(resid.to(self.W_enc.dtype), self.config.norm).z
        magnitudes = None
        if self.config.act == "gated":
            centered = z - self.b_dec if self.config.subtract_b_dec else z
            magnitudes = centered @ (self.W_enc * self.r_mag.exp()) + self.b_mag
        return self.activate(z @ self.W_enc + self.folded_bias, magnitudes)

    def decode(self, acts: Tensor, resid: Tensor) -> Tensor:
        """Return the reconstruction [..., d_model] of acts; `resid` supplies the scale of the norm."""
        _, scale, shift = normalize(resid.to(self.W_dec.dtype), self.config.norm)
        x_hat = acts @ self.W_dec + self.b_dec
        x_hat = x_hat if scale is None else x_hat * scale
        return x_hat if shift is None else x_hat + shift
