"""What patches say: against blocks run by hand, in three libraries, with a defense, and on drawn scenes."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("open_clip")
import timm
import torch
from torch.nn import functional

from defense.classify.classifier import RobustClassifier
from defense.core.suppress import Suppressor
from defense.errors import ConfigError, HookPointError
from defense.explain.patches import PatchLabels, middle_of, patch_embeds, patch_labels, region_of, threshold_of
from defense.hosts.clip import Clip
from defense.hosts.controls import Controls
from defense.hosts.families import tower_of
from defense.world import draws, scenes
from defense.world.masks import subject_mask

from ..conftest import D_MODEL, random_sae
from .explained import BLOCK, LABELS, a_set, picture

FIRST = "blocks.0.hook_resid_post"


def by_hand(visual, resid: torch.Tensor) -> torch.Tensor:
    """What open_clip's blocks behind the first, its norm and projection make of [CLS, patch] for each patch."""
    rows = []
    for patch in range(1, resid.shape[1]):
        x = resid[:, [0, patch]]
        for block in visual.transformer.resblocks[1:]:
            x = block(x)
        rows.append(functional.normalize(visual.ln_post(x[:, 0]) @ visual.proj, dim=-1))
    return torch.stack(rows, 1)


# --- against blocks run by hand ---------------------------------------------------------------------------------------


def test_a_patch_says_what_the_rest_of_the_network_makes_of_it_alone(tiny_clip):
    tower = tower_of(tiny_clip)
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        resid = tower.resid(pixels, FIRST)
        got = patch_embeds(tower, resid, FIRST)
        torch.testing.assert_close(got, by_hand(tiny_clip.visual, resid), atol=1e-5, rtol=0)
    assert got.shape == (3, 16, 32)


def test_what_other_patches_hold_does_not_count(tiny_clip):
    tower = tower_of(tiny_clip)
    with torch.inference_mode():
        resid = tower.resid(torch.zeros(1, 3, 32, 32), FIRST)
        changed = resid.clone()
        changed[:, 5] = torch.linspace(-2, 5, D_MODEL).sin()
        before, after = (patch_embeds(tower, each, FIRST)[0] for each in (resid, changed))
    assert [row for row in range(16) if not torch.allclose(before[row], after[row], atol=1e-5)] == [4]


def test_a_tower_of_transformers_says_the_same():
    pytest.importorskip("transformers")
    from ..hosts.twins import open_clip_pair

    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        said = [patch_embeds(t, t.resid(pixels, FIRST), FIRST) for t in map(tower_of, open_clip_pair())]
    torch.testing.assert_close(*said, atol=1e-4, rtol=0)


def timm_vit(**fields):
    torch.manual_seed(0)
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": D_MODEL, "depth": 3, "num_heads": 2, "num_classes": 0}
    return timm.models.VisionTransformer(**settings, **fields).eval().requires_grad_(False)


@pytest.mark.parametrize(
    "fields",
    [
        {"class_token": False, "global_pool": "avg"},
        {"class_token": False, "global_pool": "map"},
        {"class_token": True, "global_pool": "avg"},
        {"class_token": True, "reg_tokens": 2, "global_pool": "token"},
    ],
    ids=["no-cls-mean", "siglip", "cls-mean", "registers"],
)
def test_a_tower_that_pools_patches_pools_that_patch_alone(fields):
    vit = timm_vit(**fields)
    tower = tower_of(vit)
    with torch.inference_mode():
        resid = tower.resid(torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), FIRST)
        got = patch_embeds(tower, resid, FIRST)[0]
        for patch in (0, 7, 15):
            x = resid[:, [*range(tower.n_prefix), tower.n_prefix + patch]]
            for block in vit.blocks[1:]:
                x = block(x)
            want = functional.normalize(vit.forward_head(vit.norm(x), pre_logits=True)[0], dim=0)
            torch.testing.assert_close(got[patch], want, atol=1e-5, rtol=0)


# --- refused ----------------------------------------------------------------------------------------------------------


def test_behind_the_last_block_of_a_tower_that_pools_cls_there_is_nothing_to_read(tiny_clip):
    tower = tower_of(tiny_clip)
    last = "blocks.2.hook_resid_post"
    with pytest.raises(HookPointError, match="a block before block 2"):
        patch_embeds(tower, tower.resid(torch.zeros(1, 3, 32, 32), last), last)


def test_a_tower_whose_blocks_tell_places_is_refused():
    settings = {"img_size": 32, "patch_size": 8, "embed_dim": D_MODEL, "depth": 2, "num_heads": 2, "num_classes": 0}
    tower = tower_of(timm.models.Eva(**settings, use_rot_pos_emb=True).eval().requires_grad_(False))
    with pytest.raises(HookPointError, match="rotary"):
        patch_embeds(tower, torch.zeros(1, 17, D_MODEL), FIRST)


def test_a_contrast_takes_a_phrase_and_controls_take_a_defense(defended, clip):
    with pytest.raises(ConfigError, match="phrase="):
        patch_labels(defended(a_set()), picture(), less="dog")
    from defense.hosts.attach import detach

    detach(clip.model)
    clf = RobustClassifier(clip).set_labels(LABELS)
    with pytest.raises(ConfigError, match="no defense"):
        patch_labels(clf, picture(), controls=Controls())
    found = patch_labels(clf, picture())
    assert found.robust is None
    with pytest.raises(ConfigError, match="without a defense"):
        found.best(robust=True)


