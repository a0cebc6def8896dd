"""Slim defenses: the same answers from the latents of S alone, and a clear word for whatever needs the others."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.errors import CheckpointError, ConfigError
from defense.fit.control import activity_of
from defense.hosts.controls import Controls
from defense.hosts.defense import join
from defense.hosts.slim import restored, slim, slim_site
from defense.store import defenses
from defense.store.defenses import MANIFEST, load, save

from ..conftest import D_MODEL, D_SAE, clip_of, random_defense, random_sae

S = (7, 3, 150, 42, 0)
POINT = "blocks.1.hook_resid_post"
ALONE = [
    {"act": "relu"},
    {"act": "jumprelu"},
    {"act": "batchtopk"},
    {"act": "gated"},
    {"act": "relu", "norm": "layer_norm", "subtract_b_dec": False},
    {"act": "gated", "norm": "constant_norm_rescale", "subtract_b_dec": False},
]


def pixels(n: int = 3) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def a_defense(model, latents=S, edit="scale", name="text", **fields):
    values = tuple(range(len(latents))) if edit == "set" else ()
    return random_defense(model, (1, random_sae(**fields), LatentSet(name, tuple(latents), edit=edit, values=values)))


def embeds(model, defense) -> torch.Tensor:
    clip = clip_of(model)
    with clip.defended(defense):
        return clip.image_embeds(pixels())


@pytest.mark.parametrize("edit", ["scale", "project", "set"])
@pytest.mark.parametrize("fields", ALONE, ids=lambda fields: "-".join(map(str, fields.values())))
def test_a_slim_defense_answers_bit_for_bit_as_the_whole(tiny_clip, fields, edit, tmp_path):
    whole = a_defense(tiny_clip, edit=edit, **fields)
    small = slim(whole)
    assert small.sites[0].parameters["W_enc"].shape == (D_MODEL, len(S))
    assert small.sites[0].part.latents == tuple(sorted(S))
    assert torch.equal(embeds(tiny_clip, small), embeds(tiny_clip, whole))
    assert not torch.equal(embeds(tiny_clip, small), clip_of(tiny_clip).image_embeds(pixels()))
    read = load(save(small, tmp_path / "slim"))
    assert torch.equal(embeds(tiny_clip, read), embeds(tiny_clip, whole))
    assert slim(small) == small


@pytest.mark.parametrize("fields", [{"act": "relu"}, {"act": "topk", "k": 8}], ids=["slim", "whole"])
def test_a_defense_that_spares_patches_of_high_norm_does_so_slim_stored_and_read(tiny_clip, fields, tmp_path):
    touching = a_defense(tiny_clip, **fields)
    (site,) = touching.sites
    sparing = replace(touching, sites=(replace(site, sets=(replace(site.sets[0], spares_high_norm=True),)),))
    read = load(save(slim(sparing), tmp_path / "slim"))
    assert read.sites[0].sets[0].spares_high_norm
    assert torch.equal(embeds(tiny_clip, sparing), embeds(tiny_clip, touching)), "nothing stands out here"
    is_store = torch.arange(17)[:, None] == 5
    tower = clip_of(tiny_clip).tower
    with tower.changed("blocks.0.hook_resid_post", lambda resid: torch.where(is_store, 20 * resid, resid)):
        assert torch.equal(embeds(tiny_clip, read), embeds(tiny_clip, sparing))
        assert not torch.equal(embeds(tiny_clip, read), embeds(tiny_clip, touching))


def test_a_wide_sae_is_cut_to_the_same_bits_whatever_the_width_of_its_products(tiny_clip):
    for seed, n in ((1, 1), (2, 2), (3, 17), (4, 63)):
        sae = random_sae(seed, d_sae=5001)
        latents = np.random.default_rng(seed).choice(5001, n, replace=False).tolist()
        whole = random_defense(tiny_clip, (1, sae, LatentSet("text", tuple(latents))))
        assert torch.equal(embeds(tiny_clip, slim(whole)), embeds(tiny_clip, whole)), n


def test_a_rule_whose_latents_compete_stays_whole(tiny_clip):
    whole = a_defense(tiny_clip, act="topk", k=8)
    assert slim(whole).sites[0] is whole.sites[0]
    part = slim(a_defense(tiny_clip)).sites[0].part
    with pytest.raises(ConfigError, match="compete"):
        embeds(tiny_clip, replace(whole, sites=(replace(whole.sites[0], part=part),)))


def test_a_slim_defense_is_small_and_an_old_one_still_loads(tiny_clip, tmp_path):
    whole = a_defense(tiny_clip)
    save(whole, tmp_path / "whole")
    assert json.loads((tmp_path / "whole" / MANIFEST).read_text())["schema"] == 1, "older versions read it too"
    save(slim(whole), tmp_path / "slim")
    assert json.loads((tmp_path / "slim" / MANIFEST).read_text())["schema"] == 2
    sizes = [(tmp_path / name / "site-0.safetensors").stat().st_size for name in ("whole", "slim")]
    assert sizes[1] * 10 < sizes[0]
    read = load(tmp_path / "whole")
    assert read.sites[0].part is None
    assert torch.equal(embeds(tiny_clip, read), embeds(tiny_clip, whole))


def test_what_needs_a_latent_that_is_not_held_says_so(tiny_clip):
    small = slim(a_defense(tiny_clip))
    clf = RobustClassifier(clip_of(tiny_clip), small).set_labels(["dog", "cat"])
    picture = np.zeros((32, 32, 3), np.uint8)
    says = f"latent 1 is not in a slim defense, which holds only the 5 of {D_SAE} latents"
    with pytest.raises(ConfigError, match=says):
        clf.latent_map(picture, POINT, 1)
    with pytest.raises(ConfigError, match=says):
        clf.explain(picture, controls=Controls(steer={(POINT, 1): 3.0}))
    with pytest.raises(ConfigError, match=f"there is no latent {D_SAE}"):
        clf.latent_map(picture, POINT, D_SAE)
    with pytest.raises(ConfigError, match="every latent of the SAE"):
        activity_of(clf.clip, small.sites[0], [pixels().numpy()])
    assert clf.explain(picture, controls=Controls(steer={(POINT, 7): 3.0})).removed


@pytest.mark.parametrize("fields", [{"act": "relu"}, {"act": "gated"}, {"act": "batchtopk"}])
def test_a_latent_that_is_held_has_the_map_that_it_has_in_the_whole(tiny_clip, fields):
    whole = a_defense(tiny_clip, **fields)
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    maps = []
    for defense in (whole, slim(whole)):
        clip = clip_of(tiny_clip)
        with clip.defended(defense):
            from defense.hosts.attach import sae_of

            maps.append(clip.latent_map(POINT, sae_of(defense.sites[0]), 150, picture))
    np.testing.assert_allclose(maps[1], maps[0], atol=1e-5)


@pytest.mark.parametrize("fields", [{"act": "relu"}, {"act": "batchtopk"}, {"act": "gated"}])
def test_the_whole_sae_can_be_put_back(tiny_clip, fields):
    whole = a_defense(tiny_clip, **fields)
    saes = [random_sae(3), random_sae(**fields)]
    again = restored(slim(whole), saes)
    assert again.sites[0].part is None
    assert again.sites[0].sae_config == whole.sites[0].sae_config
    for name, tensor in whole.sites[0].parameters.items():
        np.testing.assert_array_equal(again.sites[0].parameters[name], tensor)
    assert restored(whole, []) == whole
    with pytest.raises(ConfigError, match=r"is not among the 1 that were given"):
        restored(slim(whole), saes[:1])


def test_a_calibrated_defense_gets_its_topk_sae_back_with_thresholds(tiny_clip):
    sae = random_sae(act="topk", k=8)
    config = replace(sae.config, act="batchtopk", k=None)
    threshold = np.full(D_SAE, 0.25, np.float32)
    threshold[list(S)] = np.arange(len(S)) / 10
    whole = a_defense(tiny_clip, act="topk", k=8)
    site = replace(whole.sites[0], sae_config=config, parameters={**whole.sites[0].parameters, "threshold": threshold})
    small = slim_site(site)
    assert small.part.elsewhere == 0.25
    (again,) = restored(replace(whole, sites=(small,)), [sae]).sites
    assert again.sae_config == config
    np.testing.assert_array_equal(again.parameters["threshold"], threshold)


def test_slim_defenses_of_one_sae_join_to_one_site_that_edits_each_latent_once(tiny_clip):
    first, second = a_defense(tiny_clip, (9, 3, 20), name="a"), a_defense(tiny_clip, (20, 4, 100), name="b")
    (site,) = join([slim(first), slim(second)]).sites
    assert site.part.latents == (3, 4, 9, 20, 100)
    joined = [embeds(tiny_clip, join(pair)) for pair in ([first, second], [slim(first), slim(second)])]
    assert torch.equal(*joined)
    other = slim(random_defense(tiny_clip, (1, random_sae(1), LatentSet("b", (4, 100)))))
    assert len(join([slim(first), other]).sites) == 2


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda part: part.update(latents=[3, 1, 7, 42, 150]), "must rise"),
        (lambda part: part.update(latents=[0, 3, 7, 42, D_SAE]), "must rise"),
        (lambda part: part.update(latents=[0, 3, 7, 42]), r"SAE tensor \w+ is"),
        (lambda part: part.update(latents=["0"]), "whole numbers"),
        (lambda part: part.pop("hashes"), "has the keys"),
        (lambda part: part.update(hashes=[1, 2]), "two hashes"),
    ],
    ids=["order", "range", "number", "type", "missing", "hashes"],
)
def test_a_manifest_that_contradicts_the_tensors_is_refused(tiny_clip, tmp_path, change, says):
    folder = save(slim(a_defense(tiny_clip)), tmp_path / "slim")
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest["sites"][0]["part"])
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises((CheckpointError, ValueError), match=says):
        embeds(tiny_clip, defenses.load(folder))


def test_a_slim_defense_exports_and_names_its_sae(tiny_clip):
    vision = pytest.importorskip("defense.export.vision")
    from defense.export.bundle import describe_defense
    from defense.hosts.attach import detach, wrap

    small = slim(a_defense(tiny_clip))
    assert describe_defense(small)["sites"][0]["d_sae"] == D_SAE
    wrap(tiny_clip, small)
    graph = vision.VisionGraph(tiny_clip, "delta")
    with torch.no_grad(), graph.in_place():
        got, _ = graph(pixels(), torch.zeros(1, 32))
    detach(tiny_clip)
    torch.testing.assert_close(got, embeds(tiny_clip, small), atol=2e-6, rtol=0)


def test_a_rounded_sae_is_stored_slim_with_the_bits_that_it_has_whole(tiny_clip, tmp_path):
    sae = random_sae(act="batchtopk").rounded(np.float16)
    whole = random_defense(tiny_clip, (1, sae, LatentSet("text", S)))
    save(whole, tmp_path / "whole", dtype=np.float16)
    save(slim(whole), tmp_path / "slim", dtype=np.float16)
    assert torch.equal(embeds(tiny_clip, load(tmp_path / "slim")), embeds(tiny_clip, load(tmp_path / "whole")))
    assert torch.equal(embeds(tiny_clip, load(tmp_path / "slim")), embeds(tiny_clip, whole))


def test_an_sae_put_back_by_its_own_rule_competes_again(tiny_clip):
    exact = a_defense(tiny_clip, act="topk", k=8)
    threshold = np.full(D_SAE, 0.25, np.float32)
    config = replace(exact.sites[0].sae_config, act="batchtopk", k=None)
    parameters = {**exact.sites[0].parameters, "threshold": threshold}
    calibrated = replace(exact, sites=(replace(exact.sites[0], sae_config=config, parameters=parameters),))
    again = restored(slim(calibrated), [random_sae(act="topk", k=8)], own_rule=True)
    assert again.sites[0].sae_config == exact.sites[0].sae_config
    assert torch.equal(embeds(tiny_clip, again), embeds(tiny_clip, exact))
