"""`encode_topk` and `sparse_decode` against float64. Run by `test_fused.py`, as `kernel_cases.py` is."""

from __future__ import annotations

import pytest
import torch

from defense.core import ops
from defense.core.ops import fused
from defense.core.ops.fused import encode

from ..conftest import random_sae
from .kernel_setup import DEVICE, TOLERANCE, dtypes, integers, residuals, some_slow
from .kernel_setup import _poisoned_memory as _poisoned_memory  # autouse

# --- encode_topk, sparse_decode ---------------------------------------------------------------------------------------


def check_encode_topk(z: torch.Tensor, W_enc: torch.Tensor, b: torch.Tensor, k: int) -> None:
    acts, indices = ops.encode_topk(z, W_enc, b, k, backend="fused")
    assert acts.shape == indices.shape == (len(z), k)
    assert acts.dtype == W_enc.dtype
    assert indices.dtype == torch.int64
    everything = (z.double() @ W_enc.double() + b.double()).relu()
    want = everything.topk(k, dim=1).values
    tolerance = TOLERANCE[W_enc.dtype]
    close = {"atol": tolerance, "rtol": tolerance}
    torch.testing.assert_close(acts.double().sort(descending=True).values, want, **close)
    torch.testing.assert_close(acts.double(), everything.gather(1, indices), **close)
    assert all(len(row.unique()) == k for row in indices)


@pytest.mark.parametrize(
    ("tokens", "d_model", "d_sae", "k"),
    [(1, 48, 300, 32), (9, 48, 300, 1), (65, 48, 60, 7), (4, 768, 161, 161), (5, 64, 1030, 32)],
    ids=str,
)
def test_encode_topk_finds_what_float64_finds(tokens, d_model, d_sae, k):
    sae = random_sae(d_model=d_model, d_sae=d_sae, act="topk", k=k)
    check_encode_topk(residuals(1, tokens, d_model)[0], sae.W_enc.to(DEVICE), sae.folded_bias.to(DEVICE), k)
    assert fused.launches == {"_encode_kernel": 1, "_select_kernel": 2}


@dtypes
def test_encode_topk_in_every_dtype(dtype):
    sae = random_sae(act="topk", k=8)
    check_encode_topk(
        residuals(1, 20, 64, dtype)[0], sae.W_enc.to(DEVICE, dtype), sae.folded_bias.to(DEVICE, dtype), 8
    )  # fmt: skip


def test_encode_topk_with_fewer_than_k_positive_latents():
    sae = random_sae(act="topk", k=8)
    check_encode_topk(residuals(1, 9, 64)[0], sae.W_enc.to(DEVICE), sae.folded_bias.to(DEVICE) - 3, 40)


def test_encode_topk_with_ties_keeps_exactly_k():
    z, W_enc = integers(12, 64, seed=0), integers(64, 300, seed=1)
    check_encode_topk(z, W_enc, torch.zeros(300, device=DEVICE), 20)
    check_encode_topk(z, torch.ones_like(W_enc), torch.full((300,), 50.0, device=DEVICE), 20)


def test_chunks_do_not_change_encode_topk(monkeypatch):
    sae = random_sae(act="topk", k=8)
    monkeypatch.setattr(encode, "_CHUNK_ELEMENTS", 3 * 160)
    strided = residuals(8, 1, 128)[:, 0, ::2]
    check_encode_topk(strided, sae.W_enc.to(DEVICE), sae.folded_bias.to(DEVICE), 8)
    assert fused.launches == {"_encode_kernel": 3, "_select_kernel": 6}


@dtypes
@pytest.mark.parametrize(
    ("tokens", "d_model", "k"), some_slow((1, 48, 1), (7, 768, 33), slow=[(50, 64, 10), (3, 1000, 8)]), ids=str
)
def test_sparse_decode_sums_what_float64_sums(dtype, tokens, d_model, k):
    sae = random_sae(d_model=d_model)
    acts, indices = ops.encode_topk(
        residuals(1, tokens, d_model)[0], sae.W_enc.to(DEVICE), sae.folded_bias.to(DEVICE), k, backend="reference"
    )  # fmt: skip
    parts = [tensor.to(DEVICE, dtype) for tensor in (acts, sae.W_dec, sae.b_dec)]
    got = ops.sparse_decode(parts[0], indices, *parts[1:], backend="fused")
    dense = torch.zeros(tokens, 160, dtype=torch.float64, device=DEVICE).scatter(1, indices, parts[0].double())
    want = dense @ parts[1].double() + parts[2].double()
    torch.testing.assert_close(got.double(), want, atol=TOLERANCE[dtype] * 5, rtol=TOLERANCE[dtype])
    assert fused.launches == {"_decode_kernel": 1}


def test_sparse_decode_does_not_read_rows_of_zero_activations():
    W_dec = torch.full((5, 48), torch.nan, device=DEVICE)
    W_dec[2] = 1.0
    acts, indices = torch.tensor([[0.0, 3.0, 0.0]], device=DEVICE), torch.tensor([[0, 2, 4]], device=DEVICE)
    got = ops.sparse_decode(acts, indices, W_dec, torch.zeros(48, device=DEVICE), backend="fused")
    assert torch.equal(got, torch.full((1, 48), 3.0, device=DEVICE))
