"""Models of transformers as hosts: the same fingerprints and defended answers as their twins of open_clip and timm."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys
from types import SimpleNamespace

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
from defense.data.tokenizer import ClipTokenizer, _bpe
from defense.errors import ConfigError, HookPointError, MissingDependencyError
from defense.fit.config import FitConfig
from defense.fit.material import Pairs
from defense.fit.selecting import TextFit
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


def test_the_embedding_of_a_picture_in_a_language_model_is_defended(clips, llava, processor):
    clf = RobustClassifier(Clip.from_transformers(llava, processor), a_defense(clips[0]))
    with pytest.raises(ConfigError, match="has no text tower"):  # its tokenizer is the language model's
        clf.set_labels(["a", "b"]).text_embeds()
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))
    robust = clf.transform([picture])
    assert np.abs(robust - clf.encode_pixels(PREPROCESS(picture)[None], plain=True)).max() > 1e-3


# --- processors and pipelines -----------------------------------------------------------------------------------------


FRAME = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
LABELS = ["cat", "red fish", "3 dogs!"]


@pytest.fixture(scope="module")
def tokenizer():
    """CLIP's own, as transformers has it."""
    bpe = json.loads(_bpe().to_str())["model"]
    vocabulary = bpe["vocab"] | {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    merges = [tuple(merge) for merge in bpe["merges"]]
    return transformers.CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=16)


@pytest.fixture
def processor(tokenizer):
    image_processor = transformers.CLIPImageProcessor(**FRAME, **HALF)
    return transformers.CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer)


def pictures(n: int = 3) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (40, 48, 3), dtype=np.uint8)) for _ in range(n)]


@pytest.mark.parametrize(
    ("processor", "want"),
    [
        (transformers.CLIPImageProcessor(**FRAME, **HALF), PREPROCESS),
        (
            transformers.SiglipImageProcessor(size={"height": 32, "width": 48}, resample=2, **HALF),
            Preprocess((32, 48), (0.5,) * 3, (0.5,) * 3, "bilinear", "squash"),
        ),
        (
            transformers.CLIPImageProcessor(),
            Preprocess.from_open_clip({"size": 224}),
        ),
    ],
    ids=["shortest", "squash", "CLIP's own"],
)
def test_a_processor_becomes_the_preparation_that_it_describes(processor, want):
    assert preprocess_of(processor) == want
    assert Preprocess.from_image_processor(json.loads(processor.to_json_string())) == want


def test_a_prepared_picture_is_the_processors_but_for_its_resizing():
    prepared = transformers.CLIPImageProcessor(**FRAME, **HALF)(images=pictures(), return_tensors="np")["pixel_values"]
    own = np.stack([PREPROCESS(picture) for picture in pictures()])
    assert np.abs(prepared - own).mean() < 0.01


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 32, "width": 32}}, "resizes to"),
        ({"size": {"shortest_edge": 32}, "do_center_crop": False}, "resizes to"),
        ({**FRAME, "do_resize": False}, "do_resize"),
        ({**FRAME, "do_normalize": False}, "do_normalize"),
        ({**FRAME, "do_rescale": False}, "do_rescale"),
        ({**FRAME, "rescale_factor": 1 / 127.5}, "want 1/255"),
        ({**FRAME, "do_pad": True}, "pads"),
        ({**FRAME, "resample": 0}, "interpolation is '0'"),
        ({"size": None, "do_center_crop": False, "max_num_patches": 256}, "resizes to None"),
        ({**FRAME, "image_mean": None}, "mean is"),
    ],
)
def test_a_processor_that_does_something_else_is_refused(settings, why):
    with pytest.raises(ConfigError, match=why):
        Preprocess.from_image_processor({**FRAME, "do_center_crop": True, **HALF, **settings})


def test_a_processor_is_held_against_the_defense(clips, processor, tokenizer):
    own, twin = clips
    defense = a_defense(own)
    other = transformers.CLIPImageProcessor(**FRAME)  # with CLIP's own mean
    for wrong in (other, transformers.CLIPProcessor(image_processor=other, tokenizer=tokenizer)):
        with pytest.raises(ConfigError, match="pictures prepared with"):
            wrap(twin, defense, processor=wrong)
        assert not is_wrapped(twin)
        with pytest.raises(ConfigError, match="pictures prepared with"):
            RobustClassifier(Clip.from_transformers(twin, wrong), defense)
    with pytest.raises(ConfigError, match="prepares no pictures"):
        wrap(twin, defense, processor=tokenizer)
    with pytest.raises(ConfigError, match="takes pictures of"):
        Clip.from_transformers(twin, transformers.CLIPImageProcessor())
    assert is_wrapped(wrap(twin, defense, processor=processor))


def test_the_pipeline_with_a_wrapped_model_answers_as_defended(clips, processor):
    own, twin = clips
    defense = a_defense(own)

    def answers() -> np.ndarray:
        pipeline = transformers.pipeline(
            "zero-shot-image-classification", model=twin, tokenizer=processor.tokenizer,
            image_processor=processor.image_processor,
        )  # fmt: skip
        said = pipeline(pictures(), candidate_labels=LABELS, hypothesis_template="a photo of {}.")
        return np.array([[{row["label"]: row["score"] for row in one}[label] for label in LABELS] for one in said])

    stock = answers()
    wrap(twin, defense, processor=processor)
    defended = answers()
    assert np.abs(defended - stock).max() > 1e-3
    pixel_values = processor.image_processor(images=pictures(), return_tensors="pt")["pixel_values"]
    clf = RobustClassifier(Clip(own, PREPROCESS, ClipTokenizer(16)), defense)
    clf.set_labels(LABELS, "a photo of {}.")
    np.testing.assert_allclose(
        defended, clf.scores(clf.encode_pixels(pixel_values.numpy()), clf.text_embeds()), atol=1e-5
    )
    detach(twin)
    assert np.array_equal(answers(), stock)


