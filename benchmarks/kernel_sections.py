"""The sections of the benchmark of the kernels: each times one operation, variant by variant, and yields rows."""

from __future__ import annotations

import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch

from defense.benchmarks import kernel_cases
from defense.benchmarks.kernel_cases import DEFAULT_SET, DEFAULT_SHARE, HALF, SEED, Case
from defense.benchmarks.kernel_parity import exact_edit, n_unequal
from defense.benchmarks.kernel_rows import Row
from defense.benchmarks.kernel_timing import Bench
from defense.benchmarks.kernel_variants import (
    Edit,
    compiled,
    eager_dense,
    eager_sparse,
    encode,
    kernels,
    plain_reference,
    sparsify,
)
from defense.benchmarks.kernel_workloads import Workload, draw
from defense.core import ops
from defense.errors import MissingDependencyError

_SHARE_UNEQUAL = 0.1
"""Of the tokens at which a variant other than the kernels may differ from float64: it may round otherwise."""


def suppress_rows(bench: Bench) -> Iterator[Row]:
    """Time the suppression by a TopK SAE: the default S in bfloat16, with what it is compared with."""
    for case, share in itertools.product(kernel_cases.CASES, kernel_cases.SHARES):
        if bench.has_time(f"suppress, {case.model}, {share:.0%}"):
            variants = {"kernels": kernels} | _rivals(share)
            yield from _suppress_rows(bench, draw(case, HALF[0], DEFAULT_SET, share), "suppress", variants)


def more_suppress_rows(bench: Bench) -> Iterator[Row]:
    """Time the kernels with other sizes of S, and in float16."""
    sizes = [(n_set, HALF[0]) for n_set in kernel_cases.SET_SIZES if n_set != DEFAULT_SET] + [(DEFAULT_SET, HALF[1])]
    for case, (n_set, dtype), share in itertools.product(kernel_cases.CASES, sizes, kernel_cases.SHARES):
        if bench.has_time(f"suppress, {case.model}, |S| {n_set}, {share:.0%}, {dtype}"):
            variants: dict[str, Edit] = {"kernels": kernels}
            yield from _suppress_rows(bench, draw(case, dtype, n_set, share), "suppress", variants)


def _rivals(share: float) -> dict[str, Edit]:
    """Return what the kernels are compared with where this share of tokens fires."""
    variants: dict[str, Edit] = {"reference": plain_reference}
    if share == 1.0:
        variants |= {"reference, compiled": compiled(plain_reference)}
    if share == DEFAULT_SHARE:  # these cost the same whatever fires
        variants |= {"eager dense": eager_dense, "eager sparse": eager_sparse}
        variants |= {"eager sparse, compiled": compiled(eager_sparse)}
    return variants


def relu_rows(bench: Bench) -> Iterator[Row]:
    """Time the suppression by a ReLU SAE."""
    for case, n_set in itertools.product(kernel_cases.CASES, kernel_cases.SET_SIZES):
        if bench.has_time(f"suppress, relu, {case.model}, |S| {n_set}"):
            variants: dict[str, Edit] = {"kernels": kernels, "reference": plain_reference}
            if n_set == DEFAULT_SET:
                variants |= {"reference, compiled": compiled(plain_reference)}
            workload = draw(case, HALF[0], n_set, 1.0, act="relu")
            yield from _suppress_rows(bench, workload, "suppress, relu", variants)


def _suppress_rows(bench: Bench, workload: Workload, operation: str, variants: Mapping[str, Edit]) -> Iterator[Row]:
    """Time variants that edit one workload, each after it was held against float64."""
    case, n_firing = workload.case, workload.n_firing
    if workload.encoder.W_enc is None:
        floor_ms, peak_floor_ms = 2 * workload.resid.nbytes / bench.bytes_per_ms, None
    else:
        peak_floor_ms = 2 * n_firing * case.d_model * case.d_sae / bench.flop_per_ms
        floor_ms = bench.matmul_ms(workload) * n_firing / case.n_tokens
    exact = exact_edit(workload.resid, workload.norm, workload.encoder, workload.W_dec_S, workload.removal)
    for name, edit in variants.items():
        unequal = n_unequal(edit(workload), exact)
        if unequal > (0 if name == "kernels" else _SHARE_UNEQUAL * case.n_tokens):
            bench.failures.append(f"{operation}, {name}, {case}: {unequal} of {case.n_tokens} tokens are wrong")
            continue
        yield bench.row(
            operation, name, case, workload.resid.dtype, partial(edit, workload), floor_ms=floor_ms,
            peak_floor_ms=peak_floor_ms,
            n_set=len(workload.latents), n_firing=n_firing, share=workload.share, unequal=unequal,
        )  # fmt: skip


