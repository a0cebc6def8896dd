"""Run methods over data sets: one JSON file per data set and method, in CLIP_benchmark's shape with a `robust` block.

    data set --datasets--> pictures --method's encoder, 64 at a time--> image_embeds --cosine--> logits
             --metrics.answers_of--> answers --metrics.figures, versus--> result

Embeddings are kept, each chunk in a file that is named by all that decides its content: the host's weights, the method
and its settings, the bytes of the pictures. A run that was interrupted goes on from there, a changed picture is encoded
anew, and more methods or figures cost no second pass. Memory holds one chunk of pictures at a time.

Two runs give equal results but for the block `run`. `defense bench` runs it; what was measured is laid out anew, from
the JSON alone, by

    python -m defense.benchmarks.robust results
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from defense.benchmarks import metrics, plots, tables
from defense.benchmarks.cost import MIB, peak_rise_mib
from defense.benchmarks.datasets import Dataset, Example, File, Task
from defense.benchmarks.environment import environment_of
from defense.data.labels import Prompts, check_labels, resolve_templates
from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError, InvalidImageError, MissingDependencyError
from defense.hosts.clip import Clip, load_clip, resolve_device
from defense.store.folders import read_tensors

if TYPE_CHECKING:
    from defense.benchmarks.methods import Encoder, Method  # some import torch

log = logging.getLogger(__name__)

SCHEMA = 1
RANDOM = "random"
"""In place of a tag of weights: a rehearsal, whose results say so."""

_CHUNK = 64
_N_LISTED = 20
_SEED_OF_WEIGHTS = 0
_STOCK = "stock"
"""In keys of what the stock CLIP gives."""

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Shows progress: from a sequence and what it stands for to the same items."""


# --- the host ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NamedHost:
    """A CLIP and what results call it.

    Attributes:
        clip: The CLIP.
        model: open_clip's name, or "embedded".
        pretrained: open_clip's tag of its weights; "random"; or "embedded".
        sha256: Of all its weights.
    """

    clip: Clip
    model: str
    pretrained: str
    sha256: str

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, so that no figure means anything."""
        return self.pretrained == RANDOM

    @property
    def logit_scale(self) -> float:
        """Factor between cosine and logit."""
        return self.clip.logit_scale


def load_named_host(model: str, pretrained: str | None, *, device: str = "cpu") -> NamedHost:
    """Load a CLIP by name.

    Args:
        model: See `classifier.load_clip`.
        pretrained: See there; or "random" for weights of a fixed seed.
        device: See there.

    Raises:
        MissingDependencyError, ConfigError: See there.
    """
    clip = _random_host(model, device) if pretrained == RANDOM else load_clip(model, pretrained, device=device)
    return NamedHost(clip, model, pretrained or model, weights_sha256(clip.model))


def _random_host(model: str, device: str) -> Clip:
    try:
        import open_clip
        import torch
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "torch") from error
    if model not in open_clip.list_models():
        raise ConfigError(f"open_clip knows no model {model!r}; `open_clip.list_models()` names them all")
    text_cfg = open_clip.get_model_config(model)["text_cfg"]
    if text_cfg.get("hf_model_name") or text_cfg.get("hf_tokenizer_name"):
        raise ConfigError(f"{model} takes its text tower from Hugging Face; random weights are for CLIP's own")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED_OF_WEIGHTS)
        net = open_clip.create_model(model, device=resolve_device(device))
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(net))
    return Clip(net.eval().requires_grad_(False), preprocess, ClipTokenizer(text_cfg.get("context_length", 77)))


def weights_sha256(model: Any) -> str:
    """Return a sha256 of a model's parameters and buffers, by name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# --- embeddings -------------------------------------------------------------------------------------------------------


class Store:
    """Arrays that were computed before, by a key.

    Args:
        folder: One safetensors file per key; made where it is not there.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder

    def get(self, key: str, compute: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return what is kept under a key, or compute and keep it.

        Raises:
            CheckpointError: The file is damaged.
        """
        path = self.folder / f"{key}.safetensors"
        if not path.exists():
            unfinished = path.with_name(f"{key}.{os.getpid()}.partial")
            # safetensors writes the memory behind a view, not what the view shows
            save_file({name: np.ascontiguousarray(array) for name, array in compute().items()}, unfinished)
            unfinished.rename(path)
        return read_tensors(path)


