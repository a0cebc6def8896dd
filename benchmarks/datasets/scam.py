"""SCAM: photographs of objects without a note, with a post-it that says something else, and with the same drawn on.

Pictures come as the Hugging Face data set unpacks (`images.zip`: pictures beside `metadata.csv` or `metadata.jsonl`
with the columns file_name, type, id, object_label, attack_word), or as the project page holds them
(`<type>/<id>.webp` beside `vlm_similarity_index.json`; smaller copies, for which the published figures do not hold).

The question is two-way, object or word, with 32 templates whose embeddings are averaged before they are normalized;
a tie is lost. The project page also has the similarities of 44 models for every picture: `read_similarities`.

Source: Westerhoff et al. 2025, arXiv:2504.04893; main_vlm_openclip.py of github.com/Bliss-e-V/SCAM.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from defense.benchmarks.datasets.base import Dataset, Example, File, Options, Task, shortfall_of
from defense.benchmarks.datasets.files import inside, read_json, read_rows, read_text, require_folder
from defense.data.labels import TEMPLATES
from defense.data.listing import files_below
from defense.errors import ConfigError, NonFiniteError

TITLE = "SCAM"
SOURCE = "huggingface.co/datasets/BLISS-e-V/SCAM (images.zip)"
N_TRIPLES = 1162
TEMPLATES_32 = TEMPLATES["openai"][:32]
VARIANTS = {"NoSCAM": "clean", "SCAM": "post-it", "SynthSCAM": "synthetic"}
"""The data set's word for a version -> ours."""

_INDEX = "vlm_similarity_index.json"
_ID = re.compile(rf"({'|'.join(VARIANTS)})_img_(\d+)")


@dataclass(frozen=True)
class _Entry:
    """A row of the data set's table."""

    type: str
    number: str
    label: str
    word: str
    path: Path


def read(folder: Path, options: Options) -> Task:
    """Read the triples.

    Args:
        folder: See the module.
        options: Whether fewer triples will do.

    Raises:
        ConfigError: It is not there, its table cannot be used, or it is not the published set.
    """
    require_folder(folder, TITLE, SOURCE)
    entries = list(_from_metadata(folder)) or list(_from_index(folder))
    by_type: dict[str, dict[str, _Entry]] = {kind: {} for kind in VARIANTS}
    for entry in entries:
        if entry.number in by_type[entry.type]:
            raise ConfigError(f"{folder}: {entry.type}_img_{entry.number} is there twice")
        by_type[entry.type][entry.number] = entry
    numbers = sorted(set.intersection(*(set(each) for each in by_type.values())))
    problems = []
    if len(numbers) != N_TRIPLES:
        problems.append(f"{len(numbers):,} of {N_TRIPLES:,} triples")
    shortfall = shortfall_of(TITLE, problems, options)
    chosen = {kind: [by_type[kind][number] for number in numbers] for kind in VARIANTS}
    class_names = tuple(sorted({name for each in chosen["SCAM"] for name in (each.label, each.word)}))
    index_of = {name: index for index, name in enumerate(class_names)}
    tests = tuple(
        Dataset(
            "scam",
            variant,
            tuple(
                Example(each.number, File(each.path), index_of[each.label], index_of[each.word])
                for each in chosen[kind]
            ),
            class_names,
            templates=TEMPLATES_32,
            choice="pair",
            normalize_each=False,
            shortfall=shortfall,
            facts={"class_rule": "object or word of each picture"},
        )
        for kind, variant in VARIANTS.items()
    )
    return Task("scam", TITLE, tests)


def _from_metadata(folder: Path) -> Iterator[_Entry]:
    """Yield the rows of every metadata file below a folder, in the forms that Hugging Face calls imagefolder."""
    columns = ("file_name", "type", "id", "object_label", "attack_word")
    for path in files_below(folder):
        if path.stem != "metadata":
            continue
        if path.suffix == ".csv":
            rows = read_rows(path, columns)
        elif path.suffix == ".jsonl":
            rows = [_json_row(line, columns, path) for line in read_text(path).splitlines() if line.strip()]
        else:
            continue
        for row in rows:
            name = row["file_name"]
            yield _entry(row["type"], row["id"], row, inside(path.parent, name, str(path)), path)


def _json_row(line: str, columns: tuple[str, ...], path: Path) -> dict[str, Any]:
    try:
        row = json.loads(line)
        return {name: row[name] for name in columns}
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(f"{path}: {line:.80} is no object with {', '.join(columns)}") from error


