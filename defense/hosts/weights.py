"""The weights that a defense was fitted on stay: a defended model refuses others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from defense.errors import ConfigError


class WeightGuard:
    """Refuses, before anything is copied, a state dict with other weights of a vision tower.

    Args:
        model: The model that is defended.
        parts: The modules that hold the weights of its vision tower.
    """

    def __init__(self, model: nn.Module, parts: Sequence[nn.Module]) -> None:
        names = {id(module): name for name, module in model.named_modules()}
        self._prefixes = tuple(f"{name}." if (name := names[id(part)]) else "" for part in parts)
        self._handles: list[RemovableHandle] = [model.register_load_state_dict_pre_hook(self._check_model)]
        for part, prefix in zip(parts, self._prefixes, strict=True):
            if prefix:
                self._handles.append(part.register_load_state_dict_pre_hook(self._check_part))

    def remove(self) -> None:
        """Let the model take any weights again."""
        for handle in self._handles:
            handle.remove()

    def _check_model(self, model: nn.Module, given: Mapping[str, Any], prefix: str, *_: Any) -> None:
        _refuse_others(model.state_dict(), given, self._prefixes, prefix)

    def _check_part(self, part: nn.Module, given: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if not prefix:  # else the model's own check has seen it
            _refuse_others(part.state_dict(), given, ("",), "")


def _refuse_others(
    own: Mapping[str, Tensor], given: Mapping[str, Any], prefixes: tuple[str, ...], given_prefix: str
) -> None:
    for name, tensor in own.items():
        other = given.get(given_prefix + name)
        if name.startswith(prefixes) and isinstance(other, Tensor) and not _is_same(tensor, other):
            raise ConfigError(
                f"this model is defended, and its defense was fitted on the weights that it has; {name} of what is "
                "being loaded differs. Call detach(model), load, and wrap with a defense fitted on the new weights"
            )


def _is_same(own: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same weights, held in float32 or float16; cf. `VisionTower.fingerprint`."""
    if not own.is_floating_point():
        return True
    return own.shape == other.shape and torch.equal(own.half(), other.to(own.device).half())
