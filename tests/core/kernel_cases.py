"""The Triton kernels against float64. Run by `test_fused.py`: under Triton's interpreter, and on a GPU where one is."""

from __future__ import annotations

import os
from types import SimpleNamespace

import pytest
import torch

from defense.benchmarks import kernel, kernel_cases, kernel_rows, kernel_sections, kernel_timing
from defense.benchmarks.kernel_cases import Case
from defense.benchmarks.kernel_parity import exact_edit, gate, n_unequal
from defense.core import ops
from defense.core.latents import LatentSet
from defense.core.ops import fused, reference
from defense.core.ops.fused import decode, encode, suppression, topk
from defense.core.ops.reference import Encoder
from defense.core.suppress import Suppressor, suppress
from defense.errors import BackendError

from ..conftest import random_defense, random_sae

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if IS_INTERPRETED else "cuda"

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Of a result in this dtype, absolute and relative; residuals and what is removed are of the order of 1."""

dtypes = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
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


# --- TopK -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "pos", "d_model", "d_sae", "k", "n"),
    [
        (1, 1, 48, 160, 8, 64),
        (2, 50, 48, 300, 32, 20),
        (1, 197, 64, 300, 1, 10),
        (1, 257, 48, 300, 32, 1),
        (1, 20, 48, 300, 300, 20),
        (1, 9, 64, 130, 16, 130),
        (1, 20, 768, 300, 32, 20),
        (2, 5, 1024, 130, 8, 7),
    ],
    ids=lambda value: str(value),
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


def integers(*shape: int, seed: int) -> torch.Tensor:
    """Small integers, whose products are exact in every dtype: ties are ties, whatever the order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-2, 3, shape, generator=generator).float().to(DEVICE)


