"""Random SAEs, with S, and residuals to edit: what the variants of the benchmark of the kernels are given."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from defense.benchmarks import kernel_cases
from defense.benchmarks.firing import firing_bias
from defense.benchmarks.kernel_cases import SEED, Case
from defense.core.config import Act, Norm
from defense.core.ops.reference import Encoder
from defense.core.sae import normalize

_EMPHASIS = 16.0
"""Length of the encoder columns of S; the others have length 1."""


@dataclass(frozen=True)
class Workload:
    """An SAE, its S, and a residual.

    Attributes:
        case: The shape.
        norm: Input normalization.
        share: Wanted share of tokens at which a latent of S has a positive pre-activation.
        resid: [batch, pos, d_model].
        encoder: The encoder parts needed for the activations of S.
        latents: Indices of S, int64 [n].
        W_dec: [d_sae, d_model].
        W_dec_S: The rows of W_dec that belong to S, [n, d_model].
        removal: 1 - gain_i, [n].
    """

    case: Case
    norm: Norm
    share: float
    resid: Tensor
    encoder: Encoder
    latents: Tensor
    W_dec: Tensor
    W_dec_S: Tensor
    removal: Tensor

    @property
    def rows(self) -> Tensor:
        """The residual as [tokens, d_model]."""
        return self.resid.flatten(0, 1)

    @property
    def n_firing(self) -> int:
        """Tokens at which a latent of S has a positive pre-activation."""
        z = normalize(self.rows.float(), self.norm).z
        return int((z @ self.encoder.W_S.float() + self.encoder.b_S.float() > 0).any(1).sum())


def draw(
    case: Case, dtype: torch.dtype, n_set: int, share: float, *, act: Act = "topk", norm: Norm = "none"
) -> Workload:
    """Return a random workload in which about `share` of the tokens fire; rounding to `dtype` may move some.

    Args:
        case: The shape.
        dtype: Of weights and residual.
        n_set: Latents in S.
        share: Wanted share of tokens at which a latent of S has a positive pre-activation.
        act: Activation rule: "topk", "jumprelu" or "relu".
        norm: Input normalization.
    """
    generator = torch.Generator(kernel_cases.DEVICE).manual_seed(SEED)
    normal = partial(torch.randn, generator=generator, device=kernel_cases.DEVICE)
    resid = normal(case.batch, case.pos, case.d_model).to(dtype)
    directions = torch.nn.functional.normalize(normal(case.d_sae, case.d_model), dim=1)
    latents = torch.randperm(case.d_sae, generator=generator, device=kernel_cases.DEVICE)[:n_set].sort().values
    removal = torch.rand(n_set, generator=generator, device=kernel_cases.DEVICE) * 0.9 + 0.1
    W_enc = directions.T.contiguous()
    W_enc[:, latents] *= _EMPHASIS
    W_enc, b = W_enc.to(dtype), torch.zeros(case.d_sae, device=kernel_cases.DEVICE)
    z = normalize(resid.flatten(0, 1).float(), norm).z
    peaks = (z @ W_enc[:, latents].float()).amax(1)
    b[latents] = firing_bias(peaks.double().cpu().numpy(), share)
    b = b.to(dtype)
    is_topk = act == "topk"
    encoder = Encoder(
        W_S=W_enc[:, latents],
        b_S=b[latents],
        threshold_S=torch.rand(n_set, generator=generator, device=kernel_cases.DEVICE) if act == "jumprelu" else None,
        W_mag_S=None,
        b_mag_S=None,
        W_enc=W_enc if is_topk else None,
        b=b if is_topk else None,
        latents=latents if is_topk else None,
        k=case.k if is_topk else 0,
        b_others=b.index_fill(0, latents, -torch.inf) if is_topk else None,
    )
    W_dec = directions.to(dtype)
    return Workload(case, norm, share, resid, encoder, latents, W_dec, W_dec[latents], removal.to(dtype))
