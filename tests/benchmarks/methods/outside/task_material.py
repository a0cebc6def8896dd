"""The tiny CLIP and tasks of a few pictures, for methods that leave the SAE alone."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import numpy as np
import pytest
from PIL import Image

from defense.benchmarks.datasets import Dataset, Example
from defense.benchmarks.methods import make_methods

TYPOGRAPHIC = ("leace", "sampling-tar", "defense-prefix", "mirror-clip", "ocr-blur", "erase")
GROUPED = ("leace", "orth-cali", "roboshot", "mirror-clip", "erase")
NAMES = ("dog", "cat", "fish")


needs_tesseract = pytest.mark.skipif(shutil.which("tesseract") is None, reason="needs the program tesseract")


@dataclass(frozen=True)
class Held:
    """A picture in memory: noise of a seed, with a bright bar across its lower part where something is written."""

    seed: int
    has_word: bool

    def digest(self) -> str:
        return f"{self.seed}{self.has_word}"

    def load(self, _limits: object = None) -> Image.Image:
        pixels = np.random.default_rng(self.seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        if self.has_word:
            pixels[24:] = [255, 255, 0]
        return Image.fromarray(pixels)


def twins(n: int) -> tuple[Dataset, Dataset]:
    """Pictures with and without a word."""
    attacked = tuple(Example(f"{i}", Held(i, True), i % 3, (i + 1) % 3) for i in range(n))
    clean = tuple(Example(f"{i}", Held(i, False), i % 3) for i in range(n))
    return Dataset("mini", "attacked", attacked, NAMES), Dataset("mini", "clean", clean, NAMES)


def groups(n: int) -> Dataset:
    """Pictures of four groups; the attribute is the bar."""
    examples = tuple(Example(f"{i}", Held(i, i % 2 == 1), (i // 2) % 2, attribute=i % 2) for i in range(n))
    return Dataset("birds", "test", examples, ("landbird", "waterbird"), group_names=("a", "b", "c", "d"))


def method(name: str):
    (made,) = make_methods([name], None)
    return made


def pictures() -> list[Image.Image]:
    return [Held(seed, seed % 2 == 0).load() for seed in range(100, 104)]


def n_hooks(model) -> int:
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