def test_a_classifier_answers_the_same_on_both_twins(clips, processor):
    own, twin = clips
    defense = a_defense(own)
    clf = RobustClassifier(Clip.from_transformers(twin, processor), defense).set_labels(LABELS)
    assert isinstance(clf.clip.tokenizer, ClipTokenizer), "the ids are CLIP's own"
    want = RobustClassifier(Clip(own, PREPROCESS, ClipTokenizer(16)), defense).set_labels(LABELS)
    np.testing.assert_allclose(clf.predict_proba(pictures()), want.predict_proba(pictures()), atol=1e-5)
    ours, theirs = clf.explain(pictures()[0]), want.explain(pictures()[0])
    assert [item.latent for item in ours.removed] == [item.latent for item in theirs.removed]
    np.testing.assert_allclose(ours.heatmap, theirs.heatmap, atol=1e-4)


def test_texts_of_another_tokenizer_have_the_length_that_the_text_tower_takes(tokenizer):
    from defense.hosts.transformers_inputs import tokenizer_of

    other = copy.deepcopy(tokenizer)
    other.add_tokens(["photo"])
    found = tokenizer_of(SimpleNamespace(tokenizer=other), 16)
    assert not isinstance(found, ClipTokenizer)
    ids = found(["a photo", "many " * 30])
    assert ids.shape == (2, 16)
    assert ids.dtype == np.int64
    assert tokenizer_of(transformers.CLIPImageProcessor(), 16) is None


def test_siglip_scores_are_those_of_its_twin_with_its_bias_left_out():
    """A bias that all labels share does not move a softmax; exported logits have it."""
    _, twin = twins.siglip_pair()
    twin.logit_scale.data.fill_(2.0)
    twin.logit_bias.data.fill_(-1.5)
    clip = Clip(twin, PREPROCESS, lambda texts: np.arange(16 * len(texts)).reshape(-1, 16))
    assert clip.logit_bias == -1.5
    clf = RobustClassifier(clip).set_labels(LABELS, "{}")
    ids = torch.arange(16 * 3).reshape(3, 16)
    prepared = torch.from_numpy(np.stack([PREPROCESS(picture) for picture in pictures()]))
    want = twin(input_ids=ids, pixel_values=prepared).logits_per_image.softmax(1)
    np.testing.assert_allclose(clf.predict_proba(pictures()), want, atol=1e-5)


def test_siglip_2_is_given_pictures_as_its_own_processor_gives_patches():
    _, twin = twins.siglip_pair("Siglip2")
    settings = {"patch_size": 8, "max_num_patches": 20}
    inputs = transformers.Siglip2ImageProcessor(**settings, do_resize=False, **HALF)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    given = inputs(images=[image], return_tensors="pt")
    assert given["pixel_attention_mask"].sum() in (16, 20)
    shape = given["spatial_shapes"][0].tolist()
    if shape != [4, 4]:
        pytest.skip(f"this processor made {shape} patches of the picture")
    want = twin.get_image_features(**given).pooler_output
    got = tower_of(twin).encode(torch.from_numpy(PREPROCESS(image))[None])
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)


# --- embeddings alone -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["DINOv2 of timm", "DINOv2", "CLIP's tower"])
def test_a_tower_alone_embeds_and_does_not_classify(name):
    if name == "CLIP's tower":
        model = vision_model(twins.open_clip_pair()[1])
    else:
        model = twins.dinov2_pair()[0 if name == "DINOv2 of timm" else 1]
    make = Clip.from_timm if "timm" in name else Clip.from_transformers
    clf = RobustClassifier(make(model, PREPROCESS), a_defense(model))
    embeds = clf.transform(pictures())
    assert embeds.shape == (3, D_MODEL)
    assert np.abs(embeds - clf.encode_pixels(np.stack([PREPROCESS(p) for p in pictures()]), plain=True)).max() > 1e-3
    for classify in (lambda: clf.set_labels(LABELS).predict(pictures()), lambda: clf(pictures(), LABELS)):
        with pytest.raises(ConfigError, match="has no text tower"):
            classify()
    with pytest.raises(ConfigError, match="no logit_scale"):
        _ = clf.logit_scale


def test_a_model_of_timm_says_how_its_pictures_are_prepared():
    model, _ = twins.dinov2_pair()
    model.pretrained_cfg = {
        "crop_pct": 1.0, "crop_mode": "center", "mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic"
    }  # fmt: skip
    assert Clip.from_timm(model).preprocess == PREPROCESS
    model.pretrained_cfg["crop_pct"] = 0.9
    with pytest.raises(ConfigError, match=r"crops a share of 0\.9"):
        Clip.from_timm(model)


def test_a_bare_siglip_of_timm_has_the_fingerprint_of_the_one_in_open_clip():
    own, twin = twins.siglip_pair()
    assert tower_of(own.visual.trunk).fingerprints() == tower_of(twin).fingerprints()
    with_classes = copy.deepcopy(own.visual.trunk)
    with_classes.reset_classifier(7)
    assert tower_of(with_classes).fingerprints().stream == tower_of(twin).fingerprints().stream
    torch.testing.assert_close(
        tower_of(with_classes).encode(pixels()), tower_of(twin).encode(pixels()), atol=1e-5, rtol=0
    )


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
    with pytest.raises(MissingDependencyError, match=r"clip-defense\[transformers\]"):
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
