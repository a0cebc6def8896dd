"""What the defense costs on a CPU: `encode_image`, end to end, beside plain CLIP and beside what others do.

    python -m defense.benchmarks.speed --out speed.json

| arm | after block L, at every token |
|---|---|
| plain CLIP | nothing |
| naive splice | full encode, top-k, scatter to dense, decode, decode again without S, error term added back |
| sparse decode | full encode, top-k, subtract the decoder rows of the members of S that were kept |
| ours | the library: `wrap` and its Suppressor |

Measured: wall-clock time of `model.encode_image(pixel_values)` in float32 under `inference_mode`. All arms run in one
process, in every round once, in an order drawn anew for each round, so that drift hits all alike; "x plain" is the
median over rounds of the ratio within a round. All arms share one set of model weights (random ones, of a fixed seed).
The parity gate compares what they compute before anything is timed; where it fails, nothing is timed.

The SAE is random. The encoder biases of S are shifted until exactly the wanted share of tokens has a positive
pre-activation in S. Such a token costs a TopK rule the whole encoder, whether or not its latent is then among the k
largest: cost follows `n_firing`, not `n_surviving`. (The encoder columns of S are longer than the others, so that most
do survive: where none does, the gate has nothing to compare.) Naive splice and sparse decode cost the same whatever
fires; they are timed on the SAE with 5 % of tokens firing.

The floor is the encoder matmul [n_firing, d_model] x [d_model, d_sae] at the rate that the same matmul on all tokens
reached in the same rounds. It stands against what an arm adds to plain CLIP, not against its whole time. A rule that
does not couple latents (relu) needs none.

Extra MiB is what an arm needs above plain CLIP: the weights that it holds, plus the rise of the process's resident
memory at the peak of one call, less the same rise in plain CLIP. Linux tells that rise exactly (clear_refs, VmHWM);
`getrusage` could not, as its peak is that of building the SAEs. Buffers that the matmul library keeps between calls
are missing from it: they were there before.

Not measured: accuracy; GPUs; torch.compile; half precision; loading and preprocessing of pictures; the text tower;
attaching a defense. Random weights cost what trained ones do, but which share of tokens fires depends on weights and
pictures: hence several.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import Tensor, nn

from defense.benchmarks.environment import Environment, environment_of, machine_words
from defense.core.config import SAEConfig
from defense.core.latents import Edit, LatentSet
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError
from defense.hosts.attach import attach, attached
from defense.hosts.defense import Site
from defense.hosts.families import tower_of

_MIB = 2**20
_ATOL = 1e-4
"""On normalized image_embeds, whose entries are about 1 / sqrt(d_embed)."""
_EMPHASIS = 32.0
"""Length of the encoder columns of S; the others have length 1."""
_BASELINE_SHARE = 0.05
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Case:
    """What is measured.

    Attributes:
        model: open_clip's name.
        batch: Pictures per call.
        d_sae: Latents of the SAE.
        k: Latents kept per token by the TopK rule.
        n_set: Latents in S.
        block: Block L whose output is edited, from 0; not the last.
        rounds: How often each arm is timed.
        threads: Threads of torch.
        seed: Of model weights, pictures, SAE and order of the arms.
        dtype: Of everything; only "float32".
    """

    model: str = "ViT-B-32"
    batch: int = 16
    d_sae: int = 49_152
    k: int = 64
    n_set: int = 64
    block: int = 8
    rounds: int = 10
    threads: int = 1
    seed: int = 0
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("batch", "d_sae", "k", "n_set", "rounds", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}; it must be at least 1")
        if max(self.n_set, self.k) > self.d_sae:
            raise ConfigError(f"n_set={self.n_set} and k={self.k} must not exceed d_sae={self.d_sae}")
        if self.dtype != "float32":
            raise ConfigError(f"dtype={self.dtype!r}; only 'float32' is measured")

    @property
    def hook_point(self) -> str:
        """Where the residual is edited."""
        return f"blocks.{self.block}.hook_resid_post"


@dataclass(frozen=True)
class Firing:
    """What the latents of S do on the pictures of the benchmark.

    Attributes:
        share: Wanted share of tokens with a positive pre-activation in S.
        n_tokens: All tokens of the batch.
        n_firing: Tokens that have one, as the library itself computes it.
        n_surviving: Tokens at which a latent of S also passes the activation rule.
    """

    share: float
    n_tokens: int
    n_firing: int
    n_surviving: int


@dataclass(frozen=True)
class Row:
    """One arm's figures.

    Attributes:
        arm: Its name.
        latency_ms: Median over rounds.
        p20_ms: 20th percentile.
        p80_ms: 80th percentile.
        x_plain: Median over rounds of the ratio to plain CLIP.
        added_ms: Median over rounds of the difference to plain CLIP.
        floor_ms: The encoder matmul for the firing tokens; None where the arm is not ours, or needs none.
        matmul_gflops: Measured rate behind `floor_ms`, in 1e9 operations per second.
        weights_mib: Weights held above the model's own.
        peak_mib: Rise of resident memory during one call; None where it was not measured.
        extra_mib: Weights and rise together, above plain CLIP; None where it was not measured.
        firing: None for plain CLIP.
        rounds_ms: Every single time, in order of the rounds.
        d_model: Width of the residual stream.
        case: What was measured.
        environment: Where and when.
    """

    arm: str
    latency_ms: float
    p20_ms: float
    p80_ms: float
    x_plain: float
    added_ms: float
    floor_ms: float | None
    matmul_gflops: float
    weights_mib: float
    peak_mib: float | None
    extra_mib: float | None
    firing: Firing | None
    rounds_ms: tuple[float, ...]
    d_model: int
    case: Case
    environment: Environment


@dataclass(frozen=True)
class Stage:
    """What all arms share.

    Attributes:
        case: What is measured.
        model: Plain CLIP, in eval mode.
        preprocess: Size of its pictures.
        pixel_values: Random pictures, [batch, 3, height, width].
        rows: Its residual at the hook point, [tokens, d_model].
    """

    case: Case
    model: nn.Module
    preprocess: Preprocess
    pixel_values: Tensor
    rows: Tensor


@dataclass(frozen=True)
class Workload:
    """An SAE, its S and what is done to S."""

    config: SAEConfig
    parameters: Mapping[str, np.ndarray]
    latent_set: LatentSet
    share: float


@dataclass(frozen=True)
class Arm:
    """A way to compute image embeddings.

    Attributes:
        name: As printed.
        encode_image: pixel_values -> image_embeds [batch, d_embed].
        weights_mib: Weights held above the model's own.
    """

    name: str
    encode_image: Callable[[Tensor], Tensor]
    weights_mib: float = 0.0


@dataclass(frozen=True)
class Rivals:
    """Arms that compute the same thing: one SAE, one S, one edit.

    Attributes:
        workload: The SAE and S.
        firing: What S does on the benchmark's pictures.
        naive: The definition of correct.
        ours: The library.
        sparse: Only for a TopK rule and the edit "scale".
    """

    workload: Workload
    firing: Firing
    naive: Arm
    ours: Arm
    sparse: Arm | None


class NaiveSplice(nn.Module):
    """An SAE put into the stream with its latents of S at zero and its error term added back.

    The usual implementations do at least this: they decode twice, and some encode twice as well.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    latents: Tensor

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.k = workload.config.k
        for name, array in workload.parameters.items():
            self.register_buffer(name, torch.from_numpy(array))
        self.register_buffer("latents", torch.tensor(workload.latent_set.latents))

    def encode(self, resid: Tensor) -> Tensor:
        """Return acts [..., d_sae] of a residual [..., d_model]."""
        acts = ((resid - self.b_dec) @ self.W_enc + self.b_enc).relu()
        if self.k is None:
            return acts
        kept, indices = acts.topk(self.k, dim=-1)
        return torch.zeros_like(acts).scatter_(-1, indices, kept)

    def decode(self, acts: Tensor) -> Tensor:
        """Return the reconstruction [..., d_model] of acts."""
        return acts @ self.W_dec + self.b_dec

    def forward(self, resid: Tensor) -> Tensor:
        """Return the edited residual [batch, pos, d_model]."""
        acts = self.encode(resid)
        error = resid - self.decode(acts)
        acts[..., self.latents] = 0
        return self.decode(acts) + error