@pytest.mark.parametrize(
    ("dtype", "k"), [(torch.float32, 1), (torch.float32, 60), (torch.float16, 5), (torch.bfloat16, 5)], ids=str
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


@pytest.mark.parametrize("n", [1, 64])
def test_tokens_without_a_positive_latent_pass_bit_for_bit(n):
    sae = random_sae(act="topk", k=8)
    sae.folded_bias -= 100
    for dtype in TOLERANCE:
        resid = residuals(2, 50, 64, dtype)
        assert torch.equal(kernels(sae, some_set(n, 160), dtype)(resid), resid)


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
    [(1, 48, 300, 32), (9, 48, 300, 1), (129, 48, 60, 7), (4, 768, 161, 161), (5, 64, 1030, 32)],
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
@pytest.mark.parametrize(("tokens", "d_model", "k"), [(1, 48, 1), (50, 64, 10), (7, 768, 33), (3, 1000, 8)], ids=str)
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


# --- as operators of torch --------------------------------------------------------------------------------------------


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


@pytest.fixture
def small_benchmark(monkeypatch):
    """Let the benchmark of the kernels run here, on a small shape, for the given sections."""
    if not IS_INTERPRETED:
        pytest.skip("a GPU runs the benchmark itself")
    cases = [Case("ViT-B-32", 2, 5, 48, 300, 8)]
    gpu = kernel_rows.Gpu("interpreter", *["-"] * 5)
    names = ("tile_rows", "suppress_rows", "encode_rows", "relu_rows", "more_suppress_rows")
    sections = tuple(getattr(kernel_sections, name) for name in names)
    parity = [(cases[0], torch.float32, "topk", "none"), (cases[0], torch.bfloat16, "jumprelu", "layer_norm")]
    for module, changed in {
        kernel_cases: {
            "DEVICE": "cpu", "CASES": cases, "SET_SIZES": (8, 64), "SHARES": (0.05, 1.0), "PARITY": parity,
            "TILES": ((16, 16, 16, 4, 2, 1), (32, 64, 16, 4, 2, 1)),
        },
        kernel: {"check_gpu": lambda: None, "gpu_of": lambda: gpu, "SECTIONS": sections},
        kernel_sections: {"compiled": lambda job: job, "sparsify": lambda: None},
        kernel_timing: {"peak_mib": lambda _job: 0.5, "_finished": lambda job: job(), "_SQUARE": 8, "_WARM_S": 0.01},
    }.items():  # fmt: skip
        for name, value in changed.items():
            monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(kernel_timing.Bench, "time", lambda _self, job: (job(), (2.0, 1.0, 3.0))[1])
    monkeypatch.setattr(kernel_timing.Bench, "graph_ms", lambda _self, job: (job(), 0.25)[1])


def test_the_benchmark_runs_on_small_shapes(small_benchmark, tmp_path, capsys):
    out = tmp_path / "kernel.json"
    assert kernel.main(["--out", str(out)]) == 0, capsys.readouterr().err
    rows, printed = kernel_rows.load_rows(out), capsys.readouterr().out
    assert kernel_rows.table(kernel_rows.short(rows)) in printed
    assert "rounding decides" in printed
    assert {row.arm for row in rows if row.operation == "encode_topk"} == {"kernels", "eager", "eager, compiled"}
    assert len({row.arm for row in rows if "tile" in row.arm}) == 2
    ours = [row for row in rows if row.operation == "suppress" and row.arm == "kernels"]
    assert all(row.graph_ms == 0.25 for row in ours)
    assert all(row.peak_floor_ms == pytest.approx(row.n_firing * 48 * 300 / 8**3 * 2) for row in ours)
    assert len(ours) == 2 * 3  # shares; two dtypes for one of two sizes of S
    assert all(row.unequal == 0 for row in ours)
    assert {row.n_firing for row in ours if row.share == 0.05} == {0}
    assert {row.arm for row in rows} >= {"eager dense", "eager sparse", "eager sparse, compiled", "reference, compiled"}
    assert {row.n_firing for row in ours if row.share == 1} == {10}


def test_fault_what_fails_leaves_the_rest_of_the_benchmark_standing(small_benchmark, monkeypatch, tmp_path, capsys):
    right = kernel_sections.n_unequal
    is_float16 = lambda got: got.dtype == torch.float16  # noqa: E731
    monkeypatch.setattr(kernel_sections, "n_unequal", lambda got, exact: 3 if is_float16(got) else right(got, exact))
    monkeypatch.setattr(kernel_sections, "encode", None)  # breaks encode_rows in the middle
    out = tmp_path / "kernel.json"
    assert kernel.main(["--out", str(out)]) == 1
    printed = capsys.readouterr()
    assert "3 of 10 tokens are wrong" in printed.err
    assert "encode_rows: TypeError" in printed.err
    rows = kernel_rows.load_rows(out)
    assert {row.dtype for row in rows} == {"bfloat16"}
    assert {row.operation for row in rows} == {"suppress", "suppress, relu"}
    assert kernel_rows.table(kernel_rows.short(rows)) in printed.out


def test_fault_nothing_is_begun_when_the_time_is_over(small_benchmark, tmp_path, capsys):
    assert kernel.main(["--out", str(tmp_path / "kernel.json"), "--minutes", "0"]) == 0
    assert "Out of time, and not measured:\nkernels, tile 16 x 16 x 16" in capsys.readouterr().out


@pytest.mark.skipif(not IS_INTERPRETED, reason="a GPU runs the benchmark itself")
def test_the_gate_of_the_benchmark_sees_a_kernel_that_is_wrong(monkeypatch):
    monkeypatch.setattr(kernel_cases, "DEVICE", "cpu")
    monkeypatch.setattr(kernel_cases, "PARITY", [(Case("x", 2, 5, 48, 300, 8), torch.float32, "topk", "none")])
    assert gate() == []
    right = fused.suppress
    monkeypatch.setattr(fused, "suppress", lambda *args: right(*args[:-1], 1))
    assert "tokens are wrong" in gate()[0]


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
