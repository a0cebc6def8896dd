"""The same SAE on two towers, of which the second was changed in a known way."""

from __future__ import annotations

import copy

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from safetensors.torch import save_file

from defense.core.latents import LatentSet
from defense.data.labels import Prompts
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError, ShapeError
from defense.explain import catalogue
from defense.explain.against import Against, lines_of
from defense.hosts.attach import wrap
from defense.hosts.clip import Clip

from ..command import run
from ..conftest import D_MODEL, D_SAE, clip_of, random_defense, random_sae
from .described import POINT, WORDS, acts_and_embeds, described

CLASSES = ("a", "b")
COLUMNS = ("against_frequency", "against_mean_activation", "against_steerability", "change", "overlap")


@pytest.fixture
def clip(tiny_clip) -> Clip:
    return clip_of(tiny_clip)


@pytest.fixture
def other(tiny_clip) -> Clip:
    """A copy to change."""
    return clip_of(copy.deepcopy(tiny_clip))


def acts_of(clip: Clip, pictures) -> np.ndarray:
    return acts_and_embeds(clip, pictures)[0]


def test_of_a_tower_that_is_the_same_nothing_changed(clip, other, pictures):
    found = described(clip, pictures, against=other, classes=CLASSES)
    fires = found.columns["frequency"] > 0
    assert not found.columns["change"].any()
    assert (found.columns["overlap"][fires] == 1).all()
    assert np.isnan(found.columns["overlap"][~fires]).all()
    for name in ("frequency", "mean_activation", "steerability"):
        np.testing.assert_array_equal(found.columns[f"against_{name}"], found.columns[name], err_msg=name)
    compared = found.provenance["against"]
    assert compared["host"] == clip.tower.fingerprint()
    assert compared["differ"][0] == 0
    assert compared["accuracy"][0] == compared["accuracy"][1]
    assert (compared["n_changed"], compared["top"]) == (0, [])
    assert compared["tokens"] == found.provenance["tokens"]
    assert compared["explained_change"] is None
    assert "the stream changed by nothing" in "\n".join(lines_of(compared))


