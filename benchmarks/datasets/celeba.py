"""CelebA: faces, where blond hair goes with gender.

| file | forms |
|---|---|
| attributes | `list_attr_celeba.txt` (a count, the 40 names, a row per picture), or Kaggle's `list_attr_celeba.csv` |
| splits | `list_eval_partition.txt` or Kaggle's `list_eval_partition.csv`: 0 train, 1 val, 2 test |
| pictures | `img_align_celeba/000001.jpg` |

The two tables are joined on the picture's name; by position, an excerpt would be misaligned in silence. The same four
groups serve two directions, which never share a table: "blond" asks for the hair, with gender as the spurious attribute
(the standard), "male" asks for the gender, with blond hair as the spurious attribute (arXiv:2504.08729).

Source: Liu et al. 2015, arXiv:1411.7766; group ids 2 y + attribute as in github.com/kohpangwei/group_DRO.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from defense.benchmarks.datasets.base import Dataset, Example, File, Options, Task, shortfall_of
from defense.benchmarks.datasets.files import read_rows, read_text, require_folder
from defense.errors import ConfigError

TITLE = "CelebA"
SOURCE = "mmlab.ie.cuhk.edu.hk/projects/CelebA.html (or Kaggle, jessicali9530/celeba-dataset)"
N_PICTURES = 202_599
ATTRIBUTES = (
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips", "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin", "Eyeglasses",
    "Goatee", "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard", "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair", "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace",
    "Wearing_Necktie", "Young",
)  # fmt: skip
COUNTS = {
    "train": {(0, 0): 71629, (0, 1): 66874, (1, 0): 22880, (1, 1): 1387},
    "val": {(0, 0): 8535, (0, 1): 8276, (1, 0): 2874, (1, 1): 182},
    "test": {(0, 0): 9767, (0, 1): 7535, (1, 0): 2480, (1, 1): 180},
}
"""Split -> (Blond_Hair, Male) -> pictures."""

_SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Direction:
    """Which attribute is asked for, and which is the spurious one.

    Attributes:
        title: For captions.
        target: Name of the attribute that is the answer.
        spurious: Name of the attribute that goes with it.
        class_names: For a target of 0 and 1.
        template: What they are put into.
        groups: Names of the groups 2 target + spurious.
        prompts_from: Where the prompts come from.
    """

    title: str
    target: str
    spurious: str
    class_names: tuple[str, str]
    template: str
    groups: tuple[str, str, str, str]
    prompts_from: str


BLOND = Direction(
    "CelebA, hair asked for, gender spurious",
    "Blond_Hair",
    "Male",
    ("dark hair", "blond hair"),
    "A photo of a celebrity with {}.",
    ("dark-haired women", "dark-haired men", "blond women", "blond men"),
    "arXiv:2302.00070",
)
MALE = Direction(
    "CelebA, gender asked for, hair spurious",
    "Male",
    "Blond_Hair",
    ("woman", "man"),
    "A photo of a {}.",
    ("dark-haired women", "blond women", "dark-haired men", "blond men"),
    "this project; those of arXiv:2504.08729 are not known",
)


def read(folder: Path, options: Options, direction: Direction) -> Task:
    """Read the data set in one direction.

    Args:
        folder: The one with the tables and `img_align_celeba`.
        options: Whether fewer pictures will do.
        direction: `BLOND` or `MALE`.

    Raises:
        ConfigError: It is not there, a table cannot be used, a split or group is empty, or it is not the published set.
    """
    require_folder(folder, TITLE, SOURCE)
    attributes, problems = read_attributes(_one_of(folder, "list_attr_celeba"))
    splits = read_partition(_one_of(folder, "list_eval_partition"))
    if missing := sorted(attributes.keys() ^ splits.keys()):
        problems.append(f"{len(missing):,} pictures in one of the two tables only, {missing[0]} the first")
    names = sorted(attributes.keys() & splits.keys())
    for split in _SPLITS:
        counts = Counter(attributes[name] for name in names if splits[name] == split)
        if counts != COUNTS[split]:
            problems.append(f"{split} groups (blond, male) of {dict(sorted(counts.items()))}, not {COUNTS[split]}")
    shortfall = shortfall_of(TITLE, problems, options)
    pictures = folder / "img_align_celeba"
    if (pictures / "img_align_celeba").is_dir():  # as Kaggle packs it
        pictures = pictures / "img_align_celeba"
    require_folder(pictures, "The folder of CelebA's pictures, img_align_celeba,", SOURCE)
    by_split: dict[str, list[Example]] = {split: [] for split in _SPLITS}
    is_blond_asked = direction.target == "Blond_Hair"
    for name in names:
        blond, male = attributes[name]
        label, attribute = (blond, male) if is_blond_asked else (male, blond)
        by_split[splits[name]].append(Example(name, File(pictures / name), label, attribute=attribute))
    train_counts = Counter(each.group for each in by_split["train"])
    facts: Mapping[str, Any] = {
        "class_rule": "fixed",
        "direction": direction.title,
        "prompts_from": direction.prompts_from,
    }
    train, val, test = (
        Dataset(
            f"celeba-{direction.target.split('_')[0].lower()}",
            split,
            tuple(by_split[split]),
            direction.class_names,
            templates=(direction.template,),
            group_names=direction.groups,
            train_counts=tuple(train_counts[group] for group in range(4)),
            shortfall=shortfall,
            facts=facts,
        )
        for split in _SPLITS
    )
    return Task(test.name, direction.title, (test,), train, val)


def _one_of(folder: Path, stem: str) -> Path:
    """Return the table's path: .txt where it is there, else .csv."""
    found = [path for path in (folder / f"{stem}.txt", folder / f"{stem}.csv") if path.exists()]
    if not found:
        raise ConfigError(f"{folder} has neither {stem}.txt nor {stem}.csv; get them from {SOURCE}")
    return found[0]


