"""The sparse autoencoder: its parameters, its input normalisation and its activation rule.

Nothing here suppresses anything. `suppress.py` takes from an SAE the columns and rows it needs; `fit.py` and
explanations use the full `encode`. Shapes are SAELens': W_enc [d_model, d_sae], b_enc [d_sae], W_dec [d_sae,
d_model], b_dec [d_model].

    z  = normalise(resid)                     norm: none, layer_norm or constant_norm_rescale
    h  = (z - b_dec) @ W_enc + b_enc          the subtraction only where `subtract_b_dec`
    f  = act(h)                               relu, jumprelu, topk, batchtopk (as a threshold) or gated
    x^ = undo the norm of (f @ W_dec + b_dec)
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor, nn

from .errors import CheckpointError, ConfigError, NonFiniteError, ShapeError

Act = Literal["relu", "jumprelu", "topk", "batchtopk", "gated"]
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]
ReluAt = Literal["before", "after", "none"]
Tokens = Literal["cls", "patch", "all"]

_LAYER_NORM_EPS = 1e-5


@dataclass(frozen=True)
class SAEConfig:
    """What the numbers of an SAE mean. Every field changes the result, so none is guessed.

    Attributes:
        d_model: Width of the residual stream.
        d_sae: Number of latents.
        act: Activation rule. "batchtopk" keeps what exceeds its `threshold`, as at inference.
        k: Latents kept per token ("topk"), else None.
        topk_relu: Where a "topk" rule applies ReLU: "before" or "after" the selection (equal results), or "none"
            (negative values count).
        norm: Input normalisation per token.
        subtract_b_dec: Whether b_dec is subtracted before the encoder.
        tokens: The tokens it was trained on: "cls", "patch" or "all".
    """

    d_model: int
    d_sae: int
    act: Act
    k: int | None = None
    topk_relu: ReluAt = "before"
    norm: Norm = "none"
    subtract_b_dec: bool = True
    tokens: Tokens = "all"

    def __post_init__(self) -> None:
        for name, value, allowed in (
            ("act", self.act, get_args(Act)),
            ("topk_relu", self.topk_relu, get_args(ReluAt)),
            ("norm", self.norm, get_args(Norm)),
            ("tokens", self.tokens, get_args(Tokens)),
        ):
            if value not in allowed:
                raise ConfigError(f"SAE config says {name}={value!r}; it must be one of {', '.join(allowed)}")
        if self.d_model < 1 or self.d_sae < 1:
            raise ShapeError(f"SAE config says d_model={self.d_model}, d_sae={self.d_sae}; both must be at least 1")
        if self.act == "topk" and not (isinstance(self.k, int) and 1 <= self.k <= self.d_sae):
            raise ConfigError(f"a topk SAE needs k between 1 and d_sae={self.d_sae}; got k={self.k!r}")
        if self.act != "topk" and self.k is not None:
            raise ConfigError(f"k={self.k} means nothing to act={self.act!r}; leave it out")

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that this kind of SAE has."""
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (self.d_model, self.d_sae),
            "b_enc": (self.d_sae,),
            "W_dec": (self.d_sae, self.d_model),
            "b_dec": (self.d_model,),
        }
        if self.act in ("jumprelu", "batchtopk"):
            shapes["threshold"] = (self.d_sae,)
        if self.act == "gated":
            shapes |= {"r_mag": (self.d_sae,), "b_mag": (self.d_sae,)}
        return shapes

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> SAEConfig:
        """Read `to_dict`'s form.

        Raises:
            CheckpointError: A field is missing or unknown.
        """
        try:
            return cls(**fields)
        except TypeError as error:
            raise CheckpointError(f"SAE config does not have the fields of this version: {error}") from error


def check_parameters(config: SAEConfig, parameters: dict[str, np.ndarray]) -> None:
    """Hold tensors against a config before anything is computed with them.

    Raises:
        CheckpointError: A tensor is missing, unknown or not floating point, or a decoder row is zero.
        ShapeError: A tensor has another shape than the config says.
        NonFiniteError: A tensor holds NaN or infinity.
    """
    shapes = config.parameter_shapes
    if set(parameters) != set(shapes):
        missing, unknown = sorted(set(shapes) - set(parameters)), sorted(set(parameters) - set(shapes))
        raise CheckpointError(
            f"a {config.act} SAE has the tensors {sorted(shapes)}; missing {missing}, unknown {unknown}"
        )
    for name, tensor in parameters.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ShapeError(f"SAE tensor {name} is {list(tensor.shape)}; its config says {list(shapes[name])}")
        if not np.issubdtype(tensor.dtype, np.floating):
            raise CheckpointError(f"SAE tensor {name} has dtype {tensor.dtype}; it must be floating point")
        if not np.isfinite(tensor).all():
            raise NonFiniteError(name)
    norms = np.linalg.norm(parameters["W_dec"].astype(np.float32), axis=1)
    if not norms.all():
        raise CheckpointError(f"decoder row {int(norms.argmin())} is zero: W_dec is damaged, or was stored transposed")


class Normalised(NamedTuple):
    """A residual as the encoder sees it, and the way back: resid = scale * z + shift."""

    z: Tensor
    """[..., d_model]"""
    scale: Tensor | None
    """s of the formula, [..., 1]; None where it is 1."""
    shift: Tensor | None
    """[..., 1]; None where it is 0."""


def normalise(resid: Tensor, norm: Norm) -> Normalised:
    """Return the encoder's input for a residual [..., d_model], in the residual's dtype.

    layer_norm follows Prisma: unbiased standard deviation, eps on the way in and none on the way out, so that
    scale * z + shift differs from resid by about 1e-5 / std.
    """
    if norm == "none":
        return Normalised(resid, None, None)
    if norm == "layer_norm":
        mean = resid.mean(-1, keepdim=True)
        std = resid.std(-1, keepdim=True)
        return Normalised((resid - mean) / (std + _LAYER_NORM_EPS), std, mean)
    scale = resid.norm(dim=-1, keepdim=True) / resid.shape[-1] ** 0.5
    scale = scale.clamp(min=torch.finfo(scale.dtype).tiny)  # a zero token stays zero
    return Normalised(resid / scale, scale, None)


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
            self.register_buffer(name, torch.from_numpy(np.array(array, dtype=np.float32)))
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
        z = normalise(resid.to(self.W_enc.dtype), self.config.norm).z
        magnitudes = None
        if self.config.act == "gated":
            centred = z - self.b_dec if self.config.subtract_b_dec else z
            magnitudes = centred @ (self.W_enc * self.r_mag.exp()) + self.b_mag
        return self.activate(z @ self.W_enc + self.folded_bias, magnitudes)

    def decode(self, acts: Tensor, resid: Tensor) -> Tensor:
        """Return the reconstruction [..., d_model] of acts; `resid` supplies the scale of the norm."""
        _, scale, shift = normalise(resid.to(self.W_dec.dtype), self.config.norm)
        x_hat = acts @ self.W_dec + self.b_dec
        x_hat = x_hat if scale is None else x_hat * scale
        return x_hat if shift is None else x_hat + shift
