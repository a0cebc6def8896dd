"""The whole way with a CLIP of full size and SAEs of 49,152 latents, killed on the way: ViT-B-32, weights random.

What a fit of noise finds is noise, so the gates are open; every byte of what it costs and writes is as with real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from safetensors.torch import save, save_file

from defense.classify.classifier import RobustClassifier
from defense.export.exporter import export_onnx
from defense.export.runtime import OnnxClassifier
from defense.hosts.attach import wrap
from defense.hosts.clip import Clip, load_clip
from defense.store import cache as cache_module
from defense.store import defenses
from defense.world import draws, scenes

from ..hub_server import FakeHub

pytestmark = [pytest.mark.slow]

MODEL, SIDE, D_SAE = "ViT-B-32", 224, 49_152
LABELS = tuple(list(scenes.OBJECTS)[:30])
COMMAND = """
from defense.fit.gates import Gates
for gate in ("check_explained", "check_fooled", "check_validation"):
    setattr(Gates, gate, lambda *_: None)
from defense.cli import main
main()
"""
KILLED_AT = ("converting it", "fitting at", "fold 2 of 3")
"""Lines after which the command is killed, one time each."""


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A folder with a ViT-B-32, weights random, whose labels lie around what it makes of drawn pictures."""
    import open_clip

    folder = tmp_path_factory.mktemp("full-size")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = open_clip.create_model(MODEL).eval().requires_grad_(False)
    config = {"model_cfg": open_clip.get_model_config(MODEL), "preprocess_cfg": open_clip.get_model_preprocess_cfg(net)}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    weights = folder / "open_clip_model.safetensors"
    save_file(_state(net), weights)
    clip = load_clip(f"local-dir:{folder}")
    wanted = torch.from_numpy(_image_embeds(clip, len(LABELS)))
    clip.model.text_projection.data = torch.eye(len(net.text_projection), wanted.shape[1])
    of_labels = clip.model.encode_text(torch.from_numpy(clip.tokenizer([f"a photo of a {each}." for each in LABELS])))
    projection = torch.linalg.lstsq(of_labels.double(), wanted.double(), driver="gelsd").solution
    save_file({**_state(net), "text_projection": projection.float().contiguous()}, weights)
    return folder


def _state(net: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in net.state_dict().items() if name != "attn_mask"}


def _image_embeds(clip: Clip, n: int) -> np.ndarray:
    drawn = [scenes.render(replace(case.scene.clean(), oversample=1), SIDE) for case in draws.typographic(n, 1)]
    return clip.image_embeds(torch.from_numpy(np.stack([clip.preprocess(picture) for picture in drawn]))).numpy()


def sae_files(clip: Clip, architecture: str, hook_point: str) -> dict[str, bytes]:
    """An SAE as SAELens writes one, whose latents point from one token of the residual stream to another."""
    drawn = [scenes.render(replace(case.scene, oversample=1), SIDE) for case in draws.typographic(20, 2)]
    rows = clip.tower.resid(np.stack([clip.preprocess(each) for each in drawn]), hook_point).flatten(0, 1)
    generator = torch.Generator().manual_seed(0)
    first, second = (rows[torch.randint(len(rows), (D_SAE,), generator=generator)] for _ in range(2))
    noise = torch.randn(D_SAE, rows.shape[1], generator=generator) * (first - second).std() / 4
    W_dec = torch.nn.functional.normalize(first - second + noise, dim=1)
    tensors = {
        "W_enc": W_dec.T.contiguous(), "W_dec": W_dec, "b_enc": torch.zeros(D_SAE), "b_dec": rows.mean(0)
    }  # fmt: skip
    config: dict[str, Any] = {
        "d_in": rows.shape[1], "d_sae": D_SAE, "architecture": architecture, "normalize_activations": "none",
        "apply_b_dec_to_input": True, "hook_name": hook_point,
    }  # fmt: skip
    if architecture == "topk":
        config["k"] = 64
    if architecture == "jumprelu":
        tensors["threshold"] = torch.full((D_SAE,), 0.05)
    if architecture == "gated":
        tensors["b_gate"] = tensors.pop("b_enc")
        tensors |= {"r_mag": torch.zeros(D_SAE), "b_mag": torch.zeros(D_SAE)}
    return {"sae_weights.safetensors": save(tensors), "cfg.json": json.dumps(config).encode()}


