"""Steering a language model through its vision tower, on a tiny one of random weights."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
import torch
from PIL import Image

from defense.benchmarks import language
from defense.benchmarks.language import Speaker, lines_of, measure, steered
from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError, HookPointError
from defense.hosts.attach import is_wrapped
from defense.hosts.families import tower_of
from defense.store import checkpoint
from defense.store.checkpoint import Checkpoint

from ..conftest import D_MODEL, random_parameters, random_sae
from ..hosts import twins
from ..hosts.twins import POINT, PREPROCESS

SAE = Checkpoint(random_sae(act="topk", k=20), POINT)


class Letters:
    """A tokenizer of one letter a token."""

    def __call__(self, text: str, **_: object) -> dict[str, torch.Tensor]:
        return {"input_ids": torch.tensor([[10 + ord(letter) % 100 for letter in text]])}

    def decode(self, ids: torch.Tensor, **_: object) -> str:
        return " " + " ".join(map(str, ids.tolist()))


class Inputs(dict):
    def to(self, _device: object) -> Inputs:
        return self


class Processor:
    """What makes inputs of a picture and a text with "<image>" in it."""

    tokenizer = Letters()

    def __call__(self, *, images: Image.Image, text: str, return_tensors: str) -> Inputs:
        before, after = (self.tokenizer(part)["input_ids"][0].tolist() for part in text.split("<image>"))
        ids = torch.tensor([[1, *before, *[199] * 16, *after]])
        pixel_values = torch.from_numpy(PREPROCESS(images)[None])
        return Inputs(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixel_values)


@pytest.fixture
def llava():
    return twins.llava_of(twins.vision_model(twins.open_clip_pair()[1]))


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 48, 3), dtype=np.uint8))


@pytest.fixture
def speaker(llava, picture) -> Speaker:
    return Speaker(llava, Processor(), picture, "a<image>b", "cd", 8)


def test_what_is_said_changes_with_the_value_and_is_what_it_was_afterwards(speaker):
    plain = speaker.says()
    found = measure(speaker, SAE, 3, (0.0, 40.0, 80.0))
    assert [each.value for each in found["latent"]] == [0, 40, 80]
    assert found["plain"][0].text == plain[0] == " ".join(plain[0].split()), "as it is read"
    assert found["latent"][1].text != plain[0]
    assert len({each.word_nats for each in found["latent"]}) == 3
    assert {each.latent for each in found["latent"]} == {3}
    (control,) = {each.latent for each in found["control"]}
    assert control in speaker.fires(SAE)
    assert control != 3
    assert measure(speaker, SAE, 3, (40.0,))["control"][0].latent == control, "the same seed draws the same"
    assert not is_wrapped(speaker.model)
    assert speaker.says() == plain
    assert len(lines_of(found)) == 7


def test_a_latent_that_writes_nothing_says_nothing(speaker):
    """Planted: one latent pushes hard, the other one's decoder row is next to nothing."""
    parameters = random_parameters(SAEConfig(D_MODEL, 160, "relu"))
    parameters["W_dec"][5] *= 1e-6
    parameters["W_dec"][6] *= 50
    planted = Checkpoint(SparseAutoencoder(SAEConfig(D_MODEL, 160, "relu"), parameters), POINT)
    plain = speaker.says()
    for latent, is_same in ((5, True), (6, False)):
        with steered(speaker.model, planted, latent, 30.0):
            text, nats = speaker.says()
        assert (text == plain[0]) == is_same
        assert (abs(nats - plain[1]) < 1e-3) == is_same


def test_the_word_s_log_probability_is_that_of_its_tokens_in_turn(speaker):
    word = speaker.word["input_ids"][0].tolist()
    inputs, want = dict(speaker.inputs), 0.0
    with torch.inference_mode():
        for token in word:
            logits = speaker.model(**inputs).logits[0, -1]
            want += float(logits.log_softmax(-1)[token])
            ids = torch.cat([inputs["input_ids"], torch.tensor([[token]])], 1)
            inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert speaker.says()[1] == pytest.approx(want, abs=1e-3)
    assert want < -1


def test_what_the_model_does_not_read_is_refused_and_leaves_no_hook(speaker):
    late = Checkpoint(SAE.sae, "blocks.2.hook_resid_post")
    with pytest.raises(HookPointError, match="after block 1"), steered(speaker.model, late, 3, 1.0):
        pass
    with pytest.raises(ConfigError, match="latents 0 to 159"), steered(speaker.model, SAE, 160, 1.0):
        pass
    assert not is_wrapped(speaker.model)


def test_the_script_prints_and_keeps_all_of_it(llava, picture, tmp_path, monkeypatch, capsys):
    picture.save(tmp_path / "a.png")
    checkpoint.save(SAE, tmp_path / "sae")
    monkeypatch.setattr(language, "load", lambda *_: (llava, Processor()))
    arguments = [str(tmp_path / "a.png"), "--model", "x", "--sae", str(tmp_path / "sae"), "--latent", "3"]
    arguments += ["--values", "0,40", "--prompt", "a<image>b", "--out", str(tmp_path / "said.json"), "--device", "cpu"]
    assert language.main(arguments) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["plain", "latent", "latent", "control", "control"]
    found = json.loads((tmp_path / "said.json").read_text(encoding="utf-8"))
    assert found["latent"][1]["value"] == 40
    assert found["plain"][0]["word_nats"] is None
    assert tower_of(llava).n_read == 2
