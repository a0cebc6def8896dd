"""Benchmark runs: what they compute, what they keep, what they write, and what their tables say."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks import plots, robust, tables
from defense.benchmarks.datasets import Dataset, Example, File, Task
from defense.benchmarks.methods import Encoder, make_methods
from defense.benchmarks.named_clip import NamedClip, load_named_clip, weights_sha256
from defense.benchmarks.robust_results import read_results, write_result
from defense.benchmarks.robust_store import Store
from defense.classify.classifier import RobustClassifier
from defense.cli import app
from defense.core.latents import LatentSet
from defense.errors import CheckpointError, ConfigError, MissingDependencyError
from defense.store import defenses

from ..conftest import random_defense, random_sae

NAMES = ("cloud", "rose", "zebra", "fish", "king", "river")


@pytest.fixture
def named(tiny_folder):
    return load_named_clip(f"local-dir:{tiny_folder}", None)


@pytest.fixture
def defense(tmp_path, tiny_clip, tiny_folder):
    site = (1, random_sae(act="topk", k=8), LatentSet("text", tuple(range(80))))
    folder = defenses.save(random_defense(tiny_clip, site, name=f"local-dir:{tiny_folder}"), tmp_path / "defense")
    return defenses.load(folder)


def write_pictures(folder: Path, n: int) -> list[Path]:
    """Pictures of one color each: the tiny CLIP gives them different answers."""
    folder.mkdir(exist_ok=True)
    paths = []
    for i in range(n):
        path = folder / f"{i:03}.png"
        Image.new("RGB", (40, 36), tuple(np.random.default_rng(i).integers(0, 256, 3).tolist())).save(path)
        paths.append(path)
    return paths


def dataset_of(paths: list[Path], variant: str = "attacked", **fields) -> Dataset:
    """Labels go round; the word is the next class. `fields` override."""
    has_groups = "group_names" in fields
    n = 2 if has_groups else len(NAMES)
    examples = tuple(
        Example(
            path.name,
            File(path),
            i % n,
            None if has_groups or variant == "clean" else (i + 1) % n,
            (i // 2) % 2 if has_groups else None,
        )
        for i, path in enumerate(paths)
    )
    return Dataset(**{"name": "set", "variant": variant, "examples": examples, "class_names": NAMES[:n], **fields})


def task_of(*tests: Dataset, **fields) -> Task:
    return Task(tests[0].name, "A set", tests, **fields)


def run_all(named, tasks, methods, out: Path, **options) -> list[dict]:
    """Run all methods on all tasks."""
    return robust.run(named, [(task, methods) for task in tasks], out, **options)


def without_run(results: list[dict]) -> list[dict]:
    return [{**r, "robust": {k: v for k, v in r["robust"].items() if k != "run"}} for r in results]


class Counting:
    """A method that counts what it encodes, and can fail at a call."""

    def __init__(self, name: str = "zero-shot", *, fails_at: int | None = None) -> None:
        self.name = name
        self.fails_at = fails_at
        self.batches: list[int] = []
        self.trained_on: Dataset | None = None

    def settings(self):
        return {}

    def fit(self, clip, task):
        self.trained_on = task.train

    @contextmanager
    def apply(self, clip):
        counting = self

        class Counted(Encoder):
            def image_embeds(self, pictures):
                if len(counting.batches) == counting.fails_at:
                    raise KeyboardInterrupt
                counting.batches.append(len(pictures))
                return super().image_embeds(pictures)

        yield Counted(clip)


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
    assert method.trained_on is train


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


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_two_runs_give_equal_results_but_for_the_block_run(named, tmp_path, defense):
    dataset = dataset_of(write_pictures(tmp_path / "pictures", 12))
    methods = make_methods(["zero-shot", "defense"], defense)
    first = run_all(named, [task_of(dataset)], methods, tmp_path / "a", command="one")
    second = run_all(named, [task_of(dataset)], methods, tmp_path / "b", command="two")
    assert without_run(first) == without_run(second)
    assert first != second


def test_pictures_are_encoded_once_and_a_chunk_at_a_time(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 150)))
    first, second = Counting(), Counting()
    a = run_all(named, [task], [first], tmp_path / "out")
    b = run_all(named, [task], [second], tmp_path / "out")
    assert first.batches == [64, 64, 22]
    assert second.batches == []
    assert a[0]["robust"]["run"]["encode_ms"] == b[0]["robust"]["run"]["encode_ms"]  # what it cost when it was done
    assert without_run(a) == without_run(b)


def test_an_interrupted_run_goes_on_where_it_was(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 150)))
    with pytest.raises(KeyboardInterrupt):
        run_all(named, [task], [Counting(fails_at=2)], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))
    rest = Counting()
    resumed = run_all(named, [task], [rest], tmp_path / "out")
    assert rest.batches == [22]
    assert without_run(resumed) == without_run(run_all(named, [task], [Counting()], tmp_path / "fresh"))


def test_a_changed_picture_is_encoded_anew(named, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 70)
    task = task_of(dataset_of(paths))
    (before,) = run_all(named, [task], [Counting()], tmp_path / "out")
    paths[0].write_bytes(paths[1].read_bytes())
    again = Counting()
    (after,) = run_all(named, [task], [again], tmp_path / "out")
    assert again.batches == [64]
    assert before["robust"]["data_sha256"] != after["robust"]["data_sha256"]


def test_other_methods_settings_and_weights_share_no_embeddings(named, tmp_path, defense):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 8)))
    store = tmp_path / "out" / "embeddings"
    run_all(named, [task], make_methods(["zero-shot", "defense", "defense@0.5"], defense), tmp_path / "out")
    assert len(list(store.iterdir())) == 4  # three times the pictures, once the prompts
    import torch

    with torch.no_grad():
        named.clip.model.visual.proj.mul_(2)
    other = NamedClip(named.clip, "other", "other", weights_sha256(named.clip.model))
    assert other.sha256 != named.sha256
    run_all(other, [task], make_methods(["zero-shot"], None), tmp_path / "out")
    assert len(list(store.iterdir())) == 6


def test_what_is_kept_is_what_was_computed_views_included(tmp_path):
    store = Store(tmp_path)
    square = np.arange(6.0).reshape(2, 3)
    for name, array in {"plain": square, "turned": square.T, "backwards": square[::-1], "one": square[:, 1]}.items():
        for _ in range(2):
            np.testing.assert_array_equal(store.get(name, lambda array=array: {"x": array})["x"], array)


def test_a_damaged_file_of_embeddings_is_an_error(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 8)))
    run_all(named, [task], make_methods(["zero-shot"], None), tmp_path / "out")
    for path in (tmp_path / "out" / "embeddings").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        run_all(named, [task], make_methods(["zero-shot"], None), tmp_path / "out")


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


# --- hosts and methods ------------------------------------------------------------------------------------------------


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


def test_random_weights_cannot_be_drawn_for_an_unknown_model():
    with pytest.raises(ConfigError, match="knows no model 'ViT-Z'"):
        load_named_clip("ViT-Z", "random")
    with pytest.raises(ConfigError, match="from Hugging Face"):
        load_named_clip("roberta-ViT-B-32", "random")


# --- tables and plots -------------------------------------------------------------------------------------------------


@pytest.fixture
def results(named, tmp_path, defense):
    paths = write_pictures(tmp_path / "pictures", 24)
    tests = dataset_of(paths, "clean"), dataset_of(paths)
    methods = make_methods(["zero-shot", "defense@0.5", "defense"], defense)
    return run_all(named, [task_of(*tests)], methods, tmp_path / "out")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_per_method_and_the_jsons_figures(results):
    text = tables.markdown(results)
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines] == ["method", "---", "zero-shot", "defense", "defense@0.5"]
    assert lines[0][1:4] == ["clean accuracy", "against zero-shot", "attacked accuracy"]
    by_place = {(r["dataset"], r["method"]): r["robust"] for r in results}
    row = dict(zip(lines[0], lines[3], strict=True))
    accuracy = by_place["set-attacked", "defense"]["figures"]["accuracy"]
    assert row["attacked accuracy"].startswith(f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f} to")
    change = by_place["set-clean", "defense"]["versus"]["zero-shot"]["difference"]["value"]
    assert lines[3][2].startswith(f"{100 * change:+.1f} (")
    assert lines[2][2] == "-"
    for expected in ("6 classes", '"a photo of a {}."', "clean 24, attacked 24", "McNemar", "bootstrap"):
        assert expected in text
    assert results[2]["robust"]["settings"]["defense_sha256"][:16] in text
    difference = by_place["set-attacked", "defense@0.5"]["versus"]["defense"]["difference"]["value"]
    assert lines[0][3:6] == ["attacked accuracy", "against zero-shot", "against defense"]
    assert lines[4][5].startswith(f"{100 * difference:+.1f} (")
    assert lines[3][5] == "-"


def test_the_table_does_not_depend_on_the_order_of_the_files(results):
    assert tables.markdown(list(reversed(results))) == tables.markdown(results)


def test_the_table_of_groups_names_the_worst(named, tmp_path):
    dataset = dataset_of(
        write_pictures(tmp_path / "pictures", 40),
        "test",
        group_names=("one", "two", "three", "four"),
        train_counts=(9, 1, 1, 9),
    )
    (result,) = run_all(named, [task_of(dataset)], make_methods(["zero-shot"], None), tmp_path / "out")
    head, _, row = (cells(line) for line in tables.markdown([result]).splitlines() if line.startswith("|"))
    assert head[1:7] == [
        "worst group", "of", "average", "train-weighted average", "gap", "against zero-shot"
    ]  # fmt: skip
    groups = result["robust"]["groups"]
    assert row[2] == min(groups, key=lambda name: groups[name][1])
    assert "Groups: one 10, two 10, three 10, four 10." in tables.markdown([result])


@pytest.mark.parametrize("name", ["class_names", "templates", "data_sha256", "host_sha256", "n", "shortfall"])
def test_results_of_different_questions_share_no_table(results, name):
    other = json.loads(json.dumps(results[1]))
    other["robust"][name] = "other"
    with pytest.raises(ConfigError, match=f"differ in {name}"):
        tables.markdown([results[0], other])


def test_a_method_is_not_shown_twice(results):
    with pytest.raises(ConfigError, match="two results of zero-shot"):
        tables.markdown([results[0], results[0]])


def test_random_weights_and_partial_data_are_said_so(results):
    changed = json.loads(json.dumps(results))
    for result in changed:
        result["robust"] |= {"has_random_weights": True, "shortfall": "24 of 1,000 pictures", "is_complete": False}
    text = tables.markdown(changed)
    assert "**random weights: a rehearsal, no figure means anything**" in text
    assert "**Not the published data: 24 of 1,000 pictures.**" in text
    title = plots.trade_off(changed).axes[0].get_title()
    assert "random weights" in title
    assert "data incomplete" in title
    assert "random weights" not in tables.markdown(results)


def test_plots_are_functions_of_the_json(results, tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths = plots.draw(json.loads(json.dumps(results)), tmp_path / folder)
        assert [path.name for path in paths] == ["set-strength.png", "set-trade-off.png", "set-classes.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_points_of_the_plots_are_the_jsons_figures(results):
    pytest.importorskip("matplotlib")
    by_place = {(r["dataset"], r["method"]): 100 * r["metrics"]["acc1"] for r in results}
    lines = [container.lines[0] for container in plots.strength(results).axes[0].containers]
    assert [line.get_xdata().tolist() for line in lines] == [[0, 0.5, 1]] * 2
    for line, dataset in zip(lines, ("set-clean", "set-attacked"), strict=True):
        expected = [by_place[dataset, method] for method in ("zero-shot", "defense@0.5", "defense")]
        assert line.get_ydata().tolist() == pytest.approx(expected)
    lost = {r["method"]: r["robust"]["versus"].get("zero-shot") for r in results if r["robust"]["variant"] == "clean"}
    for container, method in zip(
        plots.trade_off(results).axes[0].containers, ("zero-shot", "defense@0.5", "defense"), strict=True
    ):
        point = container.lines[0]
        expected = 0 if method == "zero-shot" else -100 * lost[method]["difference"]["value"]
        assert point.get_xdata().tolist() == pytest.approx([expected])
        assert point.get_ydata().tolist() == pytest.approx([by_place["set-attacked", method]])


def test_plots_that_mean_nothing_are_not_drawn(results):
    attacked = [r for r in results if r["dataset"] == "set-attacked" and r["method"] == "zero-shot"]
    assert plots.strength(attacked) is None
    assert plots.trade_off(attacked) is None
    assert plots.classes(attacked) is None


def test_without_matplotlib_the_error_names_the_extra(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"clip-defense\[bench\]"):
        plots.draw(results, tmp_path)


def test_a_report_is_made_of_the_files_in_a_folder(results, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    (out / "something else.json").write_text("[1]")
    robust.lay_out(out)
    text = (out / "results.md").read_text()
    assert text.count("| zero-shot |") == 1
    assert (out / "set-strength.png").exists()
    newer = json.loads(json.dumps(results[0]))
    newer["robust"]["schema"] += 1
    write_result(newer, out)
    with pytest.raises(ConfigError, match="reads up to"):
        robust.lay_out(out)


# --- the command ------------------------------------------------------------------------------------------------------


def run(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


@pytest.fixture
def data(tmp_path, small_minis):
    """A folder with two small data sets: RTA-100 in part, and pictures to draw words on."""
    folder = tmp_path / "data"
    (folder / "rta100").mkdir(parents=True)
    paths = write_pictures(tmp_path / "pictures", 6)
    for i, path in enumerate(paths):
        label, word = NAMES[i % 3], NAMES[(i + 1) % 3]
        (folder / "rta100" / f"label={label}_text={word}.png").write_bytes(path.read_bytes())
        (folder / "synthetic" / label).mkdir(parents=True, exist_ok=True)
        (folder / "synthetic" / label / path.name).write_bytes(path.read_bytes())
    return folder


def test_bench_prints_tables_and_writes_results(data, tmp_path, defense):
    pytest.importorskip("matplotlib")
    arguments = ("bench", "typographic", "--data", data, "--defense", tmp_path / "defense", "--out", tmp_path / "out")
    code, out, err = run(*arguments, "--allow-partial", "--device", "cpu")
    assert code == 0, err
    assert "left out: paint, disentangling, scam" in err
    assert "### RTA-100" in out
    assert "Not the published data: 3 of 1,000 pictures; 3 of 100 classes" in out
    assert "### drawn words on synthetic" in out
    assert (tmp_path / "out" / "results.md").read_text() == out
    assert "### Mini-typographic" in out
    assert len(list((tmp_path / "out").glob("*.json"))) == 12  # three data sets and three that are drawn, two methods
    assert len(list((tmp_path / "out").glob("*.png"))) > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rta100"], "not the published RTA-100"),
        (["waterbirds"], "metadata.csv is missing"),
        (["nothing"], "no data set 'nothing'"),
        (["rta100", "--allow-partial", "--methods", "magic"], "no method 'magic'"),
        (["synthetic", "--font", "nothing.ttf"], "no font"),
    ],
)
def test_bench_usage_errors_exit_with_2(data, tmp_path, defense, arguments, message):
    code, out, err = run(
        "bench", *arguments, "--data", data, "--defense", tmp_path / "defense", "--out", tmp_path / "out"
    )
    assert (code, out) == (2, "")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_bench_without_a_model_is_a_usage_error(data, tmp_path):
    code, _, err = run("bench", "synthetic", "--data", data, "--methods", "zero-shot", "--out", tmp_path / "out")
    assert code == 2
    assert "--model is missing" in err


def test_bench_tells_of_unreadable_pictures_by_its_exit_code(data, tmp_path, defense):
    pytest.importorskip("matplotlib")
    next((data / "synthetic" / NAMES[0]).iterdir()).write_bytes(b"no picture")
    code, out, err = run(
        "bench", "synthetic", "--data", data, "--defense", tmp_path / "defense", "--out", tmp_path / "out"
    )
    assert code == 4
    assert "Incomplete: pictures that could not be read: 1 of synthetic-clean, 1 of synthetic-attacked" in out
    assert "could not be read" in err


def test_readers_metrics_and_reports_load_no_torch():
    code = (
        "import sys; import defense.benchmarks.datasets, defense.benchmarks.metrics, defense.benchmarks.tables, "
        "defense.benchmarks.plots, defense.benchmarks.robust; "
        "sys.exit(bool({'torch', 'open_clip', 'matplotlib', 'scipy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# --- a full-size model ------------------------------------------------------------------------------------------------


@pytest.fixture
def rehearsal(shared_data, tmp_path) -> list[str]:
    """Arguments to measure ViT-B-32 with random weights, and a defense for just these, on a part of RTA-100."""
    from defense.core.config import SAEConfig
    from defense.hosts.defense import ClipId, Defense, Site
    from defense.hosts.families import tower_of

    from ..conftest import random_parameters

    (tmp_path / "data" / "rta100").mkdir(parents=True)
    for path in sorted((shared_data / "rta100").rglob("label=*"))[:70]:
        shutil.copy(path, tmp_path / "data" / "rta100")
    named = load_named_clip("ViT-B-32", "random")
    assert load_named_clip("ViT-B-32", "random").sha256 == named.sha256
    tower = tower_of(named.clip.model)
    spec = ClipId("ViT-B-32", "random", tower.fingerprint(), tower.quick_gelu, 768, 12)
    config = SAEConfig(d_model=768, d_sae=1024, act="topk", k=32)
    site = Site(
        "blocks.8.hook_resid_post", config.to_dict(), random_parameters(config), (LatentSet("text", range(99)),)
    )
    defenses.save(Defense(spec, named.clip.preprocess, (site,)), tmp_path / "defense")
    return [
        "bench", "rta100", "--data", str(tmp_path / "data"), "--model", "ViT-B-32", "--pretrained", "random",
        "--device", "cpu", "--defense", str(tmp_path / "defense"), "--allow-partial", "--out",
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "wait4"), reason="memory of another process is told by POSIX systems only")
def test_a_rehearsal_with_a_full_size_model_that_is_interrupted(rehearsal, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"

    def started() -> subprocess.Popen:
        command = [sys.executable, "-P", "-c", "from defense.cli import main; main()", *rehearsal, str(out)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def kept() -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in out.glob("embeddings/*.safetensors")}

    with started() as process:
        while process.poll() is None and len(kept()) < 2:  # the prompts and the first chunk of pictures
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
    assert process.returncode == 130
    assert not list(out.glob("*.json"))
    before = kept()
    with started() as process:
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    assert usage.ru_maxrss < 3 * 2**20  # KiB: the model holds 0.6 GiB, torch and its libraries about as much
    assert "random weights: a rehearsal" in printed
    assert "70 of 1,000 pictures" in printed
    assert before.items() <= kept().items()
    assert len(kept()) == 5  # the prompts, and two chunks by two methods
    code, _, err = run(*rehearsal, tmp_path / "fresh")
    assert code == 0, err
    assert without_run(read_results(out)) == without_run(read_results(tmp_path / "fresh"))
