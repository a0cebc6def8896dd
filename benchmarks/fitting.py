"""What a fit costs: seconds of each stage and the most memory, on an architecture with random weights.

    python -m defense.benchmarks.fitting --model ViT-B-32 --block 9 --out fit-cpu.json

Pictures are drawn scenes with words on them. The SAE has random directions of the residual stream for latents, so that
about as many fire as in a trained one. What a fit finds is noise; what it costs is not: the joint step takes all of its
steps, where a real one stops when held-out pictures gain no more.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from defense.benchmarks.cost import begin_peak_mib, peak_mib
from defense.benchmarks.environment import environment_of, machine_words, write_json
from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.data.preprocess import Preprocess
from defense.data.progress import Advance, Progress
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError
from defense.fit import joint
from defense.fit.config import FitConfig
from defense.fit.gates import Gates
from defense.fit.material import Material, Pairs
from defense.fit.placing import fit_defense
from defense.fit.shipping import ship
from defense.fit.sites import SitePlan
from defense.hosts.clip import Clip
from defense.hosts.tower import VisionTower
from defense.world import draws, scenes

_N_LABELS = 100
_SEED = 0


@dataclass(frozen=True)
class FitCase:
    """What is fitted.

    Attributes:
        model: open_clip's name of the architecture.
        block: Where the SAE reads.
        d_sae: Its latents.
        k: How many count at a token.
        n: Pictures, each with its two twins.
        steps: Of the joint step; none is saved by stopping early.
        folds: Of the cross-validation.
        threads: Of torch.
    """

    model: str = "ViT-B-32"
    block: int = 9
    d_sae: int = 49_152
    k: int = 64
    n: int = 300
    steps: int = 100
    folds: int = 3
    threads: int = 2

    @property
    def hook_point(self) -> str:
        """Where the SAE reads."""
        return f"blocks.{self.block}.hook_resid_post"


class _OpenGates(Gates):
    """Lets noise through: random weights are fooled by nothing in particular."""

    def check_explained(self, hook_point: str, explained: float) -> None:
        """Pass."""

    def check_fooled(self, n_fooled: int, n: int) -> None:
        """Pass."""

    def check_validation(self, validation: Any, clean_budget: float) -> None:
        """Pass."""


@dataclass
class _Timed(Progress):
    """Adds up the seconds of each kind of stage."""

    seconds: dict[str, float] = field(default_factory=dict)
    cpu_seconds: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)

    def line(self, text: str) -> None:
        """Show a line."""
        sys.stderr.write(f"{text}\n")

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Time a stage; folds are added up."""
        kind = name.rsplit(", ", 1)[-1] if "fold" in name or "all pictures" in name else name.split(" of ")[0]
        start, cpu_start = time.perf_counter(), time.process_time()

        def advance(n: int) -> None:
            self.steps[kind] = self.steps.get(kind, 0) + n

        try:
            yield advance
        finally:  # thresholds that do not stand in for a TopK rule raise
            self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - start
            self.cpu_seconds[kind] = self.cpu_seconds.get(kind, 0.0) + time.process_time() - cpu_start


def measure(case: FitCase, command: str) -> dict[str, Any]:
    """Return what a fit of a case took, as JSON values: seconds by stage, and the most memory in MiB.

    Seconds of the processor, all threads together, stand beside those of the clock: on a busy machine only they say
    what a stage takes.
    """
    torch.set_num_threads(case.threads)
    clip = random_clip(case.model)
    material, text_embeds = drawn_material(clip, case.n)
    sae = random_sae(clip, case, material)
    config = FitConfig(steps=case.steps, clean_budget=1.0, sparsity=0.0)
    plan = SitePlan(case.hook_point, sae, config)
    timed = _Timed()
    can_tell = begin_peak_mib() is not None  # what making the SAE took is no part of a fit
    start, cpu_start = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as cache, _all_steps():
        fitted = fit_defense(
            clip, clip.id_as(case.model), [plan], material, text_embeds, name="text", folds=case.folds,
            gates=_OpenGates(), cache=Path(cache), progress=timed,
        )  # fmt: skip
        shipped = ship(clip, fitted.defense, material, text_embeds.numpy(), progress=timed)
    return {
        "case": asdict(case),
        "environment": asdict(environment_of(command)),
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu_start, 1),
        "stages": {name: round(seconds, 1) for name, seconds in timed.seconds.items()},
        "cpu_stages": {name: round(seconds, 1) for name, seconds in timed.cpu_seconds.items()},
        "steps": timed.steps,
        "peak_mib": round(peak_mib()) if can_tell else None,
        "stored": "slim" if shipped.whole_because is None else "whole",
    }


@contextmanager
def _all_steps() -> Iterator[None]:
    """Let the joint step run to its end, whatever held-out pictures say."""
    patience, joint.PATIENCE = joint.PATIENCE, sys.maxsize
    try:
        yield
    finally:
        joint.PATIENCE = patience


