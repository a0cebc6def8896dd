"""What the Triton kernels cost on a GPU, beside PyTorch, torch.compile and the floor.

    python -m defense.benchmarks.kernel

All that only a GPU can tell, in one run of under ten minutes: first a parity gate, then timings, then a table and how
the targets were met. Where the gate fails, nothing is timed. Rows go to benchmarks/results/kernel.json as they come.

| operation | arms |
|---|---|
| suppress | kernels; reference; eager dense (matmul, topk, scatter, matmul); eager sparse (matmul, topk, rows of S) |
| suppress, relu | kernels; reference |
| encode_topk, sparse_decode | kernels; eager; sparsify's, where it can be imported |
| encode_image | plain CLIP; defended by the kernels |

Reference and eager arms also run under torch.compile; `encode_image` does for both arms.

Gate: the kernels against float64, for odd sizes, every dtype, rule and norm, and for each shape that is timed. Left out
are tokens at which rounding decides what is among the k largest; they are counted. An arm that is timed must agree with
float64 too; as eager arms round pre-activations to the SAE's dtype and compare after that, they may differ on a tenth
of the tokens.

Timings: `triton.testing.do_bench`, the median with 20th and 80th percentile, the L2 cache cleared before each call;
each arm alone. Random weights and residuals. The encoder columns of S are longer than the others, so that about half of
the latents of S that fire are among the k largest, and the encoder biases of S are shifted until the wanted share of
tokens fires.

The floor of a TopK rule is the encoder matmul [n_firing, d_model] x [d_model, d_sae] at the rate that `torch.mm`
reaches on all tokens in the same run; for relu and `sparse_decode`, the bytes that must be moved at the measured rate
of a copy. Extra MiB is the peak of allocated memory during one call, above the inputs and the result.

Not measured: accuracy; float32 (its products run on the general cores); other GPUs than the one named.

For memory errors: compute-sanitizer python -m pytest tests/core/kernel_cases.py
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from defense.benchmarks.environment import Environment, checkout_words, environment_of
from defense.benchmarks.firing import firing_bias
from defense.core import ops
from defense.core.config import Act, Norm
from defense.core.latents import Scope, token_slice
from defense.core.ops import Backend, reference
from defense.core.ops.reference import Encoder
from defense.core.sae import normalize
from defense.errors import BackendError
from defense.hosts.attach import attach
from defense.hosts.defense import Site

RESULTS = Path(__file__).with_name("results") / "kernel.json"
DEVICE = "cuda"

_MIB = 2**20
_EMPHASIS = 16.0
"""Length of the encoder columns of S; the others have length 1."""
_SEED = 0
_EXACT_TOKENS = 256
_SHARE_UNEQUAL = 0.1
_HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Case:
    """One shape.

    Attributes:
        model: What has this shape.
        batch: Pictures.
        pos: Tokens of a picture.
        d_model: Width of the residual.
        d_sae: Latents.
        k: Latents that count at a token.
    """

    model: str
    batch: int
    pos: int
    d_model: int
    d_sae: int
    k: int

    @property
    def n_tokens(self) -> int:
        """Tokens of all pictures."""
        return self.batch * self.pos


CASES = (
    Case("ViT-B-32", 256, 50, 768, 49_152, 64),
    Case("ViT-B-16", 64, 197, 768, 12_288, 32),
    Case("ViT-L-14", 64, 257, 1024, 65_536, 32),
)
END_TO_END = ((CASES[0], 8), (CASES[2], 16))
"""Shapes of whole models, and the block that is edited."""
TILES = (
    (128, 256, 64, 8, 3, 1),
    (128, 256, 64, 8, 4, 1),
    (128, 128, 64, 8, 3, 2),
    (128, 128, 64, 4, 3, 2),
    (256, 128, 64, 8, 3, 1),
    (64, 256, 64, 4, 3, 2),
)
"""Fields of `fused.Tile`: what the tile for Hopper is chosen from."""
SET_SIZES = (8, 64, 512)
SHARES = (0.0, 0.05, 0.2, 1.0)
DEFAULT_SET, DEFAULT_SHARE = 64, 0.05

_ODD = (Case("odd", 1, 1, 48, 300, 32), Case("odd", 2, 50, 768, 1000, 1), Case("odd", 3, 257, 1024, 777, 777))
_COUPLED_OR_NOT: tuple[Act, ...] = ("topk", "jumprelu")
_PRECISIONS: tuple[tuple[torch.dtype, Norm], ...] = (
    (torch.float32, "none"),
    (torch.float32, "layer_norm"),
    (torch.bfloat16, "none"),
    (torch.bfloat16, "constant_norm_rescale"),
    (torch.float16, "layer_norm"),
)
PARITY: tuple[tuple[Case, torch.dtype, Act, Norm], ...] = (
    *((case, dtype, act, norm) for case in _ODD for act in _COUPLED_OR_NOT for dtype, norm in _PRECISIONS),
    *((replace(case, batch=2), dtype, act, "none") for case in CASES for dtype in _HALF for act in _COUPLED_OR_NOT),
)
"""What the gate checks: every kernel, odd sizes, every dtype and norm, and the shapes that are timed."""


@dataclass(frozen=True)
class Gpu:
    """The device of a row.

    Attributes:
        name: Its model.
        driver: Version.
        power_limit_w: As set, in watts, as text; "?" where nvidia-smi does not tell.
        sm_clock_mhz: Highest clock of the multiprocessors, as text.
        cuda: Version that torch was built for.
        triton: Version.
    """

    name: str
    driver: str
    power_limit_w: str
    sm_clock_mhz: str
    cuda: str
    triton: str


@dataclass(frozen=True)
class Row:
    """One arm's figures.

    Attributes:
        operation: "suppress", "suppress, relu", "encode_topk", "sparse_decode" or "encode_image".
        arm: Who computes it.
        latency_ms: Median.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        floor_ms: See the module; None where there is none.
        peak_mib: Extra memory; None where it was not measured.
        n_set: Latents in S, where there is one.
        n_firing: Tokens at which one of them is positive.
        share: What `n_firing` was meant to be, of all tokens.
        unequal: Tokens at which the arm differs from float64, of those that rounding does not decide.
        dtype: Of weights and residual.
        case: The shape.
        gpu: Where.
        environment: And when.
    """

    operation: str
    arm: str
    latency_ms: float
    p20_ms: float
    p80_ms: float
    floor_ms: float | None
    peak_mib: float | None
    n_set: int | None
    n_firing: int | None
    share: float | None
    unequal: int | None
    dtype: str
    case: Case
    gpu: Gpu
    environment: Environment

    @property
    def matrix_mib(self) -> float:
        """Size of the [tokens, d_sae] matrix, in the dtype of the row."""
        return self.case.n_tokens * self.case.d_sae * getattr(torch, self.dtype).itemsize / _MIB


# --- workloads --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Workload:
    """An SAE, its S, and a residual.

    Attributes:
        case: The shape.
        norm: Input normalization.
        share: Wanted share of tokens with a positive latent of S.
        resid: [batch, pos, d_model].
        encoder: What deciding about S takes.
        latents: Indices of S, int64 [n].
        W_dec: [d_sae, d_model].
        W_dec_S: Its rows of S, [n, d_model].
        removal: 1 - gain_i, [n].
    """

    case: Case
    norm: Norm
    share: float
    resid: Tensor
    encoder: Encoder
    latents: Tensor
    W_dec: Tensor
    W_dec_S: Tensor
    removal: Tensor

    @property
    def rows(self) -> Tensor:
        """The residual as [tokens, d_model]."""
        return self.resid.flatten(0, 1)

    @property
    def n_firing(self) -> int:
        """Tokens with a positive latent of S."""
        z = normalize(self.rows.float(), self.norm).z
        return int((z @ self.encoder.W_S.float() + self.encoder.b_S.float() > 0).any(1).sum())


def draw(
    case: Case, dtype: torch.dtype, n_set: int, share: float, *, act: Act = "topk", norm: Norm = "none"
) -> Workload:
    """Return a random workload in which about `share` of the tokens fire."""
    generator = torch.Generator(DEVICE).manual_seed(_SEED)
    normal = partial(torch.randn, generator=generator, device=DEVICE)
    resid = normal(case.batch, case.pos, case.d_model).to(dtype)
    directions = torch.nn.functional.normalize(normal(case.d_sae, case.d_model), dim=1)
    latents = torch.randperm(case.d_sae, generator=generator, device=DEVICE)[:n_set].sort().values
    removal = torch.rand(n_set, generator=generator, device=DEVICE) * 0.9 + 0.1
    W_enc = directions.T.contiguous()
    W_enc[:, latents] *= _EMPHASIS
    W_enc, b = W_enc.to(dtype), torch.zeros(case.d_sae, device=DEVICE)
    z = normalize(resid.flatten(0, 1).float(), norm).z
    peaks = (z @ W_enc[:, latents].float()).amax(1)
    b[latents] = firing_bias(peaks.double().cpu().numpy(), share)
    b = b.to(dtype)
    is_topk = act == "topk"
    encoder = Encoder(
        W_S=W_enc[:, latents],
        b_S=b[latents],
        threshold_S=torch.rand(n_set, generator=generator, device=DEVICE) if act == "jumprelu" else None,
        W_mag_S=None,
        b_mag_S=None,
        W_enc=W_enc if is_topk else None,
        b=b if is_topk else None,
        latents=latents if is_topk else None,
        k=case.k if is_topk else 0,
    )
    W_dec = directions.to(dtype)
    return Workload(case, norm, share, resid, encoder, latents, W_dec, W_dec[latents], removal.to(dtype))


class Exact(NamedTuple):
    """What a suppression should give."""

    edited: Tensor
    """float64 [batch, pos, d_model]"""
    allowed: Tensor
    """How far float arithmetic may be from it, float64 [batch, pos, d_model]."""
    is_clear: Tensor
    """Tokens at which rounding does not decide which latents are kept, [batch, pos]."""


def exact_edit(resid: Tensor, norm: Norm, encoder: Encoder, W_dec_S: Tensor, removal: Tensor) -> Exact:
    """Return the edit "scale" in float64, of all positions of `resid` [batch, pos, d_model].

    Takes weights as they were rounded, and rounds z to their dtype, as their product does.
    """
    W_S, b_S = encoder.W_S.double(), encoder.b_S.double()
    rows_S = removal.double()[:, None] * W_dec_S.double()
    W_enc = None if encoder.W_enc is None else encoder.W_enc.double()
    eps = max(torch.finfo(resid.dtype).eps, torch.finfo(encoder.W_S.dtype).eps)
    # A z that is rounded before the product may have been rounded the other way.
    unit = 4e-6 if norm == "none" else torch.finfo(encoder.W_S.dtype).eps + 4e-6
    parts = []
    for rows in resid.flatten(0, 1).split(_EXACT_TOKENS):
        z, scale, _ = normalize(rows.double(), norm)
        z = z.to(encoder.W_S.dtype).double()
        h = z @ W_S + b_S
        margin = unit * (z.abs() @ W_S.abs() + 1)
        kept, is_clear = h > 0, torch.ones_like(h, dtype=torch.bool)
        if W_enc is not None and encoder.b is not None:
            rising = torch.addmm(encoder.b.double(), z, W_enc).sort(dim=1).values
            n_surely, n_maybe = (
                rising.shape[1] - torch.searchsorted(rising, h + shift, right=True) for shift in (margin, -margin)
            )
            survives = n_maybe - 1 < encoder.k  # less 1: itself
            kept &= survives
            is_clear = survives | (n_surely >= encoder.k) | (h < margin)
        elif encoder.threshold_S is not None:
            kept &= h > encoder.threshold_S
            is_clear = (h - encoder.threshold_S).abs() > margin
        acts, s = h * kept, 1.0 if scale is None else scale
        allowed = 2 * eps * (rows.double().abs() + s * (acts @ rows_S.abs())) + s * (margin @ rows_S.abs())
        parts.append((rows.double() - s * (acts @ rows_S), allowed, is_clear.all(1)))
    edited, allowed, is_clear = (torch.cat(each).unflatten(0, resid.shape[:2]) for each in zip(*parts, strict=True))
    return Exact(edited, allowed, is_clear)


def n_unequal(got: Tensor, exact: Exact) -> int:
    """Return at how many of the clear tokens `got` is not what it should be."""
    is_equal = ((got.double() - exact.edited).abs() <= exact.allowed).all(-1)
    return int((~is_equal & exact.is_clear).sum())


# --- arms -------------------------------------------------------------------------------------------------------------


def kernels(workload: Workload, scope: Scope = "all") -> Tensor:
    """Return the edited residual, by the kernels."""
    resid, encoder, W_dec_S = workload.resid, workload.encoder, workload.W_dec_S
    return ops.fused_suppress(
        resid, resid, token_slice(scope, 1), workload.norm, encoder, W_dec_S, workload.removal
    )  # fmt: skip


def plain_reference(workload: Workload) -> Tensor:
    """Return the edited residual, by `ops.reference`."""
    acts = reference.acts_of_set(workload.rows, workload.encoder)
    return (workload.rows - reference.scaled(acts, workload.removal, workload.W_dec_S)).view(workload.resid.shape)


def _encode(workload: Workload) -> tuple[Tensor, Tensor]:
    encoder = workload.encoder
    assert encoder.W_enc is not None
    assert encoder.b is not None
    pre_acts = torch.addmm(encoder.b, workload.rows, encoder.W_enc).relu()
    acts, indices = pre_acts.topk(encoder.k, dim=1, sorted=False)
    return acts, indices


def eager_dense(workload: Workload) -> Tensor:
    """Return the edited residual: all latents encoded, ranked, scattered into a dense matrix and decoded."""
    acts, indices = _encode(workload)
    removal = workload.removal.new_zeros(workload.case.d_sae).index_copy(0, workload.latents, workload.removal)
    removed = acts.new_zeros(workload.case.n_tokens, workload.case.d_sae).scatter(1, indices, acts) * removal
    return (workload.rows - removed @ workload.W_dec).view(workload.resid.shape)


def eager_sparse(workload: Workload) -> Tensor:
    """Return the edited residual: all latents encoded and ranked, the decoder rows of the members of S summed."""
    acts, indices = _encode(workload)
    removal = workload.removal.new_zeros(workload.case.d_sae).index_copy(0, workload.latents, workload.removal)
    weights = acts * removal[indices]
    removed = torch.nn.functional.embedding_bag(indices, workload.W_dec, per_sample_weights=weights, mode="sum")
    return (workload.rows - removed).view(workload.resid.shape)


def _sparsify() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """Return the encoder and decoder of sparsify, where it can be imported."""
    try:
        from sparsify.fused_encoder import fused_encoder
        from sparsify.utils import decoder_impl
    except ImportError as error:
        print(f"sparsify's arms are left out: {error}", file=sys.stderr)
        return None
    return fused_encoder, decoder_impl


# --- the gate ---------------------------------------------------------------------------------------------------------


def gate() -> list[str]:
    """Return where the kernels differ from float64; timing makes sense where the list is empty."""
    failures: list[str] = []
    n_tokens = n_clear = 0
    for case, dtype, act, norm in PARITY:
        workload = draw(case, dtype, min(64, case.d_sae), 0.5, act=act, norm=norm)
        exact = exact_edit(workload.resid, workload.norm, workload.encoder, workload.W_dec_S, workload.removal)
        n_tokens, n_clear = n_tokens + case.n_tokens, n_clear + int(exact.is_clear.sum())
        if wrong := n_unequal(kernels(workload), exact):
            failures.append(f"{act}, {norm}, {dtype}, {case}: {wrong} of {case.n_tokens} tokens are wrong")
        if act == "topk" and norm == "none" and (failure := _gate_encode(workload)):
            failures.append(f"{failure}, {dtype}, {case}")
    print(f"parity: {n_tokens} tokens; at {n_tokens - n_clear} of them rounding decides, and nothing is checked")
    return failures


def _gate_encode(workload: Workload) -> str | None:
    """Hold encode_topk and sparse_decode against float64."""
    encoder = workload.encoder
    assert encoder.W_enc is not None
    assert encoder.b is not None
    acts, indices = ops.encode_topk(workload.rows, encoder.W_enc, encoder.b, encoder.k, backend="fused")
    everything = torch.addmm(encoder.b.double(), workload.rows.double(), encoder.W_enc.double()).relu()
    is_close = partial(torch.allclose, atol=1e-4, rtol=4 * torch.finfo(acts.dtype).eps)
    want = everything.topk(encoder.k, dim=1).values
    if not is_close(acts.double().sort(descending=True).values, want):
        return "encode_topk: not the k largest activations"
    if not is_close(acts.double(), everything.gather(1, indices)):
        return "encode_topk: indices do not belong to the activations"
    b_dec = torch.zeros_like(workload.W_dec[0])
    got = ops.sparse_decode(acts, indices, workload.W_dec, b_dec, backend="fused")
    dense = torch.zeros_like(everything).scatter(1, indices, acts.double())
    spread = dense @ workload.W_dec.double().abs()
    is_sum = (got.double() - dense @ workload.W_dec.double()).abs() <= 2 * torch.finfo(acts.dtype).eps * spread
    return None if is_sum.all() else "sparse_decode: not the sum of the rows"


# --- measuring --------------------------------------------------------------------------------------------------------


class MismatchError(Exception):
    """An arm that does not compute what it should."""


class Bench:
    """Times jobs and turns them into rows, until the time is up.

    Args:
        gpu: Goes into every row.
        environment: As well.
        minutes: For everything.
    """

    def __init__(self, gpu: Gpu, environment: Environment, minutes: float) -> None:
        self.gpu, self.environment = gpu, environment
        self.deadline = time.monotonic() + 60 * minutes
        self.skipped: list[str] = []
        source, target = (torch.empty(2**29, dtype=torch.int8, device=DEVICE) for _ in range(2))
        self.bytes_per_ms = 2 * source.nbytes / self.time(lambda: target.copy_(source))[0]

    def has_time(self, what: str) -> bool:
        """Return whether there is time for something more, and note it as skipped where not."""
        if time.monotonic() < self.deadline:
            return True
        self.skipped.append(what)
        return False

    def time(self, job: Callable[[], object]) -> tuple[float, float, float]:
        """Return the median, the 20th and the 80th percentile in ms."""
        from triton.testing import do_bench

        p50, p20, p80 = do_bench(job, warmup=10, rep=60, quantiles=[0.5, 0.2, 0.8])
        return p50, p20, p80

    def row(self, operation: str, arm: str, case: Case, dtype: torch.dtype, job: Callable[[], Any], **more: Any) -> Row:
        """Time a job."""
        latency_ms, p20_ms, p80_ms = self.time(job)
        missing = dict.fromkeys(("floor_ms", "n_set", "n_firing", "share", "unequal"))
        return Row(
            operation=operation, arm=arm, latency_ms=latency_ms, p20_ms=p20_ms, p80_ms=p80_ms, peak_mib=peak_mib(job),
            dtype=str(dtype).removeprefix("torch."), case=case, gpu=self.gpu, environment=self.environment,
            **(missing | more),
        )  # fmt: skip

    def matmul_ms(self, workload: Workload) -> float:
        """Return the time of the encoder's product for all tokens, by torch."""
        W_enc = workload.encoder.W_enc
        assert W_enc is not None
        product = torch.empty(workload.case.n_tokens, W_enc.shape[1], dtype=W_enc.dtype, device=DEVICE)
        return self.time(lambda: torch.mm(workload.rows, W_enc, out=product))[0]