def _from_index(folder: Path) -> Iterator[_Entry]:
    """Yield the entries of the project page's index whose pictures are there."""
    path = folder / _INDEX
    if not path.exists():
        raise ConfigError(f"{folder} has neither metadata.csv nor {_INDEX}; get {TITLE} from {SOURCE}")
    for fields in read_index(path):
        number = fields["image_id"].removeprefix("SCAM_img_")
        for kind in VARIANTS:
            picture = folder / kind / f"{kind}_img_{number}.webp"
            if picture.exists():
                yield _entry(kind, picture.stem, fields, picture, path)


def _entry(kind: str, name: str, fields: Mapping[str, Any], picture: Path, table: Path) -> _Entry:
    match = _ID.fullmatch(name)
    if match is None or match[1] != kind:
        raise ConfigError(
            f"{table}: id {name!r} with type {kind!r}; want <type>_img_<number>, type one of {[*VARIANTS]}"
        )
    return _Entry(kind, match[2], fields["object_label"], fields["attack_word"], picture)


def read_index(path: Path) -> list[dict[str, Any]]:
    """Return the entries of `vlm_similarity_index.json`.

    Raises:
        ConfigError: It does not have that form.
    """
    entries = read_json(path)
    keys = {"image_id", "object_label", "attack_word", "variants"}
    if not isinstance(entries, list) or not all(isinstance(each, dict) and keys <= each.keys() for each in entries):
        raise ConfigError(f"{path} is no list of objects with {', '.join(sorted(keys))}")
    return entries


@dataclass(frozen=True)
class Similarities:
    """The published similarities, `logit_scale` included.

    Attributes:
        models: Names of open_clip architectures. Where open_clip has several sets of weights for one, which of them was
            measured is not known.
        columns: Name of a column -> its index in `values`.
        values: float32 [n_rows, n_columns].
        rows: Variant -> rows of its pictures, int [n_triples].
    """

    models: tuple[str, ...]
    columns: Mapping[str, int]
    values: np.ndarray
    rows: Mapping[str, np.ndarray]

    def of(self, model: str, variant: str) -> tuple[np.ndarray, np.ndarray]:
        """Return a model's similarities to the object and to the word, float32 [n_triples] each.

        Args:
            model: One of `models`.
            variant: "clean", "post-it" or "synthetic".

        Raises:
            ConfigError: There is no such model.
        """
        if model not in self.models:
            raise ConfigError(f"there are no similarities of {model!r}; there are those of {', '.join(self.models)}")
        rows = self.rows[variant]
        places = [self.columns[f"{model}_{side}_similarities"] for side in ("object", "attack")]
        return self.values[rows, places[0]], self.values[rows, places[1]]


def read_similarities(folder: Path) -> Similarities:
    """Read `vlm_similarity_data.bin`, `..._metadata.json` and `..._index.json` of the project page.

    The binary file is two little-endian uint32, rows and columns, and then float32 by row. Models are listed sorted,
    columns are not, so columns are looked up by name. A missing value would be written as 0.0.

    Raises:
        ConfigError: The three files do not fit together, or a value is missing.
        NonFiniteError: A value is NaN or infinite.
    """
    path = folder / "vlm_similarity_data.bin"
    meta = read_json(folder / "vlm_similarity_metadata.json")
    data = path.read_bytes()
    n_rows, n_columns = struct.unpack_from("<II", data) if len(data) >= 8 else (0, 0)
    if len(data) != 8 + 4 * n_rows * n_columns or (n_rows, n_columns) != (meta["num_rows"], meta["num_columns"]):
        raise ConfigError(
            f"{path} has {len(data):,} bytes and says {n_rows} rows of {n_columns}; the metadata say "
            f"{meta['num_rows']} of {meta['num_columns']}, and the size has to follow: it was cut or changed"
        )
    values = np.frombuffer(data, "<f4", offset=8).reshape(n_rows, n_columns)
    if not np.isfinite(values).all():
        raise NonFiniteError(path.name)
    if not values.all():
        raise ConfigError(f"{path} holds exact zeros, which stand for missing values")
    columns = {name: place for place, name in enumerate(meta["columns"])}
    missing = [model for model in meta["models"] if f"{model}_object_similarities" not in columns]
    if len(columns) != n_columns or missing:
        raise ConfigError(f"the metadata name {len(columns)} columns of {n_columns}, none for {missing}")
    index = read_index(folder / _INDEX)
    rows = {
        variant: np.array([each["variants"][kind]["row_index"] for each in index]) for kind, variant in VARIANTS.items()
    }
    if sorted(np.concatenate(list(rows.values())).tolist()) != list(range(n_rows)):
        raise ConfigError(f"{folder / _INDEX} does not name each of the {n_rows} rows once")
    return Similarities(tuple(meta["models"]), columns, values, rows)
