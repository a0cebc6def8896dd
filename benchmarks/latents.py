"""Which way of choosing S is best, and which ingredient of ours earns its place.

    python -m defense.benchmarks.latents --out benchmarks/results/latents.json

On the embedded model, at the first block that its defense edits, with that block's SAE. Rules rank latents and are
compared twice: with as many latents as ours chose, and with as many as clean pictures bear ("own stop"). Ablations take
one ingredient out of ours. And ours chooses from other candidates: from random latents, and from the latents of a
dictionary of random directions. Everything is chosen on pictures of one seed after the other, and measured on pictures
and typefaces that nothing was chosen on, the same for all.

Each way of choosing is written as soon as it is done; the same command goes on where it was interrupted. In the stored
result each is an "arm". `latents_choosing.py` has the ways of choosing, `latents_report.py` what they come to.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.benchmarks.environment import environment_of, write_json
from defense.benchmarks.latents_choosing import Choice, Chooser, variants
from defense.benchmarks.latents_report import TEST_KINDS, packed, summary, table
from defense.core.latents import LatentSet
from defense.core.sae import SparseAutoencoder
from defense.core.suppress import Suppressor
from defense.embedded import build
from defense.errors import ConfigError
from defense.explain import catalogue
from defense.fit.config import FitConfig
from defense.fit.material import Pairs
from defense.fit.selecting import TextFit
from defense.hosts.attach import sae_of
from defense.hosts.clip import EMBEDDED, Clip, embedded_folder, load_clip
from defense.hosts.defense import Defense
from defense.hosts.shipped import MODELS
from defense.hosts.slim import restored
from defense.hosts.tower import BATCH
from defense.store import checkpoint, defenses, folders
from defense.world import scenes

FILE = "latents.json"
SEED_FIT, SEED_TEST = 200, 299
"""Of pictures: to choose on (one more per seed), and to measure on. Apart from each other and from `build.SEEDS`."""


@dataclass(frozen=True)
class Settings:
    """How much of everything.

    Attributes:
        n_fit: Pictures to choose on, each with its two twins.
        n_test: Pictures to measure on, each with its twin.
        fit: How ours chooses; the others take its budget and number of candidates.
    """

    n_fit: int = 200
    n_test: int = 400
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=100, clean_budget=0.01))


class Bench:
    """The pictures to measure on, and what is measured of a choice.

    Args:
        fit_of: From a seed to the pictures to choose on, with an SAE; with None for that of the defense.
        pairs: Pictures to measure on, clean and attacked.
        text_embeds: Embeddings of the class names, [n_classes, d_embed].
    """

    def __init__(
        self, fit_of: Callable[[int, SparseAutoencoder | None], TextFit], pairs: Pairs, text_embeds: Tensor
    ) -> None:
        self.fit_of, self.text_embeds, self.label = fit_of, text_embeds, pairs.label
        self.pixel_values = {name: getattr(pairs, name) for name in TEST_KINDS}
        self._resid: dict[str, Tensor] = {}

    @torch.inference_mode()
    def is_correct(self, fit: TextFit, choice: Choice) -> dict[str, np.ndarray]:
        """Return, by kind of picture, which are answered rightly with a choice in force, bool [n_test]."""
        tower, hook_point = fit.tower, fit.hook_point
        if not self._resid:
            self._resid = {name: tower.resid(pixels, hook_point) for name, pixels in self.pixel_values.items()}
        sae = fit.sae if choice.sae is None else choice.sae
        suppressor = Suppressor(sae, LatentSet("variant", choice.latents, choice.gains))
        found = {}
        for name, resid in self._resid.items():
            embeds = [tower.embeds_from(suppressor(part), hook_point) for part in resid.split(BATCH)]
            answers = [part @ self.text_embeds.T for part in embeds]
            found[name] = (torch.cat(answers).argmax(1) == self.label).numpy()
        return found


def measure_choices(
    bench: Bench, config: FitConfig, steerability: np.ndarray, seed: int, done: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each way of choosing that is not done yet, from the pictures of a seed.

    Args:
        bench: Pictures to choose on and to measure on.
        config: How ours chooses.
        steerability: float [d_sae]; NaN where there is none.
        seed: Of the pictures to choose on and of what is random.
        done: Names of the ways that need no more record.
    """
    missing = {name: choose for name, choose in variants().items() if name not in done}
    if not missing:
        return
    fit = bench.fit_of(seed, None)
    chooser = Chooser(fit, config, steerability, seed, lambda other: bench.fit_of(seed, other))
    for name, choose in missing.items():
        start = time.perf_counter()
        choice = choose(chooser)
        seconds = time.perf_counter() - start
        is_correct = bench.is_correct(fit, choice)
        yield {
            "seed": seed,
            "arm": name,
            "latents": list(choice.latents),
            "gains": [round(gain, 4) for gain in choice.gains],
            "seconds": round(seconds, 1),
            "correct": {kind: packed(column) for kind, column in is_correct.items()},
        }