class NaiveProject(NaiveSplice):
    """The edit "project", token by token with a least-squares solver. Compared with, never timed."""

    def forward(self, resid: Tensor) -> Tensor:
        """Return the edited residual [batch, pos, d_model]."""
        rows, edited = resid.flatten(0, -2), resid.flatten(0, -2).clone()
        fires = self.encode(rows)[:, self.latents] != 0
        for token in fires.any(1).nonzero()[:, 0].tolist():
            basis = self.W_dec[self.latents[fires[token]]].double().T  # [d_model, latents that fire]
            centered = (rows[token] - self.b_dec).double()
            edited[token] -= (basis @ torch.linalg.lstsq(basis, centered[:, None]).solution)[:, 0].float()
        return edited.view(resid.shape)


class SparseDecode(nn.Module):
    """All latents encoded and ranked, but only the members of S that were kept are decoded, and subtracted."""

    W_enc: Tensor
    b_enc: Tensor
    b_dec: Tensor
    W_dec_S: Tensor
    place: Tensor

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        assert workload.config.k is not None
        self.k = workload.config.k
        for name in ("W_enc", "b_enc", "b_dec"):
            self.register_buffer(name, torch.from_numpy(workload.parameters[name]))
        latents = torch.tensor(workload.latent_set.latents)
        place = torch.full((workload.config.d_sae,), -1)  # latent -> its row of W_dec_S, -1 outside S
        place[latents] = torch.arange(len(latents))
        self.register_buffer("W_dec_S", torch.from_numpy(workload.parameters["W_dec"])[latents])
        self.register_buffer("place", place)

    def forward(self, resid: Tensor) -> Tensor:
        """Return the edited residual [batch, pos, d_model]."""
        rows = resid.flatten(0, -2)
        kept, indices = ((rows - self.b_dec) @ self.W_enc + self.b_enc).relu().topk(self.k, dim=-1)
        place = self.place[indices]  # [tokens, k]
        token, rank = (place >= 0).nonzero(as_tuple=True)
        written = kept[token, rank, None] * self.W_dec_S[place[token, rank]]  # [members of S kept, d_model]
        return rows.index_add(0, token, written, alpha=-1).view(resid.shape)


