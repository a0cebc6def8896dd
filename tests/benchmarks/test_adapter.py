"""The plug-in for CLIP_benchmark: its contract, and its own harness where it is installed."""

from __future__ import annotations

import io
import json
import pickle
import sys
import tarfile
import types

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")

import open_clip
import torch

from defense.benchmarks import adapter
from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.errors import ConfigError, MissingDependencyError
from defense.store import defenses

from ..conftest import random_defense, random_sae


@pytest.fixture
def defense_folder(tmp_path, tiny_clip, tiny_folder):
    site = (1, random_sae(act="topk", k=8), LatentSet("text", tuple(range(80))))
    return defenses.save(random_defense(tiny_clip, site, name=f"local-dir:{tiny_folder}"), tmp_path / "defense")


def colors(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.new("RGB", (40, 36), tuple(rng.integers(0, 256, 3).tolist())) for _ in range(n)]


def test_the_loader_returns_a_defended_model_with_its_transform_and_tokenizer(defense_folder, tiny_folder):
    name = f"local-dir:{tiny_folder}"
    model, transform, tokenizer = adapter.load_defended(model_name=name, pretrained=str(defense_folder), device="cpu")
    pictures = colors(5)
    with torch.inference_mode():
        batch = torch.stack([transform(picture) for picture in pictures])
        embeds = torch.nn.functional.normalize(model.encode_image(batch), dim=-1).numpy()
    clf = RobustClassifier.from_pretrained(defense_folder, device="cpu")
    np.testing.assert_allclose(embeds, clf.transform(pictures), atol=1e-6)
    plain = clf.encode_pixels(batch.numpy(), plain=True)
    assert np.abs(embeds - plain).max() > 1e-3
    ids = tokenizer(["a photo of a dog.", "cat"])
    assert torch.equal(ids, open_clip.get_tokenizer(name)(["a photo of a dog.", "cat"]))


def test_transform_and_tokenizer_reach_worker_processes(defense_folder, tiny_folder):
    _, transform, _ = adapter.load_defended(f"local-dir:{tiny_folder}", str(defense_folder))
    picture = colors(1)[0]
    assert torch.equal(pickle.loads(pickle.dumps(transform))(picture), transform(picture))


def test_another_model_than_the_defenses_is_refused(defense_folder, tiny_folder):
    with pytest.raises(ConfigError, match=f"fitted on local-dir:{tiny_folder}, not on ViT-B-32"):
        adapter.load_defended("ViT-B-32", str(defense_folder))


def test_the_model_type_is_added_once_to_the_lists_that_the_command_line_holds(monkeypatch):
    models = types.ModuleType("clip_benchmark.models")
    models.TYPE2FUNC, models.MODEL_TYPES = {"open_clip": None}, ["open_clip"]
    package = types.ModuleType("clip_benchmark")
    package.models = models
    monkeypatch.setitem(sys.modules, "clip_benchmark", package)
    monkeypatch.setitem(sys.modules, "clip_benchmark.models", models)
    held = models.MODEL_TYPES
    adapter.register()
    adapter.register()
    assert held == ["open_clip", "defense"]
    assert models.TYPE2FUNC["defense"] is adapter.load_defended


def test_without_clip_benchmark_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "clip_benchmark", None)
    with pytest.raises(MissingDependencyError, match="clip-benchmark is not installed"):
        adapter.register()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # its own, of its dependencies
def test_clip_benchmark_measures_the_accuracy_that_we_measure(defense_folder, tiny_folder, tmp_path, monkeypatch):
    cli = pytest.importorskip("clip_benchmark.cli", reason="needs: pip install clip-benchmark")
    from defense.benchmarks import robust
    from defense.benchmarks.datasets import Dataset, Example, Task
    from defense.benchmarks.datasets.folders import read_classified
    from defense.benchmarks.methods import make_methods
    from defense.benchmarks.named_clip import load_named_clip

    names = ["cloud", "rose", "zebra", "fish", "king", "river"]
    (tmp_path / "shards" / "test").mkdir(parents=True)
    with tarfile.open(tmp_path / "shards" / "test" / "0.tar", "w") as tar:
        for i, picture in enumerate(colors(30)):
            stream = io.BytesIO()
            picture.save(stream, "PNG")
            for suffix, data in (("png", stream.getvalue()), ("cls", str(i % 6).encode())):
                member = tarfile.TarInfo(f"{i:03}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    (tmp_path / "shards" / "test" / "nshards.txt").write_text("1")
    (tmp_path / "shards" / "classnames.txt").write_text("\n".join(names))
    (tmp_path / "shards" / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}.")

    name = f"local-dir:{tiny_folder}"
    arguments = {
        "--model_type": "defense", "--model": name, "--pretrained": str(defense_folder), "--dataset": "wds/colors",
        "--dataset_root": str(tmp_path / "shards"), "--num_workers": "0", "--output": str(tmp_path / "theirs.json"),
        "--task": "zeroshot_classification",
    }  # fmt: skip
    argv = ["clip_benchmark", "eval", "--no_amp", "--quiet", *(part for pair in arguments.items() for part in pair)]
    monkeypatch.setattr(sys, "argv", argv)
    adapter.register()
    cli.main()
    theirs = json.loads((tmp_path / "theirs.json").read_text())

    found = read_classified(tmp_path / "shards")
    examples = tuple(Example(key, picture, label) for key, picture, label in found.pictures)
    dataset = Dataset("colors", "clean", examples, found.class_names, found.templates)
    named = load_named_clip(name, None)
    methods = make_methods(["defense"], defenses.load(defense_folder))
    (ours,) = robust.run(named, [(Task("colors", "colors", (dataset,)), methods)], tmp_path / "out")
    assert theirs["metrics"] == pytest.approx(ours["metrics"])
