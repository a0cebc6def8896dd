"""The first table of the benchmark of exported graphs: one CLIP and one SAE, as ONNX and in PyTorch, timed in turns.

Before anything is timed, every variant's embeddings are held against PyTorch's.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from defense.benchmarks.cost import Ratio, percentiles, time_interleaved, torch_threads
from defense.benchmarks.onnx_process import OnnxProcess
from defense.benchmarks.speed_rows import Case
from defense.benchmarks.speed_variants import twin
from defense.benchmarks.speed_workloads import BASELINE_SHARE, Stage, Workload, create_model, make_workloads, set_stage
from defense.errors import ConfigError
from defense.export.int8 import quantize
from defense.export.vision import VisionGraph, trace_vision, write
from defense.hosts.attach import attach
from defense.hosts.defense import Site

_ATOL = 1e-5
_INT8_COSINE = 0.97
_N_LABELS = 1000
_PLAIN = "ONNX, plain CLIP"


@dataclass(frozen=True)
class GraphRow:
    """One variant's figures; the names of the fields are the keys of the stored result.

    Attributes:
        arm: Name of the variant.
        latency_ms: Median over rounds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        x_plain: Ratio to plain CLIP in ONNX.
        x_fp32: Ratio to the fp32 graph of the same defense, for a variant that is another form of it; else None.
        max_abs_diff: Of its embeddings to PyTorch's.
        rounds_ms: Every single time.
    """

    arm: str
    latency_ms: float
    p20_ms: float
    p80_ms: float
    x_plain: Ratio
    x_fp32: Ratio | None
    max_abs_diff: float
    rounds_ms: tuple[float, ...]


@dataclass(frozen=True)
class GraphVariant:
    """A way to compute the embeddings of a stage's pictures, which gives what PyTorch gives.

    Attributes:
        name: As printed.
        embed: Computes them once: what is timed, here or in the process of ONNX Runtime.
        max_abs_diff: Largest difference to PyTorch's.
        fp32_name: Name of the fp32 graph of the same defense, for another form of it; else None.
    """

    name: str
    embed: Callable[[], object]
    max_abs_diff: float
    fp32_name: str | None = None


class VariantMaker:
    """Makes variants of one stage, and checks each.

    Args:
        stage: Model, pictures and case.
        folder: For the graphs.
        engine: Runs them.
    """

    def __init__(self, stage: Stage, folder: Path, engine: OnnxProcess) -> None:
        self.stage, self.folder, self.engine = stage, folder, engine
        d_embed = embeds_of(stage.model, stage.pixel_values[:1]).shape[1]
        self.text_embeds = nn.functional.normalize(torch.randn(_N_LABELS, d_embed), dim=-1)

    def exported(self, name: str, model: nn.Module) -> tuple[GraphVariant, Path]:
        """Return a model's fp32 graph as a variant, and its file.

        Raises:
            ConfigError: It does not compute what the model does; see `check_embeds`.
        """
        path = self.folder / f"{name}.onnx"
        write(trace_vision(VisionGraph(model), self.stage.preprocess.size, self.text_embeds), path, {})
        return self._in_onnx(name, path, embeds_of(model, self.stage.pixel_values)), path

    def other_forms(self, fp32_name: str, path: Path, model: Any, *, compiled: bool) -> list[GraphVariant]:
        """Return the same defended model in int8, in PyTorch and, where `compiled`, under torch.compile.

        Args:
            fp32_name: Name of its fp32 graph.
            path: That graph.
            model: The model in PyTorch.
            compiled: Whether to time torch.compile.

        Raises:
            ConfigError: One does not compute what the model does; see `check_embeds`.
        """
        pixel_values = self.stage.pixel_values
        want = embeds_of(model, pixel_values)
        quantize(path, self.folder / "int8.onnx")
        eager = partial(model.encode_image, pixel_values)
        forms = [
            self._in_onnx("ONNX int8, delta, scale", self.folder / "int8.onnx", want, fp32_name, rough=True),
            GraphVariant("PyTorch eager, delta, scale", eager, 0.0, fp32_name),
        ]
        if compiled:
            name, fast = "torch.compile, delta, scale", torch.compile(model.encode_image)
            got = nn.functional.normalize(fast(pixel_values), dim=-1).numpy()
            difference = check_embeds(name, got, want, rough=False)
            forms.append(GraphVariant(name, partial(fast, pixel_values), difference, fp32_name))
        return forms

    def _in_onnx(
        self, name: str, path: Path, want: Tensor, fp32_name: str | None = None, *, rough: bool = False
    ) -> GraphVariant:
        difference = check_embeds(name, self.engine.load(path), want, rough=rough)
        return GraphVariant(name, partial(self.engine.run, path), difference, fp32_name)


def graph_variants(stage: Stage, folder: Path, engine: OnnxProcess, *, compiled: bool) -> list[GraphVariant]:
    """Return what is timed, plain CLIP first.

    Args:
        stage: Model, pictures and case.
        folder: For the graphs.
        engine: Runs them.
        compiled: Whether to time torch.compile.

    Raises:
        ConfigError: A variant does not compute what PyTorch does, so that its time would mean nothing.
    """
    maker = VariantMaker(stage, folder, engine)
    variants = [maker.exported(_PLAIN, stage.model)[0]]
    for workload in make_workloads(stage):
        is_topk = workload.config.act == "topk"
        if is_topk and workload.share not in (0.0, BASELINE_SHARE):
            continue
        rule = "exact TopK" if is_topk else "delta"
        name = f"ONNX, {rule}, {workload.latent_set.edit}, {workload.share:.0%} of tokens firing".replace("%", " %")
        model = defended(stage, workload)
        variant, path = maker.exported(name, model)
        variants.append(variant)
        if not is_topk:
            variants += maker.other_forms(name, path, model, compiled=compiled)
    return variants


def check_embeds(name: str, got: np.ndarray, want: Tensor, *, rough: bool) -> float:
    """Return the largest difference of a variant's embeddings to PyTorch's.

    Raises:
        ConfigError: It is too large for a comparison of times; where `rough`, the cosine is too small.
    """
    difference = float(np.abs(got - want.numpy()).max())
    cosine = float((got * want.numpy()).sum(1).min())
    if cosine < _INT8_COSINE if rough else difference > _ATOL:
        raise ConfigError(f"{name} differs by {difference:.1e} (cosine {cosine:.4f}); nothing was timed")
    return difference


def defended(stage: Stage, workload: Workload) -> Any:
    """Return the stage's model with a workload's SAE in it."""
    model = twin(stage.model)
    attach(model, (Site(stage.case.hook_point, workload.config, workload.parameters, (workload.latent_set,)),))
    return model


def embeds_of(model: Any, pixel_values: Tensor) -> Tensor:
    """Return normalized image embeddings, [batch, d_embed]."""
    return nn.functional.normalize(model.encode_image(pixel_values), dim=-1)


def measure_graphs(case: Case, *, compiled: bool) -> list[GraphRow]:
    """Return the rows of the first table, plain CLIP's first.

    Args:
        case: Model, SAE, rounds and threads.
        compiled: Whether to time torch.compile.

    Raises:
        ConfigError: See `graph_variants` and `speed_workloads.set_stage`.
    """
    # Not inference_mode: tensors made there cannot be traced.
    with torch_threads(case.threads), torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        stage = set_stage(create_model(case).requires_grad_(False), case)
        inputs = {"pixel_values": stage.pixel_values.numpy()}
        with OnnxProcess(case.threads, inputs, "image_embeds") as engine:
            variants = graph_variants(stage, Path(folder), engine, compiled=compiled)
            times = time_interleaved({each.name: each.embed for each in variants}, case.rounds, case.seed)
    rows = []
    for variant in variants:
        ms = times[variant.name]
        p20, median, p80 = percentiles(ms)
        x_plain = Ratio.of(ms, times[_PLAIN])
        x_fp32 = None if variant.fp32_name is None else Ratio.of(ms, times[variant.fp32_name])
        rows.append(GraphRow(variant.name, median, p20, p80, x_plain, x_fp32, variant.max_abs_diff, tuple(ms.tolist())))
    return rows
