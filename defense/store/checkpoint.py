"""One SAE on disk, with everything that decides what its numbers mean.

    sae.json             schema, semantics, hook point, host, license, provenance, hash and size of each other file
    sae.safetensors      the parameters
    golden.safetensors   residuals with their acts and reconstructions, as computed when the folder was written

`importers/` writes such folders from published checkpoints, once; everything else reads only these. A defense holds
its SAE itself (defenses.py): this is the form of an SAE that nothing was fitted with yet.

The hashes guard the tensors. The golden triple, which `load` recomputes, guards what a hash cannot: that the same
numbers still mean the same, whichever field of sae.json was edited and whichever version reads it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder, normalize
from defense.errors import CheckpointError, ConfigError, HookPointError
from defense.hosts.shipped import ShippedClip
from defense.hosts.tower import VisionTower, block_of

from . import folders
from .hub import Hub, hub_source

SCHEMA = 1
MANIFEST = "sae.json"
POOLED = "pooled"
"""Hook point of an SAE of image embeddings: it can be read, not put into a model."""

_WEIGHTS, _GOLDEN = "sae.safetensors", "golden.safetensors"
_FIELDS = {
    "schema": int,
    "package_version": str,
    "sae": dict,
    "hook_point": str,
    "host": dict,
    "licence": str,
    "provenance": dict,
    "files": dict,
}
_SAE_FIELDS = {
    "d_model": int,
    "d_sae": int,
    "act": str,
    "k": int | None,
    "topk_relu": str,
    "norm": str,
    "subtract_b_dec": bool,
    "tokens": str,
}
_HOST_FIELDS = {"model": str | None, "quick_gelu": bool | None}

_N_GOLDEN = 10
_N_CANDIDATES = 16
_GOLDEN_TOLERANCE = 1e-4
"""Largest difference that passes, as a share of the row's largest entry. Summing in another order makes one of 1e-6, a
wrong rule or bias one far beyond."""


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """An SAE and where it belongs.

    Attributes:
        sae: The SAE.
        hook_point: "blocks.{L}.hook_resid_post", L counted from 0, or "pooled".
        host_model: The CLIP it was trained on, as its authors name it; None where nobody said.
        quick_gelu: Whether the activations it was trained on came from QuickGELU; None where nobody said.
        license: SPDX identifier, or a sentence.
        provenance: Where it came from, as JSON values.

    Raises:
        HookPointError: Another kind of hook point.
    """

    sae: SparseAutoencoder
    hook_point: str
    host_model: str | None = None
    quick_gelu: bool | None = None
    license: str = "not stated"
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.hook_point != POOLED:
            block_of(self.hook_point)

    def check_clip(self, tower: VisionTower, *, allow_mismatch: bool = False) -> None:
        """Raise where this SAE does not fit the vision tower that it is to go into.

        Args:
            tower: The tower.
            allow_mismatch: Accept a tower with other weights or another kind of GELU than the SAE was trained with.

        Raises:
            HookPointError: The SAE is one of pooled embeddings, or the tower has no such block.
            ShapeError: The tower has another width.
            ConfigError: The tower has the other kind of GELU, or other weights than the SAE's provenance states.
        """
        if self.hook_point == POOLED:
            raise HookPointError("this SAE was trained on pooled image embeddings; it cannot be put into a block")
        tower.block(self.hook_point)
        tower.check_width(self.sae.config.d_model, "this SAE")
        if self.quick_gelu is not None and self.quick_gelu != tower.quick_gelu and not allow_mismatch:
            raise ConfigError(
                f"this SAE was trained on activations with quick_gelu={self.quick_gelu}, this tower has "
                f"quick_gelu={tower.quick_gelu}; load the model that fits, or pass allow_mismatch=True"
            )
        want, stream = self._clip_sha256("sha256"), self._clip_sha256("stream_sha256")
        if want is not None and not allow_mismatch and not tower.has_weights(want, stream):
            raise ConfigError(
                f"this SAE was trained on the weights of {self.host_model} (sha256 {want[:16]}...); this tower's are "
                f"{tower.fingerprint()[:16]}.... Load those weights, or pass allow_mismatch=True"
            )

    def _clip_sha256(self, key: str) -> str | None:
        """Return a fingerprint of the tower it was trained on (see `ClipId`), where `defense train` noted it."""
        trained_on = self.provenance.get("host")
        return trained_on.get(key) if isinstance(trained_on, Mapping) else None


def save(checkpoint: Checkpoint, folder: str | os.PathLike[str], *, dtype: type[np.floating] = np.float32) -> Path:
    """Write an SAE as a folder, replacing one that is there, and return the folder.

    A failure leaves what was there before.

    Args:
        checkpoint: What to write.
        folder: Where to; its parent must exist.
        dtype: Float type of the weights on disk. Thresholds stay float32.

    Raises:
        ConfigError: `folder` is there and holds something else than an SAE, or the provenance is not JSON.
        CheckpointError: No latent fires on any of the golden residuals: the SAE is dead.
        OSError: There is no space left, say.
    """
    with folders.publishing(check_target(folder), read=load) as staging:
        _write(checkpoint, staging, dtype)
    return Path(folder)


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that `save` could write now.

    Raises:
        ConfigError: It is there and holds something else than an SAE, or its parent is not there.
    """
    return folders.writable_target(folder, "SAE", MANIFEST, lambda target: _read_manifest(target)["files"])


