"""Fixtures of the benchmark of robustness, on the tiny CLIP."""

from __future__ import annotations

import pytest

from defense.core.latents import LatentSet
from defense.store import defenses

from ..conftest import random_defense, random_sae


@pytest.fixture
def named(tiny_folder):
    """The tiny CLIP, by its name."""
    pytest.importorskip("open_clip")
    from defense.benchmarks.named_clip import load_named_clip

    return load_named_clip(f"local-dir:{tiny_folder}", None)


@pytest.fixture
def defense(tmp_path, tiny_clip, tiny_folder):
    """A defense of the tiny CLIP, read from disk."""
    site = (1, random_sae(act="topk", k=8), LatentSet("text", tuple(range(80))))
    folder = defenses.save(random_defense(tiny_clip, site, name=f"local-dir:{tiny_folder}"), tmp_path / "defense")
    return defenses.load(folder)


@pytest.fixture
def results(named, tmp_path, defense):
    """Results of three methods on clean and attacked pictures; their files are in `tmp_path / "out"`."""
    pytest.importorskip("scipy")
    from defense.benchmarks.methods import make_methods

    from .runs import dataset_of, run_all, task_of, write_pictures

    paths = write_pictures(tmp_path / "pictures", 24)
    tests = dataset_of(paths, "clean"), dataset_of(paths)
    methods = make_methods(["zero-shot", "defense@0.5", "defense"], defense)
    return run_all(named, [task_of(*tests)], methods, tmp_path / "out")