def peak_mib(job: Callable[[], Any]) -> float:
    """Return the memory that a job needs above its inputs and its result."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = job()
    torch.cuda.synchronize()
    outputs = result if isinstance(result, (tuple, list)) else (result,)
    held = sum(tensor.nbytes for tensor in outputs if isinstance(tensor, Tensor))
    return (torch.cuda.max_memory_allocated() - before - held) / _MIB


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function under torch.compile, for static shapes."""
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False)


def suppress_rows(bench: Bench) -> Iterator[Row]:
    """Time the suppression by a TopK SAE."""
    for case in CASES:
        for n_set in SET_SIZES:
            for share in SHARES:
                is_default = n_set == DEFAULT_SET
                for dtype in _HALF if is_default else _HALF[:1]:
                    if bench.has_time(f"suppress, {case.model}, |S| {n_set}, {share:.0%}, {dtype}"):
                        workload = draw(case, dtype, n_set, share)
                        arms: dict[str, Callable[[Workload], Tensor]] = {"kernels": kernels}
                        if is_default and dtype == _HALF[0]:
                            arms |= {"reference": plain_reference}
                            if share in (DEFAULT_SHARE, 1.0):
                                arms |= {"reference, compiled": compiled(plain_reference)}
                            if share == DEFAULT_SHARE:  # the others cost the same whatever fires
                                arms |= {"eager dense": eager_dense, "eager sparse": eager_sparse}
                                arms |= {"eager sparse, compiled": compiled(eager_sparse)}
                        yield from _suppress_rows(bench, workload, "suppress", arms)


