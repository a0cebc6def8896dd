"""The weights that a defense was fitted on stay: a defended model refuses others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from defense.errors import ConfigError


class WeightGuard:
    """Refuses, before anything is copied, a state dict with other weights of a vision tower.

    Args:
        model: The model that is defended.
        visual: Its vision tower, or a part of it that holds the weights.
    """

    def __init__(self, model: nn.Module, visual: nn.Module) -> None:
        self._prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is visual)
        self._handles: list[RemovableHandle] = [model.register_load_state_dict_pre_hook(self._check_model)]
        if self._prefix:
            self._handles.append(visual.register_load_state_dict_pre_hook(self._check_visual))

    def remove(self) -> None:
        """Let the model take any weights again."""
        for handle in self._handles:
            handle.remove()

    def _check_model(self, model: nn.Module, given: Mapping[str, Any], prefix: str, *_: Any) -> None:
        _refuse_others(model.state_dict(), given, self._prefix, prefix)

    def _check_visual(self, visual: nn.Module, given: Mapping[str, Any], prefix: str, *_: Any) -> None:
        if not prefix:  # else the model's own check has seen it
            _refuse_others(visual.state_dict(), given, "", "")


def _refuse_others(own: Mapping[str, Tensor], given: Mapping[str, Any], prefix: str, given_prefix: str) -> None:
    for name, tensor in own.items():
        other = given.get(given_prefix + name)
        if name.startswith(prefix) and isinstance(other, Tensor) and not _is_same(tensor, other):
            raise ConfigError(
                f"this model is defended, and its defense was fitted on the weights that it has; {name} of what is "
                "being loaded differs. Call detach(model), load, and wrap with a defense fitted on the new weights"
            )


def _is_same(own: Tensor, other: Tensor) -> bool:
    """Return whether two tensors are the same weights, held in float32 or float16; cf. `VisionTower.fingerprint`."""
    if not own.is_floating_point():
        return True
    return own.shape == other.shape and torch.equal(own.half(), other.to(own.device).half())