def _write(checkpoint: Checkpoint, folder: Path, dtype: type[np.floating]) -> None:
    stored = checkpoint.sae.rounded(dtype)
    kept = stored.parameters_numpy()
    weights = {name: array if name == "threshold" else array.astype(dtype) for name, array in kept.items()}
    folders.write_tensors(weights, folder / _WEIGHTS, save_file)
    folders.write_tensors(_golden(stored), folder / _GOLDEN, save_file)
    fields = {
        "sae": checkpoint.sae.config.to_dict(),
        "hook_point": checkpoint.hook_point,
        "host": {"model": checkpoint.host_model, "quick_gelu": checkpoint.quick_gelu},
        "licence": checkpoint.license,
        "provenance": dict(checkpoint.provenance),
        "files": folders.file_entries(folder),
    }
    folders.write_manifest(folder / MANIFEST, SCHEMA, fields, "the SAE")


def shipped_saes(model: ShippedClip) -> list[Checkpoint]:
    """Return the SAEs that the defenses of a shipped CLIP were fitted with: those hold just a part of them."""
    return [load(path.parent) for path in sorted(model.folder("sae").glob(f"*/{MANIFEST}"))]


def find(source: str | os.PathLike[str], hub: Hub | None = None) -> Checkpoint:
    """Read an SAE by name: a folder, or on the hub "hf://org/repo[/folder][@revision]" or "org/repo".

    Args:
        source: The name.
        hub: How the hub is asked.

    Raises:
        CheckpointError, IntegrityError, NonFiniteError: See `load`, and `Hub.fetch_folder`.
        ConfigError: An address on the hub of another form.
    """
    address = hub_source(source)
    if address is None:
        return load(source)
    return load((hub or Hub()).fetch_folder(address, MANIFEST, "an SAE of ours"))


def load(folder: str | os.PathLike[str]) -> Checkpoint:
    """Read an SAE that `save` wrote, check every byte of it, and recompute its golden triple.

    Raises:
        CheckpointError: A file is missing or unreadable, was written by a newer version, or the golden
            triple comes out differently.
        IntegrityError: A file's bytes are not the ones that were written.
        NonFiniteError: A weight is NaN or infinite.
    """
    root = Path(folder)
    return folders.read_whole(root / MANIFEST, SCHEMA, lambda: _load(root))


def _load(root: Path) -> Checkpoint:
    manifest = _read_manifest(root)
    if set(manifest["files"]) != {_WEIGHTS, _GOLDEN}:
        raise CheckpointError(
            f"{root / MANIFEST} lists the files {sorted(manifest['files'])}; an SAE has {_WEIGHTS} and {_GOLDEN}"
        )
    tensors = folders.read_files(root / MANIFEST, manifest["files"], "sha256")
    semantics = folders.typed("sae", manifest["sae"], _SAE_FIELDS)
    sae = SparseAutoencoder(SAEConfig.from_dict(semantics), tensors[_WEIGHTS])
    _check_golden(sae, tensors[_GOLDEN], root)
    clip = folders.typed("host", manifest["host"], _HOST_FIELDS)
    return Checkpoint(
        sae, manifest["hook_point"], clip["model"], clip["quick_gelu"], manifest["licence"], manifest["provenance"]
    )


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise folders.lacks_manifest(path, "an SAE is a folder that `defense import` or `checkpoint.save` wrote")
    return folders.typed(str(path), folders.read_manifest(path, SCHEMA, "an SAE"), _FIELDS)


