"""Real attacks among the names that a CLIP of ImageNet's classes knows: which labels of a data set are such names.

A label counts as known where it is a word that WordNet has for a class of ImageNet or for what is above it, spelled as
there, or its plural: "trafficLight" is "traffic light". Pictures whose object and word are both known stay; all others
are left out, and counted. `real_names.json` holds labels of RTA-100, PAINT and SCAM with the classes that each stands
for, for a reader to check.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from defense.benchmarks.datasets.base import Dataset, Task
from defense.embedded.photo.names import load_words
from defense.errors import ConfigError


def classes_of(labels: Iterable[str]) -> dict[str, list[str]]:
    """Return the names of the classes that each label stands for; none where it is not known."""
    words = load_words()
    known = {label: words.known_as(label) for label in sorted(set(labels))}
    return {
        label: [] if word is None else [words.names[index] for index in words.members[word]]
        for label, word in known.items()
    }


def known_only(task: Task) -> Task:
    """Return a task's tests with the pictures whose object and word are known, chosen among the known names.

    Raises:
        ConfigError: No picture is left.
    """
    return Task(f"{task.name}-known", f"{task.title}, known names", tuple(_known_only(each) for each in task.tests))


def _known_only(dataset: Dataset) -> Dataset:
    words = load_words()
    known = [words.known_as(name) for name in dataset.class_names]
    class_names = tuple(sorted({word for word in known if word is not None}))
    place = {word: index for index, word in enumerate(class_names)}
    examples = []
    for each in dataset.examples:
        label, word = known[each.label], None if each.word is None else known[each.word]
        if label is not None and word is not None and label != word:
            examples.append(replace(each, label=place[label], word=place[word]))
    if not examples:
        raise ConfigError(f"{dataset.full_name}: no picture shows a known object with a known word")
    facts = {
        **dataset.facts,
        "class_rule": "labels and words that WordNet has for a class of ImageNet or above it",
        "n_left_out": len(dataset.examples) - len(examples),
    }
    return replace(
        dataset, name=f"{dataset.name}-known", examples=tuple(examples), class_names=class_names, facts=facts
    )
