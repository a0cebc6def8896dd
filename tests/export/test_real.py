"""Real architectures, with random weights: what is exported answers as torch does. Slow, and up to 12 GiB of memory."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import open_clip
import torch

from defense.classify.classifier import RobustClassifier
from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.export.exporter import export_onnx
from defense.hosts.clip import Clip
from defense.hosts.defense import ClipId, Defense, Site
from defense.hosts.families import tower_of

from ..conftest import random_parameters

D_SAE = 4096


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ViT-B-32", "ViT-L-14", "ViT-B-16-SigLIP"])
def test_a_real_architecture_answers_as_torch_does(name, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = open_clip.create_model(name, pretrained=None).eval().requires_grad_(False)
    tower = tower_of(model)
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(model))
    config = SAEConfig(tower.d_model, D_SAE, "topk", k=32)
    block = len(tower.blocks) * 2 // 3
    site = Site(f"blocks.{block}.hook_resid_post", config, random_parameters(config), (LatentSet("text", (3, 5, 8)),))
    spec = ClipId(name, None, tower.fingerprint(), tower.quick_gelu, tower.d_model, len(tower.blocks))
    clf = RobustClassifier(Clip(model, preprocess, ClipTokenizer(77)), Defense(spec, preprocess, (site,)))
    clf.set_labels([f"label {index}" for index in range(10)])
    d_embed = clf.encode_pixels(np.zeros((1, 3, *preprocess.size), np.float32)).shape[1]
    text_embeds = np.random.default_rng(0).normal(size=(10, d_embed)).astype(np.float32)
    assert clf.prompts is not None
    clf._text_embeds[clf.prompts.sha256()] = text_embeds / np.linalg.norm(text_embeds, axis=1, keepdims=True)
    report = export_onnx(clf, tmp_path / "bundle")
    assert report.parity.max_abs_diff <= 1e-5
    assert report.parity.agreement == 1.0
    assert report.parity.batch_diff <= 1e-5
