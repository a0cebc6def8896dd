"""Methods on latents: variants of a defense, controls, an SAE on embeddings."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.methods import FACTORIES, NotApplicableError, embedding_sae, make_methods, material, variants
from defense.benchmarks.methods.defended import Defended, defended
from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.fit.control import activity_of
from defense.hosts.families import tower_of

from ....conftest import D_MODEL, random_defense, random_sae
from .tower_material import NEED_A_SPLIT, NEED_NOTHING, embeds, groups_task, image_embeds, saved, words_task

# --- with the latents of a defense ------------------------------------------------------------------------------------


def test_activity_is_the_sum_over_tokens_and_pictures(clip, defense):
    task = words_task(5)
    site, (pixel_values,) = defense.sites[0], list(material.pixel_batches(clip, task.train.examples))
    found = activity_of(clip, site, [pixel_values[:2], pixel_values[2:]])
    resid = clip.tower.resid(pixel_values, site.hook_point)
    sae = random_sae(act="topk", k=8)
    np.testing.assert_allclose(found, sae.encode(resid).sum((0, 1)), rtol=1e-4)


def test_the_random_control_keeps_all_but_the_latents(clip, tiny_clip, tmp_path):
    sets = (LatentSet("a", (1, 2, 3), gains=(0.0, 0.5, 0.0), scope="cls"), LatentSet("b", (3, 4), edit="project"))
    defense = random_defense(tiny_clip, (1, random_sae(), sets[0]))
    defense = replace(defense, sites=(replace(defense.sites[0], sets=sets),))
    defense = saved(defense, tmp_path / "two")
    (method,) = make_methods(["random-latents@7"], defense)
    method.fit(clip, words_task())
    a, b = method._control.sites[0].sets
    assert (a.name, a.gains, a.scope, a.edit) == ("a", (0.0, 0.5, 0.0), "cls", "scale")
    assert (b.name, b.edit) == ("b", "project")
    assert a.latents[2] == b.latents[0]  # the same latent in both sets still is
    assert len({*a.latents, *b.latents}) == 4
    assert not {*a.latents, *b.latents} & {1, 2, 3, 4}
    assert method.settings()["seed"] == 7


@pytest.mark.parametrize("seed", ["0.5", "-1", "inf", "nan"])
def test_a_seed_is_a_whole_number(defense, seed):
    with pytest.raises(ConfigError, match="after @ comes a seed"):
        make_methods([f"random-latents@{seed}"], defense)


def identity_sae() -> SparseAutoencoder:
    """An SAE without error: a latent for each direction of each axis."""
    config = SAEConfig(D_MODEL, 2 * D_MODEL, "relu")
    eye = np.eye(D_MODEL, dtype=np.float32)
    both = np.concatenate([eye, -eye])
    zeros = np.zeros(2 * D_MODEL, np.float32)
    return SparseAutoencoder(config, {"W_enc": both.T, "b_enc": zeros, "W_dec": both, "b_dec": zeros[:D_MODEL]})


def test_a_naive_splice_of_an_sae_without_error_is_the_defense(clip, tiny_clip, tmp_path):
    latent_set = LatentSet("text", tuple(range(0, 100, 3)), gains=(0.25,) * 34, scope="patch")
    defense = saved(random_defense(tiny_clip, (1, identity_sae(), latent_set)), tmp_path / "exact")
    task = words_task()
    (splice,) = make_methods(["naive-splice"], defense)
    want = image_embeds(Defended("defense", defense), clip, task.train)
    np.testing.assert_allclose(image_embeds(splice, clip, task.train), want, atol=1e-5)
    assert np.abs(want - material.image_embeds_of(clip, task.train.examples)).max() > 0.01


@pytest.mark.parametrize("tokens", ["all", "cls"])
def test_a_naive_splice_loses_the_error_at_the_tokens_of_the_sae(clip, tiny_clip, tmp_path, tokens):
    sae = random_sae(act="topk", k=8, tokens=tokens, norm="layer_norm")
    defense = saved(random_defense(tiny_clip, (1, sae, LatentSet("text", (3, 5)))), tmp_path / "lossy")
    (splice,) = make_methods(["naive-splice"], defense)
    tower, seen = tower_of(tiny_clip), []
    before = tower.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out))
    with splice.apply(clip):
        after = tower.blocks[1].register_forward_hook(lambda _m, _i, out: seen.append(out))
        embeds(clip)
        after.remove()
    before.remove()
    resid, spliced = seen
    acts = sae.encode(resid)
    assert (acts[..., [3, 5]] > 0).any()
    acts[..., [3, 5]] = 0
    n = 1 if tokens == "cls" else None
    torch.testing.assert_close(spliced[:, :n], sae.decode(acts, resid)[:, :n])
    if n:
        assert torch.equal(spliced[:, n:], resid[:, n:])


def test_a_naive_splice_refuses_another_host(clip, defense):
    with torch.no_grad():
        clip.model.visual.proj.mul_(2)
    (splice,) = make_methods(["naive-splice"], defense)
    with pytest.raises(ConfigError, match="was fitted on the weights"), splice.apply(clip):
        pass


def test_another_edit_is_the_defense_with_that_edit(clip, tiny_clip, tmp_path, defense):
    latent_set = replace(defense.sites[0].sets[0], edit="scale")
    scaling = saved(random_defense(tiny_clip, (1, random_sae(act="topk", k=8), latent_set)), tmp_path / "scaling")
    task = words_task()
    (method,) = make_methods(["defense-scale@0.5"], defense)
    method.fit(clip, task)
    want = image_embeds(Defended("defense", scaling, 0.5), clip, task.train)
    np.testing.assert_array_equal(image_embeds(method, clip, task.train), want)
    assert np.abs(want - image_embeds(Defended("defense", defense, 0.5), clip, task.train)).max() > 1e-3
    assert method.settings() == {"defense_sha256": defense.manifest_sha256, "strength": 0.5, "edit": "scale"}


def test_the_edit_that_a_defense_has_is_no_row_of_its_own(clip, defense):
    (method,) = make_methods(["defense-project"], defense)
    with pytest.raises(NotApplicableError, match="has this edit anyway"):
        method.fit(clip, words_task())


def test_delta_is_the_calibrated_defense(clip, defense):
    task = words_task()
    (method,) = make_methods(["defense-delta"], defense)
    method.fit(clip, task)
    from defense.fit.calibrate import calibrated

    pixels = np.concatenate(
        [
            batch
            for dataset in (task.train, task.train_clean)
            for batch in material.pixel_batches(clip, dataset.examples)
        ]
    )
    by_threshold, calibration = calibrated(
        clip,
        defense,
        torch.from_numpy(pixels),
        least_agreement=0,
        text_embeds=material.class_embeds_of(clip, task.train),
        groups=np.arange(len(pixels)) % (len(pixels) // 2),
    )
    with defended(clip, by_threshold) as encoder:
        want = encoder.image_embeds([example.picture.load() for example in task.train.examples])
    np.testing.assert_array_equal(image_embeds(method, clip, task.train), want)
    assert method.settings()["agreement"] == calibration.agreement


def test_delta_refuses_a_defense_whose_latents_decide_alone(clip, tiny_clip, tmp_path):
    relu = saved(random_defense(tiny_clip, (1, random_sae(), LatentSet("text", (1, 2)))), tmp_path / "relu")
    (method,) = make_methods(["defense-delta"], relu)
    with pytest.raises(NotApplicableError, match="decide alone already"):
        method.fit(clip, words_task())


def test_the_variants_leave_the_defense_as_it_was(clip, defense):
    before = [site.sets for site in defense.sites]
    assert variants.with_edit(defense, "scale").sites[0].sets[0].edit == "scale"
    assert [site.sets for site in defense.sites] == before


# --- an SAE on embeddings ---------------------------------------------------------------------------------------------


def test_contrast_is_the_mean_over_labels_and_passes_lonely_ones_over():
    label = np.array([0, 0, 0, 1, 1, 2])
    cue = np.array([0, 0, 1, 0, 1, 1])
    acts = np.array([[1.0], [3.0], [5.0], [0.0], [1.0], [100.0]])
    np.testing.assert_array_equal(embedding_sae.contrast(acts, cue, label), [2.0])  # (3 + 1) / 2


def test_projecting_out_is_orthogonal_and_idempotent():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 3)))[0]
    x = np.random.default_rng(1).normal(size=(10, 32))
    edit = embedding_sae.without(basis)
    assert np.abs(edit(x) @ basis).max() < 1e-12
    np.testing.assert_allclose(edit(edit(x)), edit(x))
    np.testing.assert_array_equal(embedding_sae.without(np.zeros((32, 0)))(x), x)


def test_the_sae_on_embeddings_takes_out_a_cue_that_is_one_direction(clip, monkeypatch):
    """Embeddings are content, a label's direction, and with the cue another that leads to the second label."""
    first, second, cue, *content = np.linalg.qr(np.random.default_rng(0).normal(size=(32, 32)))[0].T
    class_embeds = np.stack([first - cue, second + cue])

    def planted(_host, examples):
        rng = np.random.default_rng(1)
        shown = (rng.random((len(examples), 20)) < 0.2) * rng.random((len(examples), 20)) @ content[:20]
        own = np.stack([(first, second)[example.label] + 0.8 * example.attribute * cue for example in examples])
        return (own + shown).astype(np.float32)

    monkeypatch.setattr(embedding_sae, "_STEPS", 500)
    monkeypatch.setattr(embedding_sae, "image_embeds_of", planted)
    monkeypatch.setattr(embedding_sae, "class_embeds_of", lambda _host, _dataset: class_embeds)
    (method,) = make_methods(["embedding-sae"], None)
    task = groups_task(800)
    method.fit(clip, task)
    examples = task.train.examples
    x = planted(clip, examples)
    edited = embedding_sae.without(method._basis)(x)
    assert material.accuracies(x, class_embeds, examples).min() == 0
    assert material.accuracies(edited, class_embeds, examples).min() > 0.8
    assert method.settings()["k"] in embedding_sae.KS


def test_nothing_is_projected_out_where_nothing_helps(clip, monkeypatch):
    monkeypatch.setattr(embedding_sae, "side_accuracies", lambda _x, _classes, _sides: (0.5, 0.5))
    (method,) = make_methods(["embedding-sae"], None)
    task = words_task()
    method.fit(clip, task)
    stock = material.image_embeds_of(clip, task.train.examples)
    np.testing.assert_allclose(image_embeds(method, clip, task.train), stock, atol=1e-6)
    assert method.settings()["k"] == 0


def test_every_method_of_this_file_is_registered():
    assert {*NEED_NOTHING, *NEED_A_SPLIT, "defense-project"} <= set(FACTORIES)
