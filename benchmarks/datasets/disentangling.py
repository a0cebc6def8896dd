"""Photographs of 20 objects with words on them, from "Disentangling visual and written concepts in CLIP".

The folder holds `annotations.json` (also spelled `annotation.json`), `classes.json`, whose keys in order are classes,
and `images/`. The template has no article.

Source: Materzynska et al. 2022, arXiv:2206.07835.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from defense.benchmarks.datasets.base import Dataset, Example, File, Options, Task, shortfall_of
from defense.benchmarks.datasets.files import inside, read_json, require_folder
from defense.errors import ConfigError

TITLE = "Disentangling"
SOURCE = "the Google Drive folder that github.com/joaanna/disentangling_spelling_in_clip links to"
N_PICTURES = 180
_FOLDER = "typographic_attack_dataset"


def read(folder: Path, options: Options) -> Task:
    """Read the data set.

    Args:
        folder: `typographic_attack_dataset`, or the one above it.
        options: Whether fewer pictures will do.

    Raises:
        ConfigError: It is not there, or not the published set.
    """
    require_folder(folder, TITLE, SOURCE)
    if (folder / _FOLDER).is_dir():
        folder = folder / _FOLDER
    classes = read_json(folder / "classes.json")
    if not isinstance(classes, dict) or not classes:
        raise ConfigError(f"{folder / 'classes.json'} holds no classes; want an object whose keys are their names")
    class_names = tuple(classes)
    examples = _examples(folder, class_names)
    problems = []
    if len(examples) != N_PICTURES:
        problems.append(f"{len(examples)} of {N_PICTURES} pictures")
    dataset = Dataset(
        "disentangling",
        "attacked",
        examples,
        class_names,
        templates=("a photo of {}.",),
        shortfall=shortfall_of(TITLE, problems, options),
        facts={"class_rule": "keys of classes.json, in order"},
    )
    return Task("disentangling", TITLE, (dataset,))


def _examples(folder: Path, class_names: tuple[str, ...]) -> tuple[Example, ...]:
    path = folder / "annotation.json"
    if not path.exists():
        path = folder / "annotations.json"
    annotations: Any = read_json(path)
    if not isinstance(annotations, dict):
        raise ConfigError(f"{path} is no object of file name -> annotation")
    index_of = {name: index for index, name in enumerate(class_names)}
    examples = []
    for name, fields in sorted(annotations.items()):
        try:
            label, word = fields["true object"], fields["typographic attack label"]
        except (TypeError, KeyError) as error:
            raise ConfigError(
                f"{path}: {name} has {fields!r}; want 'true object' and 'typographic attack label'"
            ) from error
        if label not in index_of:
            raise ConfigError(f"{path}: {name} shows {label!r}, which classes.json does not have")
        picture = File(inside(folder / "images", name, str(path)))
        # A word that is no class cannot be the answer: such pictures count for accuracy, not for attack success.
        examples.append(Example(name, picture, index_of[label], index_of.get(word)))
    return tuple(examples)
