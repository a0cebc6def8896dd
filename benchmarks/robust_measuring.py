"""One method on one data set: the pictures encoded chunk by chunk, or taken from the store, and answered.

    data set --datasets--> pictures --method's encoder, 64 at a time--> image_embeds --cosine--> logits
             --metrics.answers_of--> answers

Memory holds one chunk of pictures at a time.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.benchmarks import metrics
from defense.benchmarks.cost import MIB, peak_rise_mib
from defense.benchmarks.datasets import Dataset, Example, File
from defense.benchmarks.named_clip import NamedClip
from defense.benchmarks.robust_store import Store, key_of
from defense.data.images import DEFAULT_LIMITS
from defense.data.labels import Prompts, check_labels, resolve_templates
from defense.errors import ConfigError, InvalidImageError

if TYPE_CHECKING:
    from defense.benchmarks.methods import Encoder, Method  # some import torch

log = logging.getLogger(__name__)

_CHUNK = 64
_STOCK = "stock"
"""In keys of what the stock CLIP gives."""

Track = Callable[[Sequence[Any], str], Iterable[Any]]
"""Shows progress: from a sequence and what it stands for to the same items."""


def check_present(dataset: Dataset) -> None:
    """Log how many pictures of a data set are missing; `measure_method` leaves them out and lists them.

    Raises:
        ConfigError: All are missing.
    """
    paths = [example.picture.path for example in dataset.examples if isinstance(example.picture, File)]
    missing = [path for path in paths if not path.is_file()]
    if paths and len(missing) == len(paths):
        raise ConfigError(
            f"{dataset.full_name}: none of {len(paths):,} pictures is there, {paths[0]} the first; the tables are, so "
            "fetch the pictures too, or give the folder that holds both"
        )
    if missing:
        log.warning("%s: %d of %d pictures are missing", dataset.full_name, len(missing), len(paths))


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


def measure_method(
    named: NamedClip, method: Method, encoder: Encoder, dataset: Dataset, store: Store, track: Track
) -> Measured:
    """Return a method's answers for a data set.

    Args:
        named: The CLIP.
        method: The method; its name and settings are part of the keys in the store.
        encoder: The CLIP with the method in it.
        dataset: Pictures and the question.
        store: Where embeddings are kept.
        track: Shows progress.

    Raises:
        ConfigError: No picture can be read, or none of a group.
        CheckpointError: A file of the store is damaged.
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
        limits = sorted({repr(example.limits) for example in chunk if example.limits != DEFAULT_LIMITS})
        key = key_of("image", named.sha256, named.clip.preprocess.to_dict(), tower_key, digests, *limits)
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


def _encode(named: NamedClip, encoder: Encoder, chunk: Sequence[Example]) -> dict[str, np.ndarray]:
    """Return what the store keeps of a chunk: which pictures can be read, their embeddings, seconds, and peak MiB.

    A peak of -1 stands for one that is not known.
    """
    pictures, is_readable = [], np.zeros(len(chunk), np.uint8)
    for place, example in enumerate(chunk):
        try:
            pictures.append(example.load())
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


def _with_cost(named: NamedClip, job: Callable[[], np.ndarray]) -> tuple[np.ndarray, float, float | None]:
    """Return the result of a job, its seconds, and the rise of memory at its peak in MiB; None if that is not known."""
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


def _text_embeds(named: NamedClip, method_key: str, encoder: Encoder, dataset: Dataset, store: Store) -> np.ndarray:
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
