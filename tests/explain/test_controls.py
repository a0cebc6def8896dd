"""Controls equal the defense that they describe, and leave it as it was."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.classify.classifier import RobustClassifier
from defense.errors import ConfigError, HookPointError
from defense.explain.counterfactual import counterfactual
from defense.hosts.attach import attached
from defense.hosts.controls import STEERED, Controls

from .explained import BLOCK, LABELS, RULES, a_set, close, edits, picture, rules


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


@edits
def test_a_latent_s_own_strength_is_a_factor_on_what_is_removed_of_it(defended, edit):
    gains = tuple(np.linspace(0, 0.5, 40))
    strengths = {(BLOCK, latent): latent / 39 for latent in range(0, 40, 2)}
    got = defended(a_set(gains=gains, edit=edit)).classify_with(picture(), Controls(strengths=strengths))
    factors = [strengths.get((BLOCK, latent), 1.0) for latent in range(40)]
    weaker = tuple(1 - (1 - gain) * factor for gain, factor in zip(gains, factors, strict=True))
    want = defended(a_set(gains=weaker, edit=edit))(picture())
    close(got, want)
    assert got != defended(a_set(gains=gains, edit=edit))(picture())


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
        ({"strengths": {("blocks.0.hook_resid_post", 1): 1.0}}, "this defense edits blocks.1"),
        ({"strengths": {(BLOCK, 1): 1.5}}, "strengths.* is 1.5; it must lie in .0, 1."),
        ({"strengths": {(BLOCK, 1): float("nan")}}, "is nan; it must lie in"),
        ({"strengths": {(BLOCK, 1): True}}, "is True; it must lie in"),
        ({"strengths": {3: 0.5}}, "a latent is named 3; want .hook_point, latent."),
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
        "strengths": [],
    }  # fmt: skip
    parts = Controls(strengths={(BLOCK, np.int64(3)): np.float32(0.5)})
    assert json.loads(json.dumps(parts.to_dict()))["strengths"] == [[BLOCK, 3, 0.5]]


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