def random_clip(model: str) -> Clip:
    """Return a CLIP of an architecture with random weights.

    Raises:
        ConfigError: open_clip knows no such architecture.
    """
    import open_clip

    if model not in open_clip.list_models():
        raise ConfigError(f"open_clip knows no model {model!r}; `open_clip.list_models()` names them all")
    with torch.random.fork_rng():
        torch.manual_seed(_SEED)
        net = open_clip.create_model(model).eval().requires_grad_(False)
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(net))
    return Clip(net, preprocess, ClipTokenizer())


def drawn_material(clip: Clip, n: int) -> tuple[Material, torch.Tensor]:
    """Return drawn pictures with words on them and their twins, and random embeddings of labels."""
    cases = list(draws.typographic(n, _SEED))
    side = max(clip.preprocess.size)

    def pixels(kind: str) -> torch.Tensor:
        drawn = (case.scene if kind == "attacked" else getattr(case.scene, kind)() for case in cases)
        shown = [clip.preprocess(scenes.render(replace(scene, oversample=1), side)) for scene in drawn]
        return torch.from_numpy(np.stack(shown))

    clean, neutral, attacked = (pixels(kind) for kind in ("clean", "neutral", "attacked"))
    plain = torch.cat([clip.image_embeds(part) for part in clean.split(50)])
    generator = torch.Generator().manual_seed(_SEED)
    # Around the pictures' own embeddings, which random weights keep close together: else one label takes all.
    around = plain[torch.randint(n, (_N_LABELS,), generator=generator)]
    text_embeds = torch.nn.functional.normalize(around + 1e-3 * torch.randn(around.shape, generator=generator), dim=1)
    label = (plain @ text_embeds.T).argmax(1)
    pairs = Pairs(clean, neutral, attacked, label, (label + 1) % _N_LABELS)
    return Material(pairs, np.zeros(n, dtype=np.int64), (), {"kind": "drawn", "n": n}), text_embeds


def random_sae(clip: Clip, case: FitCase, material: Material) -> SparseAutoencoder:
    """Return an SAE whose latents point from one token of the residual stream to another."""
    tower: VisionTower = clip.tower
    assert isinstance(material.data, Pairs)
    rows = tower.resid(material.data.attacked[:50], case.hook_point).flatten(0, 1)
    generator = torch.Generator().manual_seed(_SEED)
    first, second = (rows[torch.randint(len(rows), (case.d_sae,), generator=generator)] for _ in range(2))
    noise = torch.randn(case.d_sae, rows.shape[1], generator=generator) * (first - second).std() / 4
    W_dec = torch.nn.functional.normalize(first - second + noise, dim=1)
    parameters = {
        "W_enc": W_dec.T.contiguous().numpy(),
        "b_enc": np.zeros(case.d_sae, np.float32),
        "W_dec": W_dec.numpy(),
        "b_dec": rows.mean(0).numpy(),
    }
    return SparseAutoencoder(SAEConfig(rows.shape[1], case.d_sae, "topk", case.k), parameters)


def table(result: Mapping[str, Any]) -> str:
    """Return a result as a table of Markdown and a line that says of what."""
    case, cpu = result["case"], {**result["cpu_stages"], "in all": result["cpu_seconds"]}
    stages = {**result["stages"], "in all": result["seconds"]}
    lines = ["| stage | s | s of the processor |", "|---|---|---|"]
    lines += [f"| {name} | {seconds:.1f} | {cpu[name]:.1f} |" for name, seconds in stages.items()]
    memory = "?" if result["peak_mib"] is None else f"{result['peak_mib']:,} MiB at the peak"
    about = (
        f"{case['model']}, random weights, {case['n']} pictures and their two twins, block {case['block']}, d_sae "
        f"{case['d_sae']}, k {case['k']}, {case['folds']} folds, {case['steps']} joint steps in each fit, none "
        f"saved; {memory}."
    )
    return "\n".join(lines) + f"\n\n{about}\n{machine_words(result['environment'])}"


def main() -> None:
    """Parse the command line, measure, print, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in asdict(FitCase()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    parser.add_argument("--out", type=Path)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    command = shlex.join(["python", "-m", "defense.benchmarks.fitting", *sys.argv[1:]])
    result = measure(FitCase(**arguments), command)
    cpu = {**result["cpu_stages"], "in all": result["cpu_seconds"]}
    for name, seconds in {**result["stages"], "in all": result["seconds"]}.items():
        print(f"{name:24} {seconds:8.1f} s, {cpu[name]:8.1f} s of the processor")
    print(f"{'memory':24} {result['peak_mib'] or '?':>8} MiB")
    if out is not None:
        write_json(out, result)


if __name__ == "__main__":
    main()