def encode_rows(bench: Bench) -> Iterator[Row]:
    """Time encode_topk and sparse_decode."""
    peer = sparsify()
    for case in kernel_cases.CASES:
        if not bench.has_time(f"encode_topk, {case.model}"):
            continue
        workload = draw(case, HALF[0], DEFAULT_SET, DEFAULT_SHARE)
        W_enc, b, W_dec = workload.encoder.W_enc, workload.encoder.b, workload.W_dec
        assert W_enc is not None
        assert b is not None
        b_dec = torch.zeros_like(W_dec[0])
        fused_topk = partial(ops.encode_topk, workload.rows, W_enc, b, case.k, backend="fused")
        acts, indices = fused_topk()
        encoders: dict[str, Callable[[], Any]] = {
            "kernels": fused_topk,
            "eager": partial(encode, workload),
            "eager, compiled": partial(compiled(encode), workload),
        }
        decode = partial(ops.sparse_decode, acts, indices, W_dec, b_dec)
        decoders: dict[str, Callable[[], Any]] = {
            "kernels": partial(decode, backend="fused"),
            "eager": partial(decode, backend="reference"),
        }
        if peer is not None:
            encoders["sparsify"] = partial(peer.encode, workload.rows, W_enc.T.contiguous(), b, case.k, "topk")
            decoders["sparsify"] = partial(peer.decode, indices, acts, W_dec)
        moved = W_dec.nbytes + acts.nbytes + indices.nbytes + workload.resid.nbytes
        for operation, variants, floor_ms in (
            ("encode_topk", encoders, bench.matmul_ms(workload)),
            ("sparse_decode", decoders, moved / bench.bytes_per_ms),
        ):
            for name, job in variants.items():
                yield bench.row(operation, name, case, HALF[0], job, floor_ms=floor_ms)


def tile_rows(bench: Bench) -> Iterator[Row]:
    """Time the suppression, every token firing, for several tiles: what the choice in `fused/launching.py` rests on."""
    from defense.core.ops.fused import Tile, launching

    workload = draw(kernel_cases.CASES[0], HALF[0], DEFAULT_SET, 1.0)
    floor_ms = bench.matmul_ms(workload)
    for tile in (Tile(*fields) for fields in kernel_cases.TILES):
        name = f"kernels, tile {tile.m} x {tile.n} x {tile.k}, {tile.num_warps} warps, {tile.num_stages} stages"
        if bench.has_time(name):
            with mock.patch.object(launching, "stream_tile", lambda *_, tile=tile: tile):
                yield bench.row(
                    "suppress", name, workload.case, HALF[0], partial(kernels, workload), floor_ms=floor_ms,
                    n_set=DEFAULT_SET, n_firing=workload.n_firing, share=1.0,
                )  # fmt: skip


def model_rows(bench: Bench) -> Iterator[Row]:
    """Time `encode_image`, plain and defended; without open_clip there is no model, and nothing is timed."""
    yield from _model_rows(bench, "", HALF)


def compiled_model_rows(bench: Bench) -> Iterator[Row]:
    """Time `encode_image` under torch.compile, which takes longest to get ready."""
    yield from _model_rows(bench, ", compiled", HALF[:1])


def _model_rows(bench: Bench, suffix: str, dtypes: Sequence[torch.dtype]) -> Iterator[Row]:
    for dtype, (case, block) in itertools.product(dtypes, kernel_cases.END_TO_END):
        if not bench.has_time(f"encode_image, {case.model}, {dtype}{suffix}"):
            continue
        try:
            plain, defended, size = _models(case, block)
        except MissingDependencyError as error:
            print(f"encode_image is left out: {error}", file=sys.stderr)
            return
        generator = torch.Generator(kernel_cases.DEVICE).manual_seed(SEED)
        pixel_values = torch.randn(case.batch, 3, *size, generator=generator, device=kernel_cases.DEVICE, dtype=dtype)
        in_force = {"n_set": DEFAULT_SET, "share": DEFAULT_SHARE}
        for name, model, more in (("plain CLIP", plain, {}), (f"defended after block {block}", defended, in_force)):
            encode_image = model.to(kernel_cases.DEVICE, dtype).encode_image
            job = partial(compiled(encode_image) if suffix else encode_image, pixel_values)
            yield bench.row("encode_image", name + suffix, case, dtype, job, **more)


@functools.cache
def _models(case: Case, block: int) -> tuple[Any, Any, tuple[int, int]]:
    """Return a plain model, the same one defended, and the height and width of its pictures.

    The share of tokens that fire is set on few pictures, on the CPU.
    """
    from defense.benchmarks.speed_rows import Case as SpeedCase
    from defense.benchmarks.speed_variants import twin
    from defense.benchmarks.speed_workloads import create_model, make_workloads, set_stage
    from defense.hosts.attach import attach
    from defense.hosts.defense import Site

    few = SpeedCase(model=case.model, batch=8, d_sae=case.d_sae, k=case.k, n_set=DEFAULT_SET, block=block, seed=SEED)
    stage = set_stage(create_model(few), few)
    workload = next(each for each in make_workloads(stage) if each.share == DEFAULT_SHARE)
    site = Site(few.hook_point, workload.config, workload.parameters, (workload.latent_set,))
    defended = twin(stage.model)
    attach(defended, (site,), backend="fused")
    return stage.model, defended, stage.preprocess.size


# What matters most comes first: time may run out.
SECTIONS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    tile_rows, suppress_rows, model_rows, encode_rows, relu_rows, more_suppress_rows, compiled_model_rows,
)  # fmt: skip
