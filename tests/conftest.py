"""Shared material: a tiny random CLIP in open_clip's own folder layout, and random SAEs of every kind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.hosts.clip import Clip
from defense.hosts.defense import ClipId, Defense, Site

from .demo.serving import STUCK, served
from .hub_server import FakeHub, serving

if TYPE_CHECKING:  # torch is imported where it is used: some tests run without it
    from defense.core.sae import SparseAutoencoder

D_MODEL, D_SAE = 64, 160

TINY_CLIP = {
    "model_cfg": {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 32, "layers": 3, "width": D_MODEL, "head_width": 32, "patch_size": 8},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    },
    "preprocess_cfg": {
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "resize_mode": "shortest",
    },
}


def random_parameters(config: SAEConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Parameters of a random SAE whose latents fire on about half of all tokens."""
    rng = np.random.default_rng(seed)
    parameters = {name: rng.normal(size=shape).astype(np.float32) for name, shape in config.parameter_shapes.items()}
    parameters["W_enc"] /= config.d_model**0.5
    parameters["W_dec"] /= np.linalg.norm(parameters["W_dec"], axis=1, keepdims=True)
    parameters["b_enc"] *= 0.1
    parameters["b_dec"] *= 0.1
    for name in ("threshold", "r_mag", "b_mag"):
        if name in parameters:
            parameters[name] = np.abs(parameters[name]) * 0.2
    return parameters


def random_sae(seed: int = 0, **fields) -> SparseAutoencoder:
    """A random SAE; `fields` override a ReLU configuration of D_MODEL x D_SAE."""
    from defense.core.sae import SparseAutoencoder

    config = SAEConfig(**{"d_model": D_MODEL, "d_sae": D_SAE, "act": "relu", **fields})
    return SparseAutoencoder(config, random_parameters(config, seed))


