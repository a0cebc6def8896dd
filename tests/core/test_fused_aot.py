"""The Triton kernels compiled for GPUs that need not be there: they compile, fit, and use the tensor cores."""

from __future__ import annotations

import os
from dataclasses import replace
from unittest import mock

import pytest

pytest.importorskip("triton")
pytest.importorskip("torch")

import torch

from defense.benchmarks import kernel_ahead, kernel_cases, kernel_static
from defense.benchmarks.kernel_cases import CASES, TILES, Case
from defense.benchmarks.kernel_compiling import LIMITS, Compiled, compile_launch
from defense.benchmarks.kernel_static import launches_of, tile_of
from defense.core.ops.fused import Tile, launching

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing; unset TRITON_INTERPRET"
)

WITH_PRODUCTS = {"_candidates_kernel", "_count_kernel", "_threshold_kernel", "_encode_kernel"}
TENSOR_CORE = {90: "HGMMA", 100: "UTCHMMA"}
"""The instruction that an architecture multiplies fastest with; HMMA on the others."""
STACK_BYTES = 128
"""A few spilled registers outside of the loops do not matter; more would. The count kernel may have none."""
ODD = Case("odd", 3, 257, 48, 300, 300)

architectures = pytest.mark.parametrize("capability", LIMITS, ids=lambda capability: f"sm_{capability}")


def compiled(
    capability: int, dtype: torch.dtype = torch.bfloat16, *, case: Case = CASES[0], norm: str = "none",
    n_set: int = 64, only: str = "",
) -> list[Compiled]:  # fmt: skip
    """Compile what the operators launch, or one kernel of it, and hold it against the limits."""
    launches = launches_of(case, dtype, norm, capability, n_set)
    assert {launch.name for launch in launches} >= WITH_PRODUCTS - ({"_encode_kernel"} if norm != "none" else set())
    found = [compile_launch(launch, capability) for launch in launches if only in launch.name]
    assert found
    for kernel in found:
        check(kernel, capability, dtype)
    return found


def check(kernel: Compiled, capability: int, dtype: torch.dtype) -> None:
    name, is_count = kernel.kernel, kernel.kernel == "_count_kernel"
    assert kernel.shared_bytes <= LIMITS[capability].shared_per_program, name
    assert kernel.stack_bytes <= (0 if is_count else STACK_BYTES), name
    assert kernel.programs_per_sm >= (tile_of(dtype, capability).per_sm if is_count else 1), name
    is_product = name in WITH_PRODUCTS and dtype != torch.float32
    assert (kernel.n_tensor_core > 0) == is_product, name
    assert (TENSOR_CORE.get(capability, "HMMA") in kernel.sass) == is_product, name
    assert "TF32" not in kernel.sass, name


def test_the_count_kernel_on_hopper_has_registers_to_spare_and_short_loops():
    (kernel,) = compiled(90, only="_count_kernel")
    assert kernel.registers <= 240
    assert kernel.per_step is not None
    assert kernel.per_step <= 130
    assert kernel.per_slot is not None
    assert kernel.per_slot <= 340


def test_two_programs_share_a_multiprocessor_where_two_are_declared():
    assert tile_of(torch.float32, 80).per_sm == 2
    (kernel,) = compiled(80, torch.float32, only="_count_kernel")
    assert kernel.programs_per_sm >= 2


def test_the_steps_of_the_count_kernel_are_the_same_with_a_norm():
    plain, normed = (
        next(launch for launch in launches_of(CASES[0], torch.bfloat16, norm, 90) if launch.name == "_count_kernel")
        for norm in ("none", "layer_norm")
    )
    assert plain.constants == normed.constants
    assert [str(each) for each in plain.arguments] == [str(each) for each in normed.arguments]


def test_every_architecture_has_a_tile_and_unknown_ones_the_smallest():
    tiles = {capability: tile_of(torch.bfloat16, capability) for capability in (*LIMITS, 75, 130)}
    assert tiles[86] == tiles[89] == tiles[120] == tiles[130]
    assert len({tiles[80], tiles[86], tiles[90], tiles[100]}) == 4


@pytest.mark.slow
@architectures
def test_kernels_compile_fit_and_multiply_on_tensor_cores(capability):
    compiled(capability)


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, ODD], ids=lambda case: case.model)
def test_the_count_kernel_never_spills(case, dtype, capability):
    compiled(capability, dtype, case=case, only="_count_kernel")


@pytest.mark.slow
@architectures
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, ODD], ids=lambda case: case.model)
def test_every_shape_dtype_and_norm_compiles_and_fits(case, dtype, norm, capability):
    for n_set in (8, 512):
        compiled(capability, dtype, case=case, norm=norm, n_set=n_set)


@pytest.mark.slow
@pytest.mark.parametrize("fields", TILES, ids=str)
def test_every_tile_that_the_benchmark_tries_compiles_and_fits(fields):
    with mock.patch.object(launching, "stream_tile", return_value=Tile(*fields)):
        compiled(90, only="_count_kernel")


def test_what_is_compiled_ahead_is_all_that_the_launcher_asks_for(monkeypatch, tmp_path):
    from triton.runtime import driver

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    small = replace(ODD, pos=5)
    for name, value in {"PARITY": [], "CASES": [small], "SET_SIZES": (8,), "TILES": ()}.items():
        monkeypatch.setattr(kernel_cases, name, value)
    wanted = kernel_ahead.kernels_ahead(90)
    with mock.patch.object(kernel_ahead, "kernels_ahead", return_value=[*wanted, (wanted[0][0], 99)]):
        (failure,) = kernel_ahead.compile_ahead(90, jobs=2)
    assert "IndexError" in failure, "one that cannot be compiled leaves the others alone"
    assert len(wanted) > 8
    compiled = sorted(tmp_path.rglob("*.cubin"))
    assert len(compiled) == len(wanted), "each once"
    monkeypatch.setattr(driver, "_active", kernel_ahead.CompileOnly(90))
    for run, index in wanted:
        kernel_ahead.compile_one(90, run, index)
        run.launches(90)[index].kernel.device_caches.clear()  # what it knows of a device that is none
    assert sorted(tmp_path.rglob("*.cubin")) == compiled, "found in the cache"


def test_all_that_the_benchmark_launches_is_compiled_ahead():
    from collections import Counter

    wanted = kernel_ahead.kernels_ahead(90)
    launches = [run.launches(90)[index] for run, index in wanted]
    assert len({kernel_ahead._what_is_compiled(launch) for launch in launches}) == len(launches)
    counts = Counter(launch.name for launch in launches)
    assert counts.keys() == WITH_PRODUCTS | {"_order_kernel", "_subtract_kernel", "_select_kernel", "_decode_kernel"}
    assert {launch.constants["BLOCK_N"] for launch in launches if launch.name == "_order_kernel"} >= {8, 64, 512}
    assert {run.tile for run, _ in wanted if run.tile is not None} == {
        fields for fields in TILES if Tile(*fields) != launching._STREAM_90
    }
    assert [launch.name for launch in launches[:3]] == ["_count_kernel"] * 3


# --- what is made of it -----------------------------------------------------------------------------------------------


def test_the_model_counts_more_slots_and_tokens_as_more_time():
    count = {"n_instructions": 1151, "per_step": 116, "per_slot": 332}
    case = CASES[0]
    few, more = (kernel_static.count_kernel_ms(count, case, case.n_tokens, slots) for slots in (1, 4))
    floor = 2 * case.n_tokens * case.d_model * case.d_sae / 790e9
    assert floor < few < more
    assert kernel_static.count_kernel_ms(count, case, case.n_tokens // 20, 1) < few / 10