# --- with a defense ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", [FIRST, BLOCK], ids=["behind-an-earlier-block", "behind-the-edited-block"])
def test_the_defended_map_has_each_edit_once_and_the_plain_one_none(tiny_clip, point):
    """Set to a value, a latent that is edited twice would still be right; halved, it would not."""
    from dataclasses import replace

    from ..conftest import clip_of, random_defense

    sae, latents = random_sae(), a_set(gains=(0.5,) * 40)
    clip = clip_of(tiny_clip)
    pixels = torch.from_numpy(clip.preprocess(_image())[None])
    with torch.inference_mode():
        stock = clip.tower.resid(pixels, FIRST)
        blocks = tiny_clip.visual.transformer.resblocks
        edited = Suppressor(sae, latents)
        rows = []
        for patch in range(1, 17):
            pair = [0, patch]
            x = edited(blocks[1](stock[:, pair])) if point == FIRST else edited(blocks[1](stock))[:, pair]
            rows.append(tiny_clip.visual.ln_post(blocks[2](x)[:, 0]) @ tiny_clip.visual.proj)
        want = functional.normalize(torch.cat(rows), dim=-1).numpy()
        plain = patch_embeds(clip.tower, clip.tower.resid(pixels, point), point)[0].numpy()
    defense = replace(random_defense(tiny_clip, (1, sae, latents)), preprocess=clip.preprocess)
    clf = RobustClassifier(clip, defense).set_labels(LABELS)
    found = patch_labels(clf, _image(), hook_point=point)
    scale, text = clf.logit_scale, clf.text_embeds()
    np.testing.assert_allclose(found.robust, (scale * want @ text.T).reshape(4, 4, -1), atol=1e-3)
    np.testing.assert_allclose(found.plain, (scale * plain @ text.T).reshape(4, 4, -1), atol=1e-3)
    assert not np.allclose(found.plain, found.robust, atol=1e-2)


def _image():
    from PIL import Image

    return Image.fromarray(picture())


def test_strength_zero_is_the_plain_map_and_a_phrase_that_is_a_label_has_its_heat(defended):
    found = patch_labels(defended(a_set()), picture(), phrase="cat", less="boat", controls=Controls(strength=0))
    np.testing.assert_array_equal(found.plain, found.robust)
    cat, boat = LABELS.index("cat"), LABELS.index("boat")
    np.testing.assert_allclose(found.region.plain, found.plain[..., cat] - found.plain[..., boat], atol=1e-3)


# --- shares, regions, data --------------------------------------------------------------------------------------------


def test_shares_are_those_of_the_best_labels_and_all_is_json():
    plain = np.zeros((2, 3, 3), np.float32)
    plain[0, :, 2] = 1
    plain[1, 0, 1] = 1
    found = PatchLabels(FIRST, ("a", "b", "c"), plain, plain[::-1])
    assert found.shares() == [("c", 0.5), ("a", pytest.approx(1 / 3)), ("b", pytest.approx(1 / 6))]
    assert found.best(robust=True)[1].tolist() == [2, 2, 2]
    assert json.loads(json.dumps(found.to_dict()))["plain"][0][0] == [0, 0, 1]


def test_a_region_is_what_stands_out_and_a_flat_map_has_none():
    heat = np.full((4, 5), 20.0) + np.random.default_rng(0).normal(size=(4, 5)) * 0.1
    heat[1:3, 2:4] += 3
    want = np.zeros((4, 5), bool)
    want[1:3, 2:4] = True
    assert np.array_equal(region_of(heat), want)
    assert not region_of(np.full((3, 3), 7.0)).any()
    assert not region_of(np.ones((1, 1))).any()


def test_the_threshold_leaves_the_least_variance_within():
    values = np.random.default_rng(1).normal(size=(5, 5)) ** 3
    within = {
        cut: sum(((part - part.mean()) ** 2).sum() for part in (values[values <= cut], values[values > cut]))
        for cut in np.sort(values.ravel())[:-1]
    }
    assert threshold_of(values) == min(within, key=within.get)


# --- on drawn scenes --------------------------------------------------------------------------------------------------


def test_objects_are_found_where_they_were_drawn(embedded):
    """The share of the union that both have; the whole picture as the region has 0.25."""
    assert middle_of(embedded.clip.tower) == "blocks.2.hook_resid_post"
    found = []
    for case in draws.typographic(12, 4):
        scene = case.scene.clean()
        heat = patch_labels(embedded, scenes.render(scene), phrase=case.label).region.plain
        mask = subject_mask(scene).reshape(10, 8, 10, 8).mean((1, 3)) > 0.5
        region = region_of(heat)
        found.append((region & mask).sum() / (region | mask).sum())
    assert np.mean(found) > 0.5


def test_without_texts_there_are_no_labels_to_say():
    clip = Clip(timm_vit(class_token=True, global_pool="token"), _preprocess())
    with pytest.raises(ConfigError, match="no text tower"):
        patch_labels(RobustClassifier(clip).set_labels(LABELS), picture())


def _preprocess():
    from defense.data.preprocess import Preprocess

    return Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