def relu_rows(bench: Bench) -> Iterator[Row]:
    """Time the suppression by a ReLU SAE."""
    for case in CASES:
        for n_set in SET_SIZES:
            if bench.has_time(f"suppress, relu, {case.model}, |S| {n_set}"):
                workload = draw(case, _HALF[0], n_set, 1.0, act="relu")
                arms: dict[str, Callable[[Workload], Tensor]] = {"kernels": kernels, "reference": plain_reference}
                if n_set == DEFAULT_SET:
                    arms |= {"reference, compiled": compiled(plain_reference)}
                yield from _suppress_rows(bench, workload, "suppress, relu", arms)


def _suppress_rows(
    bench: Bench, workload: Workload, operation: str, arms: dict[str, Callable[[Workload], Tensor]]
) -> Iterator[Row]:
    case, n_firing = workload.case, workload.n_firing
    if workload.encoder.W_enc is None:
        floor_ms = 2 * workload.resid.nbytes / bench.bytes_per_ms
    else:
        floor_ms = bench.matmul_ms(workload) * n_firing / case.n_tokens
    exact = exact_edit(workload.resid, workload.norm, workload.encoder, workload.W_dec_S, workload.removal)
    for name, arm in arms.items():
        unequal = n_unequal(arm(workload), exact)
        if unequal > (0 if name == "kernels" else _SHARE_UNEQUAL * case.n_tokens):
            raise MismatchError(f"{operation}, {name}, {case}: {unequal} of {case.n_tokens} tokens are wrong")
        yield bench.row(
            operation, name, case, workload.resid.dtype, partial(arm, workload), floor_ms=floor_ms,
            n_set=len(workload.latents), n_firing=n_firing, share=workload.share, unequal=unequal,
        )  # fmt: skip


