"""Explanations: controls equal the defense that they describe, the accounts add up, counterfactuals are irreducible."""

from __future__ import annotations

import itertools
import json
import threading
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
from defense.errors import ConfigError, HookPointError
from defense.explain.counterfactual import counterfactual
from defense.explain.heat import heat, overlay
from defense.hosts.attach import attached, detach, is_wrapped
from defense.hosts.clip import load_clip
from defense.hosts.controls import STEERED, Controls
from defense.world import draws, scenes

from ..conftest import clip_of, random_defense, random_sae

LABELS = ["dog", "cat", "fish", "tree", "car", "boat"]
BLOCK = "blocks.1.hook_resid_post"
RULES = {
    "relu": {"act": "relu"},
    "jumprelu": {"act": "jumprelu", "norm": "layer_norm"},
    "batchtopk": {"act": "batchtopk"},
    "gated": {"act": "gated"},
    "topk": {"act": "topk", "k": 8},
    "topk-none": {"act": "topk", "k": 8, "topk_relu": "none", "norm": "constant_norm_rescale"},
}
EDITS = ("scale", "project", "set")

rules = pytest.mark.parametrize("fields", RULES.values(), ids=RULES)
edits = pytest.mark.parametrize("edit", EDITS)


def picture(seed: int = 0, size: tuple[int, int] = (40, 40)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def a_set(latents=range(40), name: str = "text", **fields) -> LatentSet:
    latents = tuple(latents)
    if fields.get("edit") == "set":
        fields["values"] = tuple(0.5 + 0.01 * latent for latent in latents)
    return LatentSet(name, latents, **fields)


@pytest.fixture(scope="module")
def clip(tiny_folder):
    return load_clip(f"local-dir:{tiny_folder}")


@pytest.fixture
def defended(clip):
    """Return a function that makes a classifier of sets at block 1, all on one host."""

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
def embedded() -> RobustClassifier:
    return RobustClassifier.from_pretrained("embedded", device="cpu").set_labels(list(scenes.OBJECTS))


def attacked_scene(seed: int) -> Image.Image:
    (case,) = draws.typographic(1, seed)
    return scenes.render(case.scene)


def scores(prediction) -> dict[str, float]:
    return {entry["label"]: entry["score"] for entry in prediction}


def close(got, want) -> None:
    assert scores(got) == pytest.approx(scores(want), abs=1e-5)


# --- controls ---------------------------------------------------------------------------------------------------------


@rules
@edits
def test_whatever_switches_all_of_it_off_is_plain_clip_bit_for_bit(defended, fields, edit):
    clf = defended(a_set(edit=edit), **fields)
    before = clf.explain(picture())
    assert before.robust != before.plain, "the case must edit something"
    everything = frozenset((BLOCK, latent) for latent in range(40))
    for controls in (Controls(strength=0), Controls(sets=()), Controls(off=everything)):
        after = clf.explain(picture(), controls=controls)
        assert after.robust == before.plain
        assert after.removed == ()
        assert not after.heatmap.any()
        assert after.fraction == 0
        assert clf.classify_with(picture(), controls) == before.plain


@rules
@edits
def test_controls_that_name_all_of_it_change_nothing(defended, fields, edit):
    clf = defended(a_set(edit=edit), **fields)
    want, got = clf.explain(picture()), clf.explain(picture(), controls=Controls(sets=("text",)))
    assert got.robust == want.robust
    assert got.removed == want.removed
    np.testing.assert_array_equal(got.heatmap, want.heatmap)


@rules
@edits
@pytest.mark.parametrize("other", ["scale", "project"])
def test_an_edit_in_place_of_the_sets_own_is_that_edit(defended, fields, edit, other):
    clf = defended(a_set(edit=edit), **fields)
    got = clf.classify_with(picture(), Controls(edit=other))
    assert got == defended(a_set(edit=other), **fields)(picture())


@rules
@edits
def test_a_latent_that_is_off_might_as_well_not_be_in_the_set(defended, fields, edit):
    clf = defended(a_set(edit=edit), **fields)
    off = frozenset((BLOCK, latent) for latent in range(0, 40, 3))
    got = clf.explain(picture(), controls=Controls(off=off))
    assert got.robust != clf.explain(picture()).robust
    assert not {(item.hook_point, item.latent) for item in got.removed} & off
    rest = [latent for latent in range(40) if latent % 3]
    close(got.robust, defended(a_set(rest, edit=edit), **fields)(picture()))


def test_a_set_alone_also_edits_what_another_set_took_from_it(defended):
    first, second = a_set(range(30), "first"), a_set(range(20, 50), "second", edit="project")
    got = defended(first, second).classify_with(picture(), Controls(sets=("second",)))
    close(got, defended(second)(picture()))


def test_strength_is_a_factor_on_the_strength_that_is_attached(defended):
    clf = defended(a_set())
    attached(clf.clip.model).set_strength(0.5)
    got = clf.classify_with(picture(), Controls(strength=0.5))
    attached(clf.clip.model).set_strength(0.25)
    assert got == clf(picture())
    assert got != clf.classify_with(picture(), Controls(strength=0.5))


@rules
@pytest.mark.parametrize("latent", [3, 150], ids=["of-the-set", "of-no-set"])
def test_a_steered_latent_writes_what_it_was_set_to_on_every_token(defended, fields, latent):
    clf = defended(a_set(range(2)), **fields)
    controls = Controls(sets=(), steer={(BLOCK, latent): 4.5})
    outputs = []
    handle = clf.clip.model.visual.transformer.resblocks[2].register_forward_pre_hook(
        lambda _m, inputs: outputs.append(inputs[0])
    )
    try:
        explanation = clf.explain(picture(), controls=controls)
    finally:
        handle.remove()
    before, after = outputs
    sae = clf.sae(BLOCK)
    from defense.core.sae import normalize

    scale = normalize(before, sae.config.norm).scale
    change = (4.5 - sae.encode(before)[..., latent, None]) * sae.W_dec[latent]
    torch.testing.assert_close(after, before + change * (1 if scale is None else scale), atol=1e-4, rtol=1e-5)
    (item,) = explanation.removed
    assert (item.set_name, item.latent) == (STEERED, latent)
    assert item.energy == pytest.approx(float((after - before).square().sum()), rel=1e-3)


def test_strength_leaves_steering_alone_and_steering_comes_before_the_sets(defended):
    clf = defended(a_set())
    steer = {(BLOCK, 3): 4.0}
    only = clf.classify_with(picture(), Controls(sets=(), steer=steer))
    assert clf.classify_with(picture(), Controls(strength=0, steer=steer)) == only
    got = clf.explain(picture(), controls=Controls(steer=steer))
    assert [item.set_name for item in got.removed if item.latent == 3] == [STEERED]


def test_a_latent_steered_after_the_last_block_needs_a_token_that_counts(defended):
    clf = defended(a_set(scope="cls"), block=2, tokens="patch")
    with pytest.raises(HookPointError, match="only the CLS token"):
        clf.classify_with(picture(), Controls(steer={("blocks.2.hook_resid_post", 3): 1.0}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strength": 1.5}, "strength=1.5"),
        ({"strength": float("nan")}, "strength=nan"),
        ({"strength": "1"}, "strength=1"),
        ({"edit": "set"}, "edit='set'"),
        ({"sets": "text"}, "want a tuple"),
        ({"off": {("blocks.1.hook_resid_post",)}}, "want .hook_point, latent."),
        ({"off": {(1, 2)}}, "want .hook_point, latent."),
        ({"off": {3}}, "a latent is named 3; want .hook_point, latent."),
        ({"sets": ("birds",)}, "no set 'birds'; it has text"),
        ({"off": {("blocks.0.hook_resid_post", 1)}}, "this defense edits blocks.1"),
        ({"steer": {("blocks.0.hook_resid_post", 1): 1.0}}, "this defense edits blocks.1"),
        ({"steer": {(BLOCK, 160): 1.0}}, "latents 0 to 159"),
        ({"steer": {(BLOCK, 1): float("inf")}}, "finite"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_controls_that_mean_nothing_are_refused(defended, fields, message):
    clf = defended(a_set())
    with pytest.raises(ConfigError, match=message):
        clf.classify_with(picture(), Controls(**fields))


def test_controls_hold_plain_values_whatever_they_were_made_of():
    controls = Controls(off={(BLOCK, np.int64(3))}, steer={(BLOCK, np.int32(4)): 2.0}, sets=["text"])
    assert controls == Controls(off=frozenset({(BLOCK, 3)}), steer={(BLOCK, 4): 2.0}, sets=("text",))
    assert json.loads(json.dumps(controls.to_dict())) == {
        "strength": 1.0, "edit": None, "sets": ["text"], "off": [[BLOCK, 3]], "steer": [[BLOCK, 4, 2.0]],
    }  # fmt: skip


def test_an_error_in_between_leaves_the_defense_as_it_was(defended, monkeypatch):
    clf = defended(a_set())
    want = clf(picture())
    (block,) = attached(clf.clip.model).edited_blocks()
    encode_image, calls = clf.clip.model.encode_image, []

    def fails_at_the_second(batch):
        calls.append(block.mode().stand_ins)
        if len(calls) == 2:
            raise ZeroDivisionError
        return encode_image(batch)

    with monkeypatch.context() as patch:
        patch.setattr(clf.clip.model, "encode_image", fails_at_the_second)
        with pytest.raises(ZeroDivisionError):
            clf.explain(picture(), controls=Controls(strength=0.5))
    assert calls[0] is None, "the plain pass"
    assert calls[1] is not None, "the defended one, with the controls in force"
    mode = block.mode()
    assert (mode.stand_ins, mode.record, mode.is_bypassed) == (None, None, False)
    assert clf(picture()) == want


def test_threads_do_not_see_each_others_controls(defended):
    clf = defended(a_set(), **RULES["topk"])
    many = [Controls(strength=i / 7, edit=("scale", "project")[i % 2]) for i in range(8)]
    wanted = [clf.classify_with(picture(), controls) for controls in many]
    plain_or_full = clf(picture())
    wrong = []

    def work(controls: Controls, want) -> None:
        for _ in range(10):
            if clf.classify_with(picture(), controls) != want or clf(picture()) != plain_or_full:
                wrong.append(controls)

    threads = [threading.Thread(target=work, args=each) for each in zip(many, wanted, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_half_precision_takes_controls_too(defended, clip):
    clf = defended(a_set(), **RULES["topk"])
    clip.model.to(torch.bfloat16)
    try:
        explanation = clf.explain(picture(), controls=Controls(sets=("text",)))
        assert explanation.robust == clf(picture())
        assert clf.classify_with(picture(), Controls(strength=0)) == explanation.plain
    finally:
        clip.model.float()


def test_a_classifier_without_a_defense_has_nothing_to_adjust(clip):
    clf = RobustClassifier(clip).set_labels(LABELS)
    for call in (
        lambda: clf.explain(picture()),
        lambda: clf.explain(picture(), controls=Controls(strength=0)),
        lambda: clf.classify_with(picture(), Controls()),
        lambda: counterfactual(clf, picture()),
        lambda: clf.sae(BLOCK),
    ):
        with pytest.raises(ConfigError, match="no defense"):
            call()


def test_the_sae_of_a_hook_point_is_made_once_and_takes_gradients(defended):
    clf = defended(a_set(), **RULES["topk"])
    clf.explain(picture(), controls=Controls(strength=0.5))  # makes it, in inference mode
    sae = clf.sae(BLOCK)
    assert clf.sae(BLOCK) is sae
    assert sae.config.act == "topk"
    assert not sae.W_enc.is_inference()
    with pytest.raises(ConfigError, match=r"no defense at 'blocks\.0"):
        clf.sae("blocks.0.hook_resid_post")


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


# --- counterfactuals --------------------------------------------------------------------------------------------------


def removing(clf: RobustClassifier, image, latents, candidates) -> str:
    off = frozenset(candidates) - frozenset(latents)
    return clf.classify_with(image, Controls(off=off))[0]["label"]


def test_a_counterfactual_changes_the_answer_and_no_part_of_it_does(defended):
    n_found, sizes = 0, []
    clf = defended(a_set(range(12)), **RULES["topk"])
    candidates = [(BLOCK, latent) for latent in range(12)]
    for seed in range(12):
        image = picture(seed)
        found = counterfactual(clf, image)
        plain = clf.explain(image).plain
        assert found.plain == plain
        if not found.found:
            assert found.latents == ()
            continue
        n_found += 1
        sizes.append(len(found.latents))
        assert found.flipped[0]["label"] == removing(clf, image, found.latents, candidates) != plain[0]["label"]
        for n in range(len(found.latents)):
            for part in itertools.combinations(found.latents, n):
                if n in (0, len(found.latents) - 1):
                    assert removing(clf, image, part, candidates) == plain[0]["label"]
        single = [place for place in candidates if removing(clf, image, [place], candidates) != plain[0]["label"]]
        assert (len(found.latents) == 1) == bool(single)
    assert n_found >= 2, sizes


def test_on_an_attacked_picture_a_few_of_the_latents_are_enough(embedded):
    image = attacked_scene(424_242)
    explanation = embedded.explain(image)
    assert explanation.changed, "the case must be one that the defense mends"
    found = counterfactual(embedded, image)
    assert 1 <= len(found.latents) <= 4 < len(explanation.removed)
    assert json.loads(json.dumps(found.to_dict()))["latents"] == [list(place) for place in found.latents]


def test_no_latent_of_a_counterfactual_can_be_left_out_even_where_they_depend_on_each_other(defended, monkeypatch):
    places = [(BLOCK, latent) for latent in range(4)]
    # Without 0 the answer stays changed, and only then can 3 go too.
    margins = {(): 4, (0,): 3, (0, 1): 2, (0, 1, 2): 1, (0, 1, 2, 3): -1, (1, 2, 3): -1, (1, 2): -1}

    def scores(_search, removed):
        margin = margins.get(tuple(sorted(latent for _, latent in removed)), 3.5)
        return np.array([0.5, 0.5 * np.exp(-margin), 0], np.float32)

    monkeypatch.setattr("defense.explain.counterfactual._Search.scores", scores)
    monkeypatch.setattr("defense.explain.counterfactual._Search.firing", lambda _search: list(places))
    monkeypatch.setattr("defense.explain.counterfactual._Search.n_tried", 0)
    assert counterfactual(defended(a_set(range(4))), picture()).latents == (places[1], places[2])


def test_where_no_latent_takes_anything_none_is_found(defended):
    clf = defended(a_set(gains=(1.0,) * 40))
    found = counterfactual(clf, picture())
    assert not found.found
    assert found.latents == ()
    assert found.flipped is None
    assert counterfactual(clf, picture(), controls=Controls(sets=())).n_tried == 0


def test_a_counterfactual_uses_only_what_the_controls_leave(embedded):
    image = attacked_scene(424_242)
    first = counterfactual(embedded, image)
    second = counterfactual(embedded, image, controls=Controls(off=frozenset(first.latents[:1])))
    assert first.latents[0] not in second.latents
    assert second.plain == first.plain, "what is left alone is not removed either"
    with pytest.raises(ConfigError, match="leave `steer` empty"):
        counterfactual(embedded, image, controls=Controls(steer={first.latents[0]: 1.0}))


def test_one_label_has_no_counterfactual(defended):
    with pytest.raises(ConfigError, match="set at least two"):
        counterfactual(defended(a_set()).set_labels(["dog"]), picture())


# --- heat -------------------------------------------------------------------------------------------------------------


def test_heat_is_see_through_where_nothing_is_and_strongest_at_the_peak():
    energies = np.zeros((4, 6), np.float32)
    energies[1, 4] = 9
    image = heat(energies, (60, 40))
    assert (image.mode, image.size) == ("RGBA", (60, 40))
    pixels = np.asarray(image).astype(int)
    assert pixels[15, 45, 3] == pixels[..., 3].max() > 150
    assert (pixels[:, :30, 3] == 0).all()
    assert (pixels[30:, :, 3] == 0).all()
    light = pixels[..., :3].sum(-1)
    assert light[15, 45] == light.max()


def test_heat_of_nothing_is_see_through_and_a_common_peak_compares_maps():
    assert not np.asarray(heat(np.zeros((3, 3)), (9, 9)))[..., 3].any()
    energies = np.full((2, 2), 1.0)
    faint, full = heat(energies, (4, 4), peak=4.0), heat(energies, (4, 4))
    assert np.asarray(faint).astype(int)[..., :3].sum() < np.asarray(full).astype(int)[..., :3].sum()
    np.testing.assert_array_equal(np.asarray(heat(4 * energies, (4, 4), peak=16.0)), np.asarray(faint))


def test_an_overlay_covers_the_box_and_darkens_what_the_model_did_not_see():
    image = Image.fromarray(np.full((40, 80, 3), 200, np.uint8))
    before = image.tobytes()
    energies = np.zeros((4, 4))
    energies[0, 0] = 1
    result = np.asarray(overlay(image, energies, box=(20, 0, 60, 40))).astype(int)
    assert image.tobytes() == before
    assert result.shape == (40, 80, 3)
    assert (result[:, :20] < 120).all()
    assert (result[:, 60:] < 120).all()
    assert (result[20:, 20:60] == 200).all()
    assert (result[2, 22] != 200).any()
    padded = overlay(image, energies, box=(0, -20, 80, 60))
    assert padded.size == image.size


def test_a_map_lies_on_the_patches_that_it_belongs_to(embedded):
    """The same attacked picture, once as it is and once between gray bars, has its peak at the same place."""
    scene = attacked_scene(424_242)
    wide = Image.new("RGB", (3 * scene.width, scene.height), "gray")
    wide.paste(scene, (scene.width, 0))
    explanation = embedded.explain(wide)
    assert explanation.box == (scene.width, 0, 2 * scene.width, scene.height)
    np.testing.assert_allclose(explanation.heatmap, embedded.explain(scene).heatmap, rtol=1e-3, atol=1e-3)
