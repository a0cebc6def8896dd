"""A tower in which a change of the residual goes on through later attention alone: for gradients, not for values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.errors import ConfigError

from .tower import VisionTower, block_of


@contextmanager
def attention_alone(tower: VisionTower, hook_point: str) -> Iterator[None]:
    """Cut gradients off where they would pass a later MLP, or the pattern of a later attention.

    What is left is linear in the residual but for the norms: from token to token by the attention patterns that the
    picture has, any number of times, and past the blocks; the head behind them is whole. Values are what they were.
    The second-order lens (arXiv:2406.04341, section 3) follows one such step; this follows all of them.

    Not while another thread takes gradients through attention: torch has one such function for all.

    Args:
        tower: The tower.
        hook_point: Blocks behind this one are cut.

    Raises:
        ConfigError: A later block has no MLP that is known; or, at a pass, its attention is not torch's
            `scaled_dot_product_attention`, so that its pattern cannot be held.
        HookPointError: There is no such block.
    """
    tower.block(hook_point)  # raises where there is none
    later = list(tower.blocks)[block_of(hook_point) + 1 : tower.n_read]
    n_held: int | None = None  # in the block that is running; None outside of them, where a head may pool by attention
    attention: Any = functional.scaled_dot_product_attention

    def held(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal n_held
        if n_held is not None:
            query, key, n_held = query.detach(), key.detach(), n_held + 1
        out: Tensor = attention(query, key, value, *args, **kwargs)
        return out

    def enter(*_: Any) -> None:
        nonlocal n_held
        n_held = 0

    def leave(block: nn.Module, *_: Any) -> None:
        nonlocal n_held
        found, n_held = n_held, None
        if not found:
            raise ConfigError(
                f"{type(block).__name__} does not attend by torch's scaled_dot_product_attention, so its pattern "
                'cannot be held; load a model of transformers with attn_implementation="sdpa", or follow all that comes'
            )

    with ExitStack() as stack:
        for block in later:
            mlp = getattr(block, "mlp", None)
            if not isinstance(mlp, nn.Module):
                raise ConfigError(f"{type(block).__name__} has no MLP that is known; follow all that comes behind")
            for handle in (
                mlp.register_forward_hook(lambda _mlp, _inputs, output: output.detach()),
                block.register_forward_pre_hook(enter),
                block.register_forward_hook(leave),
            ):
                stack.callback(handle.remove)
        stack.callback(setattr, functional, "scaled_dot_product_attention", attention)
        setattr(functional, "scaled_dot_product_attention", held)  # noqa: B010 - its type is that of a builtin
        yield


def check_attention_alone(tower: VisionTower, hook_point: str) -> None:
    """Raise what `attention_alone` would, by a pass of one picture.

    Raises:
        ConfigError, HookPointError: See `attention_alone`.
    """
    blank = torch.zeros(1, tower.n_pos, tower.d_model, device=tower.device, requires_grad=True)
    with attention_alone(tower, hook_point):
        tower.embeds_from(blank, hook_point)
