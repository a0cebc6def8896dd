"""What a latent does to the embedding, said in words: directions and sparse words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.core.sae import SparseAutoencoder
from defense.hosts.tower import VisionTower

from .sums import NUMBERS_AT_ONCE, Sums

# --- what a latent does -----------------------------------------------------------------------------------------------


def directions_of(
    tower: VisionTower, hook_point: str, resid: Tensor, sae: SparseAutoencoder, sums: Sums, shared: Tensor
) -> np.ndarray:
    """Return where in embedding space each latent pushes, of length 1, float32 [d_sae, d_embed].

    Args:
        tower: The network.
        hook_point: Where it is linearized.
        resid: At which residuals, [n, pos, d_model].
        sae: The SAE.
        sums: Says how much a latent writes to CLS and to patches.
        shared: Direction that all words share, which tells nothing apart, [d_embed].
    """
    to_cls, to_patch = mean_jacobians(tower, hook_point, resid)
    written = (sums.written / sums.written.sum(1, keepdim=True).clamp(min=1e-12)).float()
    directions = written[:, :1] * (sae.W_dec @ to_cls.T) + written[:, 1:] * (sae.W_dec @ to_patch.T)
    directions -= (directions @ shared)[:, None] * shared
    return functional.normalize(directions, dim=1).cpu().numpy()


def mean_jacobians(tower: VisionTower, hook_point: str, resid: Tensor, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Return the Jacobian of image_embeds by one CLS token and by one patch, [d_embed, d_model] each.

    The mean over pictures and over tokens of the kind; 0 for a kind that the tower does not have.

    Args:
        tower: The network.
        hook_point: Where it is linearized.
        resid: At which residuals, [n, pos, d_model].
        batch: Pictures at once.
    """
    n_prefix = tower.n_prefix
    sums: list[list[Tensor]] = []
    for part in resid.split(batch):
        leaf = part.clone().requires_grad_()
        embeds = tower.embeds_from(leaf, hook_point).sum(0)
        slopes = [torch.autograd.grad(each, leaf, retain_graph=True)[0].sum(0) for each in embeds]  # [pos, d_model]
        sums.append([torch.stack([slope[tokens].sum(0) for slope in slopes]) for tokens in _kinds(n_prefix)])
    n_patches = resid.shape[1] - n_prefix
    to_cls, to_patch = (torch.stack(kind).sum(0) / len(resid) for kind in zip(*sums, strict=True))
    return to_cls / max(1, n_prefix), to_patch / n_patches


def _kinds(n_prefix: int) -> tuple[slice, slice]:
    return slice(0, n_prefix), slice(n_prefix, None)


# --- names ------------------------------------------------------------------------------------------------------------


def names_of(
    directions: np.ndarray, text_embeds: Tensor, words: Sequence[str], n_names: int
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return each direction's words with their weights."""
    shared = functional.normalize(text_embeds.mean(0), dim=0)
    apart = functional.normalize(text_embeds - (text_embeds @ shared)[:, None] * shared, dim=1).cpu().numpy()
    index, weight = sparse_words(directions, apart, n_names)
    return tuple(
        tuple((words[i], float(value)) for i, value in zip(row, values, strict=True) if i >= 0)
        for row, values in zip(index.tolist(), weight, strict=True)
    )


def sparse_words(targets: np.ndarray, words: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Write each target as a sum of at most n words with positive weights: orthogonal matching pursuit.

    The word nearest to what is left joins; then all weights are fitted anew. It ends early where no word is near, or
    a weight would turn negative.

    Args:
        targets: float32 [n_targets, d_embed].
        words: Unit vectors, float32 [n_words, d_embed].
        n: Words per target.

    Returns:
        Indices int64 [n_targets, n], -1 for none, and weights float32 [n_targets, n]; by falling weight.
    """
    index = np.full((len(targets), n), -1, np.int64)
    weight = np.zeros((len(targets), n), np.float32)
    at_once = max(1, NUMBERS_AT_ONCE // len(words))
    is_open = np.linalg.norm(targets, axis=1) > 0
    residue = targets.copy()
    for place in range(n):
        for rows in np.split(np.flatnonzero(is_open), range(at_once, int(is_open.sum()), at_once)):
            nearness = residue[rows] @ words.T
            best = nearness.argmax(1)
            for row, word, cosine in zip(rows, best, nearness.max(1), strict=True):
                chosen = [*index[row, :place], word]
                fitted = np.linalg.lstsq(words[chosen].T, targets[row], rcond=None)[0]
                if cosine <= 1e-6 or word in index[row] or (fitted <= 0).any():
                    is_open[row] = False
                    continue
                index[row, : place + 1], weight[row, : place + 1] = chosen, fitted
                residue[row] = targets[row] - fitted @ words[chosen]
    order = np.argsort(-weight, axis=1, kind="stable")
    return np.take_along_axis(index, order, 1), np.take_along_axis(weight, order, 1)
