"""What the importers share: the file and its companions, what the caller states, and what they hand back."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Collection, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor

from defense.core.config import SAEConfig
from defense.errors import CheckpointError, ConfigError, HookPointError, NotThereError, ShapeError
from defense.store.hub import COMPANIONS

from . import pickles

_SUFFIXES = (".safetensors", ".pt", ".pth", ".pkl", ".pkl.gz")
_BLOCK = re.compile(r"blocks\.\d+\.hook_resid_post")
_HF_LAYER = re.compile(r"(?:.*\.)?(?:layers|resblocks)\.(\d+)")
_FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_UNKNOWN_DTYPE = (AttributeError, KeyError, TypeError, RuntimeError)
"""What safetensors raises for numbers that torch does not know."""

OPTIONS = {
    "hook_point": "blocks.{L}.hook_resid_post with L counted from 0, or pooled for an SAE of image embeddings",
    "tokens": "cls, patch or all: what it was trained on",
    "act": "its activation rule",
    "k": "how many latents a token keeps",
    "threshold": "above which activation a latent counts",
    "norm": "none, layer_norm or constant_norm_rescale",
    "subtract_b_dec": "whether b_dec is subtracted before the encoder",
    "scaling_factor": "what residuals are multiplied by before the SAE",
    "act_mean": "the mean that is subtracted from residuals before the SAE, [d_model]",
    "scalar": "what centered residuals are divided by before the SAE",
    "host_model": "the CLIP it was trained on",
    "quick_gelu": "whether that CLIP ran with QuickGELU",
}
"""What a caller can state: name -> what it means."""


class Imported(NamedTuple):
    """What an importer reads from a file: an SAE in our form, and where it belongs as far as the file says."""

    config: SAEConfig
    parameters: dict[str, np.ndarray]
    hook_point: str | None = None
    """None where the file does not say it."""
    host_model: str | None = None
    quick_gelu: bool | None = None


class Importer(Protocol):
    """A module of this package that knows one format."""

    def detect(self, source: Source) -> bool:
        """Whether a file has this format, as far as its content tells."""

    def read(self, source: Source, given: Given) -> Imported:
        """Return the SAE of a file of this format, in our form."""


class Source:
    """A published checkpoint: the file with the weights, and what lies beside it.

    Args:
        path: That file, or a folder that holds one such file.
        config: Its configuration, where that is not beside it under its usual name.

    Raises:
        CheckpointError: There is no such file, or a folder holds several.
    """

    def __init__(self, path: Path, config: Path | None = None) -> None:
        self.path = _weights_in(path) if path.is_dir() else path
        self._config = config
        if not self.path.is_file():
            kind, what = (CheckpointError, "no file") if path.exists() else (NotThereError, "not there")
            raise kind(f"{path} is {what}; give the checkpoint, or the folder that it is in")

    def __str__(self) -> str:
        return str(self.path)

    @cached_property
    def header(self) -> dict[str, Any] | None:
        """The line of JSON before the weights, which only saev writes."""
        if self.path.suffix == ".safetensors":
            return None
        with self.path.open("rb") as file:
            if file.read(1) != b"{":
                return None
            file.seek(0)
            line = file.readline()
        return _json_object(line, f"the first line of {self}")

    @cached_property
    def payload(self) -> Any:
        """What was saved, with tensors on the CPU; read on first use.

        A prefix that all names of a state dict share is left out: a wrapper of the model, such as DataParallel or
        `torch.compile`, has put it there.
        """
        if self.path.suffix == ".safetensors":
            try:
                return _without_prefix(load_file(self.path))
            except (safetensors.SafetensorError, OSError, ValueError, *_UNKNOWN_DTYPE) as error:
                raise CheckpointError(f"{self} is not a readable safetensors file: {error}") from error
        with self.path.open("rb") as file:
            if self.header is None:
                return _without_prefix(pickles.load(file, str(self)))
            file.readline()
            return _without_prefix(pickles.load(io.BytesIO(file.read()), str(self)))

    @property
    def keys(self) -> set[str]:
        """Names in what was saved; empty where it is no mapping."""
        return {str(key) for key in self.payload} if isinstance(self.payload, Mapping) else set()

    def companion(self, *names: str) -> dict[str, Any] | None:
        """Return the JSON object of the first of these files that exists; None where none does.

        Args:
            names: Paths from the folder of the weights. A configuration that the caller named is taken before them.
        """
        for path in [self._config] if self._config else [self.path.parent / name for name in names]:
            if path.is_file():
                return _json_object(path.read_bytes(), str(path))
            if path is self._config:
                raise CheckpointError(f"{path} is not a file")
        return None

    def tensors(self, state: Any, wanted: Collection[str], ignored: Collection[str] = ()) -> dict[str, Tensor]:
        """Return exactly the wanted tensors, in float32.

        Raises:
            CheckpointError: One is missing or no tensor of 16, 32 or 64 bit floating point, or there is one that nobody
                knows.
        """
        present = set(state) if isinstance(state, Mapping) else set()
        missing, unknown = sorted(set(wanted) - present), sorted(present - set(wanted) - set(ignored))
        if missing or unknown:
            raise CheckpointError(
                f"{self} should hold the tensors {sorted(wanted)}; missing {missing}, unknown {unknown}"
            )
        for name in wanted:
            if not isinstance(state[name], Tensor) or state[name].dtype not in _FLOATS:
                kind = state[name].dtype if isinstance(state[name], Tensor) else type(state[name]).__name__
                raise CheckpointError(
                    f"{self}: {name} is {kind}; want a tensor of {', '.join(map(str, _FLOATS))}. Convert it, with its "
                    "scales if it was quantized"
                )
        return {name: state[name].detach().float() for name in wanted}

    def check_sizes(self, W_dec: Tensor, d_model: Any = None, d_sae: Any = None) -> tuple[int, int]:
        """Return d_model and d_sae of W_dec [d_sae, d_model].

        Raises:
            ShapeError: It is no matrix, or the sizes that the file states (where it does) are others.
        """
        if W_dec.ndim != 2:
            raise ShapeError(f"{self}: the decoder is {list(W_dec.shape)}; it must be a matrix")
        found = {"d_model": W_dec.shape[1], "d_sae": W_dec.shape[0]}
        for name, stated in (("d_model", d_model), ("d_sae", d_sae)):
            if stated is not None and stated != found[name]:
                raise ShapeError(f"{self} says {name}={stated}, but its decoder has {name}={found[name]}")
        return found["d_model"], found["d_sae"]

    def check_vector(self, name: str, value: Any, d_model: int) -> Tensor:
        """Return one number for each of d_model.

        Raises:
            ShapeError: It is something else.
        """
        vector = torch.as_tensor(value)
        if vector.shape != (d_model,):
            raise ShapeError(f"{name} is {list(vector.shape)}; {self} needs [{d_model}]")
        return vector

    def hook_point_of(self, name: str | None) -> str | None:
        """Return our name for the hook point that a file states; None where it states none.

        Layer L of a Hugging Face vision model and resblock L of open_clip are our block L.

        Raises:
            HookPointError: It is not the residual after a block.
        """
        if not name or _BLOCK.fullmatch(name):
            return name or None
        if match := _HF_LAYER.fullmatch(name):
            return f"blocks.{match.group(1)}.hook_resid_post"
        raise HookPointError(
            f"{self} was trained at {name!r}; a defense edits the residual after a block, blocks.L.hook_resid_post"
        )


_FACTORS = frozenset({"scalar", "scaling_factor"})
"""Options that are divided by."""


class Given:
    """What the caller states because a file does not.

    Args:
        source: The file.
        values: Name of `OPTIONS` -> value; None is nothing.

    Raises:
        ConfigError: There is no such option, or its number is none to compute with.
    """

    def __init__(self, source: Source, values: Mapping[str, Any]) -> None:
        if unknown := sorted(set(values) - set(OPTIONS)):
            raise ConfigError(f"there is no option {', '.join(unknown)}; there are {', '.join(OPTIONS)}")
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ConfigError(f"{flag(name)} is {value}; want a finite number")
        for name in _FACTORS & values.keys():
            if values[name] == 0:
                raise ConfigError(
                    f"{flag(name)} is 0, by which nothing can be divided; leave it out, or state it right"
                )
        self._source = source
        self._values = {name: value for name, value in values.items() if value is not None}
        self._asked: set[str] = set()

    def value(self, name: str, stated: Any = None) -> Any:
        """Return what the file states, else what the caller does.

        Raises:
            CheckpointError: Neither says it; the message names the option that does.
            ConfigError: They contradict each other.
        """
        value = self.optional(name, stated)
        if value is None:
            raise CheckpointError(
                f"{self._source} does not say {name} ({OPTIONS[name]}); pass {flag(name)}, or {name}= in Python"
            )
        return value

    def optional(self, name: str, stated: Any = None) -> Any:
        """Return what the file states, else what the caller does; None where neither says it.

        Raises:
            ConfigError: They contradict each other.
        """
        self._asked.add(name)
        given = self._values.get(name)
        if stated is None:
            return given
        if given is not None and given != stated:
            raise ConfigError(f"{self._source} says {name}={stated!r}, {flag(name)} says {given!r}; leave that out")
        return stated

    def check_all_used(self) -> None:
        """Raise `ConfigError` where the caller stated what means nothing to the file."""
        if unused := [flag(name) for name in self._values if name not in self._asked]:
            raise ConfigError(f"{', '.join(unused)} means nothing to {self._source}; leave it out")


def flag(name: str) -> str:
    """Return how the command line spells an option."""
    return "--" + name.replace("_", "-")


def fields_of(config: Any) -> Mapping[str, Any]:
    """Return the fields of a configuration that is a mapping, or an object that came out of a pickle."""
    return config if isinstance(config, Mapping) else getattr(config, "__dict__", {})


def numpy_of(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return tensors as numpy arrays."""
    return {name: tensor.contiguous().numpy() for name, tensor in tensors.items()}


