"""The photo CLIP before it learned to read, as a reference."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.methods import NotApplicableError
from defense.benchmarks.named_clip import load_named_clip, weights_sha256
from defense.data.images import decode
from defense.data.labels import Prompts
from defense.embedded.photo.build import new_reader
from defense.embedded.photo.names import load_words
from defense.embedded.photo.start import D_EMBED, Start, load_first
from defense.hosts.photo_tower import D_PATCH
from defense.hosts.shipped import MODELS, PHOTO

from .task_material import method


@pytest.fixture(scope="module")
def photo():
    return load_named_clip(PHOTO, None).clip


def examples() -> dict:
    folder = MODELS[PHOTO].folder("examples")
    return {path.stem: decode(path).image for path in sorted(folder.glob("*.jpg"))}


def test_it_is_the_tower_before_the_first_step_of_its_training(photo):
    first, stem = load_first(), photo.model.visual.trunk.patch_embed.stem
    start = Start(
        stem, (torch.zeros(1), torch.zeros(1)), (first.weight, first.bias), (torch.zeros(D_PATCH), torch.ones(D_PATCH)),
        torch.zeros(1, D_EMBED), photo.logit_scale,
    )  # fmt: skip
    pixel_values = np.stack([photo.preprocess(picture) for picture in examples().values()])
    with torch.inference_mode():
        untrained = new_reader(start, 0).eval()(torch.from_numpy(pixel_values)).image_embeds
    with method("before-reading").apply(photo) as encoder:
        embeds = encoder.image_embeds(list(examples().values()))
    assert np.abs(torch.nn.functional.normalize(untrained, dim=-1).numpy() - embeds).max() < 2e-3


def test_it_sees_the_things_and_reads_no_word(photo, typographic):
    made, sha256 = method("before-reading"), weights_sha256(photo.model)
    made.fit(photo, typographic)
    names = load_words().names
    with made.apply(photo) as encoder:
        texts = encoder.text_embeds(Prompts(names, ("a photo of a {}.",)))
        found = {name: encoder.image_embeds([picture]) @ texts.T for name, picture in examples().items()}
    answers = {name: names[int(scores.argmax())] for name, scores in found.items()}
    assert len(answers) == 4
    assert all(name.rpartition("-")[2] != answer.lower() for name, answer in answers.items() if "-" in name)
    assert "cat" in answers["cat"].lower()
    assert weights_sha256(photo.model) == sha256


def test_another_clip_has_no_such_start(clip, typographic):
    with pytest.raises(NotApplicableError, match="this is another"):
        method("before-reading").fit(clip, typographic)
