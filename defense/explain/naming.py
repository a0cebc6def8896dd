"""What a latent does to the embedding, and that said in words: effects, directions and sparse words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.core.sae import SparseAutoencoder
from defense.hosts.attention_alone import attention_alone
from defense.hosts.tower import VisionTower

from .baselines import median_of
from .sums import NUMBERS_AT_ONCE, Sums

# --- what a latent does -----------------------------------------------------------------------------------------------


Lens = Literal["whole", "attention"]
"""What a latent's write is followed through: all that comes behind, or later attention alone."""


class Effects(NamedTuple):
    """What 1 of each latent does to the embedding, to first order, by the kind of token that it is written to.

    Attributes:
        cls: float32 [d_sae, d_embed].
        patch: float32 [d_sae, d_embed].
    """

    cls: Tensor
    patch: Tensor

    def mean(self, sums: Sums) -> Tensor:
        """Return the effect by how much a latent writes to either kind, float32 [d_sae, d_embed]."""
        written = (sums.written / sums.written.sum(1, keepdim=True).clamp(min=1e-12)).float()
        return written[:, :1] * self.cls + written[:, 1:] * self.patch


def effects_of(
    tower: VisionTower, hook_point: str, resid: Tensor, sae: SparseAutoencoder, shared: Tensor, lens: Lens = "whole"
) -> Effects:
    """Return what latents do to the embedding.

    Args:
        tower: The network.
        hook_point: Where it is linearized.
        resid: At which residuals, [n, pos, d_model].
        sae: The SAE.
        shared: Direction that all words share, which tells nothing apart and is taken out, [d_embed].
        lens: What is followed.

    Raises:
        ConfigError: Attention alone cannot be followed here; see `attention_alone`.
    """
    with attention_alone(tower, hook_point) if lens == "attention" else nullcontext():
        jacobians = mean_jacobians(tower, hook_point, resid)
    found = (sae.W_dec @ each.T for each in jacobians)
    return Effects(*(each - (each @ shared)[:, None] * shared for each in found))


def attention_share(attention: Tensor, whole: Tensor) -> np.ndarray:
    """Return how much of each effect goes through attention alone, float64 [d_sae]; NaN for none at all.

    The part of the whole effect along itself: 1 where both are the same, 0 where attention does nothing to it,
    negative where later MLPs turn it around.

    Args:
        attention: Effects through attention alone, [d_sae, d_embed].
        whole: Effects through all that comes behind, [d_sae, d_embed].
    """
    attention, whole = attention.double(), whole.double()
    length = whole.square().sum(1)
    share = ((attention * whole).sum(1) / length.clamp(min=1e-30)).cpu().numpy()
    return np.where(length.cpu().numpy() > 0, share, np.nan)


def effect_lines(columns: Mapping[str, np.ndarray]) -> list[str]:
    """Return lines on a catalogue's columns of effects; none of those that it does not have."""
    texts = {
        "spread": "share of pictures on which a latent matters",
        "attention_share": "part of a latent's effect that goes through attention alone",
    }
    found = {text: median_of(columns[name]) for name, text in texts.items() if name in columns}
    return [
        f"{text}, median [95 %]: {each['median']:.3f} [{each['low']:.3f}-{each['high']:.3f}]"
        for text, each in found.items()
        if each["n"]
    ]


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
    index, weight = sparse_words(directions, words_apart(text_embeds), n_names)
    return tuple(
        tuple((words[i], float(value)) for i, value in zip(row, values, strict=True) if i >= 0)
        for row, values in zip(index.tolist(), weight, strict=True)
    )


def words_apart(text_embeds: Tensor) -> np.ndarray:
    """Return the embeddings of words without what all of them share, of length 1, float32 [n_words, d_embed]."""
    shared = functional.normalize(text_embeds.mean(0), dim=0)
    return functional.normalize(text_embeds - (text_embeds @ shared)[:, None] * shared, dim=1).cpu().numpy()


N_NEAREST = 5
"""Words nearest to a direction that have to be alike for it to be consistent."""


def wording(directions: np.ndarray, words: np.ndarray, n: int = N_NEAREST) -> dict[str, np.ndarray]:
    """Return whether the words near a direction are alike, and how many directions share a word, float64 [n] each.

    "consistency" is the mean cosine of all pairs of the n words nearest to it; "n_same_word" counts the other
    directions to which the same word is nearest. NaN for a direction of 0, as of a latent that never fires.

    CLIP-InterpreT (arXiv:2409.06579) lets a language model say which property a unit's words share, and by how many
    units it is shared; here words are alike as far as their embeddings are.

    Args:
        directions: Of length 1, or 0, float [n_directions, d_embed].
        words: What `words_apart` returns, float [n_words, d_embed].
        n: Words, at most as many as there are.
    """
    n = min(n, len(words))
    is_known = np.linalg.norm(directions, axis=1) > 0
    nearest = np.argsort(-(directions @ words.T), axis=1, kind="stable")[:, :n]
    together = np.square(words[nearest].astype(np.float64).sum(1)).sum(1)  # n of themselves, and each pair twice
    consistency = (together - n) / (n * (n - 1)) if n > 1 else np.full(len(directions), np.nan)
    counts = np.bincount(nearest[is_known, 0], minlength=len(words))
    found = {"consistency": consistency, "n_same_word": counts[nearest[:, 0]] - 1.0}
    return {name: np.where(is_known, column, np.nan) for name, column in found.items()}


def wording_beside_random(
    directions: np.ndarray, words: np.ndarray, seed: int
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return `wording`, and what it comes to beside as many random directions, as JSON values.

    Args:
        directions: See `wording`.
        words: See `wording`.
        seed: Of the random directions, which lie where words do.
    """
    columns = wording(directions, words)
    n = int((~np.isnan(columns["n_same_word"])).sum())
    drawn = np.random.default_rng(seed).normal(size=(max(1, n), len(words))) @ words
    control = wording(drawn / np.linalg.norm(drawn, axis=1, keepdims=True), words)
    total = np.square(words.astype(np.float64).sum(0)).sum()
    return columns, {
        "n_nearest": min(N_NEAREST, len(words)),
        "all_pairs": round(float((total - len(words)) / (len(words) * (len(words) - 1))), 4),
        **{
            kind: {
                "consistency": median_of(each["consistency"]),
                "share_alone": round(float((each["n_same_word"] == 0).sum() / max(1, n)), 4),
            }
            for kind, each in (("latents", columns), ("random", control))
        },
    }


def wording_line(found: Mapping[str, Any]) -> str:
    """Return a line on what `wording_beside_random` found."""
    parts = [
        f"{found[kind]['consistency'].get('median', float('nan')):.3f} for {name} "
        f"({100 * found[kind]['share_alone']:.0f} % alone with their word)"
        for kind, name in (("latents", "latents"), ("random", "random directions"))
    ]
    return (
        f"cosine of the {found['n_nearest']} words nearest to a direction, median: {', '.join(parts)}; all pairs "
        f"{found['all_pairs']:.3f}"
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
