"""How well and how fast SAEs are trained, beside the `dictionary-learning` package on the same batches.

    python -m defense.benchmarks.train --out benchmarks/results/train-cpu.json

Both train on residuals of the embedded model, on pictures of its world that it was not trained on, at one block. They
get the same batches, scaled alike, the same number of latents and of steps, and the same learning rates and schedule.
What differs is the code, the initial weights, and what each does to revive dead latents. Both are measured by the same
function on pictures that neither saw; a `dictionary-learning` SAE is first converted to ours and held to give the same
acts as its own code.

The two take turns, batch by batch, so that whatever else the machine does hits both alike. The rate is a batch over
the median time of a step: forward, backward, optimizer. The floor is the five matrix products that such a step cannot
do without (one forward through the encoder, one through the decoder, three backward), timed by themselves between
the steps. What AuxK computes for dead latents comes on top of it.

The encoding of pictures is not in these rates. It is measured by itself: pictures drawn, prepared and brought through
the CLIP.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.benchmarks.cost import torch_threads
from defense.benchmarks.environment import checkout_words, environment_of, installed_version, write_json
from defense.core.config import SAEConfig, Variant
from defense.core.sae import SparseAutoencoder
from defense.errors import CheckpointError
from defense.hosts.clip import EMBEDDED, Clip, load_clip
from defense.train.parallel import World
from defense.train.quality import Quality, measure
from defense.train.runs import InMemory
from defense.train.trainer import PREFIXES, TrainConfig, Trainer

OURS, THEIRS = "defense train", "dictionary-learning"
VARIANTS: tuple[Variant, ...] = ("topk", "batchtopk", "matryoshka")
_MEASURED = ("explained_variance", "l0", "alive", "tokens_per_s")
_N_SAMPLE = 8192
_FLOOR_EVERY = 5


@dataclass(frozen=True)
class Case:
    """What is trained.

    Attributes:
        block: Block of the embedded model whose residual it is.
        n_pictures: Pictures whose tokens are trained on.
        n_held_out: Pictures whose tokens are measured on.
        d_sae: Latents.
        k: Latents per token.
        n_tokens: Tokens trained on.
        batch: Tokens per step.
        lr: Peak learning rate.
        seeds: How many trainings of each kind.
        threads: Threads of torch.
    """

    block: int = 2
    n_pictures: int = 3_000
    n_held_out: int = 300
    d_sae: int = 3072
    k: int = 24
    n_tokens: int = 1_000_000
    batch: int = 2048
    lr: float = 1e-3
    seeds: int = 2
    threads: int = 2

    def config(self, variant: Variant, seed: int) -> TrainConfig:
        """Return the settings of one training, which both trainers get."""
        return TrainConfig(
            d_sae=self.d_sae, k=self.k, steps=self.n_tokens // self.batch, batch=self.batch, lr=self.lr, seed=seed,
            variant=variant,
        )  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One training and what came of it; the names of the fields are the keys of the stored result.

    Attributes:
        implementation: `OURS` or `THEIRS`.
        variant: Of the SAE: "topk", "batchtopk" or "matryoshka".
        seed: Of weights and batches.
        explained_variance: Share of the variance of residuals that was not trained on, at most 1.
        l0: Mean number of latents that fire at a token.
        alive: Share of latents that fire at all.
        tokens_per_s: Tokens of a batch over the median time of a step.
    """

    implementation: str
    variant: str
    seed: int
    explained_variance: float
    l0: float
    alive: float
    tokens_per_s: float


# --- material -------------------------------------------------------------------------------------


def residuals(case: Case, clip: Clip) -> tuple[Tensor, Tensor, float]:
    """Return residuals to train on and to measure on, [n, d_model] each, and how many tokens are encoded per second."""
    from defense.embedded.build import SEEDS, pixel_values_of
    from defense.world.draws import web_scenes

    hook_point = f"blocks.{case.block}.hook_resid_post"

    def encoded(n: int, seed: int) -> Tensor:
        scenes = web_scenes(n, seed)
        parts = [clip.tower.resid(pixel_values_of(scenes[i : i + 200], clip), hook_point) for i in range(0, n, 200)]
        return torch.cat(parts).flatten(0, 1).clone()

    start = time.perf_counter()
    train = encoded(case.n_pictures, SEEDS["benchmark"])
    return train, encoded(case.n_held_out, SEEDS["benchmark"] + 1), len(train) / (time.perf_counter() - start)