def encode_rows(bench: Bench) -> Iterator[Row]:
    """Time encode_topk and sparse_decode."""
    peer = _sparsify()
    dtype = _HALF[0]
    for case in CASES:
        if not bench.has_time(f"encode_topk, {case.model}"):
            continue
        workload = draw(case, dtype, DEFAULT_SET, DEFAULT_SHARE)
        encoder, W_dec = workload.encoder, workload.W_dec
        W_enc, b = encoder.W_enc, encoder.b
        assert W_enc is not None
        assert b is not None
        b_dec = torch.zeros_like(W_dec[0])
        fused_topk = partial(ops.encode_topk, workload.rows, W_enc, b, case.k, backend="fused")
        acts, indices = fused_topk()
        jobs: list[tuple[str, str, Callable[[], Any]]] = [
            ("encode_topk", "kernels", fused_topk),
            ("encode_topk", "eager", partial(_encode, workload)),
            ("encode_topk", "eager, compiled", partial(compiled(_encode), workload)),
        ]
        decode: dict[str, Backend] = {"kernels": "fused", "eager": "reference"}
        jobs += [
            ("sparse_decode", arm, partial(ops.sparse_decode, acts, indices, W_dec, b_dec, backend=backend))
            for arm, backend in decode.items()
        ]
        if peer is not None:
            encode, decode_rows = peer
            rows = W_enc.T.contiguous()
            jobs.append(("encode_topk", "sparsify", partial(encode, workload.rows, rows, b, case.k, "topk")))
            jobs.append(("sparse_decode", "sparsify", partial(decode_rows, indices, acts, W_dec)))
        moved = W_dec.nbytes + acts.nbytes + indices.nbytes + workload.resid.nbytes
        floors = {"encode_topk": bench.matmul_ms(workload), "sparse_decode": moved / bench.bytes_per_ms}
        for operation, arm, job in jobs:
            yield bench.row(operation, arm, case, dtype, job, floor_ms=floors[operation])


