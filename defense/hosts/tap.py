"""Where residuals are taken out of a CLIP and put back in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.core.config import Tokens
from defense.core.sae import SparseAutoencoder
from defense.core.suppress import token_slice
from defense.errors import ConfigError

from .attach import attached, is_wrapped
from .clip import Host
from .tower import VisionHost, block_of

if TYPE_CHECKING:
    from defense.core.sae import SparseAutoencoder

    from .clip import Host


def latent_map(host: Host, hook_point: str, sae: SparseAutoencoder, latent: int, image: Any) -> np.ndarray:
    """Return a latent's activation at each patch of a picture, float32 [rows, columns].

    A defense that is attached to the host stays out of it: this is what the plain network says. Not while another
    thread uses the host.

    Args:
        host: The CLIP.
        hook_point: Where the SAE reads.
        sae: The SAE.
        latent: Which latent.
        image: What `images.decode` takes.

    Raises:
        ConfigError: There is no such latent.
        InvalidImageError: The picture cannot be read.
    """
    import torch

    from defense.data.images import decode

    if not 0 <= latent < sae.config.d_sae:
        raise ConfigError(f"there is no latent {latent}; this SAE has latents 0 to {sae.config.d_sae - 1}")
    pixel_values = host.preprocess(decode(image).image)[None]
    with torch.inference_mode():
        vision, resid, _ = resid_and_embeds(host, hook_point, pixel_values)
        acts = sae.encode(resid[0, vision.n_prefix :])[:, latent]
    return acts.reshape(vision.grid_size).float().cpu().numpy()


def resid_and_embeds(host: Host, hook_point: str, pixel_values: np.ndarray) -> tuple[VisionHost, Tensor, Tensor]:
    """Return the tower, the undefended residual [batch, pos, d_model] and image_embeds [batch, d_embed], normalised."""
    vision = VisionHost.of(host.model)
    kept: list[Tensor] = []
    handle = vision.block(hook_point).register_forward_hook(lambda _m, _i, out: kept.append(vision.to_batch_first(out)))
    try:
        with _undefended(host.model):
            embeds = host.model.encode_image(Tap(host, hook_point).batch(pixel_values))
    finally:
        handle.remove()
    return vision, kept[0].float(), functional.normalize(embeds.float(), dim=-1)


def _undefended(model: Any) -> Any:
    return attached(model).bypassed() if is_wrapped(model) else nullcontext()


class _Skip(nn.Module):
    """Stands in for a block: passes its input on, or answers with a residual of its own."""

    def __init__(self, resid: Tensor | None = None) -> None:
        super().__init__()
        self.resid = resid

    def forward(self, resid: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return resid if self.resid is None else self.resid


class Tail:
    """The network behind one hook point, so that trying an edit does not pay for the blocks before it.

    Args:
        model: An open_clip model in eval mode; edits at other blocks that are attached to it stay in force.
        hook_point: Where residuals are taken out and put in.
    """

    def __init__(self, model: Any, hook_point: str, *, batch: int = 200) -> None:
        self.model = model
        self.host = VisionHost.of(model)
        self.last = block_of(hook_point)
        self.block = self.host.block(hook_point)
        self.batch = batch

    @torch.inference_mode()
    def resid(self, pixel_values: Tensor) -> Tensor:
        """Return the residual at the hook point, [n, pos, d_model]."""
        kept: list[Tensor] = []
        handle = self.block.register_forward_hook(lambda _m, _i, out: kept.append(self.host.to_batch_first(out)))
        try:
            for part in pixel_values.split(self.batch):
                self.model.encode_image(part.to(self.model.logit_scale.device))
        finally:
            handle.remove()
        return torch.cat(kept)

    @contextmanager
    def _injected(self, resid: Tensor) -> Iterator[None]:
        blocks = self.host.blocks
        originals = list(blocks[: self.last + 1])
        try:
            for index in range(self.last):
                blocks[index] = _Skip()
            blocks[self.last] = _Skip(self.host.to_batch_first(resid))
            yield
        finally:
            for index, block in enumerate(originals):
                blocks[index] = block

    def embeds(self, resid: Tensor) -> Tensor:
        """Return image_embeds [n, d_embed], normalised, of residuals [n, pos, d_model]. Differentiable."""
        height, width = self.model.visual.image_size
        parts = []
        for part in resid.split(self.batch):
            blank = part.new_zeros(len(part), 3, height, width)
            with self._injected(part):
                parts.append(functional.normalize(self.model.encode_image(blank), dim=-1))
        return torch.cat(parts)


class _Reached(Exception):  # noqa: N818 - no error: the way out of a forward pass that went far enough
    """The block of interest has run."""


@dataclass(frozen=True)
class Tap:
    """Where residuals are taken out of a CLIP.

    Attributes:
        host: The CLIP.
        hook_point: "blocks.{L}.hook_resid_post".
        scope: Which tokens; after the last block of a tower that pools its CLS token, that one only.

    Raises:
        HookPointError: No such block, or tokens that mean nothing there.
    """

    host: Host
    hook_point: str
    scope: Tokens = "all"

    def __post_init__(self) -> None:
        self.vision.block(self.hook_point)
        _ = self.tokens

    @cached_property
    def vision(self) -> VisionHost:
        """The vision tower."""
        return VisionHost.of(self.host.model)

    @cached_property
    def tokens(self) -> Tokens:
        """Which tokens are taken in fact."""
        return self.vision.effective_scope(self.hook_point, self.scope)

    @cached_property
    def n_tokens(self) -> int:
        """How many tokens a picture gives."""
        rows, columns = self.vision.grid_size
        n_pos = self.vision.n_prefix + rows * columns
        return len(range(n_pos)[token_slice(self.tokens, self.vision.n_prefix)])

    @property
    def device(self) -> torch.device:
        """Where the CLIP is."""
        return next(self.vision.visual.parameters()).device

    @torch.no_grad()
    def resid(self, pixel_values: np.ndarray) -> Tensor:
        """Return residuals, float32 [batch, n_tokens, d_model], of pixel_values; the blocks behind are not run."""
        kept: list[Tensor] = []

        def keep(_block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            kept.append(self.vision.to_batch_first(output))
            raise _Reached

        handle = self.vision.block(self.hook_point).register_forward_hook(keep)
        try:
            self.host.model.encode_image(self.batch(pixel_values))
        except _Reached:
            pass
        finally:
            handle.remove()
        return kept[0][:, token_slice(self.tokens, self.vision.n_prefix)].float()

    def batch(self, pixel_values: np.ndarray) -> Tensor:
        """Return pixel_values in the CLIP's dtype, where it is."""
        weight = next(self.vision.visual.parameters())
        return torch.from_numpy(pixel_values).to(weight.device, weight.dtype)
