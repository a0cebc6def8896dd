"""Shapes and layouts that stretch the Triton kernels. Run by `test_fused.py`, as `kernel_cases.py` is."""

from __future__ import annotations

import pytest
import torch

from defense.core.suppress import Suppressor

from ..conftest import random_sae
from .kernel_setup import DEVICE, RULES, check, kernels, norms, residuals, rules, some_set, some_slow
from .kernel_setup import _poisoned_memory as _poisoned_memory  # autouse


@rules
@norms
@pytest.mark.parametrize("d_model", some_slow(7, 160, slow=[33, 80]))
def test_odd_widths(rule, norm, d_model):
    sae = random_sae(**rule, norm=norm, d_model=d_model)
    check(kernels(sae, some_set(20, 160)), residuals(1, 9, d_model), 0.5)


@pytest.mark.parametrize("rule", [RULES["topk"]], ids=["topk"])
def test_wide_residual(rule):
    check(kernels(random_sae(**rule, d_model=1152), some_set(20, 160)), residuals(1, 3, 1152), 0.3)


@pytest.mark.slow
def test_a_set_of_five_thousand():
    sae = random_sae(act="topk", k=64, d_model=16, d_sae=5100)
    sae.folded_bias -= 1.5
    check(kernels(sae, some_set(5000, 5100)), residuals(1, 2, 16), 0.5)


@pytest.mark.parametrize("n", some_slow(40, slow=[1, 160]))
def test_k_is_d_sae(n):
    check(kernels(random_sae(act="topk", k=160), some_set(n, 160)), residuals(1, 9, 64))


@rules
def test_expanded_and_feature_major_residuals(rule):
    sae, latent_set, resid = random_sae(**rule), some_set(40, 160), residuals(3, 5, 64)
    feature_major = resid.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    expanded = resid[:1].expand(3, 5, 64)
    for layout in (feature_major, expanded):
        want = Suppressor(sae, latent_set, backend="reference").to(DEVICE)(layout)
        torch.testing.assert_close(kernels(sae, latent_set)(layout), want, atol=2e-5, rtol=0)


@rules
@pytest.mark.parametrize(
    ("scope", "pos", "n_prefix"), [("patch", 1, 1), ("patch", 5, 5), ("patch", 9, 5), ("cls", 9, 5)]
)
def test_registers_and_empty_scopes(rule, scope, pos, n_prefix):
    sae, latent_set, resid = random_sae(**rule), some_set(40, 160, scope=scope), residuals(2, pos, 64)
    want = Suppressor(sae, latent_set, backend="reference").to(DEVICE)(resid, n_prefix)
    torch.testing.assert_close(kernels(sae, latent_set)(resid, n_prefix), want, atol=2e-5, rtol=0)