def key_of(*parts: Any) -> str:
    """Return a hex key that changes with any of some JSON values."""
    return hashlib.sha256(json.dumps([SCHEMA, *parts], sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Measured:
    """What one method made of one data set.

    Attributes:
        answers: For the pictures that could be read.
        unreadable: Keys of the others.
        data_sha256: Of keys and contents of all pictures.
        encode_ms: Time per picture, preparing it included.
        peak_mib: Rise of memory at the peak, on the device, while a chunk was encoded; None where it is not known.
    """

    answers: metrics.Answers
    unreadable: tuple[str, ...]
    data_sha256: str
    encode_ms: float
    peak_mib: float | None


def measure(
    named: NamedHost, method: Method, encoder: Encoder, dataset: Dataset, store: Store, track: Track
) -> Measured:
    """Return a method's answers for a data set.

    Args:
        named: The host.
        method: What names the embeddings.
        encoder: What the method made of the host.
        dataset: Pictures and the question.
        store: Where embeddings are kept.
        track: Shows progress.

    Raises:
        ConfigError: No picture can be read, or none of a group.
    """
    from defense.benchmarks.methods import Stock

    method_key = key_of(method.name.partition("@")[0], dict(method.settings()))
    text_embeds = _text_embeds(named, method_key, encoder, dataset, store)
    tower: Encoder = Stock(named.clip) if encoder.has_stock_tower else encoder
    tower_key = _STOCK if encoder.has_stock_tower else method_key
    chunks = [dataset.examples[first : first + _CHUNK] for first in range(0, len(dataset.examples), _CHUNK)]
    parts, unreadable, contents, seconds, peaks = [], [], hashlib.sha256(), 0.0, [-1.0]
    for chunk in track(chunks, f"{dataset.full_name}, {method.name}"):
        digests = [_digest(example) for example in chunk]
        for example, digest in zip(chunk, digests, strict=True):
            contents.update(f"{example.key}\0{digest}\0".encode())
        key = key_of("image", named.sha256, named.clip.preprocess.to_dict(), tower_key, digests)
        kept = store.get(key, partial(_encode, named, tower, chunk))
        is_readable = kept["is_readable"].astype(bool)
        unreadable += [example.key for example, good in zip(chunk, is_readable, strict=True) if not good]
        seconds += float(kept["encode_s"][0])
        peaks.append(float(kept["peak_mib"][0]))
        if is_readable.any():
            image_embeds = kept["embeds"]
            if encoder.has_stock_tower:
                start = time.perf_counter()
                image_embeds = encoder.edited(image_embeds)
                seconds += time.perf_counter() - start
            logits = named.logit_scale * image_embeds @ text_embeds.T
            parts.append(_answers(logits, [e for e, good in zip(chunk, is_readable, strict=True) if good], dataset))
    answers = metrics.joined(parts)
    for group, name in enumerate(dataset.group_names):
        if not (answers.group == group).any():
            raise ConfigError(f"{dataset.full_name}: no picture of the group {name!r} can be read")
    peak = max(peaks)
    return Measured(
        answers,
        tuple(unreadable),
        contents.hexdigest(),
        1e3 * seconds / len(answers.label),
        None if peak < 0 else peak,
    )


def _digest(example: Example) -> str:
    try:
        return example.picture.digest()
    except InvalidImageError as error:
        return error.code


def _encode(named: NamedHost, encoder: Encoder, chunk: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return embeddings of the pictures of a chunk that can be read, which these are, and what it cost."""
    pictures, is_readable = [], np.zeros(len(chunk), np.uint8)
    for place, example in enumerate(chunk):
        try:
            pictures.append(example.picture.load())
            is_readable[place] = 1
        except InvalidImageError:
            continue  # counted and listed in the result
    embeds, seconds, peak = np.zeros((0, 0), np.float32), 0.0, None
    if pictures:
        embeds, seconds, peak = _with_cost(named, lambda: encoder.image_embeds(pictures))
    return {
        "embeds": embeds.astype(np.float32, copy=False),
        "is_readable": is_readable,
        "encode_s": np.array([seconds]),
        "peak_mib": np.array([-1.0 if peak is None else peak]),
    }


def _with_cost(named: NamedHost, job: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float | None]:
    """Return the result of a job, its seconds, and the rise of memory at its peak in MiB, if that can be told."""
    import torch

    results: list[tuple[np.ndarray, float]] = []

    def timed() -> None:
        start = time.perf_counter()
        results.append((job(), time.perf_counter() - start))

    device = named.clip.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        timed()
        peak: float | None = (torch.cuda.max_memory_allocated(device) - before) / MIB
    else:
        peak = peak_rise_mib(timed)
    if not results:  # memory cannot be told here, so the job was not run
        timed()
    return *results[0], peak


def _text_embeds(named: NamedHost, method_key: str, encoder: Encoder, dataset: Dataset, store: Store) -> np.ndarray:
    prompts = Prompts(check_labels(dataset.class_names), resolve_templates(dataset.templates))
    owner = method_key if encoder.edits_text else _STOCK
    key = key_of("text", named.sha256, owner, prompts.sha256(), dataset.normalize_each)
    return store.get(key, lambda: {"embeds": encoder.text_embeds(prompts, normalize_each=dataset.normalize_each)})[
        "embeds"
    ]


def _answers(logits: np.ndarray, examples: Sequence[Example], dataset: Dataset) -> metrics.Answers:
    def column(values: Iterable[int | None]) -> np.ndarray:
        return np.array([-1 if value is None else value for value in values])

    return metrics.answers_of(
        logits,
        column(each.label for each in examples),
        column(each.word for each in examples),
        column(each.group for each in examples),
        is_pair=dataset.choice == "pair",
    )


# --- results ----------------------------------------------------------------------------------------------------------


def run(
    named: NamedHost,
    jobs: Sequence[tuple[Task, Sequence[Method]]],
    out: Path,
    *,
    seed: int = 0,
    command: str | None = None,
    track: Track = lambda items, _what: items,
) -> list[dict[str, Any]]:
    """Measure, write a JSON file for each data set and method, and return what was written.

    A method that cannot be fitted on a task is named there as not applicable, with the reason.

    Args:
        named: The host.
        jobs: Each task with the methods to measure on it; all of them are compared with each other.
        out: Folder for the results; `out/embeddings` holds what a second run starts from.
        seed: Of the intervals.
        command: What was typed, for the results.
        track: Shows progress.

    Raises:
        ConfigError: See `measure`; or no method can be fitted on a task.
    """
    for task, _ in jobs:
        for dataset in task.tests:
            check_present(dataset)
    store = Store(out / "embeddings")
    where = _environment(command)
    results = []
    for task, methods in jobs:
        measured: dict[str, dict[str, Measured]] = {dataset.variant: {} for dataset in task.tests}
        fit_s: dict[str, float] = {}
        reasons: dict[str, str] = {}
        for method in methods:
            start = time.perf_counter()
            try:
                method.fit(named.clip, task)
            except (ConfigError, InvalidImageError, MissingDependencyError) as error:
                reasons[method.name] = str(error)
                continue
            fit_s[method.name] = time.perf_counter() - start
            with method.apply(named.clip) as encoder:
                for dataset in task.tests:
                    measured[dataset.variant][method.name] = measure(named, method, encoder, dataset, store, track)
        if not fit_s:
            listed = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            raise ConfigError(f"nothing to measure on {task.title}: {listed}")
        for dataset in task.tests:
            for method in methods:
                if method.name in reasons:
                    continue
                result = result_of(
                    named, task, dataset, method, measured[dataset.variant],
                    fit_s=fit_s[method.name], not_applicable=reasons, seed=seed, environment=where,
                )  # fmt: skip
                write_result(result, out)
                results.append(result)
    return results


def _environment(command: str | None) -> dict[str, Any]:
    import torch

    return {**asdict(environment_of(command or "")), "threads": torch.get_num_threads()}


def check_present(dataset: Dataset) -> None:
    """Log how many pictures of a data set are missing, which `measure` counts; raise `ConfigError` where all are."""
    paths = [example.picture.path for example in dataset.examples if isinstance(example.picture, File)]
    missing = [path for path in paths if not path.is_file()]
    if paths and len(missing) == len(paths):
        raise ConfigError(
            f"{dataset.full_name}: none of {len(paths):,} pictures is there, {paths[0]} the first; the tables are, so "
            "fetch the pictures too, or give the folder that holds both"
        )
    if missing:
        log.warning("%s: %d of %d pictures are missing", dataset.full_name, len(missing), len(paths))


def result_of(
    named: NamedHost,
    task: Task,
    dataset: Dataset,
    method: Method,
    measured: Mapping[str, Measured],
    *,
    fit_s: float,
    not_applicable: Mapping[str, str],
    seed: int,
    environment: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the result of one method on one data set, as JSON values.

    Args:
        named: The host.
        task: What the data set belongs to.
        dataset: What was measured on.
        method: What was measured.
        measured: Name of a method -> its answers on this data set, this method's among them.
        fit_s: Time that fitting took, in seconds.
        not_applicable: Name of a method that could not be fitted on this task -> why.
        seed: Of the intervals.
        environment: Machine, versions and command, as JSON values.
    """
    own = measured[method.name]
    answers = own.answers
    found = metrics.figures(answers, seed=seed, train_counts=dataset.train_counts)
    by_class = metrics.per_class(answers)
    by_group = metrics.group_accuracies(answers) if dataset.group_names else {}
    unreadable = set(own.unreadable)
    kinds = [each.kind for each in dataset.examples if each.key not in unreadable]
    has_five = dataset.choice == "all" and len(dataset.class_names) >= 5
    return {
        "dataset": dataset.full_name,
        "model": named.model,
        "pretrained": named.pretrained,
        "task": "zeroshot_classification",
        "metrics": {
            "acc1": found["accuracy"].value,
            "acc5": float(answers.in_top5.mean()) if has_five else None,
            "mean_per_class_recall": float(np.mean([accuracy for _, accuracy in by_class.values()])),
        },
        "language": "en",
        "method": method.name,
        "robust": {
            "schema": SCHEMA,
            "task": task.name,
            "title": task.title,
            "variant": dataset.variant,
            "is_attacked": dataset.is_attacked,
            "choice": dataset.choice,
            "shortfall": dataset.shortfall,
            "is_complete": dataset.shortfall is None and not own.unreadable,
            "n": len(answers.label),
            "n_unreadable": len(own.unreadable),
            "unreadable": list(own.unreadable[:_N_LISTED]),
            "figures": {name: figure.to_dict() for name, figure in found.items()},
            "groups": {dataset.group_names[group]: list(entry) for group, entry in by_group.items()},
            "train_counts": list(dataset.train_counts),
            "per_class": {dataset.class_names[label]: list(entry) for label, entry in by_class.items()},
            "kinds": {kind: list(entry) for kind, entry in metrics.per_kind(answers, kinds).items()},
            "not_applicable": dict(not_applicable),
            "versus": {
                other: metrics.versus(answers, measured[other].answers, seed=seed)
                for other in measured
                if other != method.name
            },
            "settings": dict(method.settings()),
            "class_names": list(dataset.class_names),
            "templates": list(dataset.templates),
            "normalise_each": dataset.normalize_each,
            "facts": dict(dataset.facts),
            "data_sha256": own.data_sha256,
            "host_sha256": named.sha256,
            "has_random_weights": named.is_random,
            "preprocess": named.clip.preprocess.to_dict(),
            "exif": "not applied",
            "logit_scale": named.logit_scale,
            "seed": seed,
            "n_resamples": metrics.N_RESAMPLES,
            "versions": {name: version(name) for name in ("clip-defense", "torch", "open_clip_torch", "pillow")},
            "run": {
                "fit_s": fit_s,
                "encode_ms": own.encode_ms,
                "peak_mib": own.peak_mib,
                "environment": dict(environment),
            },
        },
    }


def write_result(result: Mapping[str, Any], out: Path) -> Path:
    """Write a result into a folder, under a name made of what it is, and return the path."""
    parts = (result["dataset"], result["model"], result["pretrained"], result["method"])
    path = out / ("_".join(re.sub(r"[^\w.@-]+", "-", part) for part in parts) + ".json")
    unfinished = path.with_suffix(".partial")
    unfinished.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.rename(path)
    return path


def report(out: Path) -> None:
    """Write `results.md` and the plots of all results in a folder, from their JSON alone.

    Raises:
        ConfigError: See `tables.check_comparable`.
        MissingDependencyError: matplotlib is not installed.
    """
    results = read_results(out)
    (out / "results.md").write_text(tables.markdown(results) + "\n", encoding="utf-8")
    plots.draw(results, out)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Return the results in a folder, by file name, or those that `collect` put into a file.

    Other JSON files in the folder are passed over.

    Raises:
        ConfigError: One was written by a newer version.
    """
    if path.is_file():
        results = json.loads(path.read_text(encoding="utf-8"))
    else:
        results = [json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.glob("*.json"))]
    results = [result for result in results if isinstance(result, dict) and "robust" in result]
    for result in results:
        if result["robust"]["schema"] > SCHEMA:
            raise ConfigError(
                f"{path} holds a result of schema {result['robust']['schema']}; this version reads up to {SCHEMA}"
            )
    return results


def collect(folder: Path, path: Path) -> None:
    """Put all results of a folder into one file.

    Raises:
        ConfigError: See `read_results`.
    """
    lines = [json.dumps(result, allow_nan=False) for result in read_results(folder)]
    unfinished = path.with_suffix(".partial")
    unfinished.write_text("[" + ",\n".join(lines) + "]\n", encoding="utf-8")
    unfinished.rename(path)


def main() -> None:
    """Write tables and plots of the results in a folder."""
    parser = argparse.ArgumentParser(description="Lay out the results of `defense bench` anew, from their JSON.")
    parser.add_argument("folder", type=Path, help="what `defense bench --out` wrote")
    parser.add_argument("--into", type=Path, help="put all of them into this file as well")
    arguments = parser.parse_args()
    report(arguments.folder)
    if arguments.into is not None:
        collect(arguments.folder, arguments.into)


if __name__ == "__main__":
    main()