def run(
    out: Path,
    seeds: Sequence[int] = (0, 1, 2),
    settings: Settings | None = None,
    *,
    command: str = "defense bench latents",
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Measure all ways of choosing, or go on with it, and return the result.

    Args:
        out: JSON file, or a folder, where it is `latents.json`.
        seeds: Of the pictures to choose on and of what is random.
        settings: How much of everything.
        command: What was typed, for the record.
        report: Called with a line about each way of choosing that is done.

    Raises:
        ConfigError: `out` holds another run, or the embedded model's catalogue is missing.
    """
    path = out if out.suffix == ".json" else out / FILE
    settings = settings or Settings()
    folder = embedded_folder("text")
    defense = defenses.load(folder)
    site = defense.sites[0]
    found = catalogue.find(EMBEDDED).get(site.hook_point)
    if found is None:
        raise ConfigError(f"no catalogue for {site.hook_point}; run: python -m defense.embedded.catalogues")
    made_with = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "seeds": list(seeds),
        "hook_point": site.hook_point,
        "defense_sha256": folders.sha256_of(folder / defenses.MANIFEST),
    }
    result = _started(path, made_with, command)
    clip = load_clip(EMBEDDED)
    bench = _embedded_bench(clip, defense, settings)
    for seed in seeds:
        done = [record["arm"] for record in result["arms"] if record["seed"] == seed]
        for record in measure_choices(bench, settings.fit, found.columns["steerability"], seed, done):
            result["arms"].append(record)
            write_json(path, result)
            report(f"seed {seed}: {record['arm']}, {len(record['latents'])} latents, {record['seconds']:.0f} s")
    result["rows"] = summary(result["arms"], settings.n_test)
    write_json(path, result)
    return result


def _embedded_bench(clip: Clip, defense: Defense, settings: Settings) -> Bench:
    site = restored(defense, [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])], own_rule=True).sites[0]
    sae = sae_of(site)
    text_embeds = build.text_embeds_of(clip, list(scenes.OBJECTS))

    @lru_cache(maxsize=1)
    def pairs_of(seed: int) -> Pairs:
        return build.attack_pairs(settings.n_fit, SEED_FIT + seed, scenes.TRAIN_FONTS, clip)

    def fit_of(seed: int, other: SparseAutoencoder | None) -> TextFit:
        return TextFit(clip, site.hook_point, sae if other is None else other, pairs_of(seed), text_embeds)

    return Bench(fit_of, build.attack_pairs(settings.n_test, SEED_TEST, scenes.TEST_FONTS, clip), text_embeds)


def _started(path: Path, made_with: Mapping[str, Any], command: str) -> dict[str, Any]:
    """Return the result so far of a run with the same settings, or an empty one."""
    if path.exists():
        result = json.loads(path.read_text(encoding="utf-8"))
        if any(result.get(key) != value for key, value in made_with.items()):
            raise ConfigError(f"{path} holds a run with other settings, or of another defense; give another file")
        return {**result, "rows": None}  # until all ways of choosing are in
    path.parent.mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("clip-defense", "pillow")}
    environment = asdict(environment_of(command))
    return {**made_with, "environment": environment, "versions": versions, "rows": None, "arms": []}


def main() -> None:
    """Parse the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(FILE), help="JSON file, written after each way of choosing")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--n-fit", type=int, default=Settings.n_fit)
    parser.add_argument("--n-test", type=int, default=Settings.n_test)
    options = parser.parse_args()
    command = shlex.join(["python", "-m", "defense.benchmarks.latents", *sys.argv[1:]])
    settings = Settings(options.n_fit, options.n_test)

    def report(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    print(table(run(options.out, range(options.seeds), settings, command=command, report=report)))


if __name__ == "__main__":
    main()
