"""Methods on attention heads: what heads write, Dyslexify, TEXTSPAN."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks.datasets import Dataset, Example, Task
from defense.benchmarks.methods import NotApplicableError, heads, make_methods, material, textspan
from defense.benchmarks.methods import dyslexify as dyslexify_module
from defense.benchmarks.methods.textspan import TextSpan
from defense.hosts.clip import Clip
from defense.hosts.families import tower_of
from defense.hosts.tower import VisionTower

from ....conftest import D_MODEL
from .tower_material import CLASSES, GROUPS, Drawn, answers, embeds, groups_task, image_embeds, words_task

# --- heads ------------------------------------------------------------------------------------------------------------


def test_the_heads_writes_add_up_to_what_the_attention_gives_the_cls_token(clip, tower):
    differences = []

    def see(block, x, written):
        attention = heads.attention_of(tower, block)
        found = heads.cls_attention(attention, x)
        torch.testing.assert_close(found.pattern.sum(-1), torch.ones(6, 2))
        differences.append((written - attention.out_proj.bias - found.writes.sum(1)).abs().max())
        some = heads.cls_attention(attention, x, [1])
        torch.testing.assert_close(some.writes[:, 0], found.writes[:, 1])

    with heads.watching(tower, range(3), see):
        embeds(clip)
    assert len(differences) == 3
    assert max(differences) < 1e-5


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_silent_head_writes_nothing_to_cls_and_all_to_patches(clip, tower, batch_first):
    for block in tower.blocks:
        block.attn.batch_first = batch_first
    clip.model.visual.transformer.batch_first = batch_first
    tower = tower_of(clip.model)
    seen = []
    handle = tower.blocks[0].attn.register_forward_hook(lambda _m, _i, out: seen.append(tower.to_batch_first(out[0])))
    stock = embeds(clip)
    handle.remove()
    with heads.ablated(tower, [(0, 0), (0, 1)]):
        handle = tower.blocks[0].attn.register_forward_hook(
            lambda _m, _i, out: seen.append(tower.to_batch_first(out[0]))
        )
        embeds(clip)
        handle.remove()
    plain, silent = seen
    assert torch.equal(plain[:, 1:], silent[:, 1:])
    bias = tower.blocks[0].attn.out_proj.bias.expand(6, -1)
    torch.testing.assert_close(silent[:, 0], bias, atol=1e-5, rtol=0)
    with heads.ablated(tower, []):
        assert torch.equal(embeds(clip), stock)


def test_silence_in_the_last_block_is_zero_output_weights_there(clip, tower):
    # Behind the last block only the CLS token is read, so zeroing the head for all tokens is the same.
    with heads.ablated(tower, [(2, 1)]):
        silent = embeds(clip)
    stock = embeds(clip)
    with torch.no_grad():
        tower.blocks[2].attn.out_proj.weight[:, 32:] = 0
    torch.testing.assert_close(silent, embeds(clip))
    assert (silent - stock).abs().max() > 1e-3


def test_towers_without_such_heads_are_refused(clip, tower):
    tower.blocks[0].attn = torch.nn.Identity()
    with pytest.raises(NotApplicableError, match="this tower has Identity"):
        heads.vision_with_heads(clip.model, "dyslexify")


def test_towers_that_do_not_pool_the_cls_token_are_refused(clip):
    clip.model.visual.pool_type = "avg"
    with pytest.raises(NotApplicableError, match="not read from that token"):
        heads.vision_with_heads(clip.model, "dyslexify")


# --- Dyslexify --------------------------------------------------------------------------------------------------------


def test_writing_is_where_the_twins_differ():
    task = words_task(3)
    preprocess = random_preprocess()
    attacked, clean = (
        torch.from_numpy(np.stack([preprocess(example.picture.load()) for example in dataset.examples]))
        for dataset in (task.train, task.train_clean)
    )
    found = dyslexify_module.written_on(attacked + 0.02, clean, (4, 4)).view(3, 4, 4)  # they differ a little anywhere
    want = torch.zeros(3, 4, 4, dtype=torch.bool)
    want[:, 0, :3] = True  # the plate covers three patches of the first row
    assert torch.equal(found, want)
    assert not dyslexify_module.written_on(clean, clean, (4, 4)).any()


def random_preprocess():
    from defense.data.preprocess import Preprocess

    return Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest")


def test_heads_stand_out_by_two_deviations_or_by_one_where_none_does():
    scores = np.zeros((6, 4))
    scores[4, 2], scores[3, 0], scores[0, 0] = 1.0, 0.9, 1.0  # the last lies in the first half
    assert dyslexify_module.standing_out(scores, 3) == ([(4, 2), (3, 0)], 2)
    scores = np.zeros((3, 2))
    scores[2] = 0.9, 1.0
    assert dyslexify_module.standing_out(scores, 1) == ([(2, 1), (2, 0)], 1)


def test_the_greedy_search_keeps_what_helps_within_the_clean_budget():
    gains = {(0, 0): 0.1, (0, 1): 0.0005, (0, 2): 0.2, (0, 3): 0.3}
    costs = {(0, 0): 0.004, (0, 1): 0.0, (0, 2): 0.004, (0, 3): 0.004}

    def search(candidates):
        return dyslexify_module.chosen(
            candidates,
            lambda silent: 0.2 + sum(gains.get(head, 0.0) for head in silent),
            lambda silent: 0.9 - sum(costs.get(head, 0.0) for head in silent),
        )

    assert search(list(gains)) == [(0, 0), (0, 2)]  # one gains too little, one costs too much
    useless = [(1, i) for i in range(10)]
    assert search([*useless[:9], (0, 0)]) == [(0, 0)]
    assert search([*useless, (0, 0)]) == []  # ten in a row that did not help end it


def plant_reader(clip: Clip, tower: VisionTower, block: int, head: int, size: float = 20.0) -> None:
    """Make a head look at white patches and write a vector where it finds some; at size 20 it drowns everything."""
    task = words_task(20)
    seen = []
    handle = tower.blocks[block].attn.register_forward_hook(lambda _m, inputs, _o: seen.append(inputs[0]))
    with torch.inference_mode():
        for dataset in (task.train, task.train_clean):
            clip.model.encode_image(torch.from_numpy(next(material.pixel_batches(clip, dataset.examples))))
    handle.remove()
    written, plain = seen[0][:, 1:4].reshape(-1, D_MODEL), seen[1][:, 1:].reshape(-1, D_MODEL)
    direction = torch.nn.functional.normalize(written.mean(0) - plain.mean(0), dim=0)
    middle = float((written @ direction).mean() + (plain @ direction).mean()) / 2
    attention = tower.blocks[block].attn
    rows = slice(head * 32, head * 32 + 32)
    with torch.no_grad():
        query, key, value = (slice(i * D_MODEL + head * 32, i * D_MODEL + head * 32 + 32) for i in range(3))
        attention.in_proj_weight[query] = 0
        attention.in_proj_bias[query] = 0
        attention.in_proj_bias[query.start] = 32.0
        attention.in_proj_weight[key] = 0
        attention.in_proj_weight[key.start] = direction * 4
        attention.in_proj_weight[value] = 0
        attention.in_proj_bias[value] = 0
        attention.in_proj_weight[value.start] = direction
        attention.in_proj_bias[value.start] = -middle
        attention.out_proj.weight[:, rows] = 0
        noise = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(3))
        attention.out_proj.weight[:, rows.start] = size * noise


def test_dyslexify_finds_the_head_that_reads(clip, tower):
    plant_reader(clip, tower, 2, 1)
    with heads.ablated(tower, [(2, 1)]):
        labels = answers(clip, words_task(60).train_clean)  # what is right is what the pictures show without the reader
    assert len(set(labels)) > 1
    task = words_task(60, labels)
    (method,) = make_methods(["dyslexify"], None)
    method.fit(clip, task)
    assert method.heads == ((2, 1),)
    with method.apply(clip):
        assert np.mean(answers(clip, task.train) == labels) > np.mean(answers(clip, task.tests[1]) != labels)
    stock = np.mean(answers(clip, task.train) == labels)
    defended_embeds = image_embeds(method, clip, task.train)
    after = np.mean((defended_embeds @ material.class_embeds_of(clip, task.train).T).argmax(1) == labels)
    assert after > stock + 0.1


def test_without_a_reading_head_nothing_is_silenced(clip, monkeypatch):
    monkeypatch.setattr(dyslexify_module, "standing_out", lambda _scores, _first: ([], 1))
    (method,) = make_methods(["dyslexify"], None)
    task = words_task()
    method.fit(clip, task)
    stock = material.image_embeds_of(clip, task.train.examples)
    np.testing.assert_array_equal(image_embeds(method, clip, task.train), stock)


# --- TEXTSPAN ---------------------------------------------------------------------------------------------------------


def test_textspan_names_the_texts_that_span_a_head_most_first():
    rng = np.random.default_rng(0)
    texts = rng.normal(size=(40, 32))
    texts -= texts.mean(0)
    coordinates = rng.normal(size=(500, 3)) * (1, 5, 3)
    parts = coordinates @ texts[[7, 21, 3]] + rng.normal(size=32)
    spanning, along = textspan.textspan(parts, texts)
    assert spanning[:3] == [21, 3, 7]
    assert len(spanning) == 3  # the head has no fourth direction
    centered = parts - parts.mean(0)
    assert (along**2).sum() == pytest.approx((centered**2).sum(), rel=1e-6)  # all of it is described


def test_the_share_of_the_cue_counts_all_groups_alike():
    examples = groups_task(40).tests[0].examples
    label = np.array([example.label for example in examples], float)
    cue = np.array([example.attribute for example in examples], float)
    assert textspan.cue_share(np.stack([label, 2 * cue], 1), examples) == pytest.approx(0.8)
    assert textspan.cue_share(np.stack([label, 0 * cue], 1), examples) == pytest.approx(0)
    # 20 : 1 : 1 : 20. By numbers, a head that follows the cue alone would follow the label nearly as well.
    rows = [i for i, e in enumerate(examples) for _ in range(20 if e.label == e.attribute else 1)]
    assert textspan.cue_share(cue[rows][:, None], [examples[i] for i in rows]) == pytest.approx(1)


def test_the_share_of_a_written_word_is_against_the_label():
    examples = [Example(str(i), Drawn(i), i % 2, 2 + (i // 2) % 2) for i in range(8)]
    word = np.array([example.word for example in examples], float)
    label = np.array([example.label for example in examples], float)
    assert textspan.cue_share(word[:, None], examples) == pytest.approx(1)
    assert textspan.cue_share(np.stack([word, 3 * label], 1), examples) == pytest.approx(0.1)


def test_a_heads_part_is_what_it_adds_to_the_embedding(clip, tower):
    with torch.no_grad():  # a LayerNorm that does something
        clip.model.visual.ln_post.weight.uniform_(0.5, 2, generator=torch.Generator().manual_seed(1))
        clip.model.visual.ln_post.bias.uniform_(-1, 1, generator=torch.Generator().manual_seed(2))
    late = heads.all_heads(tower)
    encoder = textspan._Contributions(clip, late)
    pictures = [Drawn(i).load() for i in range(6)]
    whole, parts = encoder.decompose(pictures)
    values = torch.from_numpy(np.stack([clip.preprocess(picture) for picture in pictures]))
    with torch.inference_mode():
        np.testing.assert_allclose(whole, clip.model.encode_image(values), atol=1e-5)
    # The last block's MLP out of the way, a head there reaches the embedding through the LayerNorm alone.
    with torch.no_grad():
        tower.blocks[2].mlp.c_proj.weight.zero_()
        tower.blocks[2].mlp.c_proj.bias.zero_()
    _, parts = encoder.decompose(pictures)
    norm, seen = clip.model.visual.ln_post, []
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][:, 0]))
    with torch.inference_mode():
        clip.model.encode_image(values)
        with heads.ablated(tower, [(2, 1)]):
            clip.model.encode_image(values)
    handle.remove()
    lost, deviation = seen[0] - seen[1], seen[0].std(-1, correction=0, keepdim=True)
    want = (lost - lost.mean(-1, keepdim=True)) / deviation * norm.weight @ clip.model.visual.proj
    np.testing.assert_allclose(parts[:, late.index((2, 1))], want, atol=1e-4)
    assert want.abs().max() > 0.01


def test_ablated_parts_are_replaced_by_their_means(clip, tower):
    chosen = [(2, 1), (1, 0)]
    pictures = [Drawn(i).load() for i in range(6)]
    whole, parts = textspan._Contributions(clip, chosen).decompose(pictures)
    means = parts.mean(0)
    encoder = textspan._Contributions(clip, chosen, means)
    found = encoder.image_embeds(pictures)
    want = whole - parts.sum(1) + means.sum(0)
    np.testing.assert_allclose(found, want / np.linalg.norm(want, axis=1, keepdims=True), atol=1e-6)


def test_textspan_replaces_the_head_that_reads(clip, tower):
    plant_reader(clip, tower, 2, 1, size=0.5)  # it sees the plate, which is the attribute
    with torch.no_grad():  # nothing behind it but the LayerNorm, so that what it adds directly is all it does
        tower.blocks[2].mlp.c_proj.weight.zero_()
        tower.blocks[2].mlp.c_proj.bias.zero_()
    task = words_task(60)
    whole, parts = textspan._Contributions(clip, [(2, 1)]).decompose_all(
        [*task.train_clean.examples, *task.train.examples]
    )
    # What is right is what the clean pictures show with the reader at its mean.
    steady = (whole - parts[:, 0] + parts[:, 0].mean(0))[:60]
    found = (steady @ material.class_embeds_of(clip, task.train).T).argmax(1)
    two = [answer for answer, _ in Counter(found.tolist()).most_common(2)]
    examples = tuple(
        Example(f"{i}-{side}", Drawn(i, bool(side)), two.index(answer), attribute=side)
        for i, answer in enumerate(found.tolist())
        for side in (0, 1)
        if answer in two
    )
    dataset = Dataset("groups", "train", examples, tuple(CLASSES[i] for i in two), group_names=GROUPS)
    method = TextSpan("textspan")
    method.fit(clip, Task("groups", "Groups", (dataset,), dataset))
    assert (2, 1) in method.heads
    assert all(set(texts) <= {*CLASSES, "goldfish", "tench", "drum"} for texts in method.texts)
    class_embeds = material.class_embeds_of(clip, dataset)
    stock = material.accuracies(material.image_embeds_of(clip, examples), class_embeds, examples)
    assert material.accuracies(image_embeds(method, clip, dataset), class_embeds, examples).min() > stock.min() + 0.2


def test_no_head_about_the_cue_leaves_the_stock_embeddings(clip, monkeypatch):
    monkeypatch.setattr(textspan, "cue_share", lambda _along, _examples: 0.5)
    task, method = words_task(), TextSpan("textspan")
    method.fit(clip, task)
    assert method.settings()["heads"] == []
    stock = material.image_embeds_of(clip, task.train.examples)
    np.testing.assert_array_equal(image_embeds(method, clip, task.train), stock)
