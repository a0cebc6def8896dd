"""What a defense did to one picture: which latents it removed, where, and what that changed.

Two sums are told apart throughout. What was removed in all is measured on the residual itself: `Explanation.heatmap`
and `fraction` hold the difference that the edits made. What a latent wrote is its activation times its decoder row:
`Removed.energy` and `Removed.map`. Decoder rows are not orthogonal, so squared norms of the parts do not add up to that
of the whole; and the edit "project" removes more than the parts, namely everything in the span of the rows that fire.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.core.latents import token_slice
from defense.data.preprocess import Box
from defense.hosts.controls import Controls

if TYPE_CHECKING:
    from torch import Tensor

    from defense.core.suppress import Suppression, Suppressor

    from .answers import Prediction


__all__ = ["Explanation", "Removed"]


@dataclass(frozen=True)
class Removed:
    """One latent that was suppressed in a picture.

    Attributes:
        hook_point: Where.
        set_name: The latent set it belongs to, e.g. "text"; "(steered)" for one that was steered.
        latent: Its index in the SAE.
        energy: Squared norm of what it had written there, times what the edit takes of it, summed over tokens. (For a
            latent that is set to a value, of the change.)
        share: That energy as a fraction of all latents' energy: of the sum of the parts, not of what was removed in
            all, which the module tells apart.
        activation: Its largest activation over the tokens that are edited.
        map: The same energy at each patch, float32 [rows, columns]. It sums to `energy` less what was written to the
            tokens before the patches (CLS).
    """

    hook_point: str
    set_name: str
    latent: int
    energy: float
    share: float
    activation: float
    map: np.ndarray = field(repr=False, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        return {**vars(self), "map": self.map.tolist()}


@dataclass(frozen=True)
class Explanation:
    """What the defense did to one picture.

    Attributes:
        plain: The stock CLIP's answer.
        robust: The defended one's.
        removed: The latents that were suppressed, by falling energy.
        heatmap: Squared norm of the difference that all edits made at each patch, summed over the edited blocks,
            float32 [rows, columns].
        fraction: Norm of that difference over the norm of the residual, over all tokens of the edited blocks.
        warnings: What the decoder had to say about the file.
        plain_ms: Time that the image tower took without the defense, in milliseconds.
        robust_ms: The same with it.
        box: The part of the picture that the model saw and the maps cover: left, upper, right and lower edge in
            pixels of the upright picture. Beyond the picture where that was padded.
        controls: What was active.
    """

    plain: Prediction
    robust: Prediction
    removed: tuple[Removed, ...]
    heatmap: np.ndarray
    fraction: float
    warnings: tuple[str, ...]
    plain_ms: float
    robust_ms: float
    box: Box
    controls: Controls

    @property
    def changed(self) -> bool:
        """Whether the defense changed the answer."""
        return bool(self.plain[0]["label"] != self.robust[0]["label"])

    @property
    def where(self) -> str:
        """On which tokens something was removed, in words: the patches, or the CLS token where no patch was edited."""
        n_patches = int((self.heatmap > 0).sum())
        if self.removed and n_patches == 0:
            return "the CLS token"
        return f"{n_patches} of {self.heatmap.size} patches"

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes, and `changed`, as JSON values."""
        return {
            "plain": self.plain,
            "robust": self.robust,
            "changed": self.changed,
            "removed": [item.to_dict() for item in self.removed],
            "heatmap": self.heatmap.tolist(),
            "fraction": self.fraction,
            "warnings": list(self.warnings),
            "plain_ms": self.plain_ms,
            "robust_ms": self.robust_ms,
            "box": list(self.box),
            "controls": self.controls.to_dict(),
        }


def account(told: Mapping[str, Suppression], grid: tuple[int, int]) -> tuple[tuple[Removed, ...], np.ndarray, float]:
    """Return what was removed from one picture: `removed`, `heatmap` and `fraction` of `Explanation`.

    Args:
        told: What `AttachedDefense.recording` yields, after a pass of one picture.
        grid: Patches down and across.
    """
    written: list[Removed] = []
    heatmap = np.zeros(grid, np.float32)
    lost = held = 0.0
    for hook_point, suppression in told.items():
        resid = suppression.resid
        per_token = (resid.float() - suppression.edited.float())[0].square().sum(-1)
        n_prefix = len(per_token) - math.prod(grid)
        lost += float(per_token.sum())
        held += float(resid.float().square().sum())
        heatmap += per_token[n_prefix:].reshape(grid).cpu().numpy()
        for part, acts in zip(suppression.suppressors, suppression.acts, strict=True):
            written += _written(hook_point, part, resid, acts, token_slice(part.scope, n_prefix), grid)
    total = sum(item.energy for item in written)
    ranked = sorted((item for item in written if item.energy > 0), key=lambda item: -item.energy)
    removed = tuple(replace(item, share=item.energy / total) for item in ranked)
    return removed, heatmap, math.sqrt(lost / held) if held else 0.0


def _written(
    hook_point: str, part: Suppressor, resid: Tensor, acts: Tensor, tokens: slice, grid: tuple[int, ...]
) -> list[Removed]:
    """Return what each latent of one suppressor wrote into a residual [1, pos, d_model]; shares are not known yet.

    Args:
        hook_point: Of the residual.
        part: The suppressor, of n latents.
        resid: The residual, before the edit.
        acts: Activations of the n latents at `tokens`, [1, n_tokens, n].
        tokens: The positions that are edited.
        grid: Patches down and across.
    """
    n_pos, n = resid.shape[1], len(part.latents)
    energies, activations = np.zeros((n_pos, n), np.float32), np.zeros((n_pos, n), np.float32)
    energies[tokens] = part.energy(resid[:, tokens], acts)[0].cpu().numpy()
    activations[tokens] = acts[0].float().cpu().numpy()
    maps = energies[n_pos - math.prod(grid) :].T.reshape(n, *grid)
    return [
        Removed(hook_point, part.latent_set.name, latent, float(energy), 0.0, float(activation), map)
        for latent, energy, activation, map in zip(
            part.latents.tolist(), energies.sum(0), _largest(activations), maps, strict=True
        )
    ]


def _largest(activations: np.ndarray) -> np.ndarray:
    """Return the value of largest magnitude of each column: a TopK SAE without ReLU has negative activations."""
    rows = np.abs(activations).argmax(0)
    largest: np.ndarray = activations[rows, np.arange(activations.shape[1])]
    return largest
