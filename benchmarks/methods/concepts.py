"""Texts that name what should not count, for methods that know it from texts alone.

Words are such that small models know them too. No test picture was looked at to choose them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from defense.benchmarks.datasets import Task
from defense.benchmarks.methods.base import NotApplicableError
from defense.hosts.clip import Clip

Pairs = tuple[tuple[str, str], ...]
"""Pairs of texts."""
_Texts = TypeVar("_Texts", bound=tuple[str, ...])

WRITING = ("text", "some text", "a written word", "a photo of some text.", "a sign with a word on it.")
"""Texts that say that something is written, whatever it is."""


@dataclass(frozen=True)
class Concepts:
    """Texts about a task.

    Attributes:
        spurious: Pairs of texts that differ in the spurious attribute alone.
        crossed: For each class, two texts that name it with either value of the attribute.
        helpful: Pairs of texts that differ in what should decide: of the first class and of the second.
    """

    spurious: Pairs
    crossed: Pairs
    helpful: Pairs


_BIRDS = Concepts(
    spurious=(
        ("a photo with a land background.", "a photo with a water background."),
        ("a photo of land.", "a photo of water."),
        ("land background", "water background"),
    ),
    crossed=(
        ("a photo of a landbird with a land background.", "a photo of a landbird with a water background."),
        ("a photo of a waterbird with a land background.", "a photo of a waterbird with a water background."),
    ),
    helpful=(
        ("a bird with claws.", "a bird with webbed feet."),
        ("a bird with a short pointed beak.", "a bird with a long flat beak."),
        ("a bird with short legs.", "a bird with a long neck."),
    ),
)
_HAIR = Concepts(
    spurious=(("a photo of a woman.", "a photo of a man."), ("woman", "man")),
    crossed=(
        ("a photo of a woman with dark hair.", "a photo of a man with dark hair."),
        ("a photo of a woman with blond hair.", "a photo of a man with blond hair."),
    ),
    helpful=(
        ("a person with black hair.", "a person with yellow hair."),
        ("a person with brown hair.", "a person with golden hair."),
    ),
)
_GENDER = Concepts(
    spurious=(("a photo of a person with dark hair.", "a photo of a person with blond hair."),),
    crossed=(
        ("a photo of a woman with dark hair.", "a photo of a woman with blond hair."),
        ("a photo of a man with dark hair.", "a photo of a man with blond hair."),
    ),
    helpful=(("a person with makeup.", "a person with a beard."),),
)
_BY_CLASSES: Mapping[tuple[str, ...], Concepts] = {
    ("landbird", "waterbird"): _BIRDS,
    ("dark hair", "blond hair"): _HAIR,
    ("woman", "man"): _GENDER,
}


def concepts_of(task: Task, who: str) -> Concepts:
    """Return the texts about a task.

    Args:
        task: With groups.
        who: The method that needs them, for the error.

    Raises:
        NotApplicableError: There are none for this task.
    """
    concepts = _BY_CLASSES.get(task.tests[0].class_names)
    if concepts is None:
        raise NotApplicableError(
            f"{who} needs texts that name the spurious attribute; there are some for Waterbirds and CelebA, none for "
            f"{task.title}"
        )
    return concepts


def known(texts: tuple[_Texts, ...], clip: Clip) -> tuple[_Texts, ...]:
    """Return the pairs, or single texts, whose every word the CLIP has an embedding for: a small model lacks most."""
    table = getattr(clip.model, "token_embedding", None)
    if table is None:
        return texts
    is_blank = (table.weight == 0).all(1).cpu().numpy()
    is_blank[0] = False  # padding
    return tuple(each for each in texts if not is_blank[np.asarray(clip.tokenizer(list(each)))].any())


def listed(pairs: Pairs) -> list[list[str]]:
    """Return pairs as JSON values."""
    return [list(pair) for pair in pairs]
