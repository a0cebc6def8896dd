"""The vision tower that a defense goes into: its blocks, the layout of its residual, its weights.

Everything that depends on a version of open_clip or timm is in this file.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense.core.latents import Scope
from defense.errors import ConfigError, HookPointError, ShapeError

_HOOK_POINT = re.compile(r"blocks\.(\d+)\.hook_resid_post")


def block_of(hook_point: str) -> int:
    """Return the 0-based block L of "blocks.{L}.hook_resid_post".

    Raises:
        HookPointError: Another kind of hook point.
    """
    match = _HOOK_POINT.fullmatch(hook_point)
    if match is None:
        raise HookPointError(
            f"hook point {hook_point!r} is not supported; a defense edits the residual after a block: "
            "'blocks.{L}.hook_resid_post' with L counted from 0"
        )
    return int(match.group(1))


@dataclass(frozen=True)
class VisionHost:
    """The vision transformer of an open_clip model.

    Attributes:
        visual: `model.visual`.
        blocks: Its transformer blocks, in order.
        d_model: Width of the residual stream.
        n_prefix: Tokens before the patches: CLS, registers. 0 for SigLIP.
        has_cls: Whether the first token is a CLS token.
        pools_cls: Whether the image embedding is read from the CLS token alone.
        batch_first: Whether a block's output is [batch, pos, d_model], else [pos, batch, d_model].
        quick_gelu: Whether the MLPs use QuickGELU.
        grid_size: Patches down and across.
    """

    visual: nn.Module
    blocks: nn.ModuleList | nn.Sequential
    d_model: int
    n_prefix: int
    has_cls: bool
    pools_cls: bool
    batch_first: bool
    quick_gelu: bool
    grid_size: tuple[int, int]

    @classmethod
    def of(cls, model: nn.Module) -> VisionHost:
        """Find the vision transformer of an open_clip model: its native ViT, or a timm trunk.

        Raises:
            ConfigError: `model` has no vision tower.
            HookPointError: Its vision tower has no transformer blocks (ResNet, ConvNeXt).
        """
        visual = getattr(model, "visual", None)
        if not isinstance(visual, nn.Module):
            raise ConfigError(f"{type(model).__name__} has no vision tower; pass a model of open_clip.create_model")
        transformer: Any = getattr(visual, "transformer", None)
        if hasattr(transformer, "resblocks"):
            return cls._native(visual, transformer)
        trunk: Any = getattr(visual, "trunk", None)
        if hasattr(trunk, "blocks") and hasattr(trunk, "num_prefix_tokens"):
            return cls._timm(visual, trunk)
        raise HookPointError(
            f"the vision tower {type(trunk or visual).__name__} has no transformer blocks to edit; "
            "use a ViT, e.g. 'ViT-B-32'"
        )

    @classmethod
    def _native(cls, visual: Any, transformer: Any) -> VisionHost:
        blocks = transformer.resblocks
        return cls(
            visual=visual,
            blocks=blocks,
            d_model=transformer.width,
            n_prefix=1,
            has_cls=True,
            pools_cls=getattr(visual, "attn_pool", None) is None and getattr(visual, "pool_type", "tok") == "tok",
            # Read, not inferred from shapes: 50 tokens and a batch of 50 look alike. open_clip 4 has no such switch.
            batch_first=getattr(transformer, "batch_first", True),
            quick_gelu=any(type(module).__name__ == "QuickGELU" for module in blocks[0].modules()),
            grid_size=visual.grid_size,
        )

    @classmethod
    def _timm(cls, visual: Any, trunk: Any) -> VisionHost:
        has_cls = getattr(trunk, "cls_token", None) is not None
        return cls(
            visual=visual,
            blocks=trunk.blocks,
            d_model=trunk.embed_dim,
            n_prefix=trunk.num_prefix_tokens,
            has_cls=has_cls,
            pools_cls=has_cls and trunk.global_pool == "token",
            batch_first=True,
            quick_gelu=any(type(module).__name__ == "QuickGELU" for module in trunk.blocks[0].modules()),
            grid_size=trunk.patch_embed.grid_size,
        )

    def block(self, hook_point: str) -> nn.Module:
        """Return the block of a hook point.

        Raises:
            HookPointError: There is no such block.
        """
        index = block_of(hook_point)
        if index >= len(self.blocks):
            raise HookPointError(f"{hook_point}: this vision tower has blocks 0 to {len(self.blocks) - 1}")
        return self.blocks[index]

    def effective_scope(self, hook_point: str, scope: Scope) -> Scope:
        """Return the tokens that an edit of `scope` has to touch at a hook point.

        After the last block of a tower that pools its CLS token, nothing but that token matters.

        Raises:
            HookPointError: The scope means nothing there.
        """
        if scope == "cls" and not self.has_cls:
            raise HookPointError("scope='cls', but this vision tower has no CLS token; use 'patch' or 'all'")
        if block_of(hook_point) == len(self.blocks) - 1 and self.pools_cls:
            if scope == "patch":
                raise HookPointError(
                    f"scope='patch' at {hook_point}: after the last block only the CLS token reaches the image "
                    "embedding, so editing patches changes nothing; use 'cls', or an earlier block"
                )
            return "cls"
        return scope

    def check_width(self, d_model: int, what: str) -> None:
        """Raise `ShapeError` where something made for `d_model` does not fit this tower."""
        if d_model != self.d_model:
            raise ShapeError(
                f"{what} expects d_model={d_model}, but this vision tower is {self.d_model} wide; "
                "use an SAE trained on this model"
            )

    def to_batch_first(self, resid: Tensor) -> Tensor:
        """Return a block's output as [batch, pos, d_model]; its own inverse."""
        return resid if self.batch_first else resid.transpose(0, 1)

    def fingerprint(self) -> str:
        """Return a sha256 of the tower's weights, equal for the same weights held in float32 or float16."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.visual.state_dict().items()):
            if tensor.is_floating_point():
                digest.update(name.encode())
                digest.update(tensor.detach().to("cpu", torch.float16).contiguous().numpy().data)
        return digest.hexdigest()


def is_compiled(model: nn.Module) -> bool:
    """Return whether torch.compile was applied to a model or a part of it, which then ignores new hooks."""
    return any(
        type(module).__name__ == "OptimizedModule" or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )
