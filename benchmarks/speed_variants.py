"""The ways to edit a residual that the benchmark of speed compares: naive splice, sparse decode, and the library's.

Each is an `encode_image` of its own, over the same model weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from defense.benchmarks.cost import MIB
from defense.benchmarks.speed_rows import Firing
from defense.benchmarks.speed_workloads import Stage, Workload
from defense.hosts.attach import attach, attached
from defense.hosts.defense import Site
from defense.hosts.families import tower_of


@dataclass(frozen=True)
class Variant:
    """A way to compute image embeddings.

    Attributes:
        name: As printed.
        encode_image: pixel_values -> image_embeds [batch, d_embed].
        weights_mib: Weights held above the model's own.
    """

    name: str
    encode_image: Callable[[Tensor], Tensor]
    weights_mib: float = 0.0


@dataclass(frozen=True)
class Rivals:
    """Variants that compute the same thing: one SAE, one S, one edit.

    Attributes:
        workload: The SAE and S.
        firing: What S does on the benchmark's pictures.
        naive: The plain way, which the others must agree with.
        ours: The library's.
        sparse: Sparse decode; None but for a TopK rule and the edit "scale".
    """

    workload: Workload
    firing: Firing
    naive: Variant
    ours: Variant
    sparse: Variant | None


class NaiveSplice(nn.Module):
    """An SAE put into the stream with its latents of S at zero and its error term added back.

    The usual implementations do at least this: they decode twice, and some encode twice as well.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    latents: Tensor

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.k = workload.config.k
        for name, array in workload.parameters.items():
            self.register_buffer(name, torch.from_numpy(array))
        self.register_buffer("latents", torch.tensor(workload.latent_set.latents))

    def encode(self, resid: Tensor) -> Tensor:
        """Return acts [..., d_sae] of a residual [..., d_model]."""
        acts = ((resid - self.b_dec) @ self.W_enc + self.b_enc).relu()
        if self.k is None:
            return acts
        kept, indices = acts.topk(self.k, dim=-1)
        return torch.zeros_like(acts).scatter_(-1, indices, kept)

    def decode(self, acts: Tensor) -> Tensor:
        """Return the reconstruction [..., d_model] of acts."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, resid: Tensor) -> Tensor:
        """Return the edited residual [batch, pos, d_model]."""
        acts = self.encode(resid)
        error = resid - self.decode(acts)
        acts[..., self.latents] = 0
        return self.decode(acts) + error


class NaiveProject(NaiveSplice):
    """The edit "project", token by token with a least-squares solver. Compared with, never timed."""

    def forward(self, resid: Tensor) -> Tensor:
        """Return the edited residual [batch, pos, d_model]."""
        rows, edited = resid.flatten(0, -2), resid.flatten(0, -2).clone()
        fires = self.encode(rows)[:, self.latents] != 0
        for token in fires.any(1).nonzero()[:, 0].tolist():
            basis = self.W_dec[self.latents[fires[token]]].double().T  # [d_model, latents that fire]
            centered = (rows[token] - self.b_dec).double()
            edited[token] -= (basis @ torch.linalg.lstsq(basis, centered[:, None]).solution)[:, 0].float()
        return edited.view(resid.shape)


class SparseDecode(nn.Module):
    """All latents encoded and ranked, but only the members of S that were kept are decoded, and subtracted."""

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec_S: Tensor
    place: Tensor

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        assert workload.config.k is not None
        self.k = workload.config.k
        for name in ("W_enc", "b_enc", "b_dec"):
            self.register_buffer(name, torch.from_numpy(workload.parameters[name]))
        latents = torch.tensor(workload.latent_set.latents)
        place = torch.full((workload.config.d_sae,), -1)  # latent -> its row of W_dec_S, -1 outside S
        place[latents] = torch.arange(len(latents))
        self.register_buffer("W_dec_S", torch.from_numpy(workload.parameters["W_dec"])[latents])
        self.register_buffer("place", place)

    def forward(self, resid: Tensor) -> Tensor:
        """Return the edited residual [batch, pos, d_model]."""
        rows = resid.flatten(0, -2)
        kept, indices = ((rows - self.b_dec) @ self.W_enc + self.b_enc).relu().topk(self.k, dim=-1)
        place = self.place[indices]  # [tokens, k]
        token, rank = (place >= 0).nonzero(as_tuple=True)
        written = kept[token, rank, None] * self.W_dec_S[place[token, rank]]  # [members of S kept, d_model]
        return rows.index_add(0, token, written, alpha=-1).view(resid.shape)


def twin(model: nn.Module) -> nn.Module:
    """Return a second model over the same weights, which takes hooks of its own."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def spliced_variant(name: str, stage: Stage, edit: nn.Module) -> Variant:
    """Return a variant that runs `edit` on the residual [batch, pos, d_model] of the case's block."""
    model = twin(stage.model)
    tower = tower_of(model)

    def hook(_block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return tower.to_batch_first(edit(tower.to_batch_first(output)))

    tower.block(stage.case.hook_point).register_forward_hook(hook)
    return Variant(name, model.encode_image, buffers_mib(edit))  # type: ignore[arg-type]


def our_variant(stage: Stage, workload: Workload) -> tuple[Variant, Firing]:
    """Return the library's variant, and what S does on the benchmark's pictures by the library's own arithmetic."""
    site = Site(stage.case.hook_point, workload.config, workload.parameters, (workload.latent_set,))
    model = twin(stage.model)
    attach(model, (site,))
    (suppressor,) = attached(model).suppressors()
    pre_acts = stage.rows @ suppressor.W_S + suppressor.b_S
    n_firing, n_surviving = (int((x > 0).any(1).sum()) for x in (pre_acts, suppressor.acts(stage.rows)))
    act = {"topk": "TopK"}.get(workload.config.act, workload.config.act)
    name = f"ours, {act}, {workload.latent_set.edit}, {workload.share:.0%} of tokens firing".replace("%", " %")
    variant = Variant(name, model.encode_image, buffers_mib(attached(model)))  # type: ignore[arg-type]
    return variant, Firing(workload.share, len(stage.rows), n_firing, n_surviving)


def make_rivals(stage: Stage, workload: Workload) -> Rivals:
    """Return all variants for one workload."""
    ours, firing = our_variant(stage, workload)
    is_scale = workload.latent_set.edit == "scale"
    naive = (
        spliced_variant("naive splice", stage, NaiveSplice(workload))
        if is_scale
        else spliced_variant("least squares", stage, NaiveProject(workload))
    )
    has_sparse = is_scale and workload.config.act == "topk"
    sparse = spliced_variant("sparse decode", stage, SparseDecode(workload)) if has_sparse else None
    return Rivals(workload, firing, naive, ours, sparse)


def buffers_mib(module: nn.Module) -> float:
    """Return the size of a module's buffers."""
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()) / MIB
