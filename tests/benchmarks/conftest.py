"""Fixtures of the benchmark of robustness: the tiny CLIP, its defense and results, small data sets."""

from __future__ import annotations

import pytest

from defense.core.latents import LatentSet
from defense.store import defenses

from ..conftest import random_defense, random_sae
from .datasets_made import png


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


@pytest.fixture
def named_folder(tmp_path):
    """Pictures of three classes in a nested folder with a space, beside what unzipping leaves behind."""
    home = tmp_path / "set" / "ours" / "my data"
    home.mkdir(parents=True)
    for label, word in (("cat", "dog"), ("dog", "red fox"), ("red fox", "cat")):
        (home / f"label={label}_text={word}.png").write_bytes(png())
    for junk in (".DS_Store", "._label=cat_text=dog.png", "Thumbs.db"):
        (home / junk).write_bytes(b"junk")
    (home / "__MACOSX").mkdir()
    (home / "__MACOSX" / "label=cat_text=dog.png").write_bytes(b"junk")
    return tmp_path / "set"


@pytest.fixture
def image_folder(tmp_path):
    root = tmp_path / "pictures"
    for label, name in enumerate(("dog", "red_fox", "sheep")):
        (root / name).mkdir(parents=True)
        for i in range(2):
            (root / name / f"{i}.png").write_bytes(png(20 * label + i))
    return root
