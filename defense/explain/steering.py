"""How far the answers move when one direction of the residual stream is set to a high value on every token."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from defense.core.config import Norm
from defense.core.sae import SparseAutoencoder, normalize
from defense.hosts.clip import Clip
from defense.hosts.tower import BATCH


class Steering:
    """Pictures to steer on, and the words whose probabilities are watched.

        S_c = (mean over pictures of (p_steered,c - p_default,c))^2,     S = sum over words c of S_c

    The published notebooks take 192 pictures and steer to fixed values that suit one model. Here the value is a
    multiple of the norm of what the encoder sees, and S_c is estimated without bias from few pictures: the products of
    a picture's change with itself, which are large wherever steering just destroys the picture, are left out.

    Args:
        clip: The CLIP.
        hook_point: Where directions are steered.
        resid: Of the pictures, at least two, [n, pos, d_model].
        text_embeds: Of the words, [n_words, d_embed], normalized.
        norm: What the SAE's encoder does to its input; directions are ones of its output.

    Attributes:
        read: The tokens that are steered, [n, n_tokens, d_model].
        scale: What `normalize` divided them by; None where nothing.

    Source: Joseph et al. 2025, arXiv:2504.08729, as its notebooks compute it.
    """

    def __init__(self, clip: Clip, hook_point: str, resid: Tensor, text_embeds: Tensor, norm: Norm) -> None:
        self.clip, self.hook_point, self.resid, self.text_embeds = clip, hook_point, resid, text_embeds
        self.tokens = clip.tower.positions(hook_point, "all")
        self.read = resid[:, self.tokens]
        z, self.scale, _ = normalize(self.read, norm)
        self.size = float(z.norm(dim=-1).mean())
        with torch.inference_mode():
            self.default = self._answers(resid)

    def _answers(self, resid: Tensor) -> Tensor:
        embeds = self.clip.tower.embeds_from(resid, self.hook_point)
        return (self.clip.logit_scale * embeds @ self.text_embeds.T).softmax(-1)

    @torch.inference_mode()
    def moves(self, rows: Tensor, acts: Tensor, strength: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield some units at a time: which, S_c [n_some, n_words], and the mean change of each probability.

        Args:
            rows: What a unit at 1 adds to the encoder's input, [n_units, d_model].
            acts: The units' values, [n, n_tokens, n_units].
            strength: What they are set to, as a multiple of the mean norm of the encoder's input.
        """
        n, at_once = len(self.resid), max(1, BATCH // len(self.resid))
        for first in range(0, len(rows), at_once):
            some = slice(first, first + at_once)
            count = len(rows[some])
            edited = self.resid.repeat(count, 1, 1, 1)  # [unit, n, pos, d_model]
            for place, row in enumerate(rows[some]):
                push = (strength * self.size - acts[..., first + place, None]) * row
                edited[place, :, self.tokens] += push if self.scale is None else push * self.scale
            moved = self._answers(edited.flatten(0, 1)).unflatten(0, (count, -1)) - self.default  # [unit, n, n_words]
            squares = (moved.sum(1).square() - moved.square().sum(1)) / (n * (n - 1))
            yield some, squares, moved.mean(1)


def steerability(steering: Steering, sae: SparseAutoencoder, which: Tensor, steer: float) -> np.ndarray:
    """Return how far the answer moves when a latent is set to a high value on every token, S, float64 [d_sae].

    Args:
        steering: On which pictures; of this SAE's hook point and norm.
        sae: The SAE.
        which: Latents to steer, bool [d_sae]; the others get NaN.
        steer: That value, as a multiple of the mean norm of what the encoder sees.

    Source: see `Steering`.
    """
    found = torch.full((sae.config.d_sae,), torch.nan, dtype=torch.float64)
    latents = which.nonzero()[:, 0].cpu()
    acts = sae.encode(steering.read)
    for some, squares, _ in steering.moves(sae.W_dec[latents], acts[..., latents], steer):
        found[latents[some]] = squares.sum(1).double().cpu()
    return found.numpy()
