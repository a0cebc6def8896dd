"""What the tests of the Triton kernels share: device, repairs of the interpreter, inputs, the check against float64."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from defense.benchmarks.kernel_parity import exact_edit, n_unequal
from defense.core.latents import LatentSet
from defense.core.ops import fused
from defense.core.ops.fused import decode, encode, suppression, topk
from defense.core.suppress import Suppressor

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of a result in this dtype, absolute and relative; residuals and what is removed are of the order of 1."""


def some_slow(*fast, slow) -> list:
    """Values of a parameter, or tuples of several: one for each branch of the kernels for every run, and more."""
    values = (value if isinstance(value, tuple) else (value,) for value in slow)
    return [*fast, *(pytest.param(*each, marks=pytest.mark.slow) for each in values)]


dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
RULES = {"topk": {"act": "topk", "k": 8}, "relu": {"act": "relu"}, "jumprelu": {"act": "jumprelu"}}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
norms = pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])

if IS_INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    multiply, patch_tensor = interpreter.InterpreterBuilder.create_dot, interpreter._patch_lang_tensor

    def create_dot(self, a, b, *rest):
        """The interpreter holds bfloat16 as uint16, and its product multiplies these integers."""
        a, b = (
            interpreter.TensorHandle((each.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
            if each.dtype.scalar == tl.bfloat16
            else each
            for each in (a, b)
        )
        return multiply(self, a, b, *rest)

    def patch_lang_tensor(tensor, *rest):
        """Triton 3.6 takes int() of arrays [1], which numpy 2.4 refuses."""
        patch_tensor(tensor, *rest)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_lang_tensor

TOPK_KERNELS = {"_candidates_kernel": 1, "_order_kernel": 1, "_count_kernel": 1, "_subtract_kernel": 1}


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """Let the launchers allocate NaN and huge integers, so that an element that is read but never written shows."""

    def poisoned(allocate):
        def call(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max)

        return call

    names = {name: getattr(torch, name) for name in dir(torch)}
    names |= {name: poisoned(names[name]) for name in ("empty", "empty_like")}
    for module in (topk, suppression, encode, decode):
        monkeypatch.setattr(module, "torch", SimpleNamespace(**names))
    fused.launches.clear()


def residuals(batch: int, pos: int, d_model: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(batch, pos, d_model, generator=generator) * 1.5 + 0.2).to(DEVICE, dtype)


def some_set(n: int, d_sae: int, seed: int = 2, **fields) -> LatentSet:
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randperm(d_sae, generator=generator)[:n]
    return LatentSet("test", tuple(latents.tolist()), tuple(torch.rand(n, generator=generator).tolist()), **fields)


def kernels(sae, latent_set: LatentSet, dtype: torch.dtype = torch.float32) -> Suppressor:
    return Suppressor(sae, latent_set, backend="fused").to(DEVICE, dtype)


def check(suppressor: Suppressor, resid: torch.Tensor, clear_share: float = 0.9) -> None:
    """Hold the kernels against float64, at tokens where rounding does not decide what is kept."""
    exact = exact_edit(resid, suppressor.norm, suppressor.encoder(), suppressor.W_dec_S, suppressor.removal)
    got = suppressor(resid)
    assert got.dtype == resid.dtype
    assert exact.is_clear.float().mean() >= clear_share, "the case decides too little"
    assert not torch.equal(got, resid), "the case must edit something"
    assert n_unequal(got, exact) == 0


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Small integers, whose products are exact in every dtype: ties are ties, whatever the order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float().to(DEVICE)
