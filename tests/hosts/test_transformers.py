"""Models of transformers as hosts: the same fingerprints and defended answers as their twins of open_clip and timm."""

from __future__ import annotations

import copy
import dataclasses
import sys

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
import torch
import transformers

from defense.classify.classifier import RobustClassifier
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError, MissingDependencyError
from defense.explain.naming import mean_jacobians
from defense.fit.config import FitConfig
from defense.fit.material import Pairs
from defense.fit.selecting import TextFit
from defense.hosts.attach import detach, is_wrapped, wrap
from defense.hosts.attention_alone import attention_alone
from defense.hosts.clip import Clip, load_clip
from defense.hosts.families import tower_of
from defense.store import defenses

from ..conftest import random_sae
from . import twins
from .twins import LABELS, POINT, PREPROCESS, a_defense, embeds, pictures, pixels, vision_model

PAIRS = {
    "CLIP": twins.open_clip_pair,
    "CLIP with GELU": lambda: twins.open_clip_pair(quick_gelu=False),
    "SigLIP": twins.siglip_pair,
    "SigLIP 2": lambda: twins.siglip_pair("Siglip2"),
    "DINOv2": twins.dinov2_pair,
}


@pytest.fixture(params=PAIRS)
def pair(request):
    return PAIRS[request.param]()


# --- twins ------------------------------------------------------------------------------------------------------------


def test_twins_have_the_same_fingerprints(pair):
    own, twin = pair
    assert tower_of(own).fingerprints() == tower_of(twin).fingerprints()
    assert tower_of(own).quick_gelu == tower_of(twin).quick_gelu
    assert tower_of(twin).fingerprints() == tower_of(copy.deepcopy(twin).half()).fingerprints()


def test_a_weight_that_differs_shows_in_the_fingerprint_of_a_twin(pair):
    _, twin = pair
    before = tower_of(twin).fingerprints()
    parameters = dict(tower_of(twin).visual.named_parameters())
    for name, parameter in parameters.items():
        parameter.flatten()[-1] += 1
        changed = tower_of(twin).fingerprints() != before
        assert changed == (name != "embeddings.mask_token"), name
        parameter.flatten()[-1] -= 1


def test_a_defense_answers_the_same_on_both_twins(pair):
    own, twin = pair
    defense = a_defense(own)
    plain = embeds(own)
    torch.testing.assert_close(embeds(twin), plain, atol=1e-6, rtol=0)
    stock, keys = embeds(twin), set(twin.state_dict())
    wrap(own, defense)
    assert wrap(twin, defense) is twin
    torch.testing.assert_close(embeds(twin), embeds(own), atol=1e-6, rtol=0)
    assert (embeds(twin) - stock).abs().max() > 0.01
    assert set(twin.state_dict()) == keys
    assert torch.equal(embeds(detach(twin)), stock)


def test_residuals_go_out_and_in_as_with_the_twin(pair):
    own, twin = (tower_of(model) for model in pair)
    torch.testing.assert_close(twin.resid(pixels(), POINT), own.resid(pixels(), POINT), atol=1e-5, rtol=0)
    resid = own.resid(pixels(), POINT)
    torch.testing.assert_close(twin.embeds_from(resid, POINT), own.embeds_from(resid, POINT), atol=1e-6, rtol=0)
    early = twin.resid(pixels(), "blocks.0.hook_resid_post")
    torch.testing.assert_close(twin.resid_from(early, "blocks.0.hook_resid_post", POINT), resid, atol=1e-5, rtol=0)
    assert (twin.n_prefix, twin.has_cls, twin.grid_size) == (own.n_prefix, own.has_cls, own.grid_size)
    assert (twin.image_size, len(twin.blocks)) == ((32, 32), 3)


# --- towers without a projection --------------------------------------------------------------------------------------


