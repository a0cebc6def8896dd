"""The text tower of a CLIP, whichever library it is of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class TextTower:
    """What of a CLIP embeds texts.

    Attributes:
        encode: From token ids int64 [n, context_length], on the model's device, to text embeddings [n, d_embed], not
            normalized.
        table: The token embeddings; None where they are not known.
    """

    encode: Callable[[Tensor], Tensor]
    table: nn.Module | None
