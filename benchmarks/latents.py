"""Which way of choosing S is best, and which ingredient of ours earns its place.

    python -m defense.benchmarks.latents --out benchmarks/results/latents.json

On the embedded model, at the first block that its defense edits, with that block's SAE. Rules rank latents and are
compared twice: with as many latents as ours chose, and with as many as clean pictures bear ("own stop"). Ablations take
one ingredient out of ours. Everything is chosen on pictures of one seed after the other, and measured on pictures and
typefaces that nothing was chosen on, the same for all.

Each arm is written as soon as it is done; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.benchmarks.environment import environment_of
from defense.benchmarks.metrics import mean_figure
from defense.core.latents import LatentSet, draw_alike
from defense.core.suppress import Suppressor
from defense.embedded import build
from defense.errors import ConfigError
from defense.explain import catalogue
from defense.fit.config import FitConfig
from defense.fit.material import Pairs
from defense.fit.selecting import LEAST_REMOVAL, Ranking, TextFit, Trial, within_budget
from defense.hosts.attach import sae_of
from defense.hosts.clip import EMBEDDED, Clip, embedded_folder, load_clip
from defense.hosts.defense import Site
from defense.hosts.tower import BATCH
from defense.store import defenses, folders
from defense.world import scenes

FILE = "latents.json"
SEED_FIT, SEED_TEST = 200, 299
"""Of pictures: to choose on (one more per seed), and to measure on. Apart from each other and from `build.SEEDS`."""

RULES = ("ours", "contrast x causal", "causal", "contrast", "steerability", "random")
ABLATIONS = (
    "contrast", "causal effect", "joint step", "learnt gains", "moving weights", "sparsity", "budget",
    "most candidates", "most candidates and contrast", "most candidates and causal effect",
)  # fmt: skip
_FEW = 32
"""Candidates, in the ablations without most of them: then it matters which."""
_TEST_ARMS = ("clean", "attacked")


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


@dataclass(frozen=True)
class Choice:
    """Latents and the part of each that is kept; where none is given, each is removed in full."""

    latents: tuple[int, ...]
    gains: tuple[float, ...] = ()


class Chooser:
    """Chooses S in every way that is compared, from one set of pictures.

    Args:
        fit: The pictures and the SAE.
        config: How ours chooses.
        steerability: float [d_sae]; NaN where there is none.
        seed: Of what is random.
    """

    def __init__(self, fit: TextFit, config: FitConfig, steerability: np.ndarray, seed: int) -> None:
        self.fit, self.config, self.steerability = fit, replace(config, seed=seed), steerability
        self.seed = seed
        self._learned: dict[tuple[FitConfig, tuple[int, ...]], tuple[Trial, np.ndarray]] = {}

    @cached_property
    def ranking(self) -> Ranking:
        """Scores of all latents."""
        return self.fit.rank()

    @cached_property
    def ours(self) -> Choice:
        """What `fit.choose` picks."""
        return self._chosen(self.ranking.order(), self.config)

    # --- rules ---

    def order(self, rule: str) -> np.ndarray:
        """Return the latents that a rule would take, best first."""
        contrast, effect = self.ranking.contrast, self.ranking.effect
        if rule == "random":
            return self._random_order()
        score = {
            "contrast x causal": np.where((contrast > 0) & (effect > 0), contrast * effect, 0),
            "causal": effect,
            "contrast": contrast,
            "steerability": np.where(contrast > 0, np.nan_to_num(self.steerability), 0),
        }[rule]
        ranked = np.argsort(-score, kind="stable")
        return ranked[score[ranked] > 0]

    def _random_order(self) -> np.ndarray:
        """Return latents at random: first one of like activity for each of ours, then any that fire."""
        rng = np.random.default_rng([self.seed, 1])  # anew each time: an interrupted run must draw the same
        activity = self.fit._activity("attacked").cpu().numpy()
        like = draw_alike(self.ours.latents, activity, rng)
        rest = np.setdiff1d(np.flatnonzero(activity), [*self.ours.latents, *like])
        return np.array([*like, *rng.permutation(rest)], dtype=int)

    def as_many(self, rule: str) -> Choice:
        """Return a rule's best latents, as many as ours."""
        return Choice(tuple(self.order(rule)[: len(self.ours.latents)].tolist()))

    def own_stop(self, rule: str) -> Choice:
        """Return as many of a rule's best latents as clean pictures bear, at most `n_candidates`, removed in full."""
        return self._in_full(self.order(rule))

    # --- ablations ---

    def without(self, ingredient: str) -> Choice:
        """Return what is chosen without one ingredient of ours."""
        ranking, config = self.ranking, self.config
        if ingredient.startswith("most candidates"):
            config = replace(config, n_candidates=_FEW)
            ingredient = ingredient.removeprefix("most candidates").removeprefix(" and ")
        order = ranking.order()
        if not ingredient:
            return self._chosen(order, config)
        if ingredient == "contrast":
            return self._chosen(replace(ranking, contrast=np.ones_like(ranking.contrast)).order(), config)
        if ingredient == "causal effect":
            return self._chosen(self.order("contrast"), config)
        if ingredient == "joint step":
            return self._in_full(order)
        if ingredient == "learnt gains":
            trial, ranked, _ = self._joint(order, config)
            return self._stopped(trial, ranked, np.ones(len(trial.latents)))
        changed = {
            "moving weights": replace(config, worst_rate=0.0),
            "sparsity": replace(config, sparsity=0.0),
            "budget": replace(config, clean_budget=1.0),
        }
        return self._chosen(order, changed[ingredient])

    def _chosen(self, order: np.ndarray, config: FitConfig) -> Choice:
        """Do what `fit.choose` does; the joint step of the same candidates is done once."""
        trial, ranked, removal = self._joint(order, config)
        return self._stopped(trial, ranked, removal, config.clean_budget)

    def _in_full(self, order: np.ndarray) -> Choice:
        """Remove the first of a ranking in full, without the joint step."""
        trial = Trial(self.fit, order[: self.config.n_candidates], self.config)
        return self._stopped(trial, np.arange(len(trial.latents)), np.ones(len(trial.latents)))

    def _joint(self, order: np.ndarray, config: FitConfig) -> tuple[Trial, np.ndarray, np.ndarray]:
        """Return the candidates, their columns, most removed first, and how much of each is removed."""
        order = order[: config.n_candidates]
        key = replace(config, clean_budget=0.0), tuple(order.tolist())  # this step does not depend on the budget
        if key not in self._learned:
            trial = Trial(self.fit, order, config)
            self._learned[key] = trial, self.fit.learn_removal(trial, config)
        trial, removal = self._learned[key]
        ranked = np.argsort(-removal, kind="stable")
        return trial, ranked[removal[ranked] >= LEAST_REMOVAL], removal

    def _stopped(
        self, trial: Trial, ranked: np.ndarray, removal: np.ndarray, clean_budget: float | None = None
    ) -> Choice:
        budget = self.config.clean_budget if clean_budget is None else clean_budget
        selection = within_budget(trial, ranked, removal, budget)
        return Choice(selection.latents, selection.gains)