def test_a_tower_without_its_projection_is_known_by_its_residual_stream(clips):
    own, twin = clips
    alone = vision_model(twin)
    assert tower_of(alone).fingerprints().whole != tower_of(own).fingerprints().whole
    assert tower_of(alone).fingerprints().stream == tower_of(own).fingerprints().stream
    stock = alone(pixel_values=pixels()).pooler_output
    wrap(alone, a_defense(own))
    wrap(twin, a_defense(own))
    defended = alone(pixel_values=pixels()).pooler_output
    assert not torch.equal(defended, stock)
    torch.testing.assert_close(twin.visual_projection(defended), twin.get_image_features(pixels()).pooler_output)
    assert torch.equal(detach(alone)(pixel_values=pixels()).pooler_output, stock)


def test_with_its_projection_a_tower_is_known_by_all_of_its_weights(clips):
    own, twin = clips
    projected = transformers.CLIPVisionModelWithProjection(twin.config.vision_config).eval()
    projected.load_state_dict({name: twin.state_dict()[name] for name in projected.state_dict()})
    defense = a_defense(own)
    wrap(projected, defense)
    wrap(twin, defense)
    torch.testing.assert_close(
        projected(pixel_values=pixels()).image_embeds, twin.get_image_features(pixels()).pooler_output
    )
    detach(projected).visual_projection.weight.data.mul_(2)
    with pytest.raises(ConfigError, match=r"fitted on the weights of twin"):
        wrap(projected, defense)


def test_other_weights_are_refused_also_without_a_projection(clips):
    own, twin = clips
    alone = vision_model(twin)
    alone.encoder.layers[2].mlp.fc1.bias.data[0] += 1
    defense = a_defense(own)
    with pytest.raises(ConfigError, match=r"fitted on the weights of twin"):
        wrap(alone, defense)
    assert is_wrapped(wrap(alone, defense, allow_mismatch=True))


def test_a_defense_of_before_there_was_a_second_fingerprint_says_what_is_missing(clips, tmp_path):
    own, twin = clips
    defense = a_defense(own)
    old = dataclasses.replace(defense, clip=dataclasses.replace(defense.clip, stream_sha256=None))
    with pytest.raises(ConfigError, match="without its projection"):
        wrap(vision_model(twin), old)
    assert is_wrapped(wrap(twin, old)), "the whole is known as before"


def test_a_defense_keeps_its_second_fingerprint_on_disk(clips, tmp_path):
    defense = a_defense(clips[0])
    defenses.save(defense, tmp_path / "defense")
    assert defense.clip.stream_sha256 is not None
    assert defenses.load(tmp_path / "defense").clip == defense.clip


# --- hooks ------------------------------------------------------------------------------------------------------------


def test_recorded_hidden_states_are_the_edited_ones(clips):
    """The recorder's hooks are put in place by the first pass that asks for hidden states, before ours."""
    own, twin = clips
    before = twin.vision_model(pixels(), output_hidden_states=True).hidden_states
    with Clip(twin, PREPROCESS).defended(a_defense(own)) as attachment, attachment.recording() as told:
        after = twin.vision_model(pixels(), output_hidden_states=True).hidden_states
    assert torch.equal(after[1], before[1])
    assert not torch.equal(after[2], before[2])
    assert torch.equal(after[2], told[POINT].edited)


def test_loading_another_projection_into_a_wrapped_model_is_refused(clips):
    own, twin = clips
    wrap(twin, a_defense(own))
    other = {name: tensor.clone() for name, tensor in twin.state_dict().items()}
    other["visual_projection.weight"][0] += 1
    with pytest.raises(ConfigError, match=r"visual_projection\.weight"):
        twin.load_state_dict(other)
    with pytest.raises(ConfigError, match="weight of what is"):
        twin.visual_projection.load_state_dict({"weight": other["visual_projection.weight"]})
    detach(twin).load_state_dict(other)


def test_a_copy_of_a_wrapped_model_is_defended_by_itself(clips):
    own, twin = clips
    defended = embeds(wrap(twin, a_defense(own)))
    other = copy.deepcopy(twin)
    detach(twin)
    assert torch.equal(embeds(other), defended)


# --- by name, fitted, exported ----------------------------------------------------------------------------------------