def test_columns_are_those_of_the_activations_in_both_towers(clip, other, pictures):
    with torch.no_grad():
        for parameter in other.model.visual.transformer.resblocks[1].parameters():
            parameter.mul_(0.8)
    before, after = acts_of(clip, pictures), acts_of(other, pictures)
    found = described(clip, pictures, against=other, batch=5, classes=CLASSES)
    np.testing.assert_allclose(found.columns["against_frequency"], (after > 0).mean((0, 1)), rtol=1e-5)
    with np.errstate(invalid="ignore"):
        mean = after.sum((0, 1)) / (after > 0).sum((0, 1))
        overlap = np.minimum(before, after).sum((0, 1)) / np.maximum(before, after).sum((0, 1))
    np.testing.assert_allclose(found.columns["against_mean_activation"], mean, rtol=1e-4)
    np.testing.assert_allclose(found.columns["overlap"], overlap, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(found.columns["change"], np.abs(after - before).mean((0, 1)), rtol=1e-3, atol=1e-5)
    compared = found.provenance["against"]
    assert compared["n_changed"] == (overlap < 0.5).sum() > 0
    assert compared["n_fire"] == (~np.isnan(overlap)).sum()
    first = compared["top"][0]
    assert first["latent"] == int(found.columns["change"].argmax())
    more = (after.max(1) - before.max(1))[:, first["latent"]]
    want = {name: more[place::3].mean() for place, name in enumerate(CLASSES)}  # pictures without a class do not count
    assert dict(first["classes"]) == pytest.approx(want, abs=1e-3)


def test_a_latent_that_was_written_on_the_pictures_of_one_class_is_the_one_that_changed_there(clip, other, pictures):
    """The second tower adds a latent's own row to the stream, on pictures of class "b" alone."""
    sae, latent = random_sae(), 7
    b = torch.tensor([picture.label == "b" for picture in pictures])
    direction = sae.W_enc[:, latent] / sae.W_enc[:, latent].norm()

    def write(resid: torch.Tensor) -> torch.Tensor:
        return resid + 6 * b[:, None, None] * direction

    sums = Against(clip, other, POINT, sae, Prompts(CLASSES, ("{}",)), 2, 0)
    with other.tower.changed(POINT, write), torch.inference_mode():
        resid, embeds = clip.tower.resid_and_embeds(np.stack([each.pixel_values for each in pictures]), POINT)
        sums.add(pictures, resid, sae.encode(resid), embeds)
    assert int((sums.larger - sums.smaller).argmax()) == latent
    by_class = {CLASSES[number]: total[latent] / sums.n_of_class[number] for number, total in sums.by_class.items()}
    assert by_class["a"] == 0
    assert by_class["b"] > 3


def test_training_what_is_behind_the_sae_changes_no_latent_but_what_latents_do(clip, other, pictures):
    """A small fine-tuning of the last block: what the SAE reads is in front of it."""
    last = other.model.visual.transformer.resblocks[2]
    last.requires_grad_(True)
    pixels = torch.from_numpy(np.stack([picture.pixel_values for picture in pictures]))
    target = torch.from_numpy(other.text_embeds(Prompts(WORDS, ("{}",))))[torch.arange(len(pictures)) % 2]
    optimizer = torch.optim.Adam(last.parameters(), 3e-3)
    for _ in range(20):
        optimizer.zero_grad()
        (-(torch.nn.functional.normalize(other.model.encode_image(pixels), dim=-1) * target).sum()).backward()
        optimizer.step()
    found = described(clip, pictures, against=other)
    compared = found.provenance["against"]
    assert compared["differ"][0] > 0
    assert (compared["n_changed"], compared["stream_change"]) == (0, 0)
    fires = found.columns["frequency"] > 0
    moved = found.columns["against_steerability"][fires] - found.columns["steerability"][fires]
    assert np.abs(moved).max() > 1e-3
    assert compared["accuracy"] is None, "without classes nobody can be right"


def test_what_latents_account_for_tells_a_change_that_they_see_from_one_that_they_do_not(clip, other, pictures):
    sae = random_sae()
    with torch.no_grad():  # a dictionary of one direction, which is coded exactly
        sae.W_enc.zero_(), sae.W_dec.zero_(), sae.b_enc.zero_(), sae.b_dec.zero_()
        sae.W_enc[3, 0] = sae.W_dec[0, 3] = 1
    for channel, want in ((3, 1), (5, 0)):
        sums = Against(clip, other, POINT, sae, Prompts(CLASSES, ("{}",)), 2, 0)
        push = 50 * torch.eye(D_MODEL)[channel]
        with other.tower.changed(POINT, lambda resid, push=push: resid + push), torch.inference_mode():
            resid, embeds = clip.tower.resid_and_embeds(np.stack([each.pixel_values for each in pictures]), POINT)
            resid = resid.clone()
            sums.add(pictures, resid, sae.encode(resid), embeds)
        columns = dict.fromkeys((*COLUMNS, "frequency", "mean_activation", "steerability"), np.zeros(D_SAE))
        assert sums.result(columns)["explained_change"] == pytest.approx(want, abs=0.05)


def test_towers_that_see_other_pictures_or_other_places_are_refused(clip, other, pictures, tiny_clip):
    prepared_otherwise = Clip(other.model, Preprocess((32, 32), (0.1,) * 3, (0.5,) * 3, "bicubic", "shortest"))
    with pytest.raises(ConfigError, match="prepared with"):
        described(clip, pictures, against=prepared_otherwise)
    import open_clip

    vision = {"image_size": 32, "layers": 3, "width": D_MODEL, "head_width": 32, "patch_size": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    with pytest.raises(ConfigError, match="grid_size"):
        described(clip, pictures, against=clip_of(open_clip.CLIP(32, vision, text).eval()))
    narrow = clip_of(open_clip.CLIP(32, {**vision, "width": 32, "patch_size": 8}, text).eval())
    with pytest.raises(ShapeError, match="d_model"):
        described(clip, pictures, against=narrow)


def test_a_defense_on_the_other_tower_is_bypassed(clip, other, pictures):
    wrap(other.model, random_defense(other.model, (0, random_sae(), LatentSet("a", tuple(range(60))))))
    assert not described(clip, pictures, against=other).columns["change"].any()


def test_the_command_compares_searches_and_keeps_it(describing, tiny_clip, tiny_folder, tmp_path):
    tuned = tmp_path / "tuned"
    tuned.mkdir()
    (tuned / "open_clip_config.json").write_text((tiny_folder / "open_clip_config.json").read_text())
    state = {name: tensor.clone() for name, tensor in tiny_clip.state_dict().items() if name != "attn_mask"}
    state["visual.transformer.resblocks.0.mlp.c_proj.bias"] += 0.5 * torch.randn(D_MODEL)
    save_file(state, tuned / "open_clip_model.safetensors")
    arguments = [*describing, "--classes", tmp_path / "classes.txt"]
    (tmp_path / "phrases.txt").write_text("a red {}\n{} on a tree\n")
    (tmp_path / "tree.csv").write_text("class,parent\ncat,feline\ndog,canine\nfeline,animal\ncanine,animal\n")
    more = ["--phrases", tmp_path / "phrases.txt", "--tree", tmp_path / "tree.csv"]
    code, out, err = run(*arguments, "--against", f"local-dir:{tuned}", *more)
    assert code == 0, err
    assert "answers differ on" in out
    assert "latents account for" in out
    assert "of random directions" in out
    assert "2 the deepest class" in out
    found = catalogue.load(tmp_path / "out")[POINT]
    assert {*COLUMNS, "tree_depth"} <= set(found.columns)
    assert set(found.columns["tree_depth"][~np.isnan(found.columns["tree_depth"])]) <= {0, 2}
    assert found.provenance["against_model"] == f"local-dir:{tuned}"
    assert found.provenance["against"]["accuracy"] is not None
    (tmp_path / "phrases.txt").write_text("a red apple\n")
    code, _, err = run(*arguments, "--phrases", tmp_path / "phrases.txt")
    assert code == 2
    assert "a red apple" in err
    (tmp_path / "tree.csv").write_text("class,parent\ncat,feline\n")
    code, _, err = run(*arguments, "--tree", tmp_path / "tree.csv")
    assert code == 2
    assert "'dog' is not in the tree" in err
    code, _, err = run(*arguments[:-2], "--tree", tmp_path / "tree.csv")
    assert code == 2
    assert "--classes" in err
    code, _, err = run(*arguments, "--against", f"local-dir:{tmp_path / 'nowhere'}")
    assert code == 2
    assert "nowhere" in err
