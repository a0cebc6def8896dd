"""The depth of what a latent fires on, in trees that can be drawn on a napkin."""

from __future__ import annotations

import json

import numpy as np
import pytest

from defense.errors import ConfigError
from defense.explain.taxonomy import Tree, depths_of, line_of, read_tree, summary_of

PARENT = {"dog": "mammal", "cat": "mammal", "carp": "fish", "mammal": "animal", "fish": "animal", "oak": "plant"}
TREE = Tree(PARENT)


@pytest.mark.parametrize(
    ("names", "depth"),
    [
        (["dog"], 2),
        (["dog", "dog"], 2),
        (["dog", "cat"], 1),
        (["dog", "mammal"], 1),
        (["dog", "cat", "carp"], 0),
        (["animal"], 0),
        (["dog", "oak"], -1),
    ],
)
def test_the_depth_is_that_of_the_deepest_node_above_all(names, depth):
    assert TREE.depth(names) == depth


def test_planted_latents_have_the_depth_of_what_their_top_pictures_show():
    labels = ["dog", "cat", "carp", None, "dog"]
    top = np.array([[0, 4, -1], [0, 1, 3], [1, 2, -1], [3, -1, -1], [-1, -1, -1]])
    found = depths_of(top, labels, TREE)
    np.testing.assert_array_equal(found[:3], [2, 1, 0])
    assert np.isnan(found[3:]).all()


def test_latents_of_one_class_are_deeper_than_random_pictures_and_mixed_ones_are_not():
    rng = np.random.default_rng(0)
    labels = [("dog", "cat", "carp")[i % 3] for i in range(300)]
    pure = np.array([rng.choice(np.arange(i % 3, 300, 3), 8, replace=False) for i in range(60)])
    mixed = np.array([rng.choice(300, 8, replace=False) for _ in range(60)])
    for top, is_deeper in ((pure, True), (mixed, False)):
        found = summary_of(depths_of(top, labels, TREE), top, labels, TREE, 0)
        assert (found["mean"] > found["random"] + 0.5) == is_deeper
        assert sum(found["n_by_depth"].values()) == 60
        assert found["deepest"] == 2
    found = json.loads(json.dumps(summary_of(depths_of(pure, labels, TREE), pure, labels, TREE, 0)))
    assert found["n_by_depth"] == {"2": 60}
    assert "2.00 for latents" in line_of(found)
    assert line_of(found).endswith("60 at 2")


def test_pictures_without_classes_have_no_place():
    with pytest.raises(ConfigError, match="no picture on which a latent fires has a class"):
        summary_of(np.full(2, np.nan), np.zeros((2, 1), int), [None], TREE, 0)


def test_a_tree_is_read_from_a_csv_file_with_other_columns_beside(tmp_path):
    (tmp_path / "tree.csv").write_text("parent,class,note\nmammal,dog,x\nanimal,mammal,\n", encoding="utf-8")
    assert read_tree(tmp_path / "tree.csv").path_of("dog") == ("animal", "mammal", "dog")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name,parent\na,b\n", "a tree has class, parent"),
        ("", "a tree has class, parent"),
        ("class,parent\n", "at least one child"),
        ("class,parent\na,\n", "line 2: a class or its parent is blank"),
        ("class,parent\na,b\na,c\n", "line 3: 'a' has two parents, 'b' and 'c'"),
        ("class,parent\na,b\nb,c\nc,a\n", "circle: a -> b -> c -> a"),
        ("class,parent\na,a\n", "circle: a -> a"),
    ],
)
def test_what_is_no_tree_is_refused(tmp_path, text, said):
    (tmp_path / "tree.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=said):
        read_tree(tmp_path / "tree.csv")


def test_a_class_that_is_not_there_is_named():
    with pytest.raises(ConfigError, match="'zebra' is not in the tree"):
        TREE.depth(["dog", "zebra"])