def create_model(case: Case) -> nn.Module:
    """Return the case's open_clip model with random weights of its seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return open_clip.create_model(case.model, pretrained=None)


def set_stage(model: nn.Module, case: Case) -> Stage:
    """Draw the pictures and take the residual that the SAEs are made for.

    Raises:
        ConfigError: The block is the last one, whose patch tokens do not matter.
        HookPointError: There is no such block.
    """
    tower = tower_of(model.eval())
    if tower.effective_scope(case.hook_point, "all") != "all":
        raise ConfigError(
            f"block={case.block} is the last of {case.model}; choose an earlier one, where every token counts"
        )
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    generator = torch.Generator().manual_seed(case.seed)
    pixel_values = torch.randn(case.batch, 3, *preprocess.size, generator=generator)
    rows = tower.resid(pixel_values, case.hook_point).flatten(0, 1)
    return Stage(case, model, preprocess, pixel_values, rows)


def random_sae(stage: Stage, latents: np.ndarray) -> dict[str, np.ndarray]:
    """Return an SAE of random directions around the mean residual, its columns of S longer than the others."""
    case, rows = stage.case, stage.rows.numpy()
    shape = (case.d_sae, rows.shape[1])
    directions = np.random.default_rng([case.seed, 1]).standard_normal(shape, dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    W_enc = np.ascontiguousarray(directions.T)
    W_enc[:, latents] *= _EMPHASIS
    return {"W_enc": W_enc, "b_enc": np.zeros(case.d_sae, np.float32), "W_dec": directions, "b_dec": rows.mean(0)}


def firing_bias(peaks: np.ndarray, share: float) -> float:
    """Return the bias that makes just a share of tokens positive.

    Args:
        peaks: The largest pre-activation in S at each token, without a bias, [tokens].
        share: Wanted, in [0, 1]; rounded to whole tokens.
    """
    n_firing = round(share * len(peaks))
    slack = 0.05 * np.abs(peaks).max()
    falling = np.sort(peaks)[::-1]
    edges = np.concatenate([falling[:1] + slack, falling, falling[-1:] - slack])
    return -float(edges[n_firing : n_firing + 2].mean())


def make_workloads(stage: Stage) -> list[Workload]:
    """Return the SAEs of all arms; they differ in rule and bias and share their matrices."""
    case = stage.case
    latents = np.sort(np.random.default_rng([case.seed, 2]).choice(case.d_sae, case.n_set, replace=False))
    parameters = random_sae(stage, latents)
    centered = stage.rows.numpy().astype(np.float64) - parameters["b_dec"]
    peaks = (centered @ parameters["W_enc"][:, latents]).max(1)

    def workload(act: str, edit: Edit, share: float) -> Workload:
        b_enc = parameters["b_enc"].copy()
        b_enc[latents] = firing_bias(peaks, share)
        k = case.k if act == "topk" else None
        config = SAEConfig(d_model=centered.shape[1], d_sae=case.d_sae, act=act, k=k)  # type: ignore[arg-type]
        latent_set = LatentSet("benchmark", tuple(latents.tolist()), edit=edit)
        return Workload(config, {**parameters, "b_enc": b_enc}, latent_set, share)

    return [
        *(workload("topk", "scale", share) for share in (0.0, _BASELINE_SHARE, 0.2, 1.0)),
        workload("topk", "project", _BASELINE_SHARE),
        workload("relu", "scale", 1.0),
    ]


def twin(model: nn.Module) -> nn.Module:
    """Return a second model over the same weights, which takes hooks of its own."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def spliced_arm(name: str, stage: Stage, edit: nn.Module) -> Arm:
    """Return an arm that runs `edit` on the residual [batch, pos, d_model] of the case's block."""
    model = twin(stage.model)
    tower = tower_of(model)

    def hook(_block: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return tower.to_batch_first(edit(tower.to_batch_first(output)))

    tower.block(stage.case.hook_point).register_forward_hook(hook)
    return Arm(name, model.encode_image, buffers_mib(edit))  # type: ignore[arg-type]


def our_arm(stage: Stage, workload: Workload) -> tuple[Arm, Firing]:
    """Return the library's arm, and what S does on the benchmark's pictures by the library's own arithmetic."""
    site = Site(stage.case.hook_point, workload.config, workload.parameters, (workload.latent_set,))
    model = twin(stage.model)
    attach(model, (site,))
    (suppressor,) = attached(model).suppressors()
    pre_acts = stage.rows @ suppressor.W_S + suppressor.b_S
    n_firing, n_surviving = (int((x > 0).any(1).sum()) for x in (pre_acts, suppressor.acts(stage.rows)))
    act = {"topk": "TopK"}.get(workload.config.act, workload.config.act)
    name = f"ours, {act}, {workload.latent_set.edit}, {workload.share:.0%} of tokens firing".replace("%", " %")
    arm = Arm(name, model.encode_image, buffers_mib(attached(model)))  # type: ignore[arg-type]
    return arm, Firing(workload.share, len(stage.rows), n_firing, n_surviving)


def make_rivals(stage: Stage, workload: Workload) -> Rivals:
    """Return all arms for one workload."""
    ours, firing = our_arm(stage, workload)
    is_scale = workload.latent_set.edit == "scale"
    naive = (
        spliced_arm("naive splice", stage, NaiveSplice(workload))
        if is_scale
        else spliced_arm("least squares", stage, NaiveProject(workload))
    )
    has_sparse = is_scale and workload.config.act == "topk"
    sparse = spliced_arm("sparse decode", stage, SparseDecode(workload)) if has_sparse else None
    return Rivals(workload, firing, naive, ours, sparse)


def buffers_mib(module: nn.Module) -> float:
    """Return the size of a module's buffers."""
    return sum(buffer.numel() * buffer.element_size() for buffer in module.buffers()) / _MIB


def gate(stage: Stage, field: Sequence[Rivals]) -> list[str]:
    """Return what speaks against timing these arms; nothing does where the list is empty.

    Rivals must agree on the normalized image embeddings and differ from plain CLIP where a latent of S survives (else
    there is nothing to agree on). Ours must equal plain CLIP bit for bit where S does not fire. S must fire as often
    as asked.
    """

    def embed(encode_image: Callable[[Tensor], Tensor]) -> Tensor:
        return nn.functional.normalize(encode_image(stage.pixel_values), dim=-1)

    failures: list[str] = []
    plain = embed(stage.model.encode_image)  # type: ignore[arg-type]
    for rivals in field:
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
            failures.append(f"{name}: the edit moves embeddings by {moved:.2e} only and cannot tell arms apart")
        if firing.n_firing == 0 and not torch.equal(ours, plain):
            failures.append(f"{name}: not bit-equal to plain CLIP")
        if abs(firing.n_firing - firing.share * firing.n_tokens) > 1:
            failures.append(f"{name}: S fires on {firing.n_firing} of {firing.n_tokens} tokens")
    return failures


def time_interleaved(jobs: Mapping[str, Callable[[], object]], rounds: int, seed: int) -> dict[str, np.ndarray]:
    """Run each job once unmeasured, then once per round in random order, and return its times in ms, [rounds]."""
    names = list(jobs)
    for job in jobs.values():
        job()
    times = {name: np.zeros(rounds) for name in names}
    rng = np.random.default_rng([seed, 3])
    for index in range(rounds):
        for place in rng.permutation(len(names)):
            start = time.perf_counter()
            jobs[names[place]]()
            times[names[place]][index] = 1e3 * (time.perf_counter() - start)
    return times


def peak_rise_mib(job: Callable[[], object]) -> float | None:
    """Return by how much a job raises the process's resident memory at its peak; None where Linux does not tell."""
    try:
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)  # memory that was freed but kept would hide the same amount of the rise
        _CLEAR_REFS.write_text("5")  # VmHWM starts anew; getrusage's peak would be that of building the SAEs
        before = _resident_mib("VmRSS")
        job()
        return _resident_mib("VmHWM") - before
    except (OSError, TypeError):
        return None


