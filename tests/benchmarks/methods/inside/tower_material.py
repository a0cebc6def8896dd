"""The tiny CLIP and drawn tasks, for methods that work inside its tower."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

import numpy as np
import torch
from PIL import Image, ImageDraw

from defense.benchmarks.datasets import Dataset, Example, Task
from defense.benchmarks.methods import material
from defense.hosts.clip import Clip
from defense.store import defenses

CLASSES = ("cloud", "rose", "zebra", "fish", "king", "river")
GROUPS = ("a0", "a1", "b0", "b1")
NEED_NOTHING = ("defense-scale", "naive-splice")
NEED_A_SPLIT = ("defense-delta", "random-latents", "embedding-sae", "dyslexify", "textspan")


@dataclass(frozen=True)
class Drawn:
    """A picture of a seed: noise around a color, and a white plate at the top left if it is written on."""

    seed: int
    is_written: bool = False

    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def load(self, _limits: object = None) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        pixels = rng.integers(0, 200, 3) + rng.integers(-40, 40, (32, 32, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if self.is_written:
            ImageDraw.Draw(picture).rectangle((0, 0, 23, 7), fill="white")
        return picture


def words_task(n: int = 40, labels: np.ndarray | None = None) -> Task:
    """Pictures with a plate, and their twins without."""
    labels = np.arange(n) % len(CLASSES) if labels is None else labels

    def dataset(variant: str, is_written: bool) -> Dataset:
        examples = tuple(
            Example(str(i), Drawn(i, is_written), int(y), (int(y) + 1) % len(CLASSES) if is_written else None)
            for i, y in enumerate(labels)
        )
        return Dataset("words", variant, examples, CLASSES)

    attacked, clean = dataset("attacked", True), dataset("clean", False)
    return Task("words", "Words", (clean, attacked), attacked, None, clean)


def groups_task(n: int = 40) -> Task:
    """Two classes; the plate is the attribute."""
    examples = tuple(
        Example(str(i), Drawn(i, i % 4 in (1, 2)), i % 2, attribute=int(i % 4 in (1, 2))) for i in range(n)
    )
    dataset = Dataset("groups", "test", examples, CLASSES[:2], group_names=GROUPS)
    return Task("groups", "Groups", (dataset,), dataset)


def saved(defense, folder):
    return defenses.load(defenses.save(defense, folder))


def pixel_values(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def embeds(clip: Clip, n: int = 6) -> torch.Tensor:
    with torch.inference_mode():
        return clip.model.encode_image(pixel_values(n))


def image_embeds(method, clip: Clip, dataset: Dataset) -> np.ndarray:
    with method.apply(clip) as encoder:
        return np.concatenate(
            [encoder.image_embeds(pictures) for pictures in material.batches(dataset.examples)],
        )


def without_split(task: Task) -> Task:
    return replace(task, train=None, train_clean=None)


def answers(clip: Clip, dataset: Dataset) -> np.ndarray:
    class_embeds = material.class_embeds_of(clip, dataset)
    return (material.image_embeds_of(clip, dataset.examples) @ class_embeds.T).argmax(1)