def arms() -> dict[str, Callable[[Chooser], Choice]]:
    """Return every way of choosing: name -> what does it. Ours first: others take its number of latents."""
    found: dict[str, Callable[[Chooser], Choice]] = {"plain": lambda _: Choice(()), "ours": lambda c: c.ours}
    for rule in RULES[1:]:
        found[f"{rule}, as many"] = partial(Chooser.as_many, rule=rule)
        found[f"{rule}, own stop"] = partial(Chooser.own_stop, rule=rule)
    for ingredient in ABLATIONS:
        found[f"without {ingredient}"] = partial(Chooser.without, ingredient=ingredient)
    return found


# --- measuring --------------------------------------------------------------------------------------------------------


class Bench:
    """The pictures to measure on, and what is measured of a choice."""

    def __init__(self, fit_of: Callable[[int], TextFit], pairs: Pairs, text_embeds: Tensor) -> None:
        self.fit_of, self.text_embeds, self.label = fit_of, text_embeds, pairs.label
        self.pixel_values = {name: getattr(pairs, name) for name in _TEST_ARMS}
        self._resid: dict[str, Tensor] = {}

    @torch.inference_mode()
    def is_correct(self, fit: TextFit, choice: Choice) -> dict[str, np.ndarray]:
        """Return which pictures of each kind are answered rightly, bool [n_test]."""
        tower, hook_point = fit.tower, fit.hook_point
        if not self._resid:
            self._resid = {name: tower.resid(pixels, hook_point) for name, pixels in self.pixel_values.items()}
        suppressor = Suppressor(fit.sae, LatentSet("variant", choice.latents, choice.gains))
        found = {}
        for name, resid in self._resid.items():
            embeds = [tower.embeds_from(suppressor(part), hook_point) for part in resid.split(BATCH)]
            answers = [part @ self.text_embeds.T for part in embeds]
            found[name] = (torch.cat(answers).argmax(1) == self.label).numpy()
        return found


