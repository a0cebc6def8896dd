"""Which implementation runs, and that the kernels do what the reference does (`kernel_cases.py` and its like)."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")
import torch

from defense.core import ops
from defense.core.latents import LatentSet
from defense.core.ops import reference
from defense.core.suppress import Suppressor
from defense.errors import BackendError, ConfigError, ShapeError
from defense.hosts.attach import attached, wrap

from ..conftest import random_defense, random_sae

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="runs where triton is installed")

TOPK = {"act": "topk", "k": 8}
SET = LatentSet("test", tuple(range(40)))


CASES = ("kernel_cases.py", "kernel_encode.py", "kernel_shapes.py", "kernel_faults.py", "kernel_benchmark.py")


def run_cases(marked: str, **environment: str) -> None:
    """Run the cases of a mark in a process of their own: triton reads TRITON_INTERPRET when it is imported."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--import-mode=importlib",
            "-p",
            "no:cacheprovider",
            "-m",
            marked,
            *CASES,
        ],
        cwd=Path(__file__).parent,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@needs_triton
@pytest.mark.parametrize("marked", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_kernels_equal_float64_under_the_interpreter(marked):
    run_cases(marked, TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_kernels_equal_float64_on_a_gpu():
    run_cases("slow or not slow", TRITON_INTERPRET="0")


def test_importing_ops_loads_no_triton():
    code = (
        "import sys, defense.core.ops, defense.core.suppress; "
        "assert not {'triton', 'defense.core.ops.fused'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_without_triton_the_reference_works_and_fused_says_what_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import os, torch
os.environ["TRITON_INTERPRET"] = "1"
from defense.core import ops
W_enc, b, z = torch.randn(8, 20), torch.randn(20), torch.randn(3, 8)
assert ops.encode_topk(z, W_enc, b, 4)[0].shape == (3, 4)
try:
    ops.encode_topk(z, W_enc, b, 4, backend="fused")
except ops.BackendError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("backend='fused' cannot run: triton cannot be imported")


def test_fused_on_a_cpu_is_refused_and_auto_is_the_reference(tiny_clip, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    sae, resid = random_sae(**TOPK), torch.randn(2, 5, 64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(BackendError, match="the tensors are on cpu; the kernels need a CUDA device"):
        Suppressor(sae, SET, backend="fused")(resid)
    auto, plain = (Suppressor(sae, SET, backend=backend)(resid) for backend in ("auto", "reference"))
    assert torch.equal(auto, plain)
    wrap(tiny_clip, random_defense(tiny_clip, (1, sae, SET)), backend="fused")
    with pytest.raises(BackendError, match="cpu"):
        tiny_clip.encode_image(torch.zeros(1, 3, 32, 32))


@pytest.mark.parametrize(
    ("rule", "edit", "message"),
    [
        (TOPK, "project", "no kernel for the edit 'project'"),
        (TOPK, "set", "no kernel for the edit 'set'"),
        ({"act": "gated"}, "scale", "no kernel for gated SAEs"),
        ({**TOPK, "topk_relu": "none"}, "scale", "no kernel for a TopK SAE without ReLU"),
    ],
    ids=["project", "set", "gated", "no-relu"],
)
def test_what_has_no_kernel_is_refused_at_once_and_left_to_the_reference_by_auto(rule, edit, message):
    latent_set = LatentSet("test", (1, 2), edit=edit, values=(0.0, 0.0) if edit == "set" else ())
    sae = random_sae(**rule)
    with pytest.raises(BackendError, match=message):
        Suppressor(sae, latent_set, backend="fused")
    Suppressor(sae, latent_set)(torch.zeros(1, 5, 64))


def test_a_model_is_left_alone_where_fused_is_refused(tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(act="gated"), SET))
    with pytest.raises(BackendError, match="gated"):
        wrap(tiny_clip, defense, backend="fused")
    assert not hasattr(tiny_clip, "defense")
    assert not tiny_clip.visual.transformer.resblocks[1]._forward_hooks


def test_an_unknown_backend_is_refused(tiny_clip):
    with pytest.raises(ConfigError, match="backend='triton'; it must be one of auto, fused, reference"):
        wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(), SET)), backend="triton")


def test_wrap_hands_the_backend_to_every_suppressor(tiny_clip):
    wrap(tiny_clip, random_defense(tiny_clip, (0, random_sae(), SET), (1, random_sae(), SET)), backend="reference")
    assert [suppressor.backend for suppressor in attached(tiny_clip).suppressors()] == ["reference"] * 2


class OnCuda:
    """What the choice of a backend sees of a CUDA tensor."""

    is_cuda, dtype, requires_grad, device = True, torch.float32, False, "cuda:0"


@pytest.fixture
def old_gpu(monkeypatch):
    """A GPU that is too old, whether or not triton is there."""
    module = SimpleNamespace(obstacle=lambda _device: "it is too old")
    monkeypatch.setitem(sys.modules, "defense.core.ops.fused", module)
    monkeypatch.setattr(ops, "fused", module, raising=False)
    monkeypatch.setattr(ops, "_logged", set())
    return module


def test_a_fallback_on_a_gpu_is_logged_once_with_its_reason(old_gpu, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not ops._chosen("auto", OnCuda, OnCuda, None)
            assert not ops._chosen("auto", OnCuda, OnCuda, "there is no kernel")
        assert not ops._chosen("reference", OnCuda, OnCuda, None)
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["it is too old", "there is no kernel"]
    with pytest.raises(BackendError, match="it is too old"):
        ops._chosen("fused", OnCuda, OnCuda, None)


def test_float64_gradients_and_scattered_weights_are_left_to_the_reference(old_gpu):
    old_gpu.obstacle = lambda _device: None

    class Double(OnCuda):
        dtype = torch.float64

    class Learning(OnCuda):
        requires_grad = True

    class Elsewhere(OnCuda):
        device = "cuda:1"

    assert ops._chosen("auto", OnCuda, OnCuda, None)
    for other in (Double, Learning, Elsewhere):
        assert not ops._chosen("auto", OnCuda, other, None)
    with torch.no_grad():
        assert ops._chosen("auto", Learning, OnCuda, None)


# --- the reference of encode_topk and sparse_decode -------------------------------------------------------------------


def test_reference_encode_and_decode_equal_those_of_the_sae(monkeypatch):
    sae = random_sae(**TOPK)
    resid = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    want = sae.encode(resid)
    for name, chunk in (("_CHUNK_ROWS_CPU", 512), ("_CHUNK_ROWS_CPU", 9), ("_CHUNK_ELEMENTS", 7 * 160)):
        monkeypatch.setattr(reference, name, chunk)
        acts, indices = ops.encode_topk(resid, sae.W_enc, sae.folded_bias, 8, backend="reference")
        torch.testing.assert_close(torch.zeros_like(want).scatter(1, indices, acts), want, atol=1e-5, rtol=0)
    got = ops.sparse_decode(acts, indices, sae.W_dec, sae.b_dec, backend="reference")
    torch.testing.assert_close(got, sae.decode(want, resid), atol=1e-5, rtol=0)


@pytest.mark.parametrize("k", [0, 161])
def test_encode_topk_refuses_a_k_out_of_range(k):
    sae = random_sae()
    with pytest.raises(ConfigError, match=rf"k={k}; it must lie between 1 and d_sae=160"):
        ops.encode_topk(torch.zeros(1, 64), sae.W_enc, sae.folded_bias, k)


def test_sizes_that_do_not_fit_are_refused():
    sae = random_sae()
    with pytest.raises(ShapeError, match=r"z is \[1, 65\].*takes z \[tokens, 64\]"):
        ops.encode_topk(torch.zeros(1, 65), sae.W_enc, sae.folded_bias, 8)
    with pytest.raises(ShapeError, match=r"acts are \[1, 8\], indices \[1, 7\]"):
        ops.sparse_decode(torch.zeros(1, 8), torch.zeros(1, 7, dtype=torch.int64), sae.W_dec, sae.b_dec)
