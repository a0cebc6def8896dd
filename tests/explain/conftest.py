"""Classifiers whose defense is explained: random SAEs on the tiny CLIP, and the embedded one; pictures to describe."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from defense.core.latents import LatentSet

from ..conftest import random_defense, random_sae


@pytest.fixture(scope="module")
def clip(tiny_folder):
    from defense.hosts.clip import load_clip

    return load_clip(f"local-dir:{tiny_folder}")


@pytest.fixture
def defended(clip):
    """Return a function that makes a classifier of sets at block 1, all on one host."""
    from defense.classify.classifier import RobustClassifier
    from defense.hosts.attach import detach, is_wrapped

    from .explained import LABELS

    def make(*sets: LatentSet, block: int = 1, **fields) -> RobustClassifier:
        if is_wrapped(clip.model):
            detach(clip.model)
        defense = random_defense(clip.model, (block, random_sae(**fields), sets[0]))
        (site,) = defense.sites
        defense = replace(defense, sites=(replace(site, sets=sets),))
        return RobustClassifier(clip, defense).set_labels(LABELS)

    yield make
    if is_wrapped(clip.model):
        detach(clip.model)


@pytest.fixture(scope="module")
def embedded():
    from defense.classify.classifier import RobustClassifier
    from defense.world import scenes

    return RobustClassifier.from_pretrained("embedded", device="cpu").set_labels(list(scenes.OBJECTS))


@pytest.fixture
def pictures():
    """Twelve pictures of noise, two classes and none."""
    from defense.explain.sums import Example

    from .described import N

    pixels = np.random.default_rng(0).normal(size=(N, 3, 32, 32)).astype(np.float32)
    return [Example(f"{i}.png", pixels[i], ("a", "b", None)[i % 3]) for i in range(N)]


@pytest.fixture
def describing(tiny_folder, tmp_path):
    """Arguments of `defense describe` for pictures of a cat and a dog by turns; classes.txt names the two."""
    from PIL import Image

    from defense.store import checkpoint
    from defense.store.checkpoint import Checkpoint

    from .described import POINT, WORDS, sparse_sae

    rng = np.random.default_rng(0)
    for index in range(8):
        folder = tmp_path / "pictures" / ("cat", "dog")[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{index}.png")
    (tmp_path / "words.txt").write_text("\n".join(WORDS))
    (tmp_path / "classes.txt").write_text("dog\ncat\n")
    checkpoint.save(Checkpoint(sparse_sae(), POINT), tmp_path / "sae")
    arguments = ["describe", tmp_path / "sae", "--pictures", tmp_path / "pictures", "--words", tmp_path / "words.txt"]
    return [
        *arguments,
        "--out",
        tmp_path / "out",
        "--model",
        f"local-dir:{tiny_folder}",
        "--n-steered",
        2,
        "--n-sampled",
        3,
    ]
