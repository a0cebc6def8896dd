"""`suppress`: the edit `scale` as one operator of torch, whatever the activation rule."""

from typing import Any

import torch
from torch import Tensor

from . import threshold, topk
from .edit import Edit


@torch.library.custom_op("clip_defense::suppress", mutates_args=())
def suppress(
    edited: Tensor,
    resid: Tensor,
    first: int,
    last: int,
    norm: str,
    W_S: Tensor,
    b_S: Tensor,
    W_dec_S: Tensor,
    removal: Tensor,
    threshold_S: Tensor | None,
    W_enc: Tensor | None,
    b_others: Tensor | None,
    k: int,
) -> Tensor:
    """Return `edited` less what an SAE's latents of S write into positions first to last - 1 of `resid`.

    Args:
        edited: See `Edit`, as for all down to `removal`.
        resid: As above.
        first: As above.
        last: As above.
        norm: As above.
        W_S: As above.
        b_S: As above.
        W_dec_S: As above.
        removal: As above.
        threshold_S: JumpReLU and BatchTopK: f = h where h > threshold, [n].
        W_enc: TopK: the whole encoder, [d_model, d_sae].
        b_others: TopK: the whole folded bias, -inf for the latents of S, [d_sae].
        k: TopK: how many latents count at a token.
    """
    out = torch.empty_like(edited)
    edit = Edit(edited, resid, first, last, norm, W_S, b_S, W_dec_S, removal)
    with torch.cuda.device_of(resid):
        if W_enc is None:
            threshold.subtract(edit, out, threshold_S)
        else:
            assert b_others is not None
            topk.subtract(edit, out, W_enc, b_others, k)
    return out


@suppress.register_fake
def _(edited: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(edited)
