"""The tower's operators as they are exported: the same function, and nothing of it left behind."""

from __future__ import annotations

import pytest

pytest.importorskip("onnxscript")

import torch
from torch import nn

from defense.export import operators

MODULES = {
    "linear": nn.Linear(24, 7),
    "linear without bias": nn.Linear(24, 7, bias=False),
    "gelu": nn.GELU(),
    "approximate gelu": nn.GELU("tanh"),
}


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("shape", [(24,), (5, 24), (3, 5, 24)], ids=str)
def test_rewritten_module_computes_the_same(name, shape):
    module, x = MODULES[name], noise(*shape)
    want = module(x)
    with torch.no_grad(), operators.rewritten(module):
        torch.testing.assert_close(module(x), want.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_rewritten_attention_computes_the_same(batch_first):
    attention = nn.MultiheadAttention(24, 3, batch_first=batch_first).eval()
    nn.init.normal_(attention.in_proj_bias)
    x = noise(2, 5, 24)
    with torch.no_grad():
        want, _ = attention(x, x, x, need_weights=False)
        with operators.rewritten(attention):
            got, weights = attention(x, x, x, need_weights=False)
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)
    assert weights is None


def test_attention_of_another_kind_stays_as_it_is():
    """Cross-attention, and attention with a mask: what pools a tower, and what a text tower does."""
    attention = nn.MultiheadAttention(24, 3, batch_first=True).eval()
    query, x = noise(2, 1, 24), noise(2, 5, 24)
    mask = torch.full((5, 5), -torch.inf).triu(1)
    with torch.no_grad():
        crossed, masked = attention(query, x, x)[0], attention(x, x, x, attn_mask=mask)[0]
        with operators.rewritten(attention):
            torch.testing.assert_close(attention(query, x, x)[0], crossed, atol=1e-6, rtol=1e-5)
            torch.testing.assert_close(attention(x, x, x, attn_mask=mask)[0], masked, atol=1e-6, rtol=1e-5)


def test_modules_are_themselves_again_afterwards():
    tower = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.MultiheadAttention(4, 2))
    with operators.rewritten(tower):
        assert all("forward" in vars(module) for module in tower)
    assert not any("forward" in vars(module) for module in tower.modules())