def tile_rows(bench: Bench) -> Iterator[Row]:
    """Time the suppression with every token firing for several tiles: what the choice in `fused.py` rests on."""
    from defense.core.ops import fused
    from defense.core.ops.fused import Tile

    workload = draw(CASES[0], _HALF[0], DEFAULT_SET, 1.0)
    floor_ms = bench.matmul_ms(workload)
    for tile in (Tile(*fields) for fields in TILES):
        name = f"kernels, tile {tile.m} x {tile.n} x {tile.k}, {tile.num_warps} warps, {tile.num_stages} stages"
        if bench.has_time(name):
            with mock.patch.object(fused, "stream_tile", lambda *_, tile=tile: tile):
                yield bench.row(
                    "suppress", name, workload.case, _HALF[0], partial(kernels, workload), floor_ms=floor_ms,
                    n_set=DEFAULT_SET, n_firing=workload.n_firing, share=1.0,
                )  # fmt: skip


def model_rows(bench: Bench) -> Iterator[Row]:
    """Time `encode_image`, plain and defended."""
    towers = {shape: _towers(shape, block) for shape, block in END_TO_END}
    for is_compiled in (False, True):
        for dtype in _HALF:
            for case, block in END_TO_END:
                what = f"encode_image, {case.model}, {dtype}{', compiled' if is_compiled else ''}"
                if not bench.has_time(what):
                    continue
                *models, preprocess = towers[case]
                generator = torch.Generator(DEVICE).manual_seed(_SEED)
                pixel_values = torch.randn(
                    case.batch, 3, *preprocess.size, generator=generator, device=DEVICE, dtype=dtype
                )
                for arm, model in zip(("plain CLIP", f"defended after block {block}"), models, strict=True):
                    encode_image = model.to(DEVICE, dtype).encode_image
                    job = partial(compiled(encode_image) if is_compiled else encode_image, pixel_values)
                    name = f"{arm}, compiled" if is_compiled else arm
                    more = {} if arm == "plain CLIP" else {"n_set": DEFAULT_SET, "share": DEFAULT_SHARE}
                    yield bench.row("encode_image", name, case, dtype, job, **more)


