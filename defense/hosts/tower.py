"""A vision tower: its blocks, the layout of its residual stream, and the ways into and out of it.

    pixel_values --blocks 0..L--> resid_post.L          `resid`        no further than block L
    resid_post.K --blocks K+1..L--> resid_post.L        `resid_from`   no further than block L
    resid_post.L --the rest--> image_embeds             `embeds_from`  differentiable

The last two put stand-ins into the model for as long as they run: not while another thread uses it. Nothing here
depends on a library: `families.py` says what a tower of open_clip, timm or transformers looks like.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.core.config import Tokens
from defense.core.latents import Scope, token_slice
from defense.errors import HookPointError, ShapeError

BATCH = 200
"""Pictures that go through the tower at once where a caller gives more."""

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


class _Reached(Exception):  # noqa: N818 - no error: the way out of a forward pass that went far enough
    """The block of interest has run."""


@contextmanager
def _on_one_picture(embed: nn.Module) -> Iterator[None]:
    """Let a patch embedding look at the first picture of a batch alone; it is most of the photo model's tower."""
    whole = embed.forward

    def forward(pixel_values: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        one: Tensor = whole(pixel_values[:1], *args, **kwargs)
        return one.expand(len(pixel_values), *one.shape[1:])

    embed.forward = forward
    try:
        yield
    finally:
        embed.__dict__.pop("forward")


class _Skip(nn.Module):
    """Stands in for a block in front of an injected residual: passes its input on."""

    def forward(self, resid: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return resid


class Fingerprints(NamedTuple):
    """What tells the weights of one vision tower from those of another.

    Attributes:
        whole: sha256 of all of them.
        stream: sha256 of those that make the residual stream: without what stands behind the last block (final norm,
            pooling, projection), which some towers are held without.
    """

    whole: str
    stream: str


@dataclass(frozen=True)
class VisionTower:
    """The vision transformer of a CLIP.

    Attributes:
        parts: The modules that hold its weights, and no others'.
        weights: Returns its weights by the names that open_clip has for them, whatever library holds them here.
        head: How the names begin of the weights that stand behind the last block.
        is_whole: Whether `weights` has all of the head, so that `encode` gives the embeddings that its CLIP compares
            with texts.
        blocks: Its transformer blocks, in order.
        encode: From pixel_values [batch, 3, height, width], on the tower's device and in its dtype, to image
            embeddings [batch, d_embed], not normalized.
        d_model: Width of the residual stream.
        n_prefix: Tokens before the patches: CLS, registers. 0 for SigLIP.
        has_cls: Whether the first token is a CLS token.
        reads: The tokens that count behind the last block that counts.
        n_read: How many blocks count: all, but in a model that reads an earlier one.
        batch_first: Whether a block's output is [batch, pos, d_model], else [pos, batch, d_model].
        quick_gelu: Whether the MLPs use QuickGELU.
        grid_size: Patches down and across.
        image_size: Height and width of pixel_values.
        embed: What first makes tokens of pictures; None where it is no module of its own.
        places_in_blocks: Whether blocks tell by themselves where a token lies (rotary or relative positions), so that
            they take no other number of tokens than a whole picture's.
    """

    parts: tuple[nn.Module, ...]
    weights: Callable[[], Mapping[str, Tensor]]
    head: tuple[str, ...]
    is_whole: bool
    blocks: nn.ModuleList | nn.Sequential
    encode: Callable[[Tensor], Tensor]
    d_model: int
    n_prefix: int
    has_cls: bool
    reads: Scope
    n_read: int
    batch_first: bool
    quick_gelu: bool
    grid_size: tuple[int, int]
    image_size: tuple[int, int]
    embed: nn.Module | None = None
    places_in_blocks: bool = False

    # --- what it is ---

    @property
    def visual(self) -> nn.Module:
        """The module that holds its weights, all but those of a projection that stands beside it."""
        return self.parts[0]

    @property
    def pools_cls(self) -> bool:
        """Whether the image embedding is read from the CLS token alone."""
        return self.reads == "cls"

    @property
    def n_pos(self) -> int:
        """How many tokens a picture has in the stream, CLS and registers included."""
        rows, columns = self.grid_size
        return self.n_prefix + rows * columns

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self._patch_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Float type of pixel_values and of the residual stream.

        That of the patch embedding: a tower in mixed precision keeps other weights in float32.
        """
        return self._patch_weight.dtype

    @property
    def edit_dtype(self) -> torch.dtype:
        """Float type that an edit of the stream is computed in: float32 where the blocks' norms are, as in OpenAI's."""
        return next(self.blocks.parameters()).dtype

    @property
    def _patch_weight(self) -> nn.Parameter:
        """That of a convolution, the first; where the patches come flattened, of the first linear layer."""
        # Asked for with every batch: the first convolution is found soon, all parameters of a tower are not.
        convolution = next((parameter for parameter in self.visual.parameters() if parameter.ndim == 4), None)
        if convolution is not None:
            return convolution
        return next(parameter for parameter in self.visual.parameters() if parameter.ndim > 1)

    def fingerprint(self) -> str:
        """Return a sha256 of the tower's weights; see `fingerprints`."""
        return self.fingerprints().whole

    def fingerprints(self) -> Fingerprints:
        """Return what tells these weights from others.

        Equal for the same weights in another library, and in float32 or float16.
        """
        whole, stream = hashlib.sha256(), hashlib.sha256()
        for name, tensor in sorted(self.weights().items()):
            if not tensor.is_floating_point():
                continue
            content = tensor.detach().to("cpu", torch.float16).contiguous().numpy().data
            for digest in (whole,) if name.startswith(self.head) else (whole, stream):
                digest.update(name.encode())
                digest.update(content)
        return Fingerprints(whole.hexdigest(), stream.hexdigest())

    def has_weights(self, sha256: str, stream_sha256: str | None) -> bool:
        """Return whether these are the weights of two fingerprints; the second decides where the head is not here.

        Args:
            sha256: Of a whole tower.
            stream_sha256: Of its residual stream; None where it is not known.
        """
        own = self.fingerprints()
        return own.whole == sha256 or (not self.is_whole and own.stream == stream_sha256)

    def check_width(self, d_model: int, what: str) -> None:
        """Raise `ShapeError` where something made for `d_model` does not fit this tower."""
        if d_model != self.d_model:
            raise ShapeError(
                f"{what} expects d_model={d_model}, but this vision tower is {self.d_model} wide; "
                "use an SAE trained on this model"
            )

    # --- blocks and tokens ---

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

        After the last block that counts, nothing but the tokens that are read there matters: the CLS token of a tower
        that pools it, the patches for a language model that is given no other.

        Raises:
            HookPointError: The scope means nothing there, or the block does not count.
        """
        self.block(hook_point)
        block = block_of(hook_point)
        if scope == "cls" and not self.has_cls:
            raise HookPointError("scope='cls', but this vision tower has no CLS token; use 'patch' or 'all'")
        if block >= self.n_read:
            raise HookPointError(
                f"{hook_point}: this model reads its vision tower after block {self.n_read - 1}, so an edit there "
                "changes nothing; use that block or an earlier one"
            )
        if block < self.n_read - 1 or self.reads == "all":
            return scope
        if scope not in ("all", self.reads):
            token, others = ("the CLS token", "patches") if self.reads == "cls" else ("patches", "the CLS token")
            raise HookPointError(
                f"scope={scope!r} at {hook_point}: after the last block only {token} can reach the output, "
                f"so editing {others} changes nothing; use {self.reads!r}, or an earlier block"
            )
        return self.reads

    def positions(self, hook_point: str, scope: Tokens = "all") -> slice:
        """Return the positions of the tokens that a scope touches at a hook point; see `effective_scope`."""
        return token_slice(self.effective_scope(hook_point, scope), self.n_prefix)

    def kinds(self, hook_point: str, scope: Tokens = "all") -> dict[str, slice]:
        """Return the kinds of the tokens at `positions`, each with its place among them: "CLS", "register", "patch"."""
        scope = self.effective_scope(hook_point, scope)
        n_cls = int(self.has_cls)
        found = {"CLS": slice(0, n_cls), "register": slice(n_cls, self.n_prefix), "patch": slice(self.n_prefix, None)}
        if scope != "all":
            return {"CLS": slice(None)} if scope == "cls" else {"patch": slice(None)}
        return {kind: tokens for kind, tokens in found.items() if tokens.stop is None or tokens.start < tokens.stop}

    def n_tokens(self, hook_point: str, scope: Tokens = "all") -> int:
        """Return how many tokens a picture has at `positions`."""
        return len(range(self.n_pos)[self.positions(hook_point, scope)])

    def to_batch_first(self, resid: Tensor) -> Tensor:
        """Return a block's output as [batch, pos, d_model]; its own inverse."""
        return resid if self.batch_first else resid.transpose(0, 1)

    # --- out of the stream and into it ---

    @contextmanager
    def fast(self) -> Iterator[None]:
        """Let the tower compute in bfloat16, products in TF32, where the device is made for it; elsewhere as ever.

        For what only points the way, such as gradients: nothing that is reported is computed so. On a CPU it changes
        nothing: there bfloat16 was measured to be slower.
        """
        if self.device.type != "cuda" or not torch.cuda.is_bf16_supported(including_emulation=False):
            yield
            return
        precision = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            with torch.autocast("cuda", dtype=torch.bfloat16):
                yield
        finally:
            torch.set_float32_matmul_precision(precision)

    def batch(self, pixel_values: np.ndarray | Tensor) -> Tensor:
        """Return pixel_values where the tower is, in its dtype."""
        tensor = torch.from_numpy(pixel_values) if isinstance(pixel_values, np.ndarray) else pixel_values
        return tensor.to(self.device, self.dtype)

    @torch.no_grad()
    def resid(
        self, pixel_values: np.ndarray | Tensor, hook_point: str, scope: Tokens | None = None, *, edited: bool = True
    ) -> Tensor:
        """Return residuals, float32 [batch, n_tokens, d_model]; the blocks behind the hook point are not run.

        What is attached to the blocks, the one of the hook point included, is at work.

        Args:
            pixel_values: float [batch, 3, height, width].
            hook_point: Where they are taken out.
            scope: Only the tokens that this scope touches there (see `effective_scope`); every token by default.
            edited: False takes them out before what is attached to this very block edits them, as `resid_from` and
                `embeds_from` take them in.

        Raises:
            HookPointError: No such block, or tokens that mean nothing there.
        """
        positions = slice(None) if scope is None else self.positions(hook_point, scope)
        tensor = torch.as_tensor(pixel_values)
        return torch.cat(
            [
                self._until(hook_point, self.batch(part), edited=edited)[:, positions].float()
                for part in tensor.split(BATCH)
            ]
        )

    @torch.no_grad()
    def resid_from(self, resid: Tensor, start: str, hook_point: str) -> Tensor:
        """Return residuals at a later hook point, float32 [batch, pos, d_model].

        Args:
            resid: What the block of `start` gives, before anything that is attached to it edits it, [batch, pos,
                d_model].
            start: An earlier hook point.
            hook_point: Where they are taken out.
        """
        parts = []
        for part in resid.split(BATCH):
            with self._injected(part, start):
                parts.append(self._until(hook_point, self._blank(part)).float())
        return torch.cat(parts)

    def embeds_from(self, resid: Tensor, hook_point: str, batch: int = BATCH) -> Tensor:
        """Return image_embeds, float32 [batch, d_embed], normalized, of residuals [batch, pos, d_model].

        Differentiable. What is attached to the block of the hook point, or to later ones, is at work.
        """
        parts = []
        for part in resid.split(batch):
            with self._injected(part, hook_point):
                parts.append(functional.normalize(self.encode(self._blank(part)).float(), dim=-1))
        return torch.cat(parts)

    @torch.no_grad()
    def resid_and_embeds(self, pixel_values: np.ndarray | Tensor, hook_point: str) -> tuple[Tensor, Tensor]:
        """Return what one pass gives: residuals float32 [batch, pos, d_model], and image_embeds, normalized."""
        kept: list[Tensor] = []
        with self._watched(hook_point, kept.append):
            embeds = self.encode(self.batch(pixel_values))
        return kept[0].float(), functional.normalize(embeds.float(), dim=-1)

    @contextmanager
    def changed(self, hook_point: str, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Let `change` of a residual [batch, pos, d_model] take its place behind a block, while the context lasts."""

        def hook(_block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return self.to_batch_first(change(self.to_batch_first(output)).to(output.dtype))

        handle = self.block(hook_point).register_forward_hook(hook)
        try:
            yield
        finally:
            handle.remove()

    @contextmanager
    def _watched(self, hook_point: str, see: Callable[[Tensor], None], *, edited: bool = True) -> Iterator[None]:
        """Show the residuals behind a block, [batch, pos, d_model], to a function: edited there, or before that."""

        def hook(_block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            see(self.to_batch_first(output))

        handle = self.block(hook_point).register_forward_hook(hook, prepend=not edited)
        try:
            yield
        finally:
            handle.remove()

    def _until(self, hook_point: str, pixel_values: Tensor, *, edited: bool = True) -> Tensor:
        """Return the residuals behind a block and run no further."""
        kept: list[Tensor] = []

        def see(resid: Tensor) -> None:
            kept.append(resid)
            raise _Reached

        with self._watched(hook_point, see, edited=edited):
            try:
                self.encode(pixel_values)
            except _Reached:
                return kept[0]
        raise AssertionError(f"the pass did not reach {hook_point}")

    def _blank(self, resid: Tensor) -> Tensor:
        """Return pixel_values for as many pictures: what comes in front of an injected residual does not count."""
        return torch.zeros(len(resid), 3, *self.image_size, device=self.device, dtype=self.dtype)

    @contextmanager
    def _injected(self, resid: Tensor, hook_point: str) -> Iterator[None]:
        """Let a block answer with a residual [batch, pos, d_model], and pass over the blocks before it.

        The block itself stays, so that what is attached to it sees that residual.
        """
        last = block_of(hook_point)
        block = self.block(hook_point)
        answer = self.to_batch_first(resid.to(self.device, self.dtype))
        with ExitStack() as stack:
            if self.embed is not None:
                stack.enter_context(_on_one_picture(self.embed))
            for index in range(last):
                stack.callback(self.blocks.__setitem__, index, self.blocks[index])
                self.blocks[index] = _Skip()
            block.forward = lambda *_args, **_kwargs: answer
            stack.callback(block.__dict__.pop, "forward")
            yield
