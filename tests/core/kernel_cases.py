"""The Triton kernels of the edit against float64. Run by `test_fused.py`: under Triton's interpreter, and on a GPU."""

from __future__ import annotations

import pytest
import torch

from defense.core.latents import LatentSet
from defense.core.ops import fused, reference
from defense.core.ops.fused import topk
from defense.core.ops.reference import Encoder
from defense.core.suppress import Suppressor, suppress
from defense.errors import BackendError

from ..conftest import random_defense, random_sae
from .kernel_setup import (
    DEVICE,
    IS_INTERPRETED,
    TOLERANCE,
    TOPK_KERNELS,
    check,
    dtypes,
    integers,
    kernels,
    norms,
    residuals,
    rules,
    some_set,
    some_slow,
)  # fmt: skip
from .kernel_setup import _poisoned_memory as _poisoned_memory  # autouse

# --- TopK -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "pos", "d_model", "d_sae", "k", "n"),
    some_slow(
        (1, 1, 48, 160, 8, 64),
        (2, 50, 48, 300, 32, 20),
        (1, 9, 64, 130, 16, 130),
        (1, 20, 768, 300, 32, 20),
        slow=[
            (1, 197, 64, 300, 1, 10),
            (1, 257, 48, 300, 32, 1),
            (1, 20, 48, 300, 300, 20),
            (2, 5, 1024, 130, 8, 7),
        ],
    ),
    ids=str,
)
def test_topk_removes_what_float64_removes(batch, pos, d_model, d_sae, k, n):
    sae = random_sae(d_model=d_model, d_sae=d_sae, act="topk", k=k)
    check(kernels(sae, some_set(n, d_sae)), residuals(batch, pos, d_model))
    assert fused.launches == TOPK_KERNELS


@dtypes
@norms
def test_topk_in_every_dtype_and_norm(dtype, norm):
    sae = random_sae(act="topk", k=8, norm=norm)
    check(kernels(sae, some_set(10, 160), dtype), residuals(1, 40, 64, dtype), 0.5)
    assert fused.launches == TOPK_KERNELS


@dtypes
def test_half_precision_activations_of_a_float32_sae_are_encoded_in_float32(dtype):
    sae = random_sae(act="topk", k=8)
    check(kernels(sae, some_set(10, 160)), residuals(1, 20, 64, dtype))


@pytest.mark.parametrize(
    ("dtype", "k"),
    some_slow((torch.float32, 1), (torch.bfloat16, 5), slow=[(torch.float32, 60), (torch.float16, 5)]),
    ids=str,
)
def test_ties_at_rank_k_are_all_kept_as_in_the_reference(dtype, k):
    W_enc, z = integers(64, 300, seed=0), integers(1, 40, 64, seed=1)
    latents, b = torch.arange(0, 200, 5, device=DEVICE), torch.zeros(300, device=DEVICE)
    encoder = Encoder(W_enc[:, latents], b[latents], None, None, None, W_enc, b, latents, k)
    others = b.index_fill(0, latents, -torch.inf)
    everything = (z[0] @ W_enc).sort(descending=True).values
    assert (everything[:, k - 1] == everything[:, k]).any(), "the case must have ties"
    # Decoder rows of one hot column each: every activation can be read off, exactly in every dtype.
    rows = torch.eye(40, 64, device=DEVICE) / 64
    want = reference.acts_of_set(z[0], encoder) / 64
    parts = [tensor.to(dtype) for tensor in (W_enc[:, latents], b[latents], rows, torch.ones(40, device=DEVICE))]
    zero = torch.zeros(1, 40, 64, device=DEVICE)
    whole = W_enc.to(dtype), others.to(dtype), k
    got = fused.suppress(zero, z.to(dtype), 0, 40, "none", *parts, None, *whole)
    assert want.count_nonzero() > 0
    assert torch.equal(-got[0, :, :40], want)


def test_a_candidate_is_left_out_of_its_own_count_by_its_index():
    # The columns of S are a little shorter here than in the encoder: by value, each latent would exceed itself.
    sae, resid = random_sae(act="topk", k=8), residuals(1, 150, 64)
    W_enc, b, latents = sae.W_enc.to(DEVICE), sae.folded_bias.to(DEVICE), torch.arange(64, device=DEVICE)
    h = resid[0] @ W_enc + b
    gap = -h.topk(9, dim=1).values[:, 7:].diff()[:, 0]
    is_at_rank_k = torch.zeros_like(h, dtype=torch.bool).scatter(1, h.topk(8, dim=1).indices[:, 7:], True)
    is_tested = (is_at_rank_k & (gap > 1e-3)[:, None] & (h > 1e-3))[:, :64]
    assert is_tested.sum() > 20
    got = fused.suppress(
        torch.zeros_like(resid), resid, 0, 150, "none", W_enc[:, :64] * (1 - 1e-5), b[:64],
        torch.eye(64, device=DEVICE), torch.ones(64, device=DEVICE), None, W_enc,
        b.index_fill(0, latents, -torch.inf), 8,
    )  # fmt: skip
    torch.testing.assert_close(-got[0][is_tested], h[:, :64][is_tested], atol=1e-3, rtol=0)