def _towers(case: Case, block: int) -> tuple[Any, Any, Any]:
    """A plain model, the same defended, and its preprocessing; the firing share is set on few pictures, on the CPU."""
    from defense.benchmarks.speed_rows import Case as Few
    from defense.benchmarks.speed_variants import twin
    from defense.benchmarks.speed_workloads import create_model, make_workloads, set_stage

    few = Few(model=case.model, batch=8, d_sae=case.d_sae, k=case.k, n_set=DEFAULT_SET, block=block, seed=_SEED)
    stage = set_stage(create_model(few), few)
    workload = next(each for each in make_workloads(stage) if each.share == DEFAULT_SHARE)
    site = Site(few.hook_point, workload.config, workload.parameters, (workload.latent_set,))
    defended = twin(stage.model)
    attach(defended, (site,), backend="fused")
    return stage.model, defended, stage.preprocess


SECTIONS: tuple[Callable[[Bench], Iterator[Row]], ...] = (suppress_rows, encode_rows, relu_rows, tile_rows, model_rows)


# --- reporting --------------------------------------------------------------------------------------------------------


def gpu_of() -> Gpu:
    """Return what the first CUDA device is."""
    import triton

    query = ["nvidia-smi", "--query-gpu=driver_version,power.limit,clocks.max.sm", "--format=csv,noheader,nounits"]
    try:
        line = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()[0]
        driver, power, clock = (field.strip() for field in line.split(","))
    except (OSError, subprocess.CalledProcessError, IndexError, ValueError):
        driver = power = clock = "?"
    name = torch.cuda.get_device_name()
    return Gpu(name, driver, power, clock, torch.version.cuda or "none", triton.__version__)


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list; a file that was there is replaced only by a whole one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    part.replace(path)