def unsupported(source: Source, what: str) -> ConfigError:
    """Return the error for a kind of SAE that this package has no arithmetic for."""
    return ConfigError(f"{source} is {what}, which is not supported; relu, jumprelu, topk, batchtopk and gated are")


def fold(
    parameters: dict[str, Tensor],
    *,
    subtract_b_dec: bool,
    mean: Tensor | float = 0.0,
    scale: Tensor | float = 1.0,
    inverse: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return parameters for raw residuals x of an SAE that expects (x - mean) @ scale.

    Args:
        parameters: W_enc, b_enc, W_dec, b_dec; r_mag and b_mag too for a gated SAE.
        subtract_b_dec: Whether b_dec is subtracted before the encoder.
        mean: [d_model], or 0.
        scale: A factor, or a matrix [d_model, d_model].
        inverse: Inverse of that matrix.
    """
    double = {name: tensor.double() for name, tensor in parameters.items()}
    forward = torch.as_tensor(scale, dtype=torch.float64)
    backward = 1 / forward if inverse is None else inverse.double()
    times: Callable[[Tensor, Tensor], Tensor] = torch.mul if inverse is None else torch.matmul
    shift = torch.as_tensor(mean, dtype=torch.float64) * torch.ones_like(double["b_dec"])
    double["W_enc"] = times(forward, double["W_enc"])
    double["W_dec"] = times(double["W_dec"], backward)
    double["b_dec"] = times(double["b_dec"], backward) + shift
    if not subtract_b_dec:
        moved = shift @ double["W_enc"]
        double["b_enc"] = double["b_enc"] - moved
        if "b_mag" in double:
            double["b_mag"] = double["b_mag"] - moved * double["r_mag"].exp()
    return {name: tensor.float() for name, tensor in double.items()}


def _without_prefix(saved: Any) -> Any:
    """Return what was saved; names of state dicts in it lose the dotted parts that they all begin with."""
    if not isinstance(saved, Mapping):
        return saved
    found = {key: _without_prefix(value) for key, value in saved.items()}
    while len(found) > 1 and all(isinstance(key, str) and "." in key for key in found):
        (first, *others) = {key.partition(".")[0] for key in found}
        if others or not any(isinstance(value, Tensor) for value in found.values()):
            break
        found = {key.removeprefix(f"{first}."): value for key, value in found.items()}
    return found


def _weights_in(folder: Path) -> Path:
    files = [
        path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name.endswith(_SUFFIXES) and not COMPANIONS.search(path.name)
    ]
    if len(files) != 1:
        names = ", ".join(path.name for path in files) or "none"
        raise CheckpointError(f"{folder} holds several files of weights, or none ({names}); name the one to import")
    return files[0]


def _json_object(data: bytes, what: str) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} is not a JSON object")
    return value