@pytest.mark.parametrize("n", some_slow(64, slow=[1]))
def test_tokens_without_a_positive_latent_pass_bit_for_bit(n):
    sae = random_sae(act="topk", k=8)
    sae.folded_bias -= 100
    for dtype in TOLERANCE:
        resid = residuals(2, 50, 64, dtype)
        assert torch.equal(kernels(sae, some_set(n, 160), dtype)(resid), resid)


def test_neighbors_in_a_tile_have_lists_of_one_length_the_longest_first(monkeypatch):
    launched, launch = {}, topk.launching.launch

    def spy(kernel, grid, *args, **constants):
        launched[kernel.fn.__name__] = dict(zip(kernel.arg_names, args, strict=False))
        launch(kernel, grid, *args, **constants)

    monkeypatch.setattr(topk.launching, "launch", spy)
    sae = random_sae(act="topk", k=8)
    kernels(sae, some_set(20, 160))(residuals(2, 50, 64))
    seen = launched["_count_kernel"]
    n_firing = int(seen["n_firing_ptr"])
    firing = seen["firing_ptr"][:n_firing]
    lengths = seen["n_slots_ptr"][firing]
    assert len(firing.unique()) == n_firing == int((seen["n_slots_ptr"] > 0).sum())
    assert len(lengths.unique()) > 3
    assert (lengths.diff() <= 0).all()


@rules
def test_patches_of_high_norm_are_spared(rule):
    sae, resid = random_sae(**rule), residuals(2, 20, 64)
    resid[:, 7] *= 20
    resid[:, 0] *= 20
    fields = {"n": 40, "d_sae": 160, "spares_high_norm": True}
    got = kernels(sae, some_set(**fields))(resid, 1)
    assert fused.launches
    want = Suppressor(sae, some_set(**fields), backend="reference").to(DEVICE)(resid, 1)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    assert torch.equal(got[:, 7], resid[:, 7])
    assert not torch.equal(got[:, 0], resid[:, 0])


def test_all_tokens_fire():
    sae = random_sae(act="topk", k=40)
    latent_set = some_set(40, 160)
    sae.folded_bias[list(latent_set.latents)] += 3
    suppressor, resid = kernels(sae, latent_set), residuals(1, 40, 64)
    assert ((resid @ suppressor.W_S + suppressor.b_S) > 0).any(-1).all()
    check(suppressor, resid)


@pytest.mark.parametrize("rule", [{"act": "topk", "k": 8}, {"act": "relu"}], ids=["topk", "relu"])
def test_gain_one_and_strength_zero_are_the_identity_bit_for_bit(rule):
    resid = residuals(1, 50, 64)
    latents = some_set(40, 160).latents
    assert torch.equal(kernels(random_sae(**rule), LatentSet("kept", latents, (1.0,) * 40))(resid), resid)
    suppressor = kernels(random_sae(**rule), LatentSet("off", latents))
    suppressor.set_strength(0)
    assert torch.equal(suppressor(resid), resid)
    assert sum(fused.launches.values()) in (2, 8)


# --- rules that do not couple latents ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("act", "pos", "d_model", "n"),
    [("relu", 1, 48, 3), ("batchtopk", 50, 48, 64), ("jumprelu", 257, 64, 160), ("relu", 10, 768, 100)],
    ids=str,
)
def test_threshold_rules_remove_what_float64_removes(act, pos, d_model, n):
    sae = random_sae(d_model=d_model, act=act)
    check(kernels(sae, some_set(n, 160)), residuals(2, pos, d_model))
    assert fused.launches == {"_threshold_kernel": 1}


@dtypes
@norms
def test_jumprelu_in_every_dtype_and_norm(dtype, norm):
    sae = random_sae(act="jumprelu", norm=norm)
    check(kernels(sae, some_set(8, 160), dtype), residuals(2, 50, 64, dtype), 0.5)


# --- layouts, scopes, sets --------------------------------------------------------------------------------------------

rules = pytest.mark.parametrize(
    "rule", [{"act": "topk", "k": 8}, {"act": "jumprelu"}], ids=["topk", "jumprelu"]
)  # fmt: skip


