"""What the kernels of the edit `scale` are given, whatever the activation rule."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Edit(NamedTuple):
    """A residual, the positions that are edited, and the latents of S."""

    edited: Tensor
    """[batch, pos, d_model], of any strides; `resid` itself, or what another set left of it."""
    resid: Tensor
    """What the SAE reads, [batch, pos, d_model], of any strides."""
    first: int
    """First position that is edited."""
    last: int
    """One past the last position that is edited."""
    norm: str
    """The SAE's input normalization."""
    W_S: Tensor
    """Columns of W_enc, [d_model, n]."""
    b_S: Tensor
    """Folded bias, [n]."""
    W_dec_S: Tensor
    """Decoder rows, [n, d_model]."""
    removal: Tensor
    """1 - gain_i, [n]."""

    @property
    def n_set(self) -> int:
        """Latents in S."""
        return len(self.b_S)
