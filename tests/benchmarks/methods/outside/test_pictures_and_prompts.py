"""Methods on prompts, heads and pixels: Defense-Prefix, SamplingTAR, OCR and blur."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.methods import NotApplicableError
from defense.benchmarks.methods import defense_prefix as dp
from defense.benchmarks.methods import ocr_blur as ocr
from defense.benchmarks.methods import sampling_tar as tar
from defense.benchmarks.methods.embeddings import EditedImages
from defense.benchmarks.methods.heads import all_heads, attention_of, cls_attention, vision_with_heads
from defense.classify.classifier import RobustClassifier
from defense.data.labels import Prompts
from defense.errors import BackendError, ConfigError
from defense.world.scenes import load_font

from .task_material import NAMES, Held, method, needs_tesseract, pictures

# --- Defense-Prefix ---------------------------------------------------------------------------------------------------


def test_the_prefix_stands_before_the_class_name(clip, typographic):
    """With the embedding of a real word, it is that word."""
    made = method("defense-prefix")
    made.fit(clip, typographic)
    made.token = clip.model.token_embedding.weight[clip.tokenizer(["red"])[0, 1]].clone().numpy()
    with made.apply(clip) as encoder:
        prefixed = encoder.text_embeds(Prompts(NAMES, ("a photo of a {}.",)))
    plain = EditedImages(clip, np.negative).text_embeds(Prompts(NAMES, ("a photo of a red {}.",)))
    np.testing.assert_allclose(prefixed, plain, rtol=1e-5, atol=1e-6)


def test_the_prefix_lowers_its_loss(clip, typographic, monkeypatch):
    def attack_loss(steps: int) -> float:
        monkeypatch.setattr(dp, "STEPS", steps)
        made = method("defense-prefix")
        made.fit(clip, typographic)
        examples = typographic.train.examples
        with made.apply(clip) as encoder:
            embeds = encoder.image_embeds([example.picture.load() for example in examples])
            text_embeds = encoder.text_embeds(Prompts(NAMES, typographic.train.templates))
        logits = torch.from_numpy(clip.model.logit_scale.exp().item() * embeds @ text_embeds.T)
        label = torch.tensor([example.label for example in examples])
        return float(torch.nn.functional.cross_entropy(logits, label))

    monkeypatch.setattr(dp, "GAMMA", 0.0)
    assert attack_loss(30) < attack_loss(0) - 1e-3


def test_the_prefix_leaves_pictures_alone(clip, typographic):
    made = method("defense-prefix")
    made.fit(clip, typographic)
    with made.apply(clip) as encoder:
        np.testing.assert_array_equal(encoder.image_embeds(pictures()), RobustClassifier(clip).transform(pictures()))
        assert encoder.edits_text


def test_the_placeholder_is_refused_in_labels():
    with pytest.raises(ConfigError, match="marks the learned token"):
        dp.with_placeholder(Prompts(("M*A*S*H",), ("{}",)))


# --- SamplingTAR ------------------------------------------------------------------------------------------------------


def test_contributions_add_up_to_what_heads_write(clip):
    tower = vision_with_heads(clip.model, "this")
    attention = attention_of(tower, 1)
    x = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    basis = torch.eye(attention.head_dim).expand(attention.num_heads, -1, -1)
    mixed = tar.contributions(attention, x, basis).sum(2)
    W_O = attention.out_proj.weight.view(64, attention.num_heads, attention.head_dim)
    writes = torch.einsum("bhe,dhe->bhd", mixed, W_O)
    torch.testing.assert_close(writes, cls_attention(attention, x).writes, rtol=1e-4, atol=1e-5)


def test_text_share_is_corrected_for_area():
    is_written = torch.tensor([[True, False, False, False]])

    def share(*added: float) -> float:
        return float(tar.text_share(torch.tensor(added)[None, None, :, None], is_written))

    assert share(1, 1, 1, 1) == 0.5
    assert share(1, 0, 0, 0) == 1
    assert share(0, 1, 1, 1) == 0
    assert share(3, 1, 1, 1) == 0.75
    assert share(3, 1, 1, -9) == pytest.approx(3 / (3 + 2 / 3))
    assert share(0, 0, 0, 0) == 0.5
    nothing_written = torch.zeros(1, 4, dtype=torch.bool)
    assert float(tar.text_share(torch.ones(1, 1, 4, 1), nothing_written)) == 0.5


def test_a_head_is_judged_on_the_pictures_where_its_directions_are_active(monkeypatch):
    monkeypatch.setattr(tar, "_N_ACTIVE", 1)
    activity = torch.tensor([[[5.0, 0.0]], [[0.0, 5.0]]])
    on_text = torch.tensor([[[0.9, 0.1]], [[0.2, 0.7]]])
    np.testing.assert_allclose(tar.head_scores(activity, on_text), [0.8], rtol=1e-6)


def test_heads_stand_out_in_their_own_block():
    scores = {4: np.array([0.9, 0.2, 0.2]), 5: np.array([0.5, 0.5, 0.5]), 6: np.array([0.1, 0.2, 0.3])}
    assert tar.standing_out(scores, 1.0) == ((4, 0), (6, 2))
    assert tar.standing_out(scores, 2.0) == ()


def test_redirected_heads_are_blind_to_patches(clip):
    tower = vision_with_heads(clip.model, "this")
    last = len(tower.blocks) - 1
    hook_point = f"blocks.{last - 1}.hook_resid_post"
    resid = torch.randn(2, 17, 64, generator=torch.Generator().manual_seed(0))
    resid[1, 0] = resid[0, 0]  # the same CLS token, other patches
    with torch.inference_mode():
        plain = tower.embeds_from(resid, hook_point)
        with tar.redirected(tower, all_heads(tower, last)):
            blind = tower.embeds_from(resid, hook_point)
        with tar.redirected(tower, ()):
            torch.testing.assert_close(tower.embeds_from(resid, hook_point), plain, rtol=0, atol=0)
    assert (plain[0] - plain[1]).abs().max() > 1e-3
    torch.testing.assert_close(blind[0], blind[1], rtol=1e-5, atol=1e-6)


def test_sampling_tar_finds_a_planted_head(clip, typographic):
    """In the last block one head attends to the bright bar, the other to all tokens alike."""
    tower = vision_with_heads(clip.model, "sampling-tar")
    seen: list[torch.Tensor] = []
    attention = attention_of(tower, 2)
    handle = attention.register_forward_hook(lambda _m, inputs, _o: seen.append(tower.to_batch_first(inputs[0])))
    clf = RobustClassifier(clip)
    clf.transform([Held(seed, True).load() for seed in range(24)])
    handle.remove()
    x = seen[0]
    is_bar = torch.zeros(x.shape[:2])
    is_bar[:, 13:] = 1  # the last of four rows of patches
    bar = torch.linalg.lstsq(x.flatten(0, 1), is_bar.flatten()[:, None]).solution[:, 0]
    d_head = attention.head_dim
    W_Q, W_K, _ = attention.in_proj_weight.chunk(3)
    with torch.no_grad():
        W_Q[:], W_K[:] = 0, 0
        attention.in_proj_bias.zero_()
        attention.in_proj_bias[d_head] = 300.0  # a constant query in head 1
        W_K[d_head] = bar  # which the bar's patches answer
    rows = typographic.train.examples, typographic.train_clean.examples
    scores, _ = tar._read(clip, "blocks.1.hook_resid_post", *rows)
    assert set(scores) == {2}
    # A direction that nothing fires along counts 0.5, and the bar, much the same on all pictures, fires along half.
    assert scores[2][1] > 0.6 > scores[2][0], scores
    assert tar.standing_out(scores, 0.5) == ((2, 1),)


# --- OCR and blur -----------------------------------------------------------------------------------------------------


def with_word(size: int = 320) -> Image.Image:
    """A gray picture with a large word in its lower half."""
    picture = Image.new("RGB", (size, size), (200, 200, 200))
    font = load_font("dejavu-sans-bold", size // 6)
    ImageDraw.Draw(picture).text((size / 2, 0.75 * size), "banana", (20, 20, 20), font, anchor="mm")
    return picture


@needs_tesseract
@pytest.mark.parametrize("size", [80, 320, 1600])
def test_a_large_word_is_found_and_blurred(size):
    picture = with_word(size)
    ((box,),) = ocr.find_words([picture])
    left, top, right, bottom = box
    assert left < size / 2 < right
    assert 0.6 * size < top < 0.75 * size < bottom < 0.9 * size
    blurred = ocr.blurred(picture, [box])
    assert ocr.find_words([blurred]) == [[]]
    above = (0, 0, size, size // 2)
    assert blurred.crop(above).tobytes() == picture.crop(above).tobytes()


@needs_tesseract
def test_each_picture_keeps_its_own_words(clip):
    blank = Image.new("RGB", (100, 90), (90, 120, 90))
    found = ocr.find_words([blank, with_word(), blank, with_word(160)])
    assert [len(boxes) for boxes in found] == [0, 1, 0, 1]
    assert max(found[3][0]) <= 160
    encoder = ocr._Blurred(clip)
    shown = [blank, with_word(), blank]
    stock = RobustClassifier(clip).transform(shown)
    embeds = encoder.image_embeds(shown)
    np.testing.assert_allclose(embeds[[0, 2]], stock[[0, 2]], atol=1e-6)
    assert np.abs(embeds[1] - stock[1]).max() > 1e-3


def test_nothing_to_blur_leaves_the_picture():
    picture = with_word(64)
    assert ocr.blurred(picture, []).tobytes() == picture.tobytes()


def test_a_box_at_the_edge_is_blurred_within_the_picture():
    picture = with_word(64)
    assert ocr.blurred(picture, [(-3, 40, 70, 64)]).size == (64, 64)


def test_a_missing_tesseract_is_said_with_the_remedy(clip, typographic, monkeypatch):
    monkeypatch.setattr(ocr.shutil, "which", lambda _name: None)
    ocr.tesseract.cache_clear()
    with pytest.raises(NotApplicableError, match="apt install tesseract-ocr"):
        method("ocr-blur").fit(clip, typographic)


def test_a_tesseract_that_reads_too_few_pictures_is_an_error(monkeypatch):
    monkeypatch.setattr(ocr, "tesseract", lambda: (shutil.which("true"), "0"))
    with pytest.raises(BackendError, match="could not read 1 pictures"):
        ocr.find_words([with_word(64)])