def random_defense(model, *sites: tuple[int, SparseAutoencoder, LatentSet], name: str = "tiny") -> Defense:
    """A defense for a model: (block, SAE, set) for each site."""
    from defense.data.preprocess import Preprocess
    from defense.hosts.families import tower_of

    tower = tower_of(model)
    spec = ClipId(name, None, tower.fingerprint(), tower.quick_gelu, tower.d_model, len(tower.blocks))
    height, width = tower.visual.image_size
    preprocess = Preprocess((height, width), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
    return Defense(
        spec,
        preprocess,
        tuple(
            Site(f"blocks.{block}.hook_resid_post", sae.config, sae.parameters_numpy(), (latent_set,))
            for block, sae, latent_set in sites
        ),
    )


def clip_of(model) -> Clip:
    """A CLIP around a model of the tiny kind."""
    from defense.data.preprocess import Preprocess
    from defense.data.tokenizer import ClipTokenizer

    return Clip(model, Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest"), ClipTokenizer(16))


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data, beside the project or at $CLIP_DEFENSE_DATA; the test is skipped where it is absent."""
    folder = Path(os.environ.get("CLIP_DEFENSE_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set CLIP_DEFENSE_DATA to run this")
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch) -> Path:
    """An empty cache for each test, never the user's."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("CLIP_DEFENSE_CACHE", str(folder))
    return folder


@pytest.fixture
def open_gates(monkeypatch) -> None:
    """Let a fit of noise become a defense."""
    from defense.fit.gates import Gates

    for name in ("check_explained", "check_fooled", "check_validation"):
        monkeypatch.setattr(Gates, name, lambda *_: None)


@pytest.fixture
def small_minis(monkeypatch):
    """The benchmarks that are drawn, with 40 pictures in each split."""
    from defense.benchmarks.datasets import mini

    monkeypatch.setattr(mini, "N_TEST", 40)
    monkeypatch.setattr(mini, "N_TRAIN", 40)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory) -> Path:
    """A folder that open_clip loads as "local-dir:...": a 3-block ViT with random weights."""
    open_clip = pytest.importorskip("open_clip")
    import torch
    from safetensors.torch import save_file

    folder = tmp_path_factory.mktemp("tiny-clip")
    (folder / "open_clip_config.json").write_text(json.dumps(TINY_CLIP))
    config = TINY_CLIP["model_cfg"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        clip = open_clip.CLIP(config["embed_dim"], config["vision_cfg"], config["text_cfg"])
    state = {name: tensor.contiguous() for name, tensor in clip.state_dict().items() if name != "attn_mask"}
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


@pytest.fixture
def tiny_clip(tiny_folder):
    """A fresh copy of the tiny CLIP, in eval mode."""
    import open_clip

    return open_clip.create_model(f"local-dir:{tiny_folder}").eval().requires_grad_(False)


@pytest.fixture
def defense_folder(tmp_path, tiny_clip, tiny_folder) -> Path:
    """A defense of the tiny CLIP on disk, which names it."""
    from defense.store import defenses

    site = (1, random_sae(act="topk", k=8), LatentSet("text", tuple(range(60))))
    return defenses.save(random_defense(tiny_clip, site, name=f"local-dir:{tiny_folder}"), tmp_path / "defense")


# --- exported bundles -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_classifier(tiny_folder):
    """The tiny CLIP with a TopK defense that projects, and labels set."""
    open_clip = pytest.importorskip("open_clip")

    from defense.classify.classifier import RobustClassifier
    from defense.data.tokenizer import ClipTokenizer

    model = open_clip.create_model(f"local-dir:{tiny_folder}").eval().requires_grad_(False)
    latent_set = LatentSet("text", tuple(range(20)), edit="project")
    defense = random_defense(model, (1, random_sae(act="topk", k=8), latent_set), name=f"local-dir:{tiny_folder}")
    clf = RobustClassifier(Clip(model, defense.preprocess, ClipTokenizer(16)), defense).set_labels(
        ["dog", "cat", "red fish"]
    )
    return clf


@pytest.fixture(scope="session")
def tiny_export(tiny_classifier, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """The bundle of that classifier, with its text tower, and what `trace_vision` and `trace_text` gave for it."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from defense.export import exporter

    folder = tmp_path_factory.mktemp("bundles") / "tiny"
    graphs: dict[str, Any] = {}

    def kept(name: str, trace: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *arguments: graphs.setdefault(name, trace(*arguments))

    with pytest.MonkeyPatch.context() as patch:
        for name in ("trace_vision", "trace_text"):
            patch.setattr(exporter, name, kept(name, getattr(exporter, name)))
        exporter.export_onnx(tiny_classifier, folder, text=True)
    return folder, graphs


@pytest.fixture(scope="session")
def tiny_bundle(tiny_export) -> Path:
    """That bundle. Not to be changed: see `copied`."""
    return tiny_export[0]


@pytest.fixture(scope="session")
def tiny_graphs(tiny_export) -> dict[str, Any]:
    """Its graphs, for tests that export the same classifier again: to trace it takes seconds."""
    return tiny_export[1]


@pytest.fixture
def copied(tiny_bundle, tmp_path) -> Path:
    """A copy of the bundle to damage."""
    return Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))


@pytest.fixture
def seven_pictures() -> list[np.ndarray]:
    """Pictures of random noise, uint8 [40, 48, 3]."""
    return list(np.random.default_rng(0).integers(0, 256, (7, 40, 48, 3), dtype=np.uint8))


def restated(folder: Path, **fields) -> Path:
    """Make the manifest of a changed bundle agree with its files again, and set fields of it."""
    from defense.store.defenses import MANIFEST
    from defense.store.folders import file_entry

    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    manifest["files"] = {path.relative_to(folder).as_posix(): file_entry(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({**manifest, **fields}), encoding="utf-8")
    return folder


# --- the hub ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def _hub_server() -> Iterator[FakeHub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(_hub_server: FakeHub, tmp_path: Path, monkeypatch) -> FakeHub:
    """An empty imitation of the hub, which the client is led to, with a cache of its own; nobody waits."""
    _hub_server.__init__(_hub_server.url)  # type: ignore[misc]
    monkeypatch.setenv("HF_ENDPOINT", _hub_server.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr("time.sleep", lambda _: None)
    return _hub_server


@pytest.fixture(scope="session")
def address() -> Iterator[str]:
    """The address of a demo of the embedded model, in a process of its own."""
    with served() as url:
        yield url


@pytest.fixture(scope="module")
def stuck() -> Iterator[str]:
    """The same of one that never answers."""
    with served(STUCK) as url:
        yield url
