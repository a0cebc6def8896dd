"""Accounts of what a defense removed add up, and each encoder runs once for them."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
import torch

from defense.classify.classifier import RobustClassifier
from defense.classify.explanation import account
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.hosts.attach import attached
from defense.hosts.controls import Controls

from ..conftest import clip_of, random_defense, random_sae
from .explained import BLOCK, LABELS, RULES, a_set, edits, picture, rules

# --- how often the encoder runs ---------------------------------------------------------------------------------------


@rules
def test_an_explanation_runs_each_encoder_once(tiny_clip, fields, monkeypatch):
    """Two sites with two sets each: four suppressors, so four calls, one for each part of S."""
    from defense.core.ops import reference

    sets = LatentSet("a", tuple(range(30))), LatentSet("b", tuple(range(30, 60)), scope="cls")
    made = random_defense(tiny_clip, *((block, random_sae(**fields), each) for block in (0, 1) for each in sets))
    clip = clip_of(tiny_clip)
    clf = RobustClassifier(clip, replace(made, preprocess=clip.preprocess)).set_labels(LABELS)
    calls, acts_of_set = [], reference.acts_of_set
    monkeypatch.setattr(reference, "acts_of_set", lambda z, encoder: calls.append(1) or acts_of_set(z, encoder))
    explanation = clf.explain(picture())
    assert len(calls) == 4
    assert {(item.hook_point, item.set_name) for item in explanation.removed} == {
        (f"blocks.{block}.hook_resid_post", name) for block in (0, 1) for name in "ab"
    }


# --- accounts ---------------------------------------------------------------------------------------------------------


@rules
@pytest.mark.parametrize("scope", ["patch", "all"])
def test_maps_energies_and_activations_are_those_of_the_whole_encoder(defended, fields, scope):
    clf = defended(a_set(gains=tuple(i / 40 for i in range(40)), scope=scope), **fields)
    seen = clf.probe(picture()).suppressions(Controls())[BLOCK].resid
    explanation = clf.explain(picture())
    sae, tokens = clf.sae(BLOCK), slice(1, None) if scope == "patch" else slice(None)
    from defense.core.sae import normalize

    scale = normalize(seen, sae.config.norm).scale
    acts = sae.encode(seen)[0]
    assert explanation.removed
    for item in explanation.removed:
        written = acts[:, item.latent, None] * sae.W_dec[item.latent] * (1 - item.latent / 40)
        energy = (written if scale is None else written * scale[0]).square().sum(1)
        assert item.energy == pytest.approx(float(energy[tokens].sum()), rel=1e-3)
        np.testing.assert_allclose(item.map, energy[1:].reshape(4, 4), rtol=1e-3, atol=1e-6)
        column = acts[tokens, item.latent]
        assert item.activation == pytest.approx(float(column[column.abs().argmax()]), abs=1e-4)
        assert item.map.dtype == np.float32
    assert {item.latent for item in explanation.removed} == {
        latent for latent in range(40) if (acts[tokens, latent] != 0).any()
    }
    energies = [item.energy for item in explanation.removed]
    assert energies == sorted(energies, reverse=True)
    assert sum(item.share for item in explanation.removed) == pytest.approx(1)


@rules
def test_the_account_does_not_depend_on_the_callers_autocast(defended, fields):
    clf = defended(a_set(), **fields)
    defense = attached(clf.clip.model)
    with defense.recording() as told, torch.inference_mode():
        clf(picture())
        want, want_heatmap, want_fraction = account(told, defense.grid_size)
        with torch.autocast("cpu", torch.bfloat16):
            got, got_heatmap, got_fraction = account(told, defense.grid_size)
    assert want
    assert got == want
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one.map, other.map)
    np.testing.assert_array_equal(got_heatmap, want_heatmap)
    assert got_fraction == want_fraction


@edits
def test_the_heatmap_is_the_difference_that_the_edit_made(defended, edit):
    clf = defended(a_set(edit=edit), **RULES["topk"])
    outputs = []
    handle = clf.clip.model.visual.transformer.resblocks[2].register_forward_pre_hook(
        lambda _m, inputs: outputs.append(inputs[0])
    )
    try:
        explanation = clf.explain(picture())
    finally:
        handle.remove()
    plain, robust = outputs
    difference = (plain - robust)[0].square().sum(-1)
    np.testing.assert_allclose(explanation.heatmap, difference[1:].reshape(4, 4), rtol=1e-3, atol=1e-5)
    assert explanation.fraction == pytest.approx(float((difference.sum() / plain.square().sum()).sqrt()), rel=1e-3)


def test_for_one_latent_the_map_is_the_heatmap_and_project_removes_more(defended):
    clf = defended(a_set([7], scope="patch"))
    explanation = clf.explain(picture())
    (item,) = explanation.removed
    np.testing.assert_allclose(item.map, explanation.heatmap, rtol=1e-3, atol=1e-6)
    assert item.map.sum() == pytest.approx(item.energy, rel=1e-5)
    projected = clf.explain(picture(), controls=Controls(edit="project"))
    (same,) = projected.removed
    assert same.energy == item.energy, "what the latent wrote does not depend on the edit"
    assert abs(projected.heatmap.sum() - item.energy) > 0.01 * item.energy


def test_an_explanation_survives_json_and_says_what_was_in_force(defended):
    clf = defended(a_set())
    controls = Controls(strength=0.5, off=frozenset({(BLOCK, 3)}))
    explanation = clf.explain(picture(size=(40, 80)), controls=controls, top_k=2)
    fields = json.loads(json.dumps(explanation.to_dict()))
    assert fields["controls"] == controls.to_dict()
    assert fields["box"] == [20, 0, 60, 40]
    assert len(fields["plain"]) == len(fields["robust"]) == 2
    assert np.shape(fields["removed"][0]["map"]) == np.shape(fields["heatmap"]) == (4, 4)
    assert fields["plain_ms"] > 0
    assert fields["robust_ms"] > 0


@pytest.mark.parametrize(
    ("mode", "size", "box"),
    [
        ("shortest", (64, 32), (16, 0, 48, 32)),
        ("shortest", (32, 96), (0, 32, 32, 64)),
        ("longest", (64, 32), (0, -16, 64, 48)),
        ("squash", (64, 48), (0, 0, 64, 48)),
    ],
)
def test_the_box_is_the_part_of_the_picture_that_the_model_sees(mode, size, box):
    assert Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", mode).seen_box(*size) == box


def test_pixels_outside_the_box_do_not_reach_the_model():
    preprocess = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bilinear", "shortest")
    before = Image.fromarray(picture(size=(32, 96)))
    left, upper, right, lower = preprocess.seen_box(*before.size)
    after = Image.new("RGB", before.size)
    after.paste(before.crop((left, upper, right, lower)), (left, upper))
    np.testing.assert_array_equal(preprocess(after), preprocess(before))