def registry(path: Path, model: str, hook_point: str) -> Path:
    """A user's registry, with one host and one SAE, and a fit that is short."""
    sae = {"repo": "someone/sae", "file": "sae_weights.safetensors", "format": "saelens", "license": "MIT"}
    fit = {"hook_points": [hook_point], "n_pictures": 24, "clean_budget": 1.0, "steps": 3}
    host = {"model": model, "saes": [{**sae, "hook_point": hook_point, "tokens": "all"}], "fit": fit}
    path.write_text(json.dumps({"schema": 1, "hosts": [host]}))
    return path


def protect(environment: dict[str, str], arguments: Sequence[str], *, killed_at: str | None = None) -> str:
    """Run the command in a process of its own, kill it after a line, if one is named, and return what it said."""
    command = [sys.executable, "-c", COMMAND, "protect", *arguments]
    said = []
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            if killed_at is not None and killed_at in line:
                process.kill()
                break
    assert process.returncode == (0 if killed_at is None else -signal.SIGKILL), "".join(said)
    return "".join(said)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("architecture", "block"), [("topk", 9), ("topk", 11), ("jumprelu", 9), ("standard", 5)])
def test_from_a_name_to_a_defense_that_everything_uses_killed_three_times(
    hub: FakeHub, tmp_path: Path, clip_folder: Path, architecture: str, block: int
) -> None:
    clip, hook_point = load_clip(f"local-dir:{clip_folder}"), f"blocks.{block}.hook_resid_post"
    hub.add("someone/sae", sae_files(clip, architecture, hook_point))
    rows = registry(tmp_path / "mine.json", f"local-dir:{clip_folder}", hook_point)
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join(LABELS))
    name = [f"local-dir:{clip_folder}", "--registry", str(rows), "--labels-file", str(labels), "--device", "cpu"]

    def environment(cache: str) -> dict[str, str]:
        hf = {"HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "hub-cache")}
        return {**hf, cache_module.VARIABLE: str(tmp_path / cache)}

    out, expected = tmp_path / "defense", tmp_path / "expected"
    protect(environment("whole"), [*name, "--out", str(expected)])
    for line in KILLED_AT:
        protect(environment("killed"), [*name, "--out", str(out)], killed_at=line)
        assert not out.exists()
    protect(environment("killed"), [*name, "--out", str(out)])
    assert everything(out) == everything(expected)

    defense = defenses.load(out)
    is_slim = all(site.part is not None for site in defense.sites)
    assert is_slim == (architecture != "topk" or "stored_whole" not in defense.provenance)
    if is_slim:
        assert sum(len(data) for data in everything(out).values()) < 2**20
    clf = RobustClassifier.from_pretrained(out, model=f"local-dir:{clip_folder}", device="cpu").set_labels(LABELS)
    pictures = [scenes.render(replace(case.scene, oversample=1), SIDE) for case in draws.typographic(4, 3)]
    pixel_values = torch.from_numpy(np.stack([clip.preprocess(each) for each in pictures]))
    defended = clf.encode_pixels(pixel_values)
    assert np.abs(defended - clf.encode_pixels(pixel_values, plain=True)).max() > 1e-4
    wrapped = wrap(clip.model, defense).encode_image(pixel_values, normalize=True).detach().numpy()
    np.testing.assert_allclose(wrapped, defended, atol=1e-5)
    export_onnx(clf, tmp_path / "bundle")
    np.testing.assert_allclose(OnnxClassifier(tmp_path / "bundle").encode_pixels(pixel_values), defended, atol=1e-4)
