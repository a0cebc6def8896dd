"""How sure a share is. Needs neither torch nor scipy."""

from __future__ import annotations

import math

Z = 1.959964
"""Standard normal quantile of a 95 % interval."""


def wilson(hits: float, n: int) -> tuple[float, float, float]:
    """Return a share, hits / n, and its 95 % interval; of nothing the share is 0, and 1 is in it.

    Args:
        hits: In [0, n]; need not be whole, as a mean of several draws.
        n: Of how many.

    Source: Wilson 1927, JASA 22(158), the score interval.
    """
    if not n:
        return 0.0, 0.0, 1.0
    share, square = hits / n, Z**2 / n
    middle = (share + square / 2) / (1 + square)
    half = Z * math.sqrt(share * (1 - share) / n + square / (4 * n)) / (1 + square)
    return share, max(0.0, middle - half), min(1.0, middle + half)
