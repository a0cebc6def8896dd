"""Which labels of real attacks are names of ImageNet's classes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest

from defense.benchmarks.datasets import READERS, Dataset, Example, File, Options, Task, real_names
from defense.embedded.photo.names import load_words
from defense.errors import ConfigError

DATA = Path(os.environ.get("CLIP_DEFENSE_DATA", Path(__file__).parents[3] / "shared" / "data"))
TABLE = json.loads(Path(real_names.__file__).with_suffix(".json").read_text())
NAMES = ("apple", "trafficLight", "iPhone", "socks", "jacket")


def dataset(pairs) -> Dataset:
    examples = tuple(
        Example(str(row), File(Path(f"{row}.jpg")), NAMES.index(label), NAMES.index(word))
        for row, (label, word) in enumerate(pairs)
    )
    return Dataset("real", "attacked", examples, NAMES)


@pytest.mark.parametrize(
    ("label", "word"),
    [
        ("apple", "apple"), ("trafficLight", "traffic light"), ("traffic_light", "traffic light"), ("socks", "sock"),
        ("iPhone", None), ("jacket", None), ("", None),
    ],
)  # fmt: skip
def test_a_label_is_known_as_the_word_that_it_is_in_another_spelling(label, word):
    assert load_words().known_as(label) == word


def test_pictures_with_an_unknown_object_or_word_are_left_out_and_counted():
    made = dataset([("apple", "socks"), ("apple", "iPhone"), ("iPhone", "apple"), ("trafficLight", "jacket")])
    (test,) = real_names.known_only(Task("real", "Real", (made,))).tests
    assert test.class_names == ("apple", "sock", "traffic light")
    ((key, label, word),) = [
        (each.key, test.class_names[each.label], test.class_names[each.word]) for each in test.examples
    ]
    assert (key, label, word) == ("0", "apple", "sock")
    assert test.facts["n_left_out"] == 3
    assert test.name == "real-known"


def test_a_task_without_known_pictures_is_refused():
    with pytest.raises(ConfigError, match="known object"):
        real_names.known_only(Task("real", "Real", (dataset([("apple", "iPhone")]),)))


def test_two_spellings_of_one_name_are_one_class():
    made = replace(dataset([("apple", "socks")]), class_names=("apple", "Apple", "iPhone", "socks", "jacket"))
    assert real_names.known_only(Task("real", "Real", (made,))).tests[0].class_names == ("apple", "sock")


def test_the_published_table_is_what_the_rule_says():
    assert {name: real_names.classes_of(labels) for name, labels in TABLE.items()} == TABLE


@pytest.mark.parametrize("name", TABLE)
def test_the_table_names_every_label_of_the_data(name):
    if not (DATA / name).is_dir():
        pytest.skip(f"{DATA / name} is not here")
    task = READERS[name].read(DATA / name, Options(allow_partial=True))
    assert {label for each in task.tests for label in each.class_names} <= set(TABLE[name])
