"""The parity gate of the benchmark of speed, and the timing of what passed it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from defense.benchmarks.cost import peak_rise_mib, percentiles, time_interleaved
from defense.benchmarks.environment import Environment
from defense.benchmarks.speed_rows import Firing, Row
from defense.benchmarks.speed_variants import Rivals, Variant
from defense.benchmarks.speed_workloads import BASELINE_SHARE, Stage

_ATOL = 1e-4
"""On normalized image_embeds, whose entries are about 1 / sqrt(d_embed)."""


def gate(stage: Stage, all_rivals: Sequence[Rivals]) -> list[str]:
    """Return why these variants must not be timed, a line each; an empty list lets them pass.

    Rivals must agree on the normalized image embeddings, and differ from plain CLIP wherever a latent of S survives
    the activation rule: two that do nothing would agree as well. Ours must equal plain CLIP bit for bit where S does
    not fire. S must fire as often as asked.
    """

    def embed(encode_image: Callable[[Tensor], Tensor]) -> Tensor:
        return nn.functional.normalize(encode_image(stage.pixel_values), dim=-1)

    failures: list[str] = []
    plain = embed(stage.model.encode_image)  # type: ignore[arg-type]  # a module's attribute, to mypy
    for rivals in all_rivals:
        firing, name = rivals.firing, rivals.ours.name
        naive, ours = embed(rivals.naive.encode_image), embed(rivals.ours.encode_image)
        others = {name: ours}
        if rivals.sparse is not None:
            others[f"{rivals.sparse.name}, for {name}"] = embed(rivals.sparse.encode_image)
        for other, embeds in others.items():
            if not (difference := float((embeds - naive).abs().max())) <= _ATOL:
                failures.append(f"{other}: {difference:.2e} from {rivals.naive.name}, allowed {_ATOL:.0e}")
        moved = float((naive - plain).abs().max())
        if firing.n_surviving and not moved > _ATOL:
            failures.append(f"{name}: the edit moves embeddings by {moved:.2e} only and cannot tell variants apart")
        if firing.n_firing == 0 and not torch.equal(ours, plain):
            failures.append(f"{name}: not bit-equal to plain CLIP")
        if abs(firing.n_firing - firing.share * firing.n_tokens) > 1:
            failures.append(f"{name}: S fires on {firing.n_firing} of {firing.n_tokens} tokens")
    return failures


def time_variants(
    stage: Stage,
    all_rivals: Sequence[Rivals],
    environment: Environment,
    *,
    memory: bool = True,
    report: Callable[[str], None] = lambda _: None,
) -> list[Row]:
    """Return a row for each variant, plain CLIP's first. They are timed in turns; `gate` comes before.

    Args:
        stage: Model, pictures and case.
        all_rivals: The variants, by workload; one workload is TopK, "scale", with `BASELINE_SHARE` of tokens firing.
        environment: Goes into every row.
        memory: Measure memory as well.
        report: Called with a line of progress.
    """
    case = stage.case
    baseline = next(
        rivals for rivals in all_rivals if rivals.sparse is not None and rivals.workload.share == BASELINE_SHARE
    )
    assert baseline.sparse is not None
    entries: list[tuple[Variant, Firing | None, bool]] = [
        (Variant("plain CLIP", stage.model.encode_image), None, False),  # type: ignore[arg-type]  # as above
        (baseline.naive, baseline.firing, False),
        (baseline.sparse, baseline.firing, False),
        *((rivals.ours, rivals.firing, rivals.workload.config.k is not None) for rivals in all_rivals),
    ]
    W_enc = torch.from_numpy(baseline.workload.parameters["W_enc"])
    product = torch.empty(len(stage.rows), case.d_sae)
    jobs: dict[str, Callable[[], object]] = {
        variant.name: partial(variant.encode_image, stage.pixel_values) for variant, _, _ in entries
    }
    times = time_interleaved(
        {**jobs, "matmul": lambda: torch.mm(stage.rows, W_enc, out=product)}, case.rounds, case.seed, report
    )
    ms_per_token = float(np.median(times["matmul"])) / len(stage.rows)
    peaks = {name: peak_rise_mib(job) if memory else None for name, job in jobs.items()}
    plain_ms, plain_peak = times["plain CLIP"], peaks["plain CLIP"]
    rows = []
    for variant, firing, has_floor in entries:
        ms, peak = times[variant.name], peaks[variant.name]
        p20, median, p80 = percentiles(ms)
        rows.append(
            Row(
                arm=variant.name,
                latency_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                x_plain=float(np.median(ms / plain_ms)),
                added_ms=float(np.median(ms - plain_ms)),
                floor_ms=firing.n_firing * ms_per_token if firing is not None and has_floor else None,
                matmul_gflops=2e-6 * W_enc.numel() / ms_per_token,
                weights_mib=variant.weights_mib,
                peak_mib=peak,
                extra_mib=None if peak is None or plain_peak is None else variant.weights_mib + peak - plain_peak,
                firing=firing,
                rounds_ms=tuple(ms.tolist()),
                d_model=W_enc.shape[0],
                case=case,
                environment=environment,
            )
        )
    return rows
