"""Methods that work inside the vision tower, or on what an SAE says of it: each does what its formula says."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import pytest
from PIL import Image, ImageDraw

pytest.importorskip("open_clip")

import torch

from defense.benchmarks.datasets import Dataset, Example, Task
from defense.benchmarks.methods import (
    FACTORIES,
    NotApplicableError,
    embedding_sae,
    heads,
    make_methods,
    material,
    textspan,
    variants,
)
from defense.benchmarks.methods import dyslexify as dyslexify_module
from defense.benchmarks.methods.defended import Defended, defended
from defense.benchmarks.methods.textspan import TextSpan
from defense.classify.classifier import RobustClassifier
from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.core.sae import SparseAutoencoder
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError
from defense.fit.control import activity_of
from defense.hosts.clip import Clip
from defense.hosts.families import tower_of
from defense.hosts.tower import VisionTower
from defense.store import defenses

from ..conftest import D_MODEL, random_defense, random_sae

CLASSES = ("cloud", "rose", "zebra", "fish", "king", "river")
GROUPS = ("a0", "a1", "b0", "b1")

NEED_NOTHING = ("defense-scale", "naive-splice")
NEED_A_SPLIT = ("defense-delta", "random-latents", "embedding-sae", "dyslexify", "textspan")


@dataclass(frozen=True)
class Drawn:
    """A picture of a seed: noise around a color, and a white plate at the top left if it is written on."""

    seed: int
    is_written: bool = False

    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()

    def load(self) -> Image.Image:
        rng = np.random.default_rng(self.seed)
        pixels = rng.integers(0, 200, 3) + rng.integers(-40, 40, (32, 32, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        if self.is_written:
            ImageDraw.Draw(picture).rectangle((0, 0, 23, 7), fill="white")
        return picture


def words_task(n: int = 40, labels: np.ndarray | None = None) -> Task:
    """Pictures with a plate, and their twins without."""
    labels = np.arange(n) % len(CLASSES) if labels is None else labels

    def dataset(variant: str, is_written: bool) -> Dataset:
        examples = tuple(
            Example(str(i), Drawn(i, is_written), int(y), (int(y) + 1) % len(CLASSES) if is_written else None)
            for i, y in enumerate(labels)
        )
        return Dataset("words", variant, examples, CLASSES)

    attacked, clean = dataset("attacked", True), dataset("clean", False)
    return Task("words", "Words", (clean, attacked), attacked, None, clean)


def groups_task(n: int = 40) -> Task:
    """Two classes; the plate is the attribute."""
    examples = tuple(
        Example(str(i), Drawn(i, i % 4 in (1, 2)), i % 2, attribute=int(i % 4 in (1, 2))) for i in range(n)
    )
    dataset = Dataset("groups", "test", examples, CLASSES[:2], group_names=GROUPS)
    return Task("groups", "Groups", (dataset,), dataset)


@pytest.fixture(autouse=True)
def short_training(monkeypatch):
    monkeypatch.setattr(embedding_sae, "_STEPS", 20)
    monkeypatch.setattr("open_clip.IMAGENET_CLASSNAMES", ["goldfish", "tench", "drum", "rose"])


@pytest.fixture
def clip(tiny_clip) -> Clip:
    return Clip(tiny_clip, random_defense(tiny_clip).preprocess, ClipTokenizer(16))


@pytest.fixture
def tower(clip) -> VisionTower:
    return tower_of(clip.model)


def saved(defense, folder):
    return defenses.load(defenses.save(defense, folder))


@pytest.fixture
def defense(tiny_clip, tmp_path):
    latent_set = LatentSet("text", tuple(range(30)), edit="project")
    return saved(random_defense(tiny_clip, (1, random_sae(act="topk", k=8), latent_set)), tmp_path / "defense")


def pixel_values(n: int = 6) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def embeds(clip: Clip, n: int = 6) -> torch.Tensor:
    with torch.inference_mode():
        return clip.model.encode_image(pixel_values(n))


def image_embeds(method, clip: Clip, dataset: Dataset) -> np.ndarray:
    with method.apply(clip) as encoder:
        return np.concatenate(
            [encoder.image_embeds(pictures) for pictures in material.batches(dataset.examples)],
        )


def without_split(task: Task) -> Task:
    return replace(task, train=None, train_clean=None)


# --- all --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEED_NOTHING + NEED_A_SPLIT)
def test_the_host_is_restored_bit_for_bit_and_two_fits_give_the_same(clip, defense, name):
    state, before, task = clip.model.state_dict(), embeds(clip), words_task()
    state = {key: tensor.clone() for key, tensor in state.items()}
    results = []
    for _ in range(2):
        (method,) = make_methods([name], defense)
        method.fit(clip, task)
        results.append((image_embeds(method, clip, task.tests[1]), json.dumps(method.settings())))
    np.testing.assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]
    assert torch.equal(embeds(clip), before)
    assert state.keys() == clip.model.state_dict().keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in clip.model.state_dict().items())
    assert not any(module._forward_hooks for module in clip.model.modules())


@pytest.mark.parametrize("name", NEED_NOTHING + NEED_A_SPLIT)
def test_the_host_is_restored_when_the_run_fails(clip, defense, name):
    before, task = embeds(clip), words_task()
    (method,) = make_methods([name], defense)
    method.fit(clip, task)
    with pytest.raises(KeyboardInterrupt), method.apply(clip):
        raise KeyboardInterrupt
    assert torch.equal(embeds(clip), before)


@pytest.mark.parametrize("name", NEED_A_SPLIT)
def test_a_task_without_a_training_split_is_refused(clip, defense, name):
    (method,) = make_methods([name], defense)
    with pytest.raises(NotApplicableError, match=f"{name} needs a training split, and Words has none"):
        method.fit(clip, without_split(words_task()))


@pytest.mark.parametrize("name", ["embedding-sae", "dyslexify", "textspan"])
def test_attacked_pictures_without_their_twins_are_refused(clip, name):
    (method,) = make_methods([name], None)
    with pytest.raises(NotApplicableError, match="needs training pictures with and without a word"):
        method.fit(clip, replace(words_task(), train_clean=None))


def test_dyslexify_is_for_written_words_only(clip):
    (method,) = make_methods(["dyslexify"], None)
    with pytest.raises(NotApplicableError, match="needs training pictures with and without a word"):
        method.fit(clip, groups_task())


@pytest.mark.parametrize(
    "name", ["random-latents", "naive-splice", "defense-scale", "defense-project", "defense-delta"]
)
def test_what_edits_with_the_latents_of_a_defense_needs_one(clip, name):
    (method,) = make_methods([name], None)
    with pytest.raises(NotApplicableError, match="needs a defense"):
        method.fit(clip, words_task())


@pytest.mark.parametrize("name", ["dyslexify@0.5", "textspan@1", "embedding-sae@0.5", "naive-splice@0.5"])
def test_a_method_without_a_strength_refuses_one(defense, name):
    with pytest.raises(ConfigError, match="has no strength"):
        make_methods([name], defense)


@pytest.mark.parametrize("name", ["random-latents", "embedding-sae", "textspan"])
def test_methods_for_both_kinds_of_cue_take_groups(clip, defense, name):
    task = groups_task()
    (method,) = make_methods([name], defense)
    method.fit(clip, task)
    assert image_embeds(method, clip, task.tests[0]).shape == (40, 32)


# --- material ---------------------------------------------------------------------------------------------------------


def test_picked_pictures_are_spread_and_groups_even():
    assert material.picked(words_task(40).tests[0], 4) == [0, 10, 20, 30]
    assert material.picked(words_task(3).tests[0], 4) == [0, 1, 2]
    task = groups_task(40)
    rows = material.picked(task.tests[0], 8)
    groups = [task.tests[0].examples[row].group for row in rows]
    assert sorted(groups) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert rows == sorted(rows)


def test_embeddings_of_examples_are_those_of_the_classifier(clip):
    task = words_task(60)  # more than a batch
    pictures = [example.picture.load() for example in task.tests[0].examples]
    found = material.image_embeds_of(clip, task.tests[0].examples)
    np.testing.assert_allclose(found, RobustClassifier(clip).transform(pictures), atol=1e-6)


def test_accuracies_are_those_of_each_group():
    class_embeds = np.eye(2)
    examples = groups_task(8).tests[0].examples  # labels 0 1 0 1 ..., attributes 0 1 1 0 ...
    answers = np.eye(2)[[0, 1, 0, 0, 0, 1, 1, 0]]
    np.testing.assert_array_equal(material.accuracies(answers, class_embeds, examples), [1.0, 0.5, 0.0, 1.0])
    plain = [replace(example, attribute=None) for example in examples]
    np.testing.assert_array_equal(material.accuracies(answers, class_embeds, plain), [5 / 8])


def test_the_best_edit_is_the_first_of_the_best_within_the_clean_budget():
    assert material.best_of([(0.2, 0.9), (0.5, 0.895), (0.9, 0.88), (0.5, 0.9)]) == 1
    assert material.best_of([(0.2, 0.9), (0.1, 0.9)]) == 0


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


def answers(clip: Clip, dataset: Dataset) -> np.ndarray:
    class_embeds = material.class_embeds_of(clip, dataset)
    return (material.image_embeds_of(clip, dataset.examples) @ class_embeds.T).argmax(1)


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
