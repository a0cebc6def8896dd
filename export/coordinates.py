# mypy: ignore-errors
# (an onnxscript function is compiled to ONNX and only looks like Python)
"""The linear systems of the edit `project`, as one torch operator with an ONNX form.

At each token the residual is projected on the span of the decoder rows of the latents that fire there (`projected` in
defense/ops/reference.py). ONNX has no solver, so its form eliminates in a Loop: with plain operators only, and in
float64 as the original.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import onnx
import onnxscript
import torch
from onnxscript import DOUBLE, FLOAT, INT64
from onnxscript import opset18 as op
from torch import Tensor

_RIDGE = 1e-9  # reference.py's
_DIAGONAL = onnx.helper.make_tensor("idle", onnx.TensorProto.DOUBLE, [1], [1 + _RIDGE])
_DOUBLE = onnx.TensorProto.DOUBLE


@torch.library.custom_op("clip_defense::coordinates", mutates_args=())
def coordinates(fires: Tensor, gram: Tensor, dots: Tensor) -> Tensor:
    """Return x of gram[A, A] x = dots[A] at each token, where A are the latents that fire there; float64 [tokens, n].

    It is 0 for the latents that do not fire.

    Args:
        fires: 1 where a latent fires, else 0, float32 [tokens, n].
        gram: Products of the decoder rows with each other, float64 [n, n].
        dots: Products of the centered residual with the decoder rows, float64 [tokens, n].
    """
    mask = fires.double()
    system = gram * mask[:, :, None] * mask[:, None, :] + torch.diag_embed(1 - mask + _RIDGE)
    return torch.linalg.solve(system, (dots * mask)[..., None])[..., 0]


@coordinates.register_fake
def _(fires: Tensor, gram: Tensor, dots: Tensor) -> Tensor:
    return torch.empty_like(dots)


@onnxscript.script(default_opset=op)
def onnx_coordinates(fires: FLOAT, gram: DOUBLE, dots: DOUBLE) -> DOUBLE:
    """Return the same by Gauss-Jordan elimination; the systems are positive definite, so any pivot will do."""
    zero = op.Constant(value_ints=[0])
    one = op.Constant(value_ints=[1])
    two = op.Constant(value_ints=[2])
    # As many rows as latents fire at any one token: the firing ones first, then idle ones, which a 1 decouples.
    counts = op.ReduceSum(op.Cast(fires, to=INT64.dtype), one, keepdims=0)
    n_active = op.ReduceMax(op.Concat(counts, one, axis=0), keepdims=1)
    # TopK sees an idle row more, since of an empty batch there are none.
    idle_row = op.ConstantOfShape(op.Concat(one, op.Shape(gram, start=0, end=1), axis=0))
    _, active = op.TopK(op.Concat(fires, idle_row, axis=0), n_active, axis=1)
    active = op.Slice(active, zero, op.Neg(one), zero)  # [tokens, n_active]
    mask = op.Cast(op.GatherElements(fires, active, axis=1), to=_DOUBLE)  # [tokens, n_active]
    pairs = op.Add(op.Mul(op.Unsqueeze(active, two), op.Shape(gram, start=0, end=1)), op.Unsqueeze(active, one))
    system = op.Gather(op.Reshape(gram, op.Constant(value_ints=[-1])), pairs)  # [tokens, n_active, n_active]
    system = op.Mul(op.Mul(system, op.Unsqueeze(mask, one)), op.Unsqueeze(mask, two))
    steps = op.Range(op.Constant(value_int=0), op.Squeeze(n_active), op.Constant(value_int=1))
    identity = op.Cast(op.Equal(op.Unsqueeze(steps, one), op.Unsqueeze(steps, zero)), to=_DOUBLE)
    idle = op.Sub(op.Constant(value=_DIAGONAL), mask)
    system = op.Add(system, op.Mul(identity, op.Unsqueeze(idle, one)))
    right_side = op.Mul(op.GatherElements(dots, active, axis=1), mask)
    augmented = op.Concat(system, op.Unsqueeze(right_side, two), axis=2)
    step = op.Identity(zero)
    goes_on = op.Squeeze(
        op.Less(step, n_active)
    )  # stated from the start: a Loop without it is taken for one of no steps
    while goes_on:
        row = op.Gather(augmented, step, axis=1)
        row = op.Div(row, op.Gather(row, step, axis=2))
        factors = op.Sub(op.Gather(augmented, step, axis=2), op.Unsqueeze(op.Gather(identity, step, axis=1), zero))
        augmented = op.Sub(augmented, op.Mul(factors, row))
        step = op.Add(step, one)
        goes_on = op.Squeeze(op.Less(step, n_active))
    solution = op.Squeeze(op.Gather(augmented, n_active, axis=2), two)
    return op.ScatterElements(op.Sub(dots, dots), active, op.Mul(solution, mask), axis=1)


TRANSLATION: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.clip_defense.coordinates.default: onnx_coordinates
}
"""For `torch.onnx.export(custom_translation_table=...)`."""
