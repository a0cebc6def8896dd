"""The shapes that the benchmark of the kernels times, and those that its parity gate checks.

Other modules of the benchmark read these constants through this one, so that a test can put small ones in their place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from defense.benchmarks.firing import shares_to_time
from defense.core.config import Act, Norm

DEVICE = "cuda"
SEED = 0
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        model: Name of a model that has this shape.
        batch: Pictures.
        pos: Tokens of a picture.
        d_model: Width of the residual.
        d_sae: Latents.
        k: Latents that a TopK rule keeps at a token.
    """

    model: str
    batch: int
    pos: int
    d_model: int
    d_sae: int
    k: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all pictures."""
        return self.batch * self.pos


CASES = (
    Case("ViT-B-32", 256, 50, 768, 49_152, 64),
    Case("ViT-B-16", 64, 197, 768, 12_288, 32),
    Case("ViT-L-14", 64, 257, 1024, 65_536, 32),
)
END_TO_END = ((CASES[0], 8), (CASES[2], 16))
"""Shapes of whole models, and the block that is edited."""
TILES = (
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
    (128, 128, 64, 8, 3, 1),
    (128, 128, 64, 4, 3, 2),
    (256, 128, 64, 8, 3, 1),
    (64, 256, 64, 4, 3, 1),
)
"""Candidates for the tile on Hopper GPUs; each holds the fields of `fused.Tile`."""
SET_SIZES = (8, 64, 512)
"""Latents in S."""
SHARES = shares_to_time()
"""Of tokens that fire, that is, at which a latent of S has a positive pre-activation."""
DEFAULT_SET, DEFAULT_SHARE = 64, 0.05
"""What is timed with every variant, and with whole models."""

_ODD = (Case("odd", 1, 1, 48, 300, 32), Case("odd", 2, 50, 768, 1000, 1), Case("odd", 3, 257, 1024, 777, 777))
_COUPLED_OR_NOT: tuple[Act, ...] = ("topk", "jumprelu")
_PRECISIONS: tuple[tuple[torch.dtype, Norm], ...] = (
    (torch.float32, "none"),
    (torch.float32, "layer_norm"),
    (torch.bfloat16, "none"),
    (torch.bfloat16, "constant_norm_rescale"),
    (torch.float16, "layer_norm"),
)
PARITY: tuple[tuple[Case, torch.dtype, Act, Norm], ...] = (
    *((case, dtype, act, norm) for case in _ODD for act in _COUPLED_OR_NOT for dtype, norm in _PRECISIONS),
    *((replace(case, batch=2), dtype, act, "none") for case in CASES for dtype in HALF for act in _COUPLED_OR_NOT),
)
"""What the parity gate checks: shape, dtype, activation rule, norm. Odd sizes, and the shapes that are timed."""
