"""On which share of the pictures a latent matters to the embedding, from sums of one pass."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_DEGREES = (2, 4)


class Spread:
    """Adds up how much each latent writes on a picture, to CLS-like tokens (a) and to patches (b).

    To first order the latent then moves the embedding by `a u + b v`, u and v its row through the Jacobian by a token
    of either kind. With e the squared length of that, the share is `(sum e)^2 / (n sum e^2)`, the participation ratio:
    k/n where it does as much on k of n pictures and nothing on the others. e and its square are polynomials in a and b,
    so sums of their monomials are enough, and u and v may come afterwards.

    That neurons matter on few pictures was found with the second-order lens (arXiv:2406.04341, section 4), by a
    threshold in place of this ratio.

    Args:
        d_sae: Number of latents.
        device: Where the sums are.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.n = 0
        self.sums = {
            (degree - k, k): torch.zeros(d_sae, dtype=torch.float64, device=device)
            for degree in _DEGREES
            for k in range(degree + 1)
        }

    def add(self, acts: Tensor, *, n_cls: int) -> None:
        """Take in pictures: acts [batch, pos, d_sae], none negative, CLS-like tokens first."""
        self.n += len(acts)
        a, b = (tokens.sum(1, dtype=torch.float64) for tokens in (acts[:, :n_cls], acts[:, n_cls:]))
        for (i, j), sofar in self.sums.items():
            sofar += (a**i * b**j).sum(0)

    def shares(self, u: Tensor, v: Tensor) -> np.ndarray:
        """Return the share of pictures, float64 [d_sae], in (0, 1]; NaN for a latent without effect.

        Args:
            u: Effect of 1 written to a CLS-like token, float [d_sae, d_embed].
            v: Effect of 1 written to a patch, float [d_sae, d_embed].
        """
        uu, uv, vv = (x.double().mul(y.double()).sum(1) for x, y in ((u, u), (u, v), (v, v)))
        m = self.sums
        energy = uu * m[2, 0] + 2 * uv * m[1, 1] + vv * m[0, 2]
        square = (
            uu**2 * m[4, 0]
            + 4 * uu * uv * m[3, 1]
            + (4 * uv**2 + 2 * uu * vv) * m[2, 2]
            + 4 * uv * vv * m[1, 3]
            + vv**2 * m[0, 4]
        )
        share = (energy**2 / (self.n * square)).cpu().numpy()
        return np.where(energy.cpu().numpy() > 0, share, np.nan)