def read_attributes(path: Path) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """Return (Blond_Hair, Male) of each picture, 0 or 1, and what is wrong with the number of rows.

    Raises:
        ConfigError: Other attributes, a row of another length, a picture that is there twice, or a value that is none
            of -1 and 1 (or of 0 and 1, where all are).
    """
    lines = read_text(path).splitlines()
    separator = "," if path.suffix == ".csv" else None
    stated = None
    if separator is None and lines:
        stated, lines = lines[0].strip(), lines[1:]
    header = tuple(field.strip() for field in lines[0].split(separator)) if lines else ()
    header = header[1:] if separator else header
    if header != ATTRIBUTES:
        raise ConfigError(f"{path} has {len(header)} attribute names, {header[:3]}...; want the 40 of CelebA")
    first_line = 2 if separator else 3
    texts: dict[str, tuple[str, str]] = {}
    seen: dict[str, int] = {}  # value -> the first line that has it
    blond, male = ATTRIBUTES.index("Blond_Hair"), ATTRIBUTES.index("Male")
    for line, text in enumerate(lines[1:], start=first_line):
        name, *values = text.split(separator)
        if len(values) != len(ATTRIBUTES):
            raise ConfigError(f"{path}, line {line}: {len(values) + 1} fields; want a name and 40 values")
        if name in texts:
            raise ConfigError(f"{path}, line {line}: {name} is there twice")
        if "/" in name or "\\" in name:
            raise ConfigError(f"{path}, line {line}: {name!r}; want the name of a file")
        texts[name] = values[blond], values[male]
        for value in values:
            seen.setdefault(value.strip(), line)
    no = "0" if seen.keys() <= {"0", "1"} else "-1"
    for value, line in seen.items():
        if value not in (no, "1"):
            raise ConfigError(f"{path}, line {line}: the value {value!r}; want -1 and 1, or 0 and 1 throughout")
    problems = []
    if stated is not None and stated != str(len(texts)):
        problems.append(f"{path.name} states {stated} rows and has {len(texts)}")
    if len(texts) != N_PICTURES:
        problems.append(f"{len(texts):,} of {N_PICTURES:,} rows of attributes")
    return {name: (int(a.strip() == "1"), int(b.strip() == "1")) for name, (a, b) in texts.items()}, problems


def read_partition(path: Path) -> dict[str, str]:
    """Return picture -> "train", "val" or "test".

    Raises:
        ConfigError: A row of another form, or a picture that is there twice.
    """
    if path.suffix == ".csv":
        pairs = [(row["image_id"], row["partition"]) for row in read_rows(path, ("image_id", "partition"))]
        first_line = 2
    else:
        fields = [line.split() for line in read_text(path).splitlines()]
        bad = next((line for line, field in enumerate(fields, start=1) if len(field) != 2), None)
        if bad is not None:
            raise ConfigError(f"{path}, line {bad}: want a name and a number")
        pairs = [(name, split) for name, split in fields]
        first_line = 1
    splits = {}
    for line, (name, split) in enumerate(pairs, start=first_line):
        if split not in ("0", "1", "2"):
            raise ConfigError(f"{path}, line {line}: the split is {split!r}; want 0, 1 or 2")
        splits[name] = _SPLITS[int(split)]
    if len(splits) != len(pairs):
        raise ConfigError(f"{path} names a picture twice")
    return splits