def load_rows(path: Path) -> list[Row]:
    """Read what `save_rows` wrote."""
    rows = []
    for fields in json.loads(path.read_text(encoding="utf-8")):
        kinds = {"case": Case, "gpu": Gpu, "environment": Environment}
        rows.append(Row(**fields | {name: kind(**fields[name]) for name, kind in kinds.items()}))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""
    lines = [
        "| shape | operation | S | firing | arm | ms (p20-p80) | x floor | extra MiB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        firing = "-" if row.share is None else f"{row.share:.0%}".replace("%", " %")
        x_floor = f"{row.latency_ms / row.floor_ms:.2f}" if row.floor_ms else "-"
        extra = "-" if row.peak_mib is None else f"{row.peak_mib:.1f}"
        lines.append(
            f"| {row.case.model}, {row.dtype} | {row.operation} | {row.n_set or '-'} | {firing} | {row.arm} "
            f"| {row.latency_ms:.3f} ({row.p20_ms:.3f}-{row.p80_ms:.3f}) | {x_floor} | {extra} |"
        )
    return "\n".join(lines)


def short(rows: Sequence[Row]) -> list[Row]:
    """Return the rows that belong into a README: the default S at 5 % and 100 %, and whole models, in bfloat16."""
    return [
        row
        for row in rows
        if row.dtype == "bfloat16"
        and row.n_set in (None, DEFAULT_SET)
        and row.share in (None, DEFAULT_SHARE, 1.0)
        and "tile" not in row.arm
    ]


def caption(rows: Sequence[Row]) -> str:
    """Return what a reader of the table has to know, in a few lines of Markdown."""
    gpu, here = rows[0].gpu, rows[0].environment
    shapes = "; ".join(
        f"{case.model}: {case.batch} x {case.pos} tokens, d_model {case.d_model}, d_sae {case.d_sae}, k {case.k}"
        for case in dict.fromkeys(row.case for row in rows)
    )
    return (
        f"{shapes}. Random weights, seed {_SEED}.\n"
        f"{gpu.name}, driver {gpu.driver}, power limit {gpu.power_limit_w} W, at most {gpu.sm_clock_mhz} MHz, torch "
        f"{here.torch}, CUDA {gpu.cuda}, Triton {gpu.triton}, {checkout_words(asdict(here))}, {here.timestamp}.\n"
        "The floor is the encoder's matmul for the firing tokens at torch's own rate (relu, sparse_decode: the bytes "
        "to be moved)."
    )


@dataclass(frozen=True)
class Target:
    """What the kernels were meant to reach.

    Attributes:
        name: In words.
        got: The figure; None where a row of it is missing.
        limit: What it may be at most.
    """

    name: str
    got: float | None
    limit: float

    def __str__(self) -> str:
        if self.got is None:
            return f"not measured: {self.name}"
        return f"{'met' if self.got <= self.limit else 'MISSED'}: {self.name}: {self.got:.3g}, at most {self.limit:.3g}"


def targets(rows: Sequence[Row]) -> list[Target]:
    """Return how each target was met, in bfloat16 with the default S."""
    found = {(row.operation, row.arm, row.case.model, row.share): row for row in short(rows)}

    def ratio(ours: tuple[Any, ...], theirs: tuple[Any, ...] | None) -> float | None:
        """Our time over theirs, or over our floor."""
        row, other = found.get(ours), found.get(ours if theirs is None else theirs)
        if row is None or other is None:
            return None
        base = other.floor_ms if theirs is None else other.latency_ms
        return row.latency_ms / base if base else None

    result = []
    for case in CASES:
        name = case.model
        sparse, dense = ("suppress", "kernels", name, DEFAULT_SHARE), ("suppress", "kernels", name, 1.0)
        eager = ("suppress", "eager dense", name, DEFAULT_SHARE)
        compiled_reference = ("suppress", "reference, compiled", name, 1.0)
        encode = ("encode_topk", "kernels", name, None)
        row = found.get(dense)
        share = row.peak_mib / row.matrix_mib if row is not None and row.peak_mib is not None else None
        result += [
            Target(f"{name}, 5 % firing, over eager", ratio(sparse, eager), 0.1),
            Target(f"{name}, 100 % firing, over the floor", ratio(dense, None), 1.5),
            Target(f"{name}, 100 % firing, over eager", ratio(dense, eager), 0.25),
            Target(f"{name}, 100 % firing, over torch.compile", ratio(dense, compiled_reference), 0.5),
            Target(f"{name}, extra memory, over the [tokens, d_sae] matrix", share, 0.02),
            Target(f"{name}, encode_topk, over the floor", ratio(encode, None), 2.0),
            Target(f"{name}, encode_topk, over eager", ratio(encode, ("encode_topk", "eager", name, None)), 1 / 3),
        ]
    for (case, block), limit in zip(END_TO_END, (1.03, 1.01), strict=True):
        for suffix in ("", ", compiled"):
            defended = ("encode_image", f"defended after block {block}{suffix}", case.model, DEFAULT_SHARE)
            plain = ("encode_image", f"plain CLIP{suffix}", case.model, None)
            result.append(Target(f"{case.model}, encode_image{suffix}, over plain", ratio(defended, plain), limit))
    return result


def check_gpu() -> None:
    """Raise where there is nothing to measure on.

    Raises:
        BackendError: No CUDA device, or no triton.
    """
    if not torch.cuda.is_available():
        raise BackendError(
            f"this benchmark needs a CUDA device, and torch {torch.__version__} sees none; nothing was measured. "
            "The CPU's figures: python -m defense.benchmarks.speed"
        )
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise BackendError(f"this benchmark needs triton: {error}") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m defense.benchmarks.kernel", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="where the rows go (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9.0, help="nothing new is begun after (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Check, measure, print; return 1 where the kernels are wrong, 3 where there is no GPU."""
    argv = sys.argv[1:] if argv is None else argv
    arguments = _parser().parse_args(argv)
    try:
        check_gpu()
    except BackendError as error:
        print(error, file=sys.stderr)
        return 3
    environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.kernel", *argv]))
    rows: list[Row] = []
    with torch.no_grad():
        bench = Bench(gpu_of(), environment, arguments.minutes)
        if failures := gate():
            print("The parity gate failed; nothing was timed.", *failures, sep="\n", file=sys.stderr)
            return 1
        try:
            for section in SECTIONS:
                for row in section(bench):
                    rows.append(row)
                    print(f"{row.operation}, {row.case.model}, {row.arm}: {row.latency_ms:.3f} ms", file=sys.stderr)
                    save_rows(rows, arguments.out)
        except MismatchError as error:
            print(error, file=sys.stderr)
            return 1
    print(table(short(rows)), caption(rows), "\n".join(map(str, targets(rows))), sep="\n\n")
    if bench.skipped:
        print("\nOut of time, and not measured:", *bench.skipped, sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
