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

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from defense.errors import ConfigError, ShapeError

from .config import Norm, SAEConfig, check_latents, check_parameters, fingerprint

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
        copy: Whether to hold copies; else float32 arrays are shared, and must not be changed as long as this lives.
        held: The latents that the tensors are of, in rising order, where they are not of all: see `part_of`.

    Attributes:
        folded_bias: b such that h = z @ W_enc + b, [d_sae].
        folded_magnitude_bias: Gated: the same for the magnitudes, [d_sae]; else of no latents.

    Raises:
        CheckpointError, ShapeError, NonFiniteError: See `check_parameters` and `check_latents`.
        ConfigError: See `check_latents`.
    """

    folded_bias: Tensor
    folded_magnitude_bias: Tensor
    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor
    r_mag: Tensor
    b_mag: Tensor

    def __init__(
        self,
        config: SAEConfig,
        parameters: dict[str, np.ndarray],
        held: tuple[int, ...] | None = None,
        *,
        copy: bool = True,
    ) -> None:
        super().__init__()
        if held is not None:
            check_latents(config, held)
        check_parameters(config, parameters, None if held is None else len(held))
        self.config, self.held = config, held
        for name, array in parameters.items():
            is_copied = copy or not array.flags.writeable  # torch takes no array that cannot be written
            # In C order: a transposed checkpoint would be copied at every call of the kernels.
            own = np.array(array, np.float32, order="C") if is_copied else np.ascontiguousarray(array, np.float32)
            self.register_buffer(name, torch.from_numpy(own))
        bias = self.b_enc - self.b_dec @ self.W_enc if config.subtract_b_dec else self.b_enc
        self.register_buffer("folded_bias", bias, persistent=False)
        magnitude_bias = self.b_enc.new_zeros(0)
        if config.act == "gated":
            folded = self.b_dec @ self._magnitude_encoder if config.subtract_b_dec else 0
            magnitude_bias = self.b_mag - folded
        self.register_buffer("folded_magnitude_bias", magnitude_bias, persistent=False)

    @property
    def _magnitude_encoder(self) -> Tensor:
        """Gated: encoder of the magnitudes, [d_model, d_sae]."""
        return self.W_enc * self.r_mag.exp()

    def columns(self, latents: Sequence[int]) -> Tensor:
        """Return where the tensors hold some latents, int64 [n].

        Raises:
            ConfigError: The SAE has no such latent, or it is not held.
        """
        for latent in latents:
            if not 0 <= latent < self.config.d_sae:
                raise ConfigError(f"there is no latent {latent}; this SAE has latents 0 to {self.config.d_sae - 1}")
        if self.held is None:
            return torch.tensor(latents, dtype=torch.int64)
        place = {latent: column for column, latent in enumerate(self.held)}
        for latent in latents:
            if latent not in place:
                raise ConfigError(f"latent {latent} is not in {self._what_is_held()}")
        return torch.tensor([place[latent] for latent in latents], dtype=torch.int64)

    def check_whole(self) -> None:
        """Raise `ConfigError` where some of the latents are not held."""
        if self.held is not None:
            raise ConfigError(f"this needs every latent of the SAE, and there is only {self._what_is_held()}")

    def _what_is_held(self) -> str:
        assert self.held is not None
        return (
            f"a slim defense, which holds only the {len(self.held)} of {self.config.d_sae} latents that it edits; put "
            "the SAE that it was fitted with back first (`defense.hosts.slim.restored`)"
        )

    def parameters_numpy(self, dtype: type[np.floating] = np.float32, *, copy: bool = True) -> dict[str, np.ndarray]:
        """Return the tensors as numpy arrays of `dtype`; without `copy` they may be the SAE's own memory."""
        return {
            name: getattr(self, name).detach().cpu().numpy().astype(dtype, copy=copy)
            for name in self.config.parameter_shapes
        }

    def rounded(self, dtype: type[np.floating]) -> SparseAutoencoder:
        """Return the SAE as it is read once it was stored in `dtype`, thresholds in float32; itself for float32."""
        if dtype is np.float32:
            return self
        kept = self.parameters_numpy()
        stored = {name: array if name == "threshold" else array.astype(dtype) for name, array in kept.items()}
        return SparseAutoencoder(self.config, stored, self.held)

    @cached_property
    def hashes(self) -> tuple[str, str]:
        """sha256 of the tensors, and of all but the thresholds, which calibrating changes (`config.fingerprint`)."""
        parameters = self.parameters_numpy(copy=False)
        whole = fingerprint(parameters)
        parameters.pop("threshold", None)
        return whole, fingerprint(parameters)

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
            ConfigError: Some of the latents are not held.
        """
        self.check_whole()
        return self._encode(resid)

    def acts_of(self, resid: Tensor, latents: Sequence[int]) -> Tensor:
        """Return acts [..., n] of some latents, of a residual [..., d_model].

        Raises:
            ShapeError: `resid` is not d_model wide.
            ConfigError: See `columns`.
        """
        return self._encode(resid)[..., self.columns(latents).to(resid.device)]

    def _encode(self, resid: Tensor) -> Tensor:
        """Return acts of the latents that are held."""
        if resid.shape[-1] != self.config.d_model:
            raise ShapeError(f"this SAE expects d_model={self.config.d_model}; the residual is {resid.shape[-1]} wide")
        z = normalize(resid.to(self.W_enc.dtype), self.config.norm).z
        magnitudes = None
        if self.config.act == "gated":
            centered = z - self.b_dec if self.config.subtract_b_dec else z
            magnitudes = centered @ self._magnitude_encoder + self.b_mag
        return self.activate(z @ self.W_enc + self.folded_bias, magnitudes)

    def decode(self, acts: Tensor, resid: Tensor) -> Tensor:
        """Return the reconstruction [..., d_model] of acts; `resid` supplies the scale of the norm.

        Raises:
            ConfigError: Some of the latents are not held.
        """
        self.check_whole()
        _, scale, shift = normalize(resid.to(self.W_dec.dtype), self.config.norm)
        x_hat = acts @ self.W_dec + self.b_dec
        x_hat = x_hat if scale is None else x_hat * scale
        return x_hat if shift is None else x_hat + shift


def part_of(sae: SparseAutoencoder, latents: Sequence[int]) -> tuple[SAEConfig, dict[str, np.ndarray], tuple[int, ...]]:
    """Return an SAE cut down to some of its latents: what `SparseAutoencoder` takes.

    These latents fire and write bit for bit as they did. The subtraction of b_dec goes into the biases: summed over
    fewer columns, it could come out with another last bit.

    Args:
        sae: The whole SAE.
        latents: Which, in any order.

    Raises:
        ConfigError: The latents compete, or the SAE has no such latent.
    """
    config, held = replace(sae.config, subtract_b_dec=False), tuple(sorted(set(latents)))
    check_latents(config, held)
    columns = sae.columns(held).to(sae.W_enc.device)
    part = {"W_enc": sae.W_enc[:, columns], "b_enc": sae.folded_bias[columns], "W_dec": sae.W_dec[columns]}
    part |= {name: getattr(sae, name)[columns] for name in ("threshold", "r_mag") if name in config.parameter_shapes}
    if config.act == "gated":
        part["b_mag"] = sae.folded_magnitude_bias[columns]
    part["b_dec"] = sae.b_dec
    return config, {name: np.ascontiguousarray(tensor.cpu().numpy()) for name, tensor in part.items()}, held
