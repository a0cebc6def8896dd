"""Small data sets of plain pictures, and runs of the benchmark of robustness over them."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image

from defense.benchmarks import robust
from defense.benchmarks.datasets import Dataset, Example, File, Task
from defense.benchmarks.methods import Encoder

NAMES = ("cloud", "rose", "zebra", "fish", "king", "river")


def write_pictures(folder: Path, n: int) -> list[Path]:
    """Pictures of one color each: the tiny CLIP gives them different answers."""
    folder.mkdir(exist_ok=True)
    paths = []
    for i in range(n):
        path = folder / f"{i:03}.png"
        Image.new("RGB", (40, 36), tuple(np.random.default_rng(i).integers(0, 256, 3).tolist())).save(path)
        paths.append(path)
    return paths


def dataset_of(paths: list[Path], variant: str = "attacked", **fields) -> Dataset:
    """Labels go round; the word is the next class. `fields` override."""
    has_groups = "group_names" in fields
    n = 2 if has_groups else len(NAMES)
    examples = tuple(
        Example(
            path.name,
            File(path),
            i % n,
            None if has_groups or variant == "clean" else (i + 1) % n,
            (i // 2) % 2 if has_groups else None,
        )
        for i, path in enumerate(paths)
    )
    return Dataset(**{"name": "set", "variant": variant, "examples": examples, "class_names": NAMES[:n], **fields})


def task_of(*tests: Dataset, **fields) -> Task:
    return Task(tests[0].name, "A set", tests, **fields)


def run_all(named, tasks, methods, out: Path, **options) -> list[dict]:
    """Run all methods on all tasks."""
    return robust.run(named, [(task, methods) for task in tasks], out, **options)


def without_run(results: list[dict]) -> list[dict]:
    return [{**r, "robust": {k: v for k, v in r["robust"].items() if k != "run"}} for r in results]


class Counting:
    """A method that counts what it encodes, and can fail at a call."""

    def __init__(self, name: str = "zero-shot", *, fails_at: int | None = None) -> None:
        self.name = name
        self.fails_at = fails_at
        self.batches: list[int] = []
        self.trained_on: Dataset | None = None

    def settings(self):
        return {}

    def fit(self, clip, task):
        self.trained_on = task.train

    @contextmanager
    def apply(self, clip):
        counting = self

        class Counted(Encoder):
            def image_embeds(self, pictures):
                if len(counting.batches) == counting.fails_at:
                    raise KeyboardInterrupt
                counting.batches.append(len(pictures))
                return super().image_embeds(pictures)

        yield Counted(clip)
