"""The SAE by itself: its input normalization where a norm has nothing to divide by."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

from defense.core.sae import normalize

from ..conftest import D_MODEL, random_sae


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_zero_token_stays_zero_under_constant_norm_rescale(dtype):
    resid = torch.stack([torch.zeros(D_MODEL), torch.linspace(-1, 2, D_MODEL)]).to(dtype)
    z, scale, shift = normalize(resid, "constant_norm_rescale")
    assert z.dtype == dtype
    assert (z[0] == 0).all()
    assert shift is None
    assert scale is not None
    assert (scale > 0).all()
    torch.testing.assert_close(scale * z, resid)
    torch.testing.assert_close(z[1].float().norm(), torch.tensor(D_MODEL**0.5), rtol=1e-2, atol=0)


def test_a_zero_token_has_finite_acts_and_a_reconstruction_of_nothing():
    sae = random_sae(norm="constant_norm_rescale")
    resid = torch.zeros(1, D_MODEL)
    acts = sae.encode(resid)
    torch.testing.assert_close(acts, sae.folded_bias.relu()[None])
    assert sae.decode(acts, resid).abs().max() < 1e-30


def test_fault_parameters_are_held_in_c_order_whatever_order_they_come_in():
    from defense.core.sae import SparseAutoencoder

    sae = random_sae()
    transposed = {name: value.T.copy().T for name, value in sae.parameters_numpy().items()}
    assert not transposed["W_enc"].flags.c_contiguous
    held = SparseAutoencoder(sae.config, transposed)
    for name, tensor in held.named_buffers():
        assert tensor.is_contiguous(), name
        assert torch.equal(tensor, getattr(sae, name)), name
