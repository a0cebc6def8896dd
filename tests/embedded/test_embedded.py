"""The model that ships: it reads, its defense stops that, and nothing in the package says otherwise."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch

from defense.classify.classifier import RobustClassifier
from defense.embedded import build
from defense.errors import CheckpointError
from defense.fit.control import activity_of, random_control
from defense.hosts.clip import embedded_folder, load_clip
from defense.hosts.defense import Defense, join
from defense.hosts.golden import golden_difference
from defense.hosts.shipped import EMBEDDED, MODELS
from defense.hosts.slim import restored
from defense.store import checkpoint, defenses
from defense.store.defenses import find_defense
from defense.world import draws, scenes

FOLDER = Path(build.__file__).parent
EXAMPLES = sorted((FOLDER / "examples").glob("*.png"))


@pytest.fixture(scope="module")
def clf() -> RobustClassifier:
    return RobustClassifier.from_pretrained("embedded", device="cpu").set_labels(list(scenes.OBJECTS))


@pytest.fixture(scope="module")
def pairs():
    """200 held-out scenes: seeds that no stage of the build uses, and unseen typefaces."""
    return build.attack_pairs(200, 123_456, scenes.TEST_FONTS, load_clip("embedded"))


@pytest.fixture(scope="module")
def measured(pairs):
    clip = load_clip("embedded")
    text_embeds = build.text_embeds_of(clip, list(scenes.OBJECTS))
    plain = build.report_on(clip, pairs, text_embeds)
    clf = RobustClassifier(clip, defenses.load(embedded_folder("text")))
    assert clf.defense is not None
    return plain, build.report_on(clip, pairs, text_embeds)


def test_golden_vectors_are_reproduced(clf):
    assert golden_difference(clf.clip, clf.defense.golden) < 1e-4


def test_the_plain_model_sees_and_reads(measured):
    plain, _ = measured
    assert plain["clean"] >= 95
    assert plain["attack_success"] >= 60


def test_the_defense_stops_the_reading_and_keeps_the_seeing(measured):
    plain, defended = measured
    assert defended["attack_success"] <= 5
    assert defended["attacked"] >= plain["attacked"] + 50
    assert defended["clean"] >= plain["clean"] - 1.5
    assert defended["attacked"] >= defended["neutral"] - 6


@pytest.mark.parametrize("task", sorted(draws.GROUPINGS))
def test_the_plain_model_leans_on_what_goes_with_the_answer(task):
    clip, grouping = load_clip("embedded"), draws.GROUPINGS[task]
    groups = build.groups_of(grouping, 200, 123_456, clip)
    text_embeds = build.text_embeds_of(clip, grouping.classes, grouping.template)
    report = build.report_on(clip, groups, text_embeds)
    of_groups = [report[f"{y}-{a}"] for y in range(2) for a in range(2)]
    assert report["worst"] == min(of_groups)
    assert report["average"] == pytest.approx(sum(of_groups) / 4)
    assert report["worst"] <= report["average"] - 15


@pytest.mark.parametrize(("task", "rise"), [("waterbirds", 20), ("celeba", 10)])
def test_a_group_defense_lifts_the_worst_group_and_keeps_the_average(task, rise):
    defense = find_defense(f"embedded:{task}")
    clip, grouping = load_clip("embedded"), draws.GROUPINGS[task]
    groups = build.groups_of(grouping, 300, 123_456, clip)
    text_embeds = build.text_embeds_of(clip, grouping.classes, grouping.template)
    plain = build.report_on(clip, groups, text_embeds)
    RobustClassifier(clip, defense)
    defended = build.report_on(clip, groups, text_embeds)
    assert defended["worst"] >= plain["worst"] + rise
    assert defended["average"] >= plain["average"] - 2


def test_the_defenses_are_named_and_others_refused():
    assert MODELS[EMBEDDED].defenses == ("celeba", "text", "waterbirds")
    assert find_defense("embedded:text").manifest_sha256 == find_defense("embedded").manifest_sha256
    with pytest.raises(CheckpointError, match="no defense 'dogs'; it has celeba, text, waterbirds"):
        find_defense("embedded:dogs")


def test_several_defenses_work_together():
    joined = join([find_defense(f"embedded:{name}") for name in MODELS[EMBEDDED].defenses])
    assert set(joined.sets) == {"text", "waterbirds", "celeba"}
    assert [site.hook_point for site in joined.sites].count("blocks.4.hook_resid_post") == 1
    clf = RobustClassifier(load_clip("embedded"), joined).set_labels(["apple", "pizza"])
    assert clf(EXAMPLES[0])[0]["label"] == "apple"


def test_random_latents_of_equal_activity_do_not_defend(pairs):
    clip = load_clip("embedded")
    saes = [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])]
    defense = restored(defenses.load(embedded_folder("text")), saes, own_rule=True)
    control = Defense(
        defense.clip,
        defense.preprocess,
        tuple(
            random_control(site, activity_of(clip, site, [pairs.attacked.numpy()]), np.random.default_rng(0))
            for site in defense.sites
        ),
    )
    for site, mine in zip(control.sites, defense.sites, strict=True):
        assert len(site.sets[0].latents) == len(mine.sets[0].latents)
        assert not set(site.sets[0].latents) & set(mine.sets[0].latents)
    text_embeds = build.text_embeds_of(clip, list(scenes.OBJECTS))
    before = build.report_on(clip, pairs, text_embeds)
    RobustClassifier(clip, control)
    after = build.report_on(clip, pairs, text_embeds)
    assert after["attack_success"] >= before["attack_success"] - 25


def test_the_examples_fool_plain_clip_and_not_the_defended_one(clf):
    attacked = [path for path in EXAMPLES if "-" in path.stem]
    assert len(attacked) >= 4
    for path in attacked:
        label, word = path.stem.split("-")
        explanation = clf.explain(path)
        assert explanation.plain[0]["label"] == word, path.name
        assert explanation.robust[0]["label"] == label, path.name
        assert explanation.changed
        assert explanation.removed
        assert {item.set_name for item in explanation.removed} == {"text"}


def test_an_example_without_writing_keeps_its_answer(clf):
    (path,) = [path for path in EXAMPLES if "-" not in path.stem]
    explanation = clf.explain(path)
    assert explanation.plain[0]["label"] == explanation.robust[0]["label"] == path.stem


def test_what_is_removed_lies_where_the_word_is(clf):
    inside = total = 0.0
    grid = (np.stack(np.meshgrid(np.arange(10), np.arange(10)), -1).reshape(-1, 2) + 0.5) / 10
    for case in draws.typographic(25, 424_242):
        heat = clf.explain(scenes.render(case.scene)).heatmap.ravel()
        text = scenes.letters_at(case.scene, grid) > 0
        inside, total = inside + heat[text].sum() / heat.sum(), total + text.mean()
    assert inside > 2 * total, "per patch, twice as much must be removed on the word as elsewhere"


def test_the_shipped_report_is_the_one_of_the_shipped_weights():
    defense = defenses.load(embedded_folder("text"))
    assert defense.clip.sha256 == load_clip("embedded").tower.fingerprint()
    assert set(defense.provenance["report"]) == {"plain", "defended", "random latents"}


def test_words_that_no_caption_used_are_named(clf, caplog):
    clf.set_labels(["apple", "aardvark"]).text_embeds()
    assert "'aardvark'" in caplog.text
    assert "'apple'" not in caplog.text
    clf.set_labels(list(scenes.OBJECTS))


def test_the_shipped_weights_are_small():
    def size(name: str) -> int:
        return sum(path.stat().st_size for path in (FOLDER / name).rglob("*.safetensors"))

    assert size("clip") + size("sae") <= 25e6
    assert all(size(task) <= 4e5 for task in MODELS[EMBEDDED].defenses)


@pytest.mark.parametrize("name", MODELS[EMBEDDED].defenses)
def test_a_shipped_defense_is_calibrated_and_slim_and_its_sae_ships_beside_it(name):
    defense = find_defense(f"embedded:{name}")
    assert defense.provenance["calibration"]["agreement"] >= 0.99
    whole = restored(defense, [each.sae for each in checkpoint.shipped_saes(MODELS[EMBEDDED])])
    for site, again in zip(defense.sites, whole.sites, strict=True):
        assert site.sae_config.act == "batchtopk"
        assert site.part.latents == tuple(sorted(site.sets[0].latents))
        assert again.part is None
    assert golden_difference_of(whole) < 1e-4


def golden_difference_of(defense: Defense) -> float:
    clip = load_clip("embedded")
    with clip.defended(defense):
        return golden_difference(clip, defense.golden)


def test_training_resumes_where_it_stopped(tmp_path):
    from defense.embedded import train_clip
    from defense.embedded.train_clip import Reader

    torch.manual_seed(0)
    reader = Reader()
    optimizer = torch.optim.AdamW(reader.parameters(), lr=1e-3)
    reader(torch.zeros(2, 3, 80, 80))[0].sum().backward()
    optimizer.step()
    train_clip.save_state(tmp_path / "state.safetensors", 7, reader, optimizer)
    other = Reader()
    other_optimizer = torch.optim.AdamW(other.parameters(), lr=1e-3)
    assert train_clip.load_state(tmp_path / "state.safetensors", other, other_optimizer) == 7
    for name, tensor in reader.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    moments, restored = optimizer.state_dict()["state"], other_optimizer.state_dict()["state"]
    assert moments.keys() == restored.keys()
    for index, want in moments.items():
        assert torch.equal(want["exp_avg"], restored[index]["exp_avg"])
        assert want["step"] == restored[index]["step"]


def test_training_examples_are_drawn_from_the_seed_alone():
    from defense.world import draws

    examples = [draws.draw_example(i) for i in range(300)]
    assert examples == [draws.draw_example(i) for i in range(300)]
    assert {example.question for example in examples} == set(draws.QUESTIONS)
    fonts = {e.scene.writing.font for e in examples if e.scene.writing is not None}
    assert fonts <= set(scenes.TRAIN_FONTS)
