"""Models of transformers as hosts: the same fingerprints and defended answers as their twins of open_clip and timm."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
import torch
import transformers
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError, HookPointError, MissingDependencyError
from defense.hosts.attach import detach, is_wrapped, wrap
from defense.hosts.clip import Clip, load_clip
from defense.hosts.families import tower_of
from defense.hosts.transformers_inputs import preprocess_of
from defense.store import defenses

from ..conftest import D_MODEL, random_sae
from . import twins

POINT = "blocks.1.hook_resid_post"
PREPROCESS = Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")
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


@pytest.fixture
def clips():
    return twins.open_clip_pair()


def pixels(n: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def a_defense(model, *, block: int = 1, **fields):
    """A defense fitted, so to say, on a model; `fields` of its latent set."""
    latent_set = LatentSet("text", tuple(range(60)), **fields)
    clip_id = Clip(model, PREPROCESS).id_as("twin")
    site = random_site(block, latent_set)
    return defenses.Defense(clip_id, PREPROCESS, (site,))


def random_site(block: int, latent_set: LatentSet):
    from defense.hosts.defense import Site

    sae = random_sae(act="topk", k=20)
    return Site(f"blocks.{block}.hook_resid_post", sae.config, sae.parameters_numpy(), (latent_set,))


def embeds(model) -> torch.Tensor:
    return Clip(model, PREPROCESS).image_embeds(pixels())


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


def vision_model(clip, **settings):
    """The vision tower of a CLIP of transformers alone."""
    model = transformers.CLIPVisionModel(clip.config.vision_config)
    model.load_state_dict(clip.vision_model.state_dict())
    return model.eval()


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


# --- in a language model ----------------------------------------------------------------------------------------------


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


def test_the_embedding_of_a_picture_in_a_language_model_is_defended(clips, llava):
    clf = RobustClassifier(Clip.from_transformers(llava, PREPROCESS), a_defense(clips[0]))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    robust = clf.transform([picture])
    assert np.abs(robust - clf.encode_pixels(PREPROCESS(picture)[None], plain=True)).max() > 1e-3


# --- processors and pipelines -----------------------------------------------------------------------------------------


def image_processor(**settings):
    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3,
    ) if not settings else transformers.CLIPImageProcessor(**settings)  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """CLIP's own, as transformers has it."""
    from defense.data.tokenizer import _bpe

    vocabulary = dict(_bpe().get_vocab())
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    merges = tuple(tuple(pair) for pair in __import__("json").loads(_bpe().to_str())["model"]["merges"])
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=list(merges), model_max_length=16)


@pytest.fixture
def processor(tokenizer):
    return transformers.CLIPProcessor(image_processor=image_processor(), tokenizer=tokenizer)
