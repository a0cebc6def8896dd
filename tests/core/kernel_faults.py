"""Faults that the Triton kernels had. Run by `test_fused.py`, as `kernel_cases.py` is."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch
from triton.runtime.errors import OutOfResources

from defense.core import ops
from defense.core.latents import LatentSet
from defense.core.ops import fused
from defense.core.ops.fused import launching, topk
from defense.core.suppress import Suppressor
from defense.errors import BackendError

from ..conftest import random_sae
from .kernel_setup import DEVICE, IS_INTERPRETED, RULES, TOPK_KERNELS, kernels, residuals, rules, some_set, some_slow
from .kernel_setup import _poisoned_memory as _poisoned_memory  # autouse

# --- a device that looks right and cannot run them --------------------------------------------------------------------


class Failing:
    """Stands for a kernel that raises when it is launched."""

    def __init__(self, error: Exception) -> None:
        self.error, self.n_launches, self.fn = error, 0, SimpleNamespace(__name__="_failing_kernel")

    def __getitem__(self, _grid):
        def launched(*_args, **_constants):
            self.n_launches += 1
            raise self.error

        return launched


ERRORS = pytest.mark.parametrize(
    "error",
    [
        RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable."),
        FileNotFoundError("Python.h"),
        OutOfResources(147_456, 101_376, "shared memory"),
        TypeError("'NoneType' object is not callable"),
    ],
    ids=lambda error: type(error).__name__,
)


@pytest.fixture
def on_gpu(monkeypatch):
    """Let "auto" choose here as it does on a GPU, with nothing logged or remembered yet."""
    obstacle = ops._obstacle
    monkeypatch.setattr(ops, "_logged", set())
    monkeypatch.setattr(ops, "_unable", {})
    launching._failure.cache_clear()

    def chosen(backend, tensor, weight, missing):
        reason = missing or obstacle(tensor, weight) or ops._unable.get(str(tensor.device))
        if backend != "reference" and reason is not None:
            ops._fall_back(backend, reason)
        return backend != "reference" and reason is None

    monkeypatch.setattr(ops, "_chosen", chosen)
    yield
    launching._failure.cache_clear()


@ERRORS
def test_fault_a_failing_launch_ends_in_one_log_line_and_the_reference(on_gpu, monkeypatch, caplog, error):
    failing = Failing(error)
    monkeypatch.setattr(topk, "_count_kernel", failing)
    sae, latent_set, resid = random_sae(act="topk", k=8), some_set(40, 160), residuals(2, 9, 64)
    auto = Suppressor(sae, latent_set).to(DEVICE)
    want = Suppressor(sae, latent_set, backend="reference").to(DEVICE)(resid)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert torch.equal(auto(resid), want)
    assert failing.n_launches == 1, "the device is remembered"
    assert len(caplog.records) == 1
    assert type(error).__name__ in caplog.text
    assert str(error).splitlines()[0] in caplog.text


@ERRORS
def test_fault_fused_raises_with_the_cause_where_a_launch_fails(on_gpu, monkeypatch, error):
    monkeypatch.setattr(topk, "_count_kernel", Failing(error))
    with pytest.raises(BackendError, match=type(error).__name__) as raised:
        kernels(random_sae(act="topk", k=8), some_set(40, 160))(residuals(2, 9, 64))
    assert isinstance(raised.value.__cause__, BackendError)


@pytest.mark.parametrize("kernel", ["_encode_kernel", "_decode_kernel"])
def test_fault_encoding_and_decoding_fall_back_too(on_gpu, monkeypatch, kernel):
    module = fused.encode if kernel == "_encode_kernel" else fused.decode
    monkeypatch.setattr(module, kernel, Failing(RuntimeError("no compiler")))
    sae, z = random_sae(), residuals(1, 5, 64)[0]
    W_enc, b, W_dec, b_dec = (each.to(DEVICE) for each in (sae.W_enc, sae.folded_bias, sae.W_dec, sae.b_dec))
    acts, indices = ops.encode_topk(z, W_enc, b, 4)
    got = ops.sparse_decode(acts, indices, W_dec, b_dec)
    want = ops.sparse_decode(acts, indices, W_dec, b_dec, backend="reference")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    assert set(ops._unable.values()) == {"_failing_kernel cannot be launched (RuntimeError: no compiler)"}


@ERRORS
def test_fault_a_small_kernel_is_tried_once_per_device(on_gpu, monkeypatch, caplog, error):
    failing = Failing(error)
    monkeypatch.setattr(launching, "_trial_kernel", failing)
    sae, latent_set, resid = random_sae(act="topk", k=8), some_set(40, 160), residuals(2, 9, 64)
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            Suppressor(sae, latent_set).to(DEVICE)(resid)
    assert failing.n_launches == 1
    assert [record.message.partition(": ")[2].partition(" (")[0] for record in caplog.records] == [
        f"a small kernel fails on {resid.device}"
    ]
    assert not fused.launches
    with pytest.raises(BackendError, match=type(error).__name__):
        kernels(sae, latent_set)(resid)


def test_fault_a_small_kernel_that_computes_nothing_is_seen(on_gpu, monkeypatch):
    class Idle(Failing):
        def __getitem__(self, _grid):
            return lambda *_args: None

    assert launching.obstacle(DEVICE) is None
    launching._failure.cache_clear()
    monkeypatch.setattr(launching, "_trial_kernel", Idle(ValueError()))
    assert launching.obstacle(DEVICE) == f"a small kernel computes a wrong result on {DEVICE}"


def test_fault_rocm_is_refused_whatever_capability_it_reports(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device: (9, 4))
    assert launching.obstacle("cuda:0") == "the kernels are for NVIDIA GPUs; this torch is built for ROCm 6.4"


# --- weights and memory -----------------------------------------------------------------------------------------------


@rules
def test_fault_no_call_copies_the_weights(monkeypatch, rule):
    from defense.core.sae import SparseAutoencoder

    sae = random_sae(**rule)
    parameters = {
        name: value.T.copy().T for name, value in sae.parameters_numpy().items()
    }  # as torch's linears hold them
    assert not parameters["W_enc"].flags.c_contiguous
    suppressor = kernels(SparseAutoencoder(sae.config, parameters), some_set(40, 160))
    given, right = [], fused.suppress
    monkeypatch.setattr(fused, "suppress", lambda *args: (given.extend(args), right(*args))[1])
    suppressor(residuals(1, 5, 64))
    held = {tensor.data_ptr() for tensor in suppressor.buffers() if tensor is not suppressor.removal}
    weights = [each for each in given[5:-1] if isinstance(each, torch.Tensor) and each.ndim == 2]
    assert weights
    assert {tensor.data_ptr() for tensor in weights} <= held


def test_fault_scratch_memory_is_bounded_and_the_result_the_same(monkeypatch):
    sae, latent_set, resid = (
        random_sae(act="topk", k=8, norm="layer_norm"),
        some_set(40, 160, scope="patch"),
        residuals(7, 9, 64),
    )
    want = kernels(sae, latent_set)(resid)
    fused.launches.clear()
    monkeypatch.setattr(topk, "_CHUNK_ENTRIES", 2 * 8 * 40 + 1)  # two pictures of 8 tokens, less than three
    largest = []
    empty = topk.torch.empty
    monkeypatch.setattr(topk.torch, "empty", lambda shape, **kw: (largest.append(shape), empty(shape, **kw))[1])
    torch.testing.assert_close(kernels(sae, latent_set)(resid), want, atol=1e-6, rtol=1e-6)
    assert fused.launches == {name: 4 for name in TOPK_KERNELS}
    assert max(shape[0] * shape[1] for shape in largest if shape[1:] == (40,)) == 2 * 8 * 40


# --- numbers that are none --------------------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


quietly = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter


@quietly
@pytest.mark.parametrize("rule", some_slow(RULES["topk"], RULES["jumprelu"], slow=[RULES["relu"]]), ids=str)
@pytest.mark.parametrize("norm", some_slow("none", "layer_norm", slow=["constant_norm_rescale"]))
@pytest.mark.parametrize("value", some_slow(NAN, INF, slow=[-INF]), ids=str)
@pytest.mark.parametrize("scope", ["all", "patch"])
def test_fault_nan_and_inf_are_as_in_the_reference(rule, norm, value, scope):
    # Token 0 is out of the scope "patch", 3 in it. Every latent has a decoder row and gain of its own.
    sae, resid = random_sae(**rule, norm=norm), residuals(2, 6, 64)
    resid[0, 0, 5] = value
    resid[1, 3, 7] = value
    latent_set = LatentSet("test", some_set(40, 160).latents, (0.25,) * 40, scope=scope)
    want = Suppressor(sae, latent_set, backend="reference").to(DEVICE)(resid)
    got = kernels(sae, latent_set)(resid)
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-5, equal_nan=True)
    if scope == "patch":
        assert torch.equal(got[:, 0].nan_to_num(), resid[:, 0].nan_to_num())
    assert not got[1, 3].isfinite().all()
    assert got[1, 4].isfinite().all()


@quietly
@pytest.mark.parametrize("dtype", some_slow(torch.float32, torch.bfloat16, slow=[torch.float16]), ids=str)
@pytest.mark.parametrize("value", some_slow(-NAN, INF, slow=[NAN, -INF]), ids=str)
def test_fault_encode_topk_ranks_nan_first_as_the_reference_does(dtype, value):
    sae, z = random_sae(d_sae=161), residuals(1, 5, 64, dtype)[0]
    z[2, 3] = value
    W_enc, b = sae.W_enc.to(DEVICE, dtype), sae.folded_bias.to(DEVICE, dtype)
    got, indices = ops.encode_topk(z, W_enc, b, 9, backend="fused")
    want, _ = ops.encode_topk(z, W_enc, b, 9, backend="reference")
    order = {"descending": True, "dim": 1}
    assert torch.equal(got.isnan(), want.isnan())
    torch.testing.assert_close(got.sort(**order)[0], want.sort(**order)[0], equal_nan=True, atol=0.03, rtol=0.02)
    assert all(len(row.unique()) == 9 for row in indices)


# --- tracing ----------------------------------------------------------------------------------------------------------


@rules
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
def test_fault_traced_where_nothing_fires_it_still_defends(rule):
    sae = random_sae(**rule)
    sae.folded_bias -= 1
    suppressor, resid = kernels(sae, some_set(40, 160)), residuals(2, 5, 64) * 2
    quiet = torch.zeros_like(resid)
    with torch.inference_mode():
        assert torch.equal(suppressor(quiet), quiet)
        want = suppressor(resid)
        assert not torch.equal(want, resid)
        traced = torch.jit.trace(suppressor, quiet)
        fused.launches.clear()
        assert torch.equal(traced(resid), want)
    assert fused.launches


@pytest.mark.skipif(not IS_INTERPRETED, reason="here a launch cannot be made to fail")
def test_fault_a_trial_that_fails_leaves_a_compiled_graph_whole(on_gpu, monkeypatch):
    monkeypatch.setattr(launching, "_trial_kernel", Failing(RuntimeError("no compiler")))
    suppressor, resid = Suppressor(random_sae(act="topk", k=8), some_set(40, 160)).to(DEVICE), residuals(1, 9, 64)
    torch._dynamo.reset()
    with torch.inference_mode():
        compiled = torch.compile(suppressor, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(resid), suppressor(resid), atol=1e-5, rtol=0)
    assert not fused.launches