@torch.inference_mode()
def _golden(sae: SparseAutoencoder) -> dict[str, np.ndarray]:
    """Return resid [n, d_model], acts [n, d_sae] and reconstruction [n, d_model] to be recomputed on load.

    Each row starts at b_dec and goes along a latent's encoder direction, further from row to row, so that latents
    fire whatever their thresholds. Of several candidates a row is the one that stays farthest from every edge of the
    activation rule: there the rounding of another machine cannot switch a latent on or off.
    """
    generator = torch.Generator().manual_seed(0)
    config = sae.config
    n = _N_GOLDEN * _N_CANDIDATES
    aims = sae.W_enc[:, torch.randint(config.d_sae, (n,), generator=generator)].T
    noise = torch.randn(n, config.d_model, generator=generator) / config.d_model**0.5
    directions = aims / aims.norm(dim=1, keepdim=True).clamp(min=1e-12) + noise / 4
    distances = 4.0 ** torch.arange(_N_GOLDEN) * max(1.0, float(sae.b_dec.norm()))
    candidates = sae.b_dec + distances.repeat_interleave(_N_CANDIDATES)[:, None] * directions
    best = _margin(sae, candidates).view(_N_GOLDEN, _N_CANDIDATES).argmax(1)
    resid = candidates.view(_N_GOLDEN, _N_CANDIDATES, -1)[torch.arange(_N_GOLDEN), best].contiguous()
    acts = sae.encode(resid)
    if not acts.any():
        raise CheckpointError("no latent of this SAE fires, however large the residual: its encoder is damaged")
    golden = {"resid": resid, "acts": acts, "reconstruction": sae.decode(acts, resid)}
    return {name: tensor.numpy() for name, tensor in golden.items()}


def _margin(sae: SparseAutoencoder, resid: Tensor) -> Tensor:
    """Return how far each row of resid [n, d_model] is from where the activation rule jumps, float [n].

    That is the smallest distance of a pre-activation from the edge at which a latent goes on or off, over the largest
    pre-activation of the row; 0 for rules without jumps.
    """
    config = sae.config
    pre_acts = normalize(resid, config.norm).z @ sae.W_enc + sae.folded_bias
    scale = pre_acts.abs().amax(1).clamp(min=1e-12)
    if config.act in ("jumprelu", "batchtopk"):
        return (pre_acts - sae.threshold).abs().amin(1) / scale
    if config.act == "gated":
        return pre_acts.abs().amin(1) / scale
    if config.act == "topk" and config.k is not None and config.k < config.d_sae:
        largest = pre_acts.topk(config.k + 1, dim=1).values
        return (largest[:, -2] - largest[:, -1]) / scale
    return torch.zeros_like(scale)  # continuous: any row will do


@torch.inference_mode()
def _check_golden(sae: SparseAutoencoder, golden: dict[str, np.ndarray], root: Path) -> None:
    shapes = {"resid": sae.config.d_model, "acts": sae.config.d_sae, "reconstruction": sae.config.d_model}
    found = {name: array.shape for name, array in golden.items()}
    if found != {name: (_N_GOLDEN, width) for name, width in shapes.items()}:
        raise CheckpointError(f"{root / _GOLDEN} holds {found}; this SAE has {_N_GOLDEN} rows of widths {shapes}")
    resid = torch.from_numpy(golden["resid"]).float()
    acts = sae.encode(resid)
    for name, got in (("acts", acts), ("reconstruction", sae.decode(acts, resid))):
        want = torch.from_numpy(golden[name]).float()
        difference = float(((got - want).abs().amax(1) / want.abs().amax(1).clamp(min=1e-12)).max())
        if not difference <= _GOLDEN_TOLERANCE:  # also where it is NaN
            raise CheckpointError(
                f"{root}: golden {name} come out differently, by {difference:.2g} of their size; its {MANIFEST} was "
                "edited, or means something else to this version. Import the SAE again"
            )
