"""CelebA: the real tables give the right answer or the right refusal, and so do made-up ones."""

from __future__ import annotations

from pathlib import Path

import pytest

from defense.benchmarks.datasets import File, celeba
from defense.errors import ConfigError

from .datasets_made import PARTIAL, read


def celeba_tables(
    folder: Path, rows: list[tuple[str, int, int, int]], *, kaggle: bool = False, stated: int | None = None
):
    """Write both tables for rows of (name, blond, male, split), and an empty folder for the pictures."""
    (folder / "img_align_celeba").mkdir(parents=True, exist_ok=True)

    def values(blond: int, male: int) -> list[str]:
        held = {"Blond_Hair": blond, "Male": male, "Young": 1}
        return [str(1 if held.get(name) else -1) for name in celeba.ATTRIBUTES]

    if kaggle:
        lines = [",".join(["image_id", *celeba.ATTRIBUTES])]
        lines += [",".join([name, *values(blond, male)]) for name, blond, male, _ in rows]
        (folder / "list_attr_celeba.csv").write_bytes("\r\n".join(lines).encode())
        lines = ["image_id,partition", *(f"{name},{split}" for name, _, _, split in rows)]
        (folder / "list_eval_partition.csv").write_bytes("\r\n".join(lines).encode())
    else:
        lines = [str(len(rows) if stated is None else stated), " ".join(celeba.ATTRIBUTES) + " "]
        lines += [name + "".join(f"{value:>3}" for value in values(blond, male)) for name, blond, male, _ in rows]
        (folder / "list_attr_celeba.txt").write_text("\n".join(lines) + "\n")
        lines = [f"{name} {split}" for name, _, _, split in rows]
        (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")


ROWS = [
    (f"{1000 * split + 10 * group + i:06}.jpg", group // 2, group % 2, split)
    for split in range(3)
    for group, count in enumerate((3, 2, 2, 1))
    for i in range(count)
]


@pytest.mark.parametrize("kaggle", [False, True], ids=["txt", "csv"])
def test_celeba_groups_in_both_directions(tmp_path, kaggle):
    celeba_tables(tmp_path, ROWS, kaggle=kaggle)
    blond = read("celeba-blond", tmp_path, PARTIAL)
    male = read("celeba-male", tmp_path, PARTIAL)
    assert blond.tests[0].group_counts() == (3, 2, 2, 1)
    assert male.tests[0].group_counts() == (3, 2, 2, 1)  # groups 1 and 2 swap, and hold as many here
    assert blond.tests[0].group_names[1] == male.tests[0].group_names[2] == "dark-haired men"
    by_key = {e.key: e for e in male.tests[0].examples}
    for example in blond.tests[0].examples:
        twin = by_key[example.key]
        assert (example.label, example.attribute) == (twin.attribute, twin.label)
        assert blond.tests[0].group_names[example.group] == male.tests[0].group_names[twin.group]
    assert blond.tests[0].examples[0].picture == File(tmp_path / "img_align_celeba" / "002000.jpg")
    assert blond.tests[0].class_names == ("dark hair", "blond hair")
    assert blond.tests[0].facts["direction"] != male.tests[0].facts["direction"]


def test_celeba_tables_are_joined_by_name(tmp_path):
    celeba_tables(tmp_path, ROWS)
    expected = read("celeba-blond", tmp_path, PARTIAL).tests
    path = tmp_path / "list_eval_partition.txt"
    path.write_text("\n".join(reversed(path.read_text().splitlines())))
    assert read("celeba-blond", tmp_path, PARTIAL).tests == expected


def test_celeba_in_two_folders_as_kaggle_packs_it(tmp_path):
    celeba_tables(tmp_path, ROWS)
    (tmp_path / "img_align_celeba" / "img_align_celeba").mkdir()
    path = read("celeba-blond", tmp_path, PARTIAL).tests[0].examples[0].picture.path
    assert path == tmp_path / "img_align_celeba" / "img_align_celeba" / "002000.jpg"


def test_celeba_without_the_folder_of_pictures_is_refused(tmp_path):
    celeba_tables(tmp_path, ROWS)
    (tmp_path / "img_align_celeba").rmdir()
    with pytest.raises(ConfigError, match="img_align_celeba, is not at"):
        read("celeba-blond", tmp_path, PARTIAL)


def test_a_lying_first_line_is_refused_with_both_numbers(tmp_path):
    celeba_tables(tmp_path, ROWS, stated=202_599)
    with pytest.raises(ConfigError, match="states 202599 rows and has 24"):
        read("celeba-blond", tmp_path)
    assert "states 202599 rows and has 24" in read("celeba-blond", tmp_path, PARTIAL).tests[0].shortfall


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("000001.jpg -1", "000001.jpg", r"line 4: 40 fields"),
        ("000001.jpg -1", "000001.jpg -1 -1", r"line 4: 42 fields"),
        ("000001.jpg -1", "000000.jpg -1", r"line 4: 000000.jpg is there twice"),
        ("000001.jpg -1", "000001.jpg  0", r"line 4: the value '0'"),
        ("000001.jpg -1", "../001.jpg -1", r"line 4: '../001.jpg'; want the name of a file"),
        ("000001.jpg -1", "000001.jpg  x", r"line 4: the value 'x'"),
        ("Blond_Hair", "Blonde_Hair", "want the 40 of CelebA"),
    ],
    ids=["short", "long", "twice", "mixed", "path", "value", "names"],
)
def test_celeba_attributes_that_cannot_be_right_are_refused(tmp_path, old, new, message):
    celeba_tables(tmp_path, ROWS)
    edited(tmp_path / "list_attr_celeba.txt", old, new)
    with pytest.raises(ConfigError, match=message):
        read("celeba-blond", tmp_path, PARTIAL)


