"""The neurons of a block's MLP: what its last layer is given, and what each of them writes into the residual stream."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from defense.errors import ConfigError

from .tower import VisionTower

_SCALES = (("ls_2", "gamma"), ("ls2", "gamma"), ("layer_scale2", "lambda1"), ("", "gamma_2"))
"""Where a block may keep a factor per channel on what its MLP writes: part of the block, and name there."""


class Neurons:
    """The neurons of one block.

    Args:
        tower: The tower.
        hook_point: Behind the block.

    Attributes:
        rows: What a neuron at 1 adds to the residual behind the block, float32 [n_neurons, d_model].

    Raises:
        ConfigError: The block has no MLP that ends in a linear layer.
        HookPointError: There is no such block.
    """

    def __init__(self, tower: VisionTower, hook_point: str) -> None:
        block: Any = tower.block(hook_point)
        mlp = getattr(block, "mlp", None)
        layers = [part for part in mlp.modules() if isinstance(part, nn.Linear)] if isinstance(mlp, nn.Module) else []
        if not layers or layers[-1].out_features != tower.d_model:
            raise ConfigError(
                f"{hook_point}: {type(block).__name__} has no MLP that ends in a linear layer, so there are no neurons "
                "to compare with"
            )
        self._tower, self._last = tower, layers[-1]
        rows = self._last.weight.detach().float().T
        for part, name in _SCALES:
            scale = getattr(getattr(block, part, None) if part else block, name, None)
            if isinstance(scale, Tensor):
                rows = rows * scale.detach().float()
        self.rows = rows.contiguous()

    @contextmanager
    def watched(self) -> Iterator[list[Tensor]]:
        """Yield a list that gets the neurons' values at each pass, float32 [batch, pos, n_neurons]."""
        seen: list[Tensor] = []

        def hook(_layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.append(self._tower.to_batch_first(inputs[0]).float())

        handle = self._last.register_forward_pre_hook(hook)
        try:
            yield seen
        finally:
            handle.remove()


def unit_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows [n, d_model] of length 1, and their lengths [n]; a row of zeros stays one.

    Args:
        rows: float [n, d_model].
    """
    lengths = rows.norm(dim=1)
    return rows / lengths.clamp(min=torch.finfo(rows.dtype).tiny)[:, None], lengths
