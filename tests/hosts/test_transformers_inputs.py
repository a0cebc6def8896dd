"""Processors, pipelines and tokenizers of transformers around a defended model, and models that only embed."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
import torch
import transformers
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError
from defense.hosts.attach import detach, is_wrapped, wrap
from defense.hosts.clip import Clip
from defense.hosts.families import tower_of
from defense.hosts.transformers_inputs import preprocess_of

from ..conftest import D_MODEL
from . import twins
from .twins import FRAME, HALF, LABELS, PREPROCESS, a_defense, pictures, pixels, vision_model


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
