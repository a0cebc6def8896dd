"""Benchmark runs: what they compute, and what becomes of pictures and methods that fail."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks import tables
from defense.benchmarks.methods import Encoder, make_methods
from defense.benchmarks.named_clip import weights_sha256
from defense.classify.classifier import RobustClassifier
from defense.core.latents import LatentSet
from defense.errors import ConfigError

from ..conftest import random_defense, random_sae
from .runs import NAMES, Counting, dataset_of, run_all, task_of, write_pictures

# --- what is computed -------------------------------------------------------------------------------------------------


def test_zero_shot_answers_are_the_classifiers(named, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 20)
    dataset = dataset_of(paths)
    (result,) = run_all(named, [task_of(dataset)], make_methods(["zero-shot"], None), tmp_path / "out")
    predicted = RobustClassifier(named.clip).set_labels(NAMES).predict([str(path) for path in paths])
    right = [NAMES[e.label] for e in dataset.examples]
    assert result["metrics"]["acc1"] == np.mean(predicted == right)
    words = [NAMES[e.word] for e in dataset.examples]
    assert result["robust"]["figures"]["attack_success"]["value"] == np.mean(predicted == words)
    assert len(set(predicted)) > 1  # else this test could not tell one answer from another


def test_the_result_has_the_shape_of_clip_benchmark(named, tmp_path):
    dataset = dataset_of(write_pictures(tmp_path / "pictures", 12))
    (result,) = run_all(named, [task_of(dataset)], make_methods(["zero-shot"], None), tmp_path / "out")
    assert set(result) == {"dataset", "model", "pretrained", "task", "metrics", "language", "method", "robust"}
    assert result["task"] == "zeroshot_classification"
    assert set(result["metrics"]) == {"acc1", "acc5", "mean_per_class_recall"}
    (path,) = (tmp_path / "out").glob("*.json")
    assert json.loads(path.read_text()) == result
    # A row of its CSV tooling: metrics and the rest side by side.
    assert not set(result["metrics"]) & set(result)


def test_a_result_records_what_it_rests_on(named, tmp_path, defense):
    dataset = dataset_of(write_pictures(tmp_path / "pictures", 12), facts={"recipe": "x"}, shortfall="12 of 99")
    methods = make_methods(["zero-shot", "defense@0.5"], defense)
    plain, defended = run_all(named, [task_of(dataset)], methods, tmp_path / "out", seed=5, command="typed")
    block = plain["robust"]
    assert block["class_names"] == list(NAMES)
    assert block["templates"] == ["a photo of a {}."]
    assert block["facts"] == {"recipe": "x"}
    assert block["shortfall"] == "12 of 99"
    assert not block["is_complete"]
    assert block["host_sha256"] == named.sha256
    assert block["preprocess"] == named.clip.preprocess.to_dict()
    assert (block["seed"], block["exif"], block["run"]["environment"]["command"]) == (5, "not applied", "typed")
    assert defended["robust"]["settings"] == {"defense_sha256": defense.manifest_sha256, "strength": 0.5}
    assert set(defended["robust"]["versus"]) == {"zero-shot"}
    assert block["run"]["encode_ms"] > 0


def test_the_defense_is_attached_in_full_in_part_and_not_at_all(named, tmp_path, defense):
    dataset = dataset_of(write_pictures(tmp_path / "pictures", 24))
    methods = make_methods(["zero-shot", "defense@0", "defense@0.5", "defense"], defense)
    plain, none, half, full = run_all(named, [task_of(dataset)], methods, tmp_path / "out")
    margins = [r["robust"]["figures"]["margin"]["value"] for r in (plain, none, half, full)]
    assert margins[0] == margins[1]
    assert len(set(margins)) == 3


def test_the_host_is_as_it_was_after_a_run(named, tmp_path, defense):
    paths = write_pictures(tmp_path / "pictures", 4)
    before = RobustClassifier(named.clip).transform(map(str, paths))
    run_all(named, [task_of(dataset_of(paths))], make_methods(["defense"], defense), tmp_path / "out")
    np.testing.assert_array_equal(RobustClassifier(named.clip).transform(map(str, paths)), before)
    assert weights_sha256(named.clip.model) == named.sha256


def test_groups_are_measured(named, tmp_path):
    groups = ("a", "b", "c", "d")
    dataset = dataset_of(
        write_pictures(tmp_path / "pictures", 40), "test", group_names=groups, train_counts=(90, 5, 5, 90)
    )
    (result,) = run_all(named, [task_of(dataset)], make_methods(["zero-shot"], None), tmp_path / "out")
    block = result["robust"]
    accuracies = {name: accuracy for name, (_, accuracy) in block["groups"].items()}
    assert {name: n for name, (n, _) in block["groups"].items()} == dict.fromkeys(groups, 10)
    assert block["figures"]["worst_group"]["value"] == min(accuracies.values())
    weighted = np.average(list(accuracies.values()), weights=(90, 5, 5, 90))
    assert block["figures"]["accuracy_adjusted"]["value"] == pytest.approx(weighted)
    assert result["metrics"]["acc5"] is None  # of two classes
    assert "attack_success" not in block["figures"]


def test_templates_are_averaged_as_the_data_set_asks(named, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 12)
    templates = ("a photo of a {}.", "graffiti of a {}.")
    margins = []
    for normalize_each in (True, False):
        dataset = dataset_of(paths, templates=templates, choice="pair", normalize_each=normalize_each)
        (result,) = run_all(named, [task_of(dataset)], make_methods(["zero-shot"], None), tmp_path / "out")
        margins.append(result["robust"]["figures"]["margin"]["value"])
    assert margins[0] != margins[1]


def test_a_method_is_fitted_on_the_training_split_only(named, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 12)
    train, test = dataset_of(paths[:6], "train"), dataset_of(paths[6:])
    method = Counting()
    run_all(named, [task_of(test, train=train)], [method], tmp_path / "out")
    assert [each.key for each in method.trained_on.examples] == [each.key for each in train.examples]


def test_a_method_that_edits_text_has_its_own_text_embeddings(named, tmp_path):
    class Backwards(Counting):
        @contextmanager
        def apply(self, clip):
            class Turned(Encoder):
                edits_text = True

                def text_embeds(self, prompts, *, normalize_each=True):
                    return super().text_embeds(prompts, normalize_each=normalize_each)[::-1]

            yield Turned(clip)

    dataset = dataset_of(write_pictures(tmp_path / "pictures", 30))
    methods = [Counting("stock"), Backwards("turned")]
    stock, turned = run_all(named, [task_of(dataset)], methods, tmp_path / "out")
    assert stock["robust"]["figures"]["margin"] != turned["robust"]["figures"]["margin"]


# --- pictures that cannot be read -------------------------------------------------------------------------------------


def test_fault_81_unreadable_pictures_are_counted_and_listed(named, tmp_path, defense, caplog):
    paths = write_pictures(tmp_path / "pictures", 12)
    paths[3].write_bytes(b"<html>not found</html>")
    paths[7].unlink()
    methods = make_methods(["zero-shot", "defense"], defense)
    for _ in range(2):  # computed, then kept
        caplog.clear()
        results = run_all(named, [task_of(dataset_of(paths))], methods, tmp_path / "out")
        assert "set-attacked: 1 of 12 pictures are missing" in caplog.text
        for result in results:
            block = result["robust"]
            assert (block["n"], block["n_unreadable"]) == (10, 2)
            assert block["unreadable"] == ["003.png", "007.png"]
            assert not block["is_complete"]
            assert block["figures"]["accuracy"]["n"] == 10
    assert "Incomplete: pictures that could not be read: 2 of set-attacked" in tables.markdown(results)
    write_pictures(tmp_path / "pictures", 12)
    (mended, _) = run_all(named, [task_of(dataset_of(paths))], methods, tmp_path / "out")
    assert (mended["robust"]["n"], mended["robust"]["is_complete"]) == (12, True)


def test_fault_81_a_data_set_without_pictures_is_refused_before_anything_is_encoded(named, tmp_path):
    method = Counting()
    missing = [tmp_path / f"{i}.png" for i in range(3)]
    with pytest.raises(ConfigError, match=r"none of 3 pictures is there, .*0\.png the first"):
        run_all(named, [task_of(dataset_of(missing))], [method], tmp_path / "out")
    assert method.batches == []


def test_fault_81_a_group_of_which_nothing_can_be_read_is_an_error(named, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 8)
    dataset = dataset_of(paths, "test", group_names=("a", "b", "c", "d"))
    for example in dataset.examples:
        if example.group == 2:
            example.picture.path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="no picture of the group 'c' can be read"):
        run_all(named, [task_of(dataset)], make_methods(["zero-shot"], None), tmp_path / "out")


def test_a_data_set_of_which_nothing_can_be_read_is_an_error(named, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 3)
    for path in paths:
        path.write_bytes(b"no picture")
    with pytest.raises(ConfigError, match="no picture could be read"):
        run_all(named, [task_of(dataset_of(paths))], make_methods(["zero-shot"], None), tmp_path / "out")


# --- methods ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["dyslexia"], "no method 'dyslexia'; there are zero-shot, defense"),
        (["zero-shot", "zero-shot"], "twice"),
        (["zero-shot@0.5"], "no strength"),
        (["defense@much"], "strength in"),
        (["defense@2"], "must lie in"),
        (["defense@nan"], "must lie in"),
    ],
)
def test_methods_that_cannot_be_are_refused(names, message, defense):
    with pytest.raises(ConfigError, match=message):
        make_methods(names, defense)


def test_a_defense_has_to_have_a_hash(tiny_clip):
    unsaved = random_defense(tiny_clip, (1, random_sae(), LatentSet("text", (1,))))
    with pytest.raises(ConfigError, match="not read from disk"):
        make_methods(["defense"], unsaved)


class Refusing(Counting):
    """A method that asks for what the task has not."""

    def fit(self, clip, task):
        raise ConfigError("needs a training split")


class Unfed(Counting):
    """A method that learns from the pictures of the training split."""

    def fit(self, clip, task):
        task.train.examples[0].picture.load()


def test_a_broken_training_picture_costs_a_method_its_row_and_no_other(named, tmp_path):
    train = dataset_of(write_pictures(tmp_path / "train", 8))
    train.examples[0].picture.path.write_bytes(b"no picture")
    task = replace(task_of(dataset_of(write_pictures(tmp_path / "pictures", 8))), train=train)
    (result,) = run_all(named, [task], [Counting(), Unfed("unfed")], tmp_path / "out")
    assert set(result["robust"]["not_applicable"]) == {"unfed"}


def test_a_method_that_cannot_be_fitted_is_listed_with_the_reason(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 8)))
    refusing = Refusing("picky")
    (result,) = run_all(named, [task], [Counting(), refusing, *make_methods(["defense"], None)], tmp_path / "out")
    assert refusing.batches == []
    assert result["robust"]["not_applicable"] == {
        "picky": "needs a training split",
        "defense": "needs a defense; give --defense",
    }
    text = tables.markdown([result])
    assert "Not applicable: picky: needs a training split.\n" in text
    assert "| picky" not in text


def test_of_a_method_that_was_measured_no_reason_is_told(results):
    results = json.loads(json.dumps(results))
    results[0]["robust"]["not_applicable"] = {"defense": "none was there in an earlier run"}
    assert "Not applicable" not in tables.markdown(results)


def test_where_no_method_can_be_fitted_the_reasons_are_the_error(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 8)))
    with pytest.raises(ConfigError, match=r"nothing to measure on A set: picky: needs a .*; defense: .*give"):
        run_all(named, [task], [Refusing("picky"), *make_methods(["defense"], None)], tmp_path / "out")


def test_an_error_while_measuring_is_no_reason_to_leave_a_method_out(named, tmp_path):
    class Broken(Counting):
        @contextmanager
        def apply(self, clip):
            raise ConfigError("broken")
            yield

    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 8)))
    with pytest.raises(ConfigError, match="broken"):
        run_all(named, [task], [Counting(), Broken("other")], tmp_path / "out")


def test_a_defense_for_another_host_is_refused(tmp_path, defense, named):
    import torch

    with torch.no_grad():
        named.clip.model.visual.proj.mul_(2)
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 2)))
    with pytest.raises(ConfigError, match="fitted on the weights"):
        run_all(named, [task], make_methods(["defense"], defense), tmp_path / "out")
