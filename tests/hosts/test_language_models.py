"""A defended vision tower inside a language model: what it says changes, and what it cannot see is refused."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
import torch
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.errors import ConfigError, HookPointError
from defense.hosts.attach import detach, is_wrapped, wrap
from defense.hosts.clip import Clip
from defense.hosts.families import tower_of

from . import twins
from .twins import POINT, PREPROCESS, a_defense, pixels, random_site, vision_model


@pytest.fixture
def llava(clips):
    return twins.llava_of(vision_model(clips[1]))


def tokens(model, n: int = 12) -> list[int]:
    """What a language model says about a picture."""
    ids = torch.tensor([[1, *[199] * 16, 5, 7]])
    with torch.inference_mode():
        said = model.generate(
            input_ids=ids, pixel_values=pixels(1), attention_mask=torch.ones_like(ids), max_new_tokens=n,
            min_new_tokens=n, do_sample=False,
        )  # fmt: skip
    return said[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("has_run", [False, True], ids=["fresh", "after a pass"])
def test_what_a_language_model_says_changes_with_a_latent_and_is_what_it_was_after_detach(clips, llava, has_run):
    own, _ = clips
    if has_run:
        tokens(llava)  # after it, the recorder of hidden states is in place
    said = tokens(copy.deepcopy(llava))
    site = random_site(1, LatentSet("set", (3,), edit="set", values=(40.0,), scope="patch"))  # block n - 2
    defense = dataclasses.replace(a_defense(own), sites=(site,))
    wrap(llava, defense)
    assert tokens(llava) != said
    assert tokens(detach(llava)) == said
    with torch.inference_mode():
        states = [model.model.get_image_features(pixels()).pooler_output for model in (llava, copy.deepcopy(llava))]
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_an_edit_that_a_language_model_does_not_see_is_refused(clips, llava):
    own, _ = clips
    said = tokens(llava)
    for block, scope, why in ((2, "all", "after block 1"), (2, "patch", "after block 1"), (1, "cls", "only patches")):
        with pytest.raises(HookPointError, match=why):
            wrap(llava, a_defense(own, block=block, scope=scope))
        assert not is_wrapped(llava)
    for block, scope in ((1, "all"), (1, "patch"), (0, "cls")):
        wrap(llava, a_defense(own, block=block, scope=scope))
        detach(llava)
    assert tokens(llava) == said
    tower = tower_of(llava)
    assert (tower.n_read, tower.reads) == (2, "patch")
    assert tower.positions(POINT, "all") == slice(1, None)


@pytest.mark.parametrize(
    ("settings", "n_read", "reads"),
    [
        ({"vision_feature_layer": -1}, 3, "patch"),
        ({"vision_feature_layer": [-3, -2]}, 2, "patch"),
        ({"vision_feature_layer": 1, "vision_feature_select_strategy": "full"}, 1, "all"),
    ],
)
def test_the_last_block_that_counts_is_the_last_that_is_read(clips, settings, n_read, reads):
    model = twins.llava_of(vision_model(clips[1]), **settings)
    tower = tower_of(model)
    assert (tower.n_read, tower.reads) == (n_read, reads)
    last = f"blocks.{n_read - 1}.hook_resid_post"
    resid = tower.resid(pixels(), last)
    seen = resid[:, 1:] if reads == "patch" else resid
    torch.testing.assert_close(tower.encode(pixels()), seen.mean(1), atol=1e-6, rtol=0)
    torch.testing.assert_close(tower.embeds_from(resid, last), Clip(model, PREPROCESS).image_embeds(pixels()))
    with pytest.raises(HookPointError, match="blocks 0 to 2"):
        tower.positions("blocks.3.hook_resid_post")


def test_a_language_model_that_reads_no_block_is_refused(clips):
    with pytest.raises(HookPointError, match="before the first block"):
        tower_of(twins.llava_of(vision_model(clips[1]), vision_feature_layer=0))


def test_the_embedding_of_a_picture_in_a_language_model_is_defended(clips, llava, processor):
    clf = RobustClassifier(Clip.from_transformers(llava, processor), a_defense(clips[0]))
    with pytest.raises(ConfigError, match="has no text tower"):  # its tokenizer is the language model's
        clf.set_labels(["a", "b"]).text_embeds()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    robust = clf.transform([picture])
    assert np.abs(robust - clf.encode_pixels(PREPROCESS(picture)[None], plain=True)).max() > 1e-3