def _resident_mib(key: str) -> float:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[key].split()[0]) / 1024


def measure(stage: Stage, field: Sequence[Rivals], environment: Environment, *, memory: bool = True) -> list[Row]:
    """Time all arms, which passed the gate; the first row is plain CLIP."""
    case = stage.case
    baseline = next(
        rivals for rivals in field if rivals.sparse is not None and rivals.workload.share == _BASELINE_SHARE
    )
    assert baseline.sparse is not None
    entries: list[tuple[Arm, Firing | None, bool]] = [
        (Arm("plain CLIP", stage.model.encode_image), None, False),  # type: ignore[arg-type]
        (baseline.naive, baseline.firing, False),
        (baseline.sparse, baseline.firing, False),
        *((rivals.ours, rivals.firing, rivals.workload.config.k is not None) for rivals in field),
    ]
    W_enc = torch.from_numpy(baseline.workload.parameters["W_enc"])
    product = torch.empty(len(stage.rows), case.d_sae)
    jobs: dict[str, Callable[[], object]] = {
        arm.name: partial(arm.encode_image, stage.pixel_values) for arm, _, _ in entries
    }
    times = time_interleaved(
        {**jobs, "matmul": lambda: torch.mm(stage.rows, W_enc, out=product)}, case.rounds, case.seed
    )
    ms_per_token = float(np.median(times["matmul"])) / len(stage.rows)
    peaks = {name: peak_rise_mib(job) if memory else None for name, job in jobs.items()}
    plain_ms, plain_peak = times["plain CLIP"], peaks["plain CLIP"]
    rows = []
    for arm, firing, has_floor in entries:
        ms, peak = times[arm.name], peaks[arm.name]
        p20, median, p80 = (float(value) for value in np.percentile(ms, (20, 50, 80)))
        rows.append(
            Row(
                arm=arm.name,
                latency_ms=median,
                p20_ms=p20,
                p80_ms=p80,
                x_plain=float(np.median(ms / plain_ms)),
                added_ms=float(np.median(ms - plain_ms)),
                floor_ms=firing.n_firing * ms_per_token if firing is not None and has_floor else None,
                matmul_gflops=2e-6 * W_enc.numel() / ms_per_token,
                weights_mib=arm.weights_mib,
                peak_mib=peak,
                extra_mib=None if peak is None or plain_peak is None else arm.weights_mib + peak - plain_peak,
                firing=firing,
                rounds_ms=tuple(ms.tolist()),
                d_model=W_enc.shape[0],
                case=case,
                environment=environment,
            )
        )
    return rows


