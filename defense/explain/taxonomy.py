"""How general a latent is: the depth, in a tree of classes, of the deepest node above all that it fires on.

    class,parent          a csv file: "beagle,dog", "dog,mammal"; what is nobody's child is a root, at depth 0
    beagle,dog
    dog,mammal

Source: arXiv:2504.02821, which asks for the depth of the lowest common ancestor of the
pictures that make a latent fire most, by level of a Matryoshka SAE. Here any tree may be given, the pictures are the
top ones of the catalogue, and as many pictures drawn at random stand beside them: in a shallow tree, or where one
class has most of the pictures, these have deep ancestors too.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from defense.errors import ConfigError

COLUMNS = ("class", "parent")


class Tree:
    """A tree of classes, or several.

    Args:
        parent: Child -> parent.

    Raises:
        ConfigError: Parents lead in a circle, or there are none.
    """

    def __init__(self, parent: Mapping[str, str]) -> None:
        if not parent:
            raise ConfigError("a tree needs at least one child and its parent")
        self.parent = dict(parent)
        self.names = frozenset([*parent, *parent.values()])
        for name in parent:
            self.path_of(name)

    def path_of(self, name: str) -> tuple[str, ...]:
        """Return the nodes from a root down to this one.

        Raises:
            ConfigError: It is not in the tree, or its parents lead in a circle.
        """
        if name not in self.names:
            raise ConfigError(f"{name!r} is not in the tree; it has {', '.join(sorted(self.names)[:5])} and others")
        path = [name]
        while (above := self.parent.get(path[-1])) is not None:
            if above in path:
                raise ConfigError(f"the parents of {name!r} lead in a circle: {' -> '.join([*path, above])}")
            path.append(above)
        return tuple(reversed(path))

    def depth(self, names: Iterable[str]) -> int:
        """Return the depth of the lowest common ancestor, 0 for a root; -1 where nothing is above all of them.

        Of one class it is the depth of that class.

        Raises:
            ConfigError: There are no names, or one is not in the tree.
        """
        paths = [self.path_of(name) for name in dict.fromkeys(names)]
        if not paths:
            raise ConfigError("no classes, which have no common ancestor; give at least one")
        shared = 0
        for nodes in zip(*paths, strict=False):
            if len(set(nodes)) > 1:
                break
            shared += 1
        return shared - 1


def read_tree(path: Path) -> Tree:
    """Return the tree of a csv file with the columns "class" and "parent".

    Raises:
        ConfigError: It has other columns, a blank name or a class with two parents, or see `Tree`.
    """
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.DictReader(file)
        if not set(COLUMNS) <= set(rows.fieldnames or ()):
            raise ConfigError(f"{path} has the columns {rows.fieldnames}; a tree has {', '.join(COLUMNS)}")
        parent: dict[str, str] = {}
        for row in rows:
            name, above = ((row[column] or "").strip() for column in COLUMNS)
            if not name or not above:
                raise ConfigError(f"{path}, line {rows.line_num}: a class or its parent is blank")
            if parent.setdefault(name, above) != above:
                raise ConfigError(
                    f"{path}, line {rows.line_num}: {name!r} has two parents, {parent[name]!r} and {above!r}"
                )
    return Tree(parent)


def depths_of(top: np.ndarray, labels: Sequence[str | None], tree: Tree) -> np.ndarray:
    """Return the depth of each latent, float64 [d_sae]: of the classes of its top pictures; NaN where none has one.

    Args:
        top: Indices of pictures, int [d_sae, n_top]; -1 for none.
        labels: Of all pictures.
        tree: Has all these labels.
    """
    found = np.full(len(top), np.nan)
    for latent, row in enumerate(top.tolist()):
        names = [name for index in row if index >= 0 and (name := labels[index]) is not None]
        if names:
            found[latent] = tree.depth(names)
    return found


def summary_of(
    depths: np.ndarray, top: np.ndarray, labels: Sequence[str | None], tree: Tree, seed: int
) -> dict[str, Any]:
    """Return the mean depth of latents, and of as many random pictures as each has, as JSON values.

    Args:
        depths: What `depths_of` returned.
        top: See `depths_of`.
        labels: See `depths_of`.
        tree: See `depths_of`.
        seed: Of the random pictures.

    Raises:
        ConfigError: No latent has a picture with a class.
    """
    is_known = ~np.isnan(depths)
    if not is_known.any():
        raise ConfigError("no picture on which a latent fires has a class, so none has a place in the tree")
    rng = np.random.default_rng(seed)
    n, is_repeated = top.shape[1], len(labels) < top.shape[1]
    drawn = np.array([rng.choice(len(labels), n, replace=is_repeated) for _ in range(int(is_known.sum()))])
    random = depths_of(np.where(top[is_known] >= 0, drawn, -1), labels, tree)
    counts = np.bincount(depths[is_known].astype(int) + 1)
    return {
        "mean": round(float(depths[is_known].mean()), 4),
        "random": round(float(np.nanmean(random)), 4) if not np.isnan(random).all() else None,
        "deepest": max(tree.depth([name]) for name in {name for name in labels if name is not None}),
        "n_by_depth": {str(depth - 1): int(n) for depth, n in enumerate(counts) if n},
    }


def line_of(found: Mapping[str, Any]) -> str:
    """Return a line on what `summary_of` found."""
    random = "-" if found["random"] is None else f"{found['random']:.2f}"
    by_depth = ", ".join(f"{n} at {depth}" for depth, n in found["n_by_depth"].items())
    return (
        f"depth in the tree (0 is a root, {found['deepest']} the deepest class): {found['mean']:.2f} for latents, "
        f"{random} for random pictures; {by_depth}"
    )