@rules
@pytest.mark.parametrize("scope", ["cls", "patch", "all"])
def test_scope_and_layout(rule, scope):
    sae, latent_set = random_sae(**rule), some_set(40, 160, scope=scope)
    resid = residuals(3, 7, 64)
    want = Suppressor(sae, latent_set, backend="reference").to(DEVICE)(resid)
    assert not torch.equal(want, resid)
    strided = resid.transpose(0, 1).contiguous().transpose(0, 1)
    spread = torch.zeros(3, 7, 128, device=DEVICE)[..., ::2].copy_(resid)
    for layout in (resid, strided, spread):
        before = layout.clone()
        torch.testing.assert_close(kernels(sae, latent_set)(layout), want, atol=2e-5, rtol=0)
        assert torch.equal(layout, before)


@rules
def test_two_sets_both_see_the_unedited_residual(rule):
    sae, resid = random_sae(**rule), residuals(2, 9, 64, torch.bfloat16)
    sets = [LatentSet("a", tuple(range(40))), LatentSet("b", tuple(range(40, 80)), scope="patch")]
    want = suppress(resid, [Suppressor(sae, s, backend="reference").to(DEVICE) for s in sets], 1)
    got = suppress(resid, [kernels(sae, s) for s in sets], 1)
    torch.testing.assert_close(got, want, atol=1e-2, rtol=1e-2)
    assert max(fused.launches.values()) == 2


@rules
def test_no_tokens_and_an_empty_set_are_the_identity(rule):
    resid = residuals(2, 50, 64)
    assert torch.equal(kernels(random_sae(**rule), LatentSet("empty", ()))(resid), resid)
    assert not fused.launches
    assert kernels(random_sae(**rule), some_set(4, 160))(resid[:0]).shape == (0, 50, 64)


def test_a_wrapped_model_runs_the_kernels(tiny_clip):
    from defense.hosts.attach import attached, wrap

    model = tiny_clip.to(DEVICE)
    defense = random_defense(model, (1, random_sae(act="topk", k=8), some_set(40, 160)))
    generator = torch.Generator().manual_seed(0)
    pixel_values = torch.randn(2, 3, 32, 32, generator=generator).to(DEVICE)
    with torch.inference_mode():
        plain = model.encode_image(pixel_values)
        wrap(model, defense, backend="fused")
        got = model.encode_image(pixel_values)
        assert fused.launches == TOPK_KERNELS
        for suppressor in attached(model).suppressors():
            suppressor.backend = "reference"
        want = model.encode_image(pixel_values)
    assert (want - plain).abs().max() > 1e-3
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# --- as operators of torch --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_opcheck():
    sae, resid = random_sae(act="topk", k=8), residuals(2, 3, 64)
    suppressor = kernels(sae, some_set(4, 160))
    W_S, b_S, W_dec_S, removal = suppressor.W_S, suppressor.b_S, suppressor.W_dec_S, suppressor.removal
    of_set = (resid, resid, 1, 3, "none", W_S, b_S)
    whole = (suppressor.W_enc, suppressor.b_others, 8)
    torch.library.opcheck(fused.suppress, (*of_set, W_dec_S, removal, None, *whole))
    torch.library.opcheck(fused.suppress, (*of_set, W_dec_S, removal, None, None, None, 0))
    torch.library.opcheck(fused.encode_topk, (resid[0], suppressor.W_enc, suppressor.b, 8))
    acts, indices = fused.encode_topk(resid[0], suppressor.W_enc, suppressor.b, 8)
    W_dec, b_dec = sae.W_dec.to(DEVICE), sae.b_dec.to(DEVICE)
    torch.library.opcheck(fused.sparse_decode, (acts, indices, W_dec, b_dec))


@rules
def test_compiled_code_runs_the_kernels_in_one_graph(rule):
    suppressor, resid = kernels(random_sae(**rule), some_set(40, 160)), residuals(1, 9, 64)
    want = suppressor(resid)
    fused.launches.clear()
    compiled = torch.compile(suppressor, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        assert torch.equal(compiled(resid), want)
    assert fused.launches


def test_gradients_are_refused():
    suppressor, resid = kernels(random_sae(act="topk", k=8), some_set(4, 160)), residuals(1, 5, 64)
    with pytest.raises(BackendError, match="no gradient"):
        suppressor(resid.requires_grad_())
    with torch.no_grad():
        suppressor(resid)


@pytest.mark.skipif(IS_INTERPRETED, reason="runs where there is a GPU")
def test_auto_runs_the_kernels_on_a_gpu_and_a_cuda_graph_replays_them():
    suppressor = Suppressor(random_sae(act="topk", k=8), some_set(40, 160)).to(DEVICE, torch.bfloat16)
    resid = residuals(2, 50, 64, torch.bfloat16)
    want = suppressor(resid)
    assert fused.launches == TOPK_KERNELS
    torch.cuda.synchronize()
    graph, static = torch.cuda.CUDAGraph(), torch.zeros_like(resid)
    with torch.cuda.graph(graph):
        got = suppressor(static)
    static.copy_(resid)
    graph.replay()
    torch.testing.assert_close(got, want)
