"""The tower's own operators, written so that ONNX Runtime runs them well. Same function, other graph.

| module | as it is | here |
|---|---|---|
| nn.Linear | MatMul, and a pass to add the bias | one Gemm on rows |
| nn.GELU | five passes | x * (1 + erf(x / sqrt 2)) * 1/2, which ONNX Runtime knows and makes one |
| nn.MultiheadAttention | transposed to [pos, batch, d_model] and back; shapes computed at run time | neither |

Whatever else a tower is made of stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F


def linear(module: nn.Linear, x: Tensor) -> Tensor:
    """Return `module(x)`, [..., n_out]."""
    rows = F.linear(x.reshape(-1, module.in_features), module.weight, module.bias)
    return rows.reshape(*x.shape[:-1], module.out_features)


def gelu(_module: nn.GELU, x: Tensor) -> Tensor:
    """Return the exact GELU of x."""
    return x * ((x / math.sqrt(2)).erf() + 1) * 0.5


def attention(module: nn.MultiheadAttention, query: Tensor, *others: Any, **options: Any) -> tuple[Tensor, None]:
    """Return `module(query, ...)` for self-attention without a mask, and in place of its weights None."""
    x = query if module.batch_first else query.transpose(0, 1)
    batch, pos, d_model = x.shape
    head = d_model // module.num_heads
    rows = F.linear(x.reshape(-1, d_model), module.in_proj_weight, module.in_proj_bias)
    q, k, v = rows.reshape(batch, pos, 3 * module.num_heads, head).transpose(1, 2).chunk(3, dim=1)
    weights = (q / math.sqrt(head) @ k.transpose(2, 3)).softmax(-1)
    out = module.out_proj((weights @ v).transpose(1, 2).reshape(batch, pos, d_model))
    return (out if module.batch_first else out.transpose(0, 1)), None


def _is_plain_self_attention(
    module: nn.MultiheadAttention, query: Tensor, key: Tensor, value: Tensor, **given: Any
) -> bool:
    mask, padding = given.get("attn_mask"), given.get("key_padding_mask")
    same = query is key is value and module.in_proj_weight is not None and module.bias_k is None
    return same and mask is None and padding is None and not module.add_zero_attn and query.ndim == 3


def _attention_or_original(module: nn.MultiheadAttention, *inputs: Any, **options: Any) -> tuple[Tensor, Tensor | None]:
    if _is_plain_self_attention(module, *inputs, **options):
        return attention(module, *inputs, **options)
    return type(module).forward(module, *inputs, **options)


@contextmanager
def rewritten(tower: nn.Module) -> Iterator[None]:
    """Let the modules of a tower compute as above for as long as the context lasts."""
    changed: list[nn.Module] = []
    try:
        for module in tower.modules():
            if isinstance(module, nn.MultiheadAttention):
                forward: Any = partial(_attention_or_original, module)
            elif isinstance(module, nn.Linear):
                forward = partial(linear, module)
            elif isinstance(module, nn.GELU) and module.approximate == "none":
                forward = partial(gelu, module)
            else:
                continue
            vars(module)["forward"] = forward
            changed.append(module)
        yield
    finally:
        for module in changed:
            del vars(module)["forward"]
