"""The Triton kernels compiled for GPUs that need not be there: they compile, fit, and use the tensor cores."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("triton")

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from defense.benchmarks.kernel_cases import CASES, TILES, Case
from defense.core.ops import fused
from defense.core.ops.fused import Tile, encode, launching

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing; unset TRITON_INTERPRET"
)

TYPES = {
    torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip
SHARED_BYTES = {80: 99 * 1024, 90: 227 * 1024}
"""What a program may have. 80 stands for all before Hopper, of which consumer GPUs have least."""
STACK_BYTES = 128
"""A few spilled registers outside of the loops do not matter; more would."""
WITH_PRODUCTS = {"_candidates_kernel", "_count_kernel", "_threshold_kernel", "_encode_kernel"}

architectures = pytest.mark.parametrize("capability", SHARED_BYTES, ids=lambda capability: f"sm_{capability}")


@dataclass(frozen=True)
class Compiled:
    name: str
    ptx: str
    shared_bytes: int
    stack_bytes: int


def compile_launch(kernel, arguments: tuple, constants: dict, capability: int, folder: Path) -> Compiled:
    """Compile a kernel for arguments as the launcher hands them over, in the way that triton's jit does."""
    options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
    values = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
    signature, constexprs, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = values[name]
        is_specialized = not (parameter.is_constexpr or parameter.do_not_specialize)
        if parameter.is_constexpr or value is None or (is_specialized and isinstance(value, int) and value == 1):
            signature[name], constexprs[(index,)] = "constexpr", value
            continue
        is_tensor = isinstance(value, torch.Tensor)
        signature[name] = TYPES[value.dtype] if is_tensor else "i32"
        if is_tensor or (is_specialized and value % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs, attributes)
    target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={**options, "enable_fp_fusion": True})
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    usage = subprocess.run([tool, "-res-usage", cubin], capture_output=True, text=True, check=True).stdout
    stack = re.search(r"STACK:(\d+)", usage)
    assert stack is not None, usage
    return Compiled(kernel.fn.__name__, compiled.asm["ptx"], compiled.metadata.shared, int(stack[1]))


@pytest.fixture
def compile_all(monkeypatch, tmp_path):
    """Return what compiles every launch of the operators, for a shape, dtype, norm and architecture."""

    def call(case: Case, dtype: torch.dtype, norm: str, capability: int, n_set: int = 64) -> dict[str, Compiled]:
        launches = []
        monkeypatch.setattr(
            launching, "launch", lambda kernel, _, *args, **constants: launches.append((kernel, args, constants))
        )
        monkeypatch.setattr(launching, "capability", lambda _device: (capability // 10, capability % 10))

        def meta(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        resid = meta(case.batch, case.pos, case.d_model)
        W_enc, b, W_dec, b_dec = (
            meta(case.d_model, case.d_sae),
            meta(case.d_sae),
            meta(case.d_sae, case.d_model),
            meta(case.d_model),
        )
        of_set = (resid, resid, 0, case.pos, norm, meta(case.d_model, n_set), meta(n_set))
        rows, removal, indices = meta(n_set, case.d_model), meta(n_set), meta(n_set, dtype=torch.int64)
        fused.topk_suppress._init_fn(*of_set, rows, removal, W_enc, b, indices, case.k)
        fused.threshold_suppress._init_fn(*of_set, meta(n_set, dtype=torch.float32), rows, removal)
        z = resid.flatten(0, 1)[: encode._CHUNK_ELEMENTS // case.d_sae]
        acts, indices = fused.encode_topk._init_fn(z, W_enc, b, case.k)
        fused.sparse_decode._init_fn(acts, indices, W_dec, b_dec)
        found = [compile_launch(kernel, args, constants, capability, tmp_path) for kernel, args, constants in launches]
        assert len(found) == 9
        return {each.name: each for each in found}

    return call


def check(kernels: dict[str, Compiled], capability: int, dtype: torch.dtype) -> None:
    """Hold compiled kernels against the limits."""
    for name, kernel in kernels.items():
        assert kernel.shared_bytes <= SHARED_BYTES[capability], name
        assert kernel.stack_bytes <= STACK_BYTES, name
        on_tensor_cores = "wgmma.mma_async" if capability == 90 else "mma.sync"
        is_product = name in WITH_PRODUCTS and dtype != torch.float32
        assert (on_tensor_cores in kernel.ptx) == is_product, name
        assert "tf32" not in kernel.ptx, name


@architectures
def test_kernels_compile_fit_and_multiply_on_tensor_cores(compile_all, capability):
    check(compile_all(CASES[0], torch.bfloat16, "none", capability), capability, torch.bfloat16)


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, Case("odd", 3, 257, 48, 300, 300)], ids=lambda case: case.model)
def test_every_shape_dtype_and_norm_compiles_and_fits(compile_all, case, dtype, norm, capability):
    for n_set in (8, 512):
        check(compile_all(case, dtype, norm, capability, n_set), capability, dtype)


@pytest.mark.slow
@pytest.mark.parametrize("fields", TILES, ids=str)
def test_every_tile_that_the_benchmark_tries_compiles_and_fits(compile_all, monkeypatch, fields):
    monkeypatch.setattr(launching, "stream_tile", lambda *_: Tile(*fields))
    check(compile_all(CASES[0], torch.bfloat16, "none", 90), 90, torch.bfloat16)