def test_a_folder_of_transformers_is_loaded_by_name(clips, processor, tmp_path):
    own, twin = clips
    twin.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    clip = load_clip(f"transformers:{tmp_path}")
    assert clip.tower.fingerprints() == tower_of(own).fingerprints()
    assert clip.preprocess == PREPROCESS
    assert isinstance(clip.tokenizer, ClipTokenizer)
    clip_id = clip.id_as(f"transformers:{tmp_path}")
    defense = dataclasses.replace(a_defense(own), clip=clip_id)
    defenses.save(defense, tmp_path / "defense")
    clf = RobustClassifier.from_pretrained(tmp_path / "defense", device="cpu").set_labels(LABELS)
    assert clf.clip.model is not twin
    assert clf(pictures()[0])[0]["label"] in LABELS


def test_weights_that_are_no_safetensors_are_not_read(clips, processor, tmp_path):
    processor.save_pretrained(tmp_path)
    clips[1].config.save_pretrained(tmp_path)
    torch.save(clips[1].state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="transformers cannot load"):
        load_clip(f"transformers:{tmp_path}")


def test_without_transformers_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[transformers\]"):
        load_clip("transformers:nowhere")


def test_a_defense_is_fitted_the_same_on_both_twins(clips):
    text_embeds = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)), dim=1)
    chosen = []
    for model in clips:
        clip = Clip(model, PREPROCESS)
        label = (clip.image_embeds(pixels(12)) @ text_embeds.T).argmax(1)
        pairs = Pairs(pixels(12), pixels(12, 1), pixels(12, 2), label, (label + 1) % 5)
        fit = TextFit(clip, POINT, random_sae(act="topk", k=8), pairs, text_embeds)
        chosen.append(fit.choose(fit.rank().order(), FitConfig(n_candidates=20, steps=3, clean_budget=1.0)))
    assert chosen[0].latents == chosen[1].latents


def test_latents_are_described_the_same_on_both_twins(clips):
    from defense.explain.describe import Example, describe

    tables = []
    for model in clips:
        clip = Clip(model, PREPROCESS, ClipTokenizer(16))
        shown = (Example(f"{i}", one.numpy()) for i, one in enumerate(pixels(20)))
        tables.append(describe(clip, POINT, random_sae(act="topk", k=8), shown, ["cat", "dog", "fish"], n_steered=2))
    assert tables[0].columns["frequency"].max() > 0
    for name, column in tables[0].columns.items():
        np.testing.assert_allclose(tables[1].columns[name], column, rtol=1e-3, atol=1e-4, err_msg=name)
    assert np.array_equal(tables[0].top, tables[1].top)


def test_half_precision_for_a_graph_reaches_the_projection_too(clips):
    exporter = pytest.importorskip("defense.export.exporter")
    clf = RobustClassifier(Clip(clips[1], PREPROCESS))
    halved = exporter._tower(clf, "fp16")
    assert {parameter.dtype for part in tower_of(halved).parts for parameter in part.parameters()} == {torch.float16}
    assert {parameter.dtype for parameter in clips[1].parameters()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["CLIP", "SigLIP 2"])
def test_a_defended_model_of_transformers_is_exported(name, tmp_path):
    exporter = pytest.importorskip("defense.export.exporter")
    own, twin = PAIRS[name]()
    tokenizer = ClipTokenizer(16) if name == "CLIP" else lambda texts: np.arange(16 * len(texts)).reshape(-1, 16)
    clf = RobustClassifier(Clip(twin, PREPROCESS, tokenizer), a_defense(own)).set_labels(LABELS)
    report = exporter.export_onnx(clf, tmp_path / "bundle", text=name == "CLIP")
    assert report.parity.max_abs_diff < 1e-5


def test_effects_through_attention_alone_are_those_of_the_twin(pair):
    found = []
    for model in pair:
        tower = tower_of(model)
        resid = torch.randn(2, tower.n_pos, tower.d_model, generator=torch.Generator().manual_seed(0))
        with attention_alone(tower, POINT):
            found.append(mean_jacobians(tower, POINT, resid))
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= 1e-3 * other.norm()  # 0 where there is no CLS token