def _packed(is_correct: np.ndarray) -> str:
    return np.packbits(is_correct).tobytes().hex()


def _unpacked(text: str, n: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), np.uint8), count=n).astype(bool)


def measure(
    bench: Bench, config: FitConfig, steerability: np.ndarray, seed: int, done: Sequence[str]
) -> Iterator[dict[str, Any]]:
    """Yield a record for each way of choosing that is not done yet, from the pictures of a seed."""
    missing = {name: choose for name, choose in arms().items() if name not in done}
    if not missing:
        return
    fit = bench.fit_of(seed)
    chooser = Chooser(fit, config, steerability, seed)
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
            "correct": {kind: _packed(column) for kind, column in is_correct.items()},
        }


# --- what it comes to -------------------------------------------------------------------------------------------------


def summary(records: Sequence[Mapping[str, Any]], n_test: int) -> dict[str, Any]:
    """Return, per way of choosing, shares of right answers and the difference to ours, over seeds.

    A picture's value is its mean over seeds; intervals are over pictures.
    """
    found: dict[str, Any] = {}
    ours = _values([record for record in records if record["arm"] == "ours"], n_test)
    for name in dict.fromkeys(record["arm"] for record in records):
        mine = [record for record in records if record["arm"] == name]
        values = _values(mine, n_test)
        found[name] = {
            "n_latents": [len(record["latents"]) for record in mine],
            **{kind: mean_figure(values[kind].mean(0), seed=0).to_dict() for kind in _TEST_ARMS},
            "by_seed": {kind: values[kind].mean(1).tolist() for kind in _TEST_ARMS},
            "less_ours": {
                kind: mean_figure(values[kind].mean(0) - ours[kind].mean(0), seed=0).to_dict() for kind in _TEST_ARMS
            },
        }
    return found


def _values(records: Sequence[Mapping[str, Any]], n_test: int) -> dict[str, np.ndarray]:
    """Return which pictures were answered rightly, float [n_seeds, n_test], by kind."""
    return {
        kind: np.stack([_unpacked(record["correct"][kind], n_test) for record in records]).astype(float)
        for kind in _TEST_ARMS
    }


def verdict(less_ours: Mapping[str, Mapping[str, float]]) -> str:
    """Say whether an ingredient earns its place, from what is lost or won without it."""
    worse = [kind for kind in _TEST_ARMS if less_ours[kind]["high"] < 0]
    better = [kind for kind in _TEST_ARMS if less_ours[kind]["low"] > 0]
    if worse and better:
        return f"a trade: {' and '.join(worse)} for {' and '.join(better)}"
    return f"yes: {' and '.join(worse)}" if worse else "no: better without" if better else "no difference seen"


