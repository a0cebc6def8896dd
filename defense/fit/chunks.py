"""How much goes at once, by bytes: what a picture takes differs a hundredfold between towers and SAEs."""

from __future__ import annotations

from collections.abc import Iterator

from defense.hosts.tower import VisionTower, block_of

AT_ONCE = 2**27
"""Bytes that one step computes on, on top of what is kept."""

COPIES = 3
"""Matrices [tokens, d_sae] that encoding with an SAE holds at a time."""

_FLOATS_PER_BLOCK = 24
"""Numbers, in units of d_model, that a token takes in a block whose gradient is wanted: about that many in a ViT."""


def chunks(n: int, bytes_each: int) -> Iterator[slice]:
    """Yield slices of `n` things, each of which takes `bytes_each`, that are computed at once.

    Where they are cut depends on the two numbers alone, since sums over other chunks differ in their last bits.

    Args:
        n: How many there are.
        bytes_each: What one of them takes while it is computed on; a slice takes `AT_ONCE`, or holds one thing.
    """
    size = max(1, AT_ONCE // max(1, bytes_each))
    for start in range(0, n, size):
        yield slice(start, min(n, start + size))


def bytes_of_pass(tower: VisionTower, n_blocks: int, n_pos: int) -> int:
    """Return about how many bytes a picture of `n_pos` tokens takes in a pass through some blocks and back."""
    return 4 * n_pos * tower.d_model * _FLOATS_PER_BLOCK * (n_blocks + 1)


def bytes_behind(tower: VisionTower, hook_point: str, n_pos: int) -> int:
    """Return `bytes_of_pass` of the blocks behind a hook point."""
    return bytes_of_pass(tower, len(tower.blocks) - 1 - block_of(hook_point), n_pos)