def test_celeba_values_may_be_0_and_1_throughout(tmp_path):
    celeba_tables(tmp_path, ROWS, kaggle=True)
    expected, _ = celeba.read_attributes(tmp_path / "list_attr_celeba.csv")
    text = (tmp_path / "list_attr_celeba.csv").read_text().replace("-1", "0")
    (tmp_path / "list_attr_celeba.csv").write_text(text)
    assert celeba.read_attributes(tmp_path / "list_attr_celeba.csv")[0] == expected


def test_a_web_page_in_place_of_a_table_is_told(tmp_path):
    celeba_tables(tmp_path, ROWS)
    (tmp_path / "list_attr_celeba.txt").write_text("\n<!DOCTYPE html><title>Google Drive - Quota exceeded</title>")
    with pytest.raises(ConfigError, match="web page"):
        read("celeba-blond", tmp_path, PARTIAL)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("000001.jpg 0", "000001.jpg", "line 2: want a name"),
        ("000001.jpg 0", "000001.jpg 3", "line 2: the split is '3'"),
    ],
)
def test_celeba_splits_that_cannot_be_right_are_refused(tmp_path, old, new, message):
    celeba_tables(tmp_path, ROWS)
    edited(tmp_path / "list_eval_partition.txt", old, new)
    with pytest.raises(ConfigError, match=message):
        read("celeba-blond", tmp_path, PARTIAL)


def test_the_real_excerpt_of_attributes(shared_data):
    attributes, problems = celeba.read_attributes(shared_data / "celeba" / "list_attr_celeba.first20000.txt")
    assert problems == [
        "list_attr_celeba.first20000.txt states 202599 rows and has 20000",
        "20,000 of 202,599 rows of attributes",
    ]
    counts = {pair: list(attributes.values()).count(pair) for pair in set(attributes.values())}
    assert counts == {(0, 0): 8778, (0, 1): 8245, (1, 0): 2791, (1, 1): 186}


def test_the_real_partition(shared_data):
    splits = celeba.read_partition(shared_data / "celeba" / "list_eval_partition.csv")
    values = list(splits.values())
    assert [values.count(split) for split in ("train", "val", "test")] == [162_770, 19_867, 19_962]
    assert [sum(groups.values()) for groups in celeba.COUNTS.values()] == [162_770, 19_867, 19_962]
    assert splits["162771.jpg"] == "val"
    assert splits["182638.jpg"] == "test"


def test_the_real_excerpt_with_the_real_partition_is_refused(shared_data, tmp_path):
    source = shared_data / "celeba"
    (tmp_path / "img_align_celeba").mkdir()
    (tmp_path / "list_attr_celeba.txt").write_bytes((source / "list_attr_celeba.first20000.txt").read_bytes())
    (tmp_path / "list_eval_partition.csv").write_bytes((source / "list_eval_partition.csv").read_bytes())
    with pytest.raises(ConfigError, match=r"states 202599 rows and has 20000.*182,599 pictures in one of the two"):
        read("celeba-blond", tmp_path)
    with pytest.raises(ConfigError, match="holds no pictures"):  # the excerpt is all training pictures
        read("celeba-blond", tmp_path, PARTIAL)


@pytest.mark.slow
def test_the_published_celeba_has_no_shortfall(tmp_path):
    rows, index = [], 0
    for split, groups in enumerate(celeba.COUNTS.values()):
        for (blond, male), count in groups.items():
            for _ in range(count):
                index += 1
                rows.append((f"{index:06}.jpg", blond, male, split))
    celeba_tables(tmp_path, rows)
    (test,) = read("celeba-blond", tmp_path).tests
    assert test.shortfall is None
    assert test.group_counts() == (9767, 7535, 2480, 180)
    assert read("celeba-male", tmp_path).tests[0].group_counts() == (9767, 2480, 7535, 180)