def table(result: Mapping[str, Any]) -> str:
    """Return a result of `run` as Markdown: the rules, the ablations, and what they rest on.

    Raises:
        ConfigError: The run was interrupted.
    """
    rows = result["rows"]
    if rows is None:
        raise ConfigError("this run of the benchmark of latents was interrupted; run the same command again")
    lines = ["| rule | n | clean | attacked | n, own stop | clean | attacked |", "|---" * 7 + "|"]
    lines.append(f"| no defense | 0 | {_cells(rows['plain'])} | | | |")
    for rule in RULES:
        two = [rows[rule]] * 2 if rule == "ours" else [rows[f"{rule}, as many"], rows[f"{rule}, own stop"]]
        lines.append(f"| {rule} | " + " | ".join(f"{_count(row)} | {_cells(row)}" for row in two) + " |")
    lines += ["", "| ours without | n | clean | attacked | clean, less ours | attacked, less ours | earns its place |"]
    lines.append("|---" * 7 + "|")
    for ingredient in ABLATIONS:
        row = rows[f"without {ingredient}"]
        changes = " | ".join(_points(row["less_ours"][kind]) for kind in _TEST_ARMS)
        lines.append(f"| {ingredient} | {_count(row)} | {_cells(row)} | {changes} | {verdict(row['less_ours'])} |")
    settings, seeds = result["settings"], result["seeds"]
    lines += [
        "",
        f"Percent of {settings['n_test']} pictures (95 % interval over pictures), mean of {len(seeds)} seeds; n is the "
        f"number of latents. Chosen at {result['hook_point']} on {settings['n_fit']} pictures a seed, of "
        f"{settings['fit']['n_candidates']} candidates, under a clean budget of "
        f'{100 * settings["fit"]["clean_budget"]:g} %. "No difference seen" means that the interval holds 0. '
        f"`{result['environment']['command']}`",
    ]
    return "\n".join(lines)


def _count(row: Mapping[str, Any]) -> str:
    least, most = min(row["n_latents"]), max(row["n_latents"])
    return str(least) if least == most else f"{least} to {most}"


def _cells(row: Mapping[str, Any]) -> str:
    figures = [row[kind] for kind in _TEST_ARMS]
    return " | ".join(f"{100 * f['value']:.1f} ({100 * f['low']:.1f} to {100 * f['high']:.1f})" for f in figures)


def _points(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:+.1f} ({100 * figure['low']:+.1f} to {100 * figure['high']:+.1f})"


# --- the run ----------------------------------------------------------------------------------------------------------


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
        report: Called with the name of each arm that is done.

    Raises:
        ConfigError: `out` holds another run, or the embedded model's catalogue is missing.
    """
    path = out if out.suffix == ".json" else out / FILE
    settings = settings or Settings()
    folder = embedded_folder("text")
    site = defenses.load(folder).sites[0]
    found = catalogue.find(EMBEDDED).get(site.hook_point)
    if found is None:
        raise ConfigError(f"no catalogue for {site.hook_point}; run: python -m defense.embedded.describe")
    made_with = {
        "settings": json.loads(json.dumps(asdict(settings))),
        "seeds": list(seeds),
        "hook_point": site.hook_point,
        "defense_sha256": folders.sha256_of(folder / defenses.MANIFEST),
    }
    result = _started(path, made_with, command)
    clip = load_clip(EMBEDDED)
    bench = _embedded_bench(clip, site, settings)
    for seed in seeds:
        done = [record["arm"] for record in result["arms"] if record["seed"] == seed]
        for record in measure(bench, settings.fit, found.columns["steerability"], seed, done):
            result["arms"].append(record)
            _write(path, result)
            report(f"seed {seed}: {record['arm']}, {len(record['latents'])} latents, {record['seconds']:.0f} s")
    result["rows"] = summary(result["arms"], settings.n_test)
    _write(path, result)
    return result


def _embedded_bench(clip: Clip, site: Site, settings: Settings) -> Bench:
    sae = sae_of(site)
    text_embeds = build.text_embeds_of(clip, list(scenes.OBJECTS))

    def fit_of(seed: int) -> TextFit:
        pairs = build.attack_pairs(settings.n_fit, SEED_FIT + seed, scenes.TRAIN_FONTS, clip)
        return TextFit(clip, site.hook_point, sae, pairs, text_embeds)

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


def _write(path: Path, result: Mapping[str, Any]) -> None:
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def main() -> None:
    """Parse the command line, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(FILE), help="JSON file, written arm by arm")
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