class Floor:
    """The five matrix products that no training step can do without, on random matrices.

    Args:
        d_model: Width of the residual.
        d_sae: Latents.
        batch: Tokens per step.
    """

    def __init__(self, d_model: int, d_sae: int, batch: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(batch, d_model, generator=generator)
        self.W_enc = torch.randn(d_model, d_sae, generator=generator)
        self.W_dec = self.W_enc.T.contiguous()
        self.acts = torch.randn(batch, d_sae, generator=generator)

    def step(self) -> None:
        """Compute the five products once."""
        _ = self.x @ self.W_enc
        _ = self.acts @ self.W_dec
        _ = self.x @ self.W_dec.T
        _ = self.acts.T @ self.x
        _ = self.x.T @ self.acts


# --- the two trainers -----------------------------------------------------------------------------


class Ours:
    """Our trainer, step by step.

    Args:
        config: Its settings.
        sample: Residuals to set the scale and b_dec from, [n, d_model].
    """

    def __init__(self, config: TrainConfig, sample: Tensor) -> None:
        self.trainer = Trainer(config, sample.shape[1], sample.device, World())
        self.trainer.start(sample)

    def step(self, batch: Tensor) -> None:
        """Take a step on residuals [batch, d_model]."""
        self.trainer.update(batch)

    def finish(self, batches: InMemory) -> SparseAutoencoder:
        """Return the SAE."""
        return self.trainer.finish(batches, "all")


class Theirs:
    """The trainer of dictionary-learning, step by step.

    Its threshold starts to be learned halfway (by default after 1,000 steps, more than there are here).

    Args:
        config: The settings, as ours takes them.
        sample: Residuals to set the scale from, [n, d_model].
    """

    def __init__(self, config: TrainConfig, sample: Tensor) -> None:
        from dictionary_learning.trainers.batch_top_k import BatchTopKTrainer
        from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKTrainer
        from dictionary_learning.trainers.top_k import TopKTrainer

        options: dict[str, Any] = {
            "steps": config.steps, "activation_dim": sample.shape[1], "dict_size": config.d_sae, "k": config.k,
            "layer": 0, "lm_name": "embedded", "lr": config.lr, "warmup_steps": 100, "seed": config.seed,
            "decay_start": int(0.8 * config.steps), "threshold_start_step": config.steps // 2, "device": "cpu",
        }  # fmt: skip
        if config.variant == "matryoshka":
            shares = [end - start for start, end in zip((0.0, *PREFIXES), PREFIXES, strict=False)]
            self.trainer = MatryoshkaBatchTopKTrainer(**options, group_fractions=shares)
        else:
            self.trainer = {"topk": TopKTrainer, "batchtopk": BatchTopKTrainer}[config.variant](**options)
        self.config = config
        self.scale = float((sample - sample.mean(0)).square().mean().sqrt())
        self.n_done = 0

    def step(self, batch: Tensor) -> None:
        """Take a step on residuals [batch, d_model]."""
        self.trainer.update(self.n_done, batch / self.scale)
        self.n_done += 1

    @torch.no_grad()
    def finish(self, batches: InMemory) -> SparseAutoencoder:
        """Return the SAE, converted to ours.

        Raises:
            CheckpointError: The conversion does not give the acts of its own code.
        """
        ae, scale = self.trainer.ae, self.scale
        is_linear = hasattr(ae, "encoder")  # Matryoshka holds plain matrices, in our orientation
        weights = {
            "W_enc": ae.encoder.weight.T if is_linear else ae.W_enc,
            "b_enc": (ae.encoder.bias if is_linear else ae.b_enc) * scale,
            "W_dec": ae.decoder.weight.T if is_linear else ae.W_dec,
            "b_dec": ae.b_dec * scale,
        }
        act = "topk" if self.config.variant == "topk" else "batchtopk"
        if act == "batchtopk":
            weights["threshold"] = ae.threshold.expand(self.config.d_sae) * scale
        fields: dict[str, Any] = {"act": act, "k": self.config.k if act == "topk" else None}
        parameters = {name: tensor.numpy() for name, tensor in weights.items()}
        sae = SparseAutoencoder(SAEConfig(len(ae.b_dec), self.config.d_sae, **fields), parameters)
        probe = batches.next()[:256]
        want = ae.encode(probe / scale) * scale
        if not torch.allclose(sae.encode(probe), want, atol=1e-3 * float(want.max()), rtol=1e-3):
            raise CheckpointError("the converted SAE does not give the acts of dictionary-learning's own code")
        return sae


TRAINERS: Mapping[str, Callable[[TrainConfig, Tensor], Ours | Theirs]] = {OURS: Ours, THEIRS: Theirs}


# --- the run --------------------------------------------------------------------------------------


def run(case: Case, names: Sequence[str], command: str) -> dict[str, Any]:
    """Train and measure everything; return the result as JSON values.

    Args:
        case: What is trained.
        names: Of the trainers: of `TRAINERS`.
        command: What was typed, for the record.
    """
    environment = environment_of(command)
    with torch_threads(case.threads):
        resid, held_out, encoded_per_s = residuals(case, load_clip(EMBEDDED))
        floor = Floor(resid.shape[1], case.d_sae, case.batch)
        rows, floor_s = [], []
        for seed, variant in itertools.product(range(case.seeds), VARIANTS):
            config = case.config(variant, seed)
            saes, seconds = duel(resid, config, names, floor)
            floor_s += seconds.pop("floor")
            for name, sae in saes.items():
                rate = case.batch / statistics.median(seconds[name])
                rows.append(_row(name, variant, seed, measure(sae, held_out), rate))
                print(rows[-1], file=sys.stderr, flush=True)
    floor_step_s = statistics.median(floor_s)
    return {
        "case": asdict(case),
        "environment": asdict(environment),
        "versions": {name: installed_version(name) for name in ("clip-defense", "torch", THEIRS)},
        "d_model": resid.shape[1],
        "encoded_tokens_per_s": encoded_per_s,
        "floor_tokens_per_s": case.batch / floor_step_s,
        "matmul_gflops": 5 * 2 * case.batch * resid.shape[1] * case.d_sae / floor_step_s / 1e9,
        "rows": [asdict(row) for row in rows],
    }


def duel(
    resid: Tensor, config: TrainConfig, names: Sequence[str], floor: Floor
) -> tuple[dict[str, SparseAutoencoder], dict[str, list[float]]]:
    """Let trainers take turns on the same batches.

    Args:
        resid: Residuals to train on, [n, d_model].
        config: Settings of each.
        names: Of the trainers: of `TRAINERS`.
        floor: Timed between the steps.

    Returns:
        The SAE of each trainer; and the seconds of each step by trainer, those of "floor" beside them.
    """
    batches = InMemory(resid, config)
    sample = batches.sample(_N_SAMPLE)
    trainers = {name: TRAINERS[name](config, sample) for name in names}
    seconds: dict[str, list[float]] = {name: [] for name in (*names, "floor")}

    def timed(name: str, work: Callable[[], None]) -> None:
        start = time.perf_counter()
        work()
        seconds[name].append(time.perf_counter() - start)

    for step in range(config.steps):
        batch = batches.next()
        for name in names if step % 2 else reversed(names):
            timed(name, partial(trainers[name].step, batch))
        if step % _FLOOR_EVERY == 0:
            timed("floor", floor.step)
    return {name: trainer.finish(batches) for name, trainer in trainers.items()}, seconds


def _row(implementation: str, variant: str, seed: int, quality: Quality, rate: float) -> Row:
    return Row(implementation, variant, seed, quality.explained_variance, quality.l0, quality.alive, rate)


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result of `run`: means over the seeds."""
    lines = [
        "| SAE | trained by | EV % (range) | L0 | alive % | tokens/s | of the floor |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, implementation in itertools.product(VARIANTS, TRAINERS):
        rows = [row for row in result["rows"] if row["variant"] == variant and row["implementation"] == implementation]
        if not rows:
            continue
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in _MEASURED}
        evs = [100 * row["explained_variance"] for row in rows]
        spread = f" ({min(evs):.2f}-{max(evs):.2f})" if len(rows) > 1 else ""
        lines.append(
            f"| {variant} | {implementation} | {100 * mean['explained_variance']:.2f}{spread} | {mean['l0']:.1f} | "
            f"{100 * mean['alive']:.1f} | {mean['tokens_per_s']:,.0f} | "
            f"{100 * mean['tokens_per_s'] / result['floor_tokens_per_s']:.0f} % |"
        )
    return "\n".join(lines)


def caption(result: dict[str, Any]) -> str:
    """Return what a reader of the table has to know, from the stored result."""
    case, here = result["case"], result["environment"]
    return (
        f"Residuals after block {case['block']} of the embedded model, d_model {result['d_model']}, "
        f"d_sae {case['d_sae']:,}, k {case['k']}; {case['n_tokens']:,} tokens, batch {case['batch']:,}, learning rate "
        f"{case['lr']:g}; mean of {case['seeds']} seeds; measured on {case['n_held_out']} other pictures.\n"
        f"Floor: {result['floor_tokens_per_s']:,.0f} tokens/s ({result['matmul_gflops']:.0f} GFLOP/s). "
        f"Drawing and encoding pictures: {result['encoded_tokens_per_s']:,.0f} tokens/s.\n"
        f"{here['cpu']}, {case['threads']} threads, load before the run {here['load']:.1f}, torch {here['torch']}, "
        f"dictionary-learning {result['versions'][THEIRS]}, {checkout_words(here)}, {here['timestamp']}."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Train, print the table and return the exit code: 3 where dictionary-learning is missing."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m defense.benchmarks.train", description=__doc__.splitlines()[0])
    for name, value in asdict(Case(threads=torch.get_num_threads())).items():
        kind = type(value)
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, default=value, help="(default: %(default)s)")
    parser.add_argument("--alone", action="store_true", help="without dictionary-learning")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    fields = vars(parser.parse_args(argv))
    out, alone = fields.pop("out"), fields.pop("alone")
    if not alone and installed_version(THEIRS) is None:
        print(
            "dictionary-learning is not installed: pip install dictionary-learning (a separate environment is best, "
            "it brings much with it), or run with --alone",
            file=sys.stderr,
        )
        return 3
    command = shlex.join(["python", "-m", "defense.benchmarks.train", *argv])
    result = run(Case(**fields), [OURS] if alone else [OURS, THEIRS], command)
    if out is not None:
        write_json(out, result)
    print(table(result), caption(result), sep="\n\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
