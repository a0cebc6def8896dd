"""The vision tower with the defense inside, in a form that goes through torch.onnx.

    pixel_values [batch, 3, height, width] --vision tower, edited after block L--> image_embeds [batch, d_embed]
    strength [batch] or [1] --factor on what is removed: 1 where nothing is fed, 0 is the CLIP without its defense--^
    text_embeds [n_labels, d_embed] --logit_scale * image_embeds @ text_embeds.T--> logits_per_image [batch, n_labels]

The Suppressor of the library branches on its data, which a graph cannot. So `TracedEdit` restates the one formula from
a Suppressor's own buffers, and a test holds it equal to `wrap`. Only plain ONNX operators come out of it. None of them
meets an empty tensor because of what is in a picture, and TopK never one: up to ONNX Runtime 1.30 it ends the process.

| mode | a TopK rule ... | the other rules |
|---|---|---|
| delta | is refused | take |S| columns of the encoder |
| exact | encodes the tokens on which a latent of S is positive, and no others | as above |
| static | encodes every token, for engines that refuse shapes that depend on data | as above; no `project` |
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.core.latents import token_slice
from defense.core.norms import FACTOR
from defense.core.ops import reference
from defense.core.sae import normalize
from defense.core.suppress import Suppressor
from defense.errors import ConfigError
from defense.export.coordinates import TRANSLATION, coordinates
from defense.export.layouts import Mode
from defense.export.operators import rewritten
from defense.export.repository import STRENGTH
from defense.hosts.attach import EditedBlock, attached, is_wrapped
from defense.hosts.families import tower_of

OPSET = 18
_TRACED_BATCH = 3  # traced with 1, the exporter fixes the batch at 1 whatever it is told
_TRACED_LABELS = 5
_MAX_SIZE = 2**16
OUTPUTS = ("image_embeds", "logits_per_image")
_SILENT = -1e30  # far below what any residual makes of a bias, and far from float32's end
ONE_FILE_BYTES = 2**31 - 2**20
"""Weights beyond this go to a file beside the graph: protobuf holds no more than 2 GiB."""


class TracedEdit(nn.Module):
    """What one Suppressor subtracts from a residual, without a branch.

    Args:
        suppressor: In float32. Its strength becomes a constant, beside the one that the graph is fed.
        mode: See the module.
    """

    removal: Tensor

    def __init__(self, suppressor: Suppressor, mode: Mode) -> None:
        super().__init__()
        self.suppressor = suppressor
        self.mode = mode
        self.register_buffer("removal", suppressor.removal * suppressor.strength, persistent=False)

    def forward(self, resid: Tensor) -> Tensor:
        """Return what to remove from resid [batch, pos, d_model], at every pos."""
        s, removal = self.suppressor, self.removal
        rows = resid.reshape(-1, s.d_model)
        z, scale, _ = normalize(rows, s.norm)
        acts = reference.acts_of_set(z, s.encoder()) if s.W_enc is None else self._topk_acts(z)
        if s.values is not None:
            delta = reference.steered(acts, removal, s.W_dec_S, s.values)
        elif s.latent_set.edit == "project":
            delta = self._projected(acts, removal, z - s.b_dec)
        else:
            delta = reference.scaled(acts, removal, s.W_dec_S)
        return (delta if scale is None else delta * scale).reshape(resid.shape)

    def _topk_acts(self, z: Tensor) -> Tensor:
        """Keep the pre-activations of S, [tokens, n], that are among the k largest of their token."""
        s = self.suppressor
        assert s.W_enc is not None
        assert s.b is not None
        values = z @ s.W_S + s.b_S
        if not s.negative_counts:
            values = values.relu()
        if self.mode == "static" or s.negative_counts:
            return values * self._survives(z)
        rows = _rows_where(values > 0)
        kept = values.index_select(0, rows) * self._survives(z.index_select(0, rows))
        return torch.zeros_like(values).index_copy(0, rows, kept)

    def _survives(self, z: Tensor) -> Tensor:
        s = self.suppressor
        assert s.W_enc is not None
        assert s.b is not None
        everything = F.pad(z, (0, 0, 0, 1)) @ s.W_enc + s.b  # a token more, so that of an empty batch there is one too
        kth_largest = everything.topk(s.k, dim=1).values[:, -1:]
        survives = everything.index_select(1, s.latents) >= kth_largest  # [:, latents] would transpose it in ONNX
        return survives[:-1]

    def _projected(self, acts: Tensor, removal: Tensor, centered: Tensor) -> Tensor:
        rows = _rows_where(acts != 0)
        W_dec_S = self.suppressor.W_dec_S.double()
        shares = coordinates((acts[rows] != 0).float(), W_dec_S @ W_dec_S.T, centered[rows].double() @ W_dec_S.T)
        delta = ((shares * removal) @ W_dec_S).to(centered.dtype)
        return torch.zeros_like(centered).index_copy(0, rows, delta)


def _rows_where(fires: Tensor) -> Tensor:
    """Return the tokens at which any latent fires, int64 [n]: and the first one, so that there is one in every picture.

    Args:
        fires: Bool, [tokens, n_S].
    """
    is_first = torch.arange(fires.shape[0]) == 0  # len() would fix the number
    return (fires.any(1) | is_first).nonzero()[:, 0]


class TracedBlock(nn.Module):
    """The edits after one block, as a forward hook in the block's own layout."""

    def __init__(self, block: EditedBlock, mode: Mode) -> None:
        super().__init__()
        parts = [part for part in block.parts() if len(part.latents)]
        self.edits = nn.ModuleList(TracedEdit(part, mode) for part in parts)
        self.slices = [token_slice(part.scope, block.n_prefix) for part in parts]
        self.spares = [part.latent_set.spares_high_norm for part in parts]
        self.n_prefix = block.n_prefix
        self.batch_first = block.batch_first

    def edited(self, strength: Tensor, _block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        """Return the edited output of the block; each edit sees the unedited one, and none counts at strength 0."""
        resid = (output if self.batch_first else output.transpose(0, 1)).float()
        edited = resid
        is_edited = 1 - _is_high(resid, self.n_prefix) if any(self.spares) else None
        for edit, tokens, spares in zip(self.edits, self.slices, self.spares, strict=True):
            delta = edit(resid[:, tokens]) * strength[:, None, None]
            if spares and is_edited is not None:
                delta = delta * is_edited[:, tokens, None]
            before, after = tokens.start or 0, 0 if tokens.stop is None else resid.shape[1] - tokens.stop
            edited = edited - F.pad(delta, (0, 0, before, after))
        edited = edited.to(output.dtype)
        return edited if self.batch_first else edited.transpose(0, 1)


def _is_high(resid: Tensor, n_prefix: int) -> Tensor:
    """Return 1 where a token is a patch of high norm, else 0, [batch, pos]: `norms.is_high`, by counting.

    A median would be TopK in ONNX. More than half of the patches are below norm / FACTOR just where the median is.
    """
    norms = resid[:, n_prefix:].norm(dim=-1)
    n_below = (FACTOR * norms[:, None, :] < norms[:, :, None]).sum(-1)
    high = (n_below > (norms.shape[1] - 1) // 2).to(resid.dtype)
    return F.pad(high, (n_prefix, 0))


class VisionGraph(nn.Module):
    """From pixel_values to image_embeds and logits_per_image; to be called within `in_place`.

    Args:
        model: A CLIP (see `wrap`) on the CPU, defended or not. Its vision tower may be in half precision; what is in
            front of it, the edits and the logits are in float32.
        mode: See the module.

    Raises:
        ConfigError: A mode that is unknown, or does not go with the defense's SAEs.
    """

    scale: Tensor
    bias: Tensor

    def __init__(self, model: Any, mode: Mode = "exact") -> None:
        super().__init__()
        if mode not in get_args(Mode):
            raise ConfigError(f"mode={mode!r}; it must be one of {', '.join(get_args(Mode))}")
        self.tower = tower_of(model)
        self.visual, *others = self.tower.parts  # their weights are the graph's
        self.others = nn.ModuleList(others)
        self.register_buffer("scale", model.logit_scale.detach().exp().reshape(()))
        bias = getattr(model, "logit_bias", None)
        self.register_buffer("bias", torch.zeros(()) if bias is None else bias.detach().clone().reshape(()))
        self._attached = attached(model) if is_wrapped(model) else None
        edited = [] if self._attached is None else self._attached.edited_blocks()
        topk = [block.hook_point for block in edited for part in block.parts() if part.W_enc is not None]
        if mode == "delta" and topk:
            raise ConfigError(
                f"mode='delta' cannot hold the topk SAE at {topk[0]}, whose latents compete; use 'exact' or "
                "'static', or give each latent a threshold of its own first (defense.calibrate)"
            )
        if mode == "static" and any(part.latent_set.edit == "project" for block in edited for part in block.parts()):
            raise ConfigError(
                "mode='static' cannot hold the edit 'project', whose systems grow with what fires; use 'exact'"
            )
        self.hook_points = [block.hook_point for block in edited]
        self.blocks = nn.ModuleList(TracedBlock(block, mode) for block in edited)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Keep the library's own edits out of the tower, and let `operators` stand in for its modules."""
        with ExitStack() as stack:
            for part in self.tower.parts:
                stack.enter_context(rewritten(part))
            if self._attached is not None:
                stack.enter_context(self._attached.bypassed())
            yield

    def forward(
        self, pixel_values: Tensor, text_embeds: Tensor, strength: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return image_embeds [batch, d_embed], normalized, and logits_per_image [batch, n_labels].

        Args:
            pixel_values: [batch, 3, height, width].
            text_embeds: [n_labels, d_embed], normalized.
            strength: Factor on what is removed, float32 [batch] or [1]; 1 by default.
        """
        with self._edits(torch.ones(1) if strength is None else strength):
            image_embeds = F.normalize(self.tower.encode(pixel_values.to(self.tower.dtype)).float(), dim=-1)
        return image_embeds, self.scale * image_embeds @ text_embeds.T + self.bias

    @contextmanager
    def _edits(self, strength: Tensor) -> Iterator[None]:
        """Edit the blocks of the tower for as long as the context lasts."""
        with ExitStack() as stack:
            for hook_point, block in zip(self.hook_points, self.blocks, strict=True):
                assert isinstance(block, TracedBlock)
                handle = self.tower.block(hook_point).register_forward_hook(partial(block.edited, strength))
                stack.callback(handle.remove)
            yield


def silent_bias(suppressor: Suppressor) -> Tensor:
    """Return a bias [n_S] with which none of a suppressor's latents fires, or its own where a negative one could."""
    return suppressor.b_S if suppressor.negative_counts else torch.full_like(suppressor.b_S, _SILENT)


def silent_biases(graph: VisionGraph) -> dict[str, np.ndarray]:
    """Return such biases for all edits of a graph, by the names that they have in ONNX."""
    edits = {name: module for name, module in graph.named_modules() if isinstance(module, TracedEdit)}
    return {f"{name}.suppressor.b_S": silent_bias(edit.suppressor).numpy() for name, edit in edits.items()}


def trace_vision(graph: VisionGraph, size: tuple[int, int], text_embeds: Tensor) -> ir.Model:
    """Return the graph in ONNX, with labels and strength baked in that a caller may replace.

    `text_embeds` and `strength` are initializers that are also inputs: what is fed under these names, for any number of
    labels, and for all pictures or for each its own, stands in for them. A CLIP without a defense has no strength.

    Args:
        graph: What to trace.
        size: Height and width of its pictures.
        text_embeds: The labels' embeddings, normalized, [n_labels, d_embed].
    """
    example = {
        "pixel_values": torch.zeros(_TRACED_BATCH, 3, *size),
        "text_embeds": torch.zeros(_TRACED_LABELS, text_embeds.shape[1]),
    }
    defaults = {"text_embeds": text_embeds}
    if len(graph.blocks):
        example[STRENGTH] = defaults[STRENGTH] = torch.ones(1)
    with graph.in_place():
        model = trace(graph, example, {"pixel_values": "batch", "text_embeds": "n_labels"}, OUTPUTS)
    for value in model.graph.inputs:
        if value.name in defaults:
            value.const_value = ir.tensor(defaults[value.name].numpy(), name=value.name)
            if value.name == STRENGTH:
                # One for all pictures, or as many as they are: it is multiplied, which broadcasts, and nothing else.
                value.shape = ir.Shape(["n_strengths"])
            model.graph.register_initializer(value)
    return model


def trace(graph: nn.Module, example: dict[str, Tensor], axes: dict[str, str], outputs: tuple[str, ...]) -> ir.Model:
    """Return a module in ONNX.

    Args:
        graph: Its forward takes the tensors of `example`, in that order.
        example: Inputs by name.
        axes: Input -> name of its first axis, which is dynamic. The others are fixed.
        outputs: Names of the outputs.
    """
    dims = {axis: torch.export.Dim(axis, min=1, max=_MAX_SIZE) for axis in axes.values()}
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operator that ONNX does not have
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                graph.eval(),
                tuple(example.values()),
                input_names=list(example),
                output_names=list(outputs),
                dynamic_shapes={name: {0: dims[axes[name]]} if name in axes else None for name in example},
                custom_translation_table=TRANSLATION,
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)
    assert program is not None
    return program.model


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's advice on its own workings to itself; what it made is verified."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def write(model: ir.Model, path: Path, metadata: dict[str, str]) -> None:
    """Write a graph as one file, or where its weights exceed 2 GiB as two: `path` and `path`.data beside it."""
    model.metadata_props.update(metadata)
    n_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    external = f"{path.name}.data" if n_bytes > ONE_FILE_BYTES else None
    ir.save(model, path, external_data=external, size_threshold_bytes=1024)