def save_rows(rows: Sequence[Row], path: Path) -> None:
    """Write rows as a JSON list."""
    path.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")


def load_rows(path: Path) -> list[Row]:
    """Read what `save_rows` wrote."""
    rows = []
    for fields in json.loads(path.read_text(encoding="utf-8")):
        fields["firing"] = fields["firing"] and Firing(**fields["firing"])
        fields["rounds_ms"] = tuple(fields["rounds_ms"])
        fields["case"], fields["environment"] = Case(**fields["case"]), Environment(**fields["environment"])
        rows.append(Row(**fields))
    return rows


def table(rows: Sequence[Row]) -> str:
    """Return rows as a Markdown table."""

    def cell(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{max(value, 0.0):.{digits}f}"

    lines = ["| arm | ms (p20-p80) | x plain | floor ms | extra MiB |", "|---|---|---|---|---|"]
    for row in rows:
        spread = f"{row.latency_ms:.1f} ({row.p20_ms:.1f}-{row.p80_ms:.1f})"
        lines.append(
            f"| {row.arm} | {spread} | {row.x_plain:.2f} | {cell(row.floor_ms, 1)} | {cell(row.extra_mib, 1)} |"
        )
    return "\n".join(lines)


def caption(rows: Sequence[Row]) -> str:
    """Return what a reader of the table has to know, in a few lines of Markdown."""
    row, case = rows[0], rows[0].case
    survivors = "; ".join(
        f"{other.firing.n_firing} of {other.firing.n_tokens} ({other.firing.n_surviving})"
        for other in rows
        if other.firing is not None and other.arm.startswith("ours")
    )
    return (
        f"{case.model}, random weights, batch {case.batch}, block {case.block}, d_model {row.d_model}, "
        f"d_sae {case.d_sae}, k {case.k}, |S| {case.n_set}, {case.dtype}, seed {case.seed}, {case.rounds} rounds.\n"
        f"{machine_words({**asdict(row.environment), 'threads': case.threads})}\n"
        f"The floor (at {row.matmul_gflops:.0f} GFLOP/s) stands against the time that an arm adds to plain CLIP.\n"
        f"Tokens firing (of these, with a latent of S that passes the activation rule), for our arms: {survivors}."
    )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use this many threads, and then as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m defense.benchmarks.speed", description=__doc__.splitlines()[0])
    default = Case(threads=torch.get_num_threads())
    parser.add_argument("--model", default=default.model, help="open_clip's name of a ViT (default: %(default)s)")
    for name, text in (
        ("batch", "pictures per call"),
        ("d-sae", "latents of the SAE"),
        ("k", "latents kept per token by the TopK rule"),
        ("n-set", "latents in S"),
        ("block", "block whose output is edited, from 0"),
        ("rounds", "how often each arm is timed"),
        ("threads", "threads of torch"),
        ("seed", "of everything that is random"),
    ):
        value = getattr(default, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=int, default=value, help=f"{text} (default: %(default)s)")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure memory as well")
    parser.add_argument("--out", type=Path, help="write the rows there, as JSON")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table and return the exit code: 1 where the gate failed, 2 for arguments that cannot work."""
    argv = sys.argv[1:] if argv is None else argv
    fields = vars(_parser().parse_args(argv))
    out, memory = fields.pop("out"), fields.pop("memory")
    try:
        case = Case(**fields)
        if out is not None and not out.resolve().parent.is_dir():
            raise ConfigError(f"{out.parent} is no folder; create it first")
        environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.speed", *argv]))
        with torch_threads(case.threads), torch.inference_mode():
            stage = set_stage(create_model(case), case)
            field = [make_rivals(stage, workload) for workload in make_workloads(stage)]
            if failures := gate(stage, field):
                print("The parity gate failed; nothing was timed.", *failures, sep="\n", file=sys.stderr)
                return 1
            rows = measure(stage, field, environment, memory=memory)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if out is not None:
        save_rows(rows, out)
    print(table(rows), caption(rows), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
