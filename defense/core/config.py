"""What the numbers of an SAE mean, and whether its tensors fit that. Needs numpy alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Any, Literal, get_args

import numpy as np

from defense.errors import CheckpointError, ConfigError, NonFiniteError, ShapeError

Act = Literal["relu", "jumprelu", "topk", "batchtopk", "gated"]
Norm = Literal["none", "layer_norm", "constant_norm_rescale"]
ReluAt = Literal["before", "after", "none"]
Tokens = Literal["cls", "patch", "all"]
Variant = Literal["topk", "batchtopk", "matryoshka", "relu"]
"""Which latents count while an SAE is trained (train/trainer.py)."""


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
        norm: Input normalization per token.
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
        if not all(_is_whole(width) and width >= 1 for width in (self.d_model, self.d_sae)):
            raise ShapeError(
                f"SAE config says d_model={self.d_model!r}, d_sae={self.d_sae!r}; both must be whole and at least 1"
            )
        if self.act == "topk" and not (_is_whole(self.k) and self.k is not None and 1 <= self.k <= self.d_sae):
            raise ConfigError(f"a topk SAE needs k between 1 and d_sae={self.d_sae}; got k={self.k!r}")
        if self.act != "topk" and self.k is not None:
            raise ConfigError(f"k={self.k} means nothing to act={self.act!r}; leave it out")

    @property
    def couples_latents(self) -> bool:
        """Whether a latent counts or not depends on the others, so that none can be computed alone."""
        return self.act == "topk"

    @property
    def parameter_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor that this kind of SAE has."""
        return self.shapes_of(self.d_sae)

    def shapes_of(self, n: int) -> dict[str, tuple[int, ...]]:
        """Return `parameter_shapes` of an SAE of which only `n` latents are held."""
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (self.d_model, n),
            "b_enc": (n,),
            "W_dec": (n, self.d_model),
            "b_dec": (self.d_model,),
        }
        if self.act in ("jumprelu", "batchtopk"):
            shapes["threshold"] = (n,)
        if self.act == "gated":
            shapes |= {"r_mag": (n,), "b_mag": (n,)}
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


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def fingerprint(parameters: Mapping[str, np.ndarray]) -> str:
    """Return a sha256 of an SAE's tensors, equal for the same numbers held in float32 or float16."""
    digest = hashlib.sha256()
    for name, tensor in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(tensor, np.float32).data)
    return digest.hexdigest()


def check_latents(config: SAEConfig, latents: tuple[int, ...]) -> None:
    """Raise where these could not be the latents of an SAE that are held, the others left out.

    Raises:
        ConfigError: Its latents compete, so that none can be left out.
        CheckpointError: They are not in rising order, or some are none of the SAE's.
    """
    if config.couples_latents:
        raise ConfigError(f"the latents of a {config.act} SAE compete, so that none can be left out; store it whole")
    if list(latents) != sorted(set(latents)) or not set(latents) <= set(range(config.d_sae)):
        raise CheckpointError(f"the latents that are held must rise from 0 on, below d_sae={config.d_sae}")


def check_parameters(config: SAEConfig, parameters: dict[str, np.ndarray], n_held: int | None = None) -> None:
    """Hold tensors against a config before anything is computed with them.

    Args:
        config: What they should be.
        parameters: The tensors.
        n_held: How many of the latents they are of; by default all.

    Raises:
        CheckpointError: A tensor is missing, unknown or not floating point, or a decoder row is zero.
        ShapeError: A tensor has another shape than the config says.
        NonFiniteError: A tensor holds NaN or infinity.
    """
    shapes = config.parameter_shapes if n_held is None else config.shapes_of(n_held)
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
    parts = np.array_split(parameters["W_dec"], 64)  # of a large SAE, a copy takes as much as the encoder
    norms = np.concatenate([np.linalg.norm(part.astype(np.float32, copy=False), axis=1) for part in parts])
    if not norms.all():
        raise CheckpointError(f"decoder row {int(norms.argmin())} is zero: W_dec is damaged, or was stored transposed")
