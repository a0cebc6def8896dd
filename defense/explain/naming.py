"""What a latent does to the embedding, said in words: directions, sparse words, steerability."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.core.sae import SparseAutoencoder, normalize
from defense.hosts.clip import Clip
from defense.hosts.tower import BATCH, VisionTower

from .sums import NUMBERS_AT_ONCE, Sums

STEER = 2.0
"""Steered activation, as a multiple of the mean norm of what the encoder sees. On the embedded model steerability is
three quarters of what it is at twice that, from where on it hardly grows."""


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


@torch.inference_mode()
def steerability(
    clip: Clip,
    hook_point: str,
    resid: Tensor,
    sae: SparseAutoencoder,
    text_embeds: Tensor,
    which: Tensor,
    steer: float = STEER,
) -> np.ndarray:
    """Return how far the answer moves when a latent is set to a high value on every token, float64 [d_sae].

        S = sum over words c of (mean over pictures of (p_steered,c - p_default,c))^2

    The published notebooks take 192 pictures and steer to fixed values that suit one model. Here the value is a
    multiple of the norm of what the encoder sees, and S is estimated without bias from few pictures: the products of a
    picture's change with itself, which are large wherever steering just destroys the picture, are left out.

    Args:
        clip: The CLIP.
        hook_point: Where the SAE reads.
        resid: Pictures to steer on, at least two, [n, pos, d_model].
        sae: The SAE.
        text_embeds: Of the words, [n_words, d_embed], normalized.
        which: Latents to steer, bool [d_sae]; the others get NaN.
        steer: That multiple.

    Source: Joseph et al. 2025, arXiv:2504.08729, as its notebooks compute it.
    """
    tokens = clip.tower.positions(hook_point, "all")
    read = resid[:, tokens]
    z, scale, _ = normalize(read, sae.config.norm)
    target = steer * float(z.norm(dim=-1).mean())
    acts = sae.encode(read)

    def answers(edited: Tensor) -> Tensor:
        return (clip.logit_scale * clip.tower.embeds_from(edited, hook_point) @ text_embeds.T).softmax(-1)

    default = answers(resid)
    found = torch.full((sae.config.d_sae,), torch.nan, dtype=torch.float64)
    latents = which.nonzero()[:, 0].tolist()
    at_once = max(1, BATCH // len(resid))
    for first in range(0, len(latents), at_once):
        some = latents[first : first + at_once]
        edited = resid.repeat(len(some), 1, 1, 1)  # [latent, n, pos, d_model]
        for row, latent in enumerate(some):
            push = (target - acts[..., latent, None]) * sae.W_dec[latent]
            edited[row, :, tokens] += push if scale is None else push * scale
        moved = answers(edited.flatten(0, 1)).unflatten(0, (len(some), -1)) - default  # [latent, n, n_words]
        products = moved.sum(1).square().sum(-1) - moved.square().sum((1, 2))
        found[some] = (products / (len(resid) * (len(resid) - 1))).double().cpu()
    return found.numpy()


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
