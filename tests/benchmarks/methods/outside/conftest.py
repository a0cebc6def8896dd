"""The tiny CLIP and tasks of a few pictures. What needs torch is imported where it is used."""

from __future__ import annotations

import pytest

from defense.benchmarks.datasets import Task


@pytest.fixture
def clip(tiny_folder):
    from defense.hosts.clip import load_clip

    return load_clip(f"local-dir:{tiny_folder}")


@pytest.fixture
def typographic():
    from .task_material import twins

    attacked, clean = twins(24)
    return Task("mini", "written words", (clean, attacked), train=attacked, train_clean=clean)


@pytest.fixture
def grouped():
    from .task_material import groups

    return Task("birds", "birds", (groups(12),), train=groups(24))


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    from defense.benchmarks.methods import defense_prefix

    monkeypatch.setattr(defense_prefix, "STEPS", 5)
