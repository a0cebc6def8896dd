"""The bias that sets how many tokens of a random workload fire.

A token *fires* if a latent of S has a positive pre-activation there. What a defense costs depends on how many do, so
the benchmarks of speed shift the encoder biases of S until a wanted share fires.
"""

from __future__ import annotations

import numpy as np


def firing_bias(peaks: np.ndarray, share: float) -> float:
    """Return the encoder bias, the same for all of S, with which just a share of tokens fires.

    Args:
        peaks: The largest pre-activation in S at each token, without a bias, [tokens].
        share: Wanted, in [0, 1]; rounded to whole tokens.
    """
    n_firing = round(share * len(peaks))
    slack = 0.05 * np.abs(peaks).max()
    falling = np.sort(peaks)[::-1]
    edges = np.concatenate([falling[:1] + slack, falling, falling[-1:] - slack])
    return -float(edges[n_firing : n_firing + 2].mean())
