"""The interface of a method that is compared, and what methods share.

    method.fit(clip, task)              once per task; may look at task.train and task.val, never at task.tests
    with method.apply(clip) as encoder:
        encoder.image_embeds(pictures)  [n, d_embed]
        encoder.text_embeds(prompts)    [n_labels, d_embed]

An answer is the label whose embedding has the largest cosine with the picture's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from PIL import Image

from defense.benchmarks.datasets import Task
from defense.data.labels import Prompts
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense


class NotApplicableError(ConfigError):
    """A method lacks something it needs, e.g. a defense or a training split; results list it with the reason."""


class CannotWorkError(NotApplicableError):
    """A method could be fitted, and its figure would mislead: this CLIP lacks what the method rests on."""


@dataclass(frozen=True)
class Record:
    """Where a method comes from, and how it differs from there. Tables show it; it is written nowhere else.

    Attributes:
        source: Authors and where it is published, or what it is where nobody published it.
        section: Part of the source that it was written from; empty without one.
        differences: From the source, as a sentence or more; empty where there are none.
        needs_context: Whether it works by words around a name, which not every text tower reads; see `text_tower`.
    """

    source: str
    section: str = ""
    differences: str = ""
    needs_context: bool = False


def needed(defense: Defense | None) -> Defense:
    """Return the defense that a method cannot do without.

    Raises:
        NotApplicableError: None was given.
    """
    if defense is None:
        raise NotApplicableError("needs a defense; give --defense")
    return defense


class Encoder:
    """Embeddings of a CLIP as it is now; a method overrides what it changes.

    Attributes:
        edits_text: Whether `text_embeds` differ from the stock CLIP's, which are then not shared between methods.
        has_stock_tower: Whether the image tower is the stock CLIP's, whose embeddings are then computed once for all
            such methods; `edited` makes the difference.
    """

    edits_text = False
    has_stock_tower = False

    def __init__(self, clip: Clip) -> None:
        self.clip = clip

    def image_embeds(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return normalized embeddings, float32 [n, d_embed], of RGB pictures."""
        pixel_values = np.stack([self.clip.preprocess(picture) for picture in pictures])
        return self.clip.image_embeds(pixel_values).cpu().numpy()

    def edited(self, image_embeds: np.ndarray) -> np.ndarray:
        """Return what the method makes of the stock tower's embeddings, normalized, float32 [n, d_embed]."""
        return image_embeds

    def text_embeds(self, prompts: Prompts, *, normalize_each: bool = True) -> np.ndarray:
        """Return normalized embeddings, float32 [n_labels, d_embed]; see `labels.average_templates`."""
        return self.clip.text_embeds(prompts, normalize_each=normalize_each)


class Stock(Encoder):
    """The stock CLIP, with its embeddings as they are or edited."""

    has_stock_tower = True

    def image_embeds(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return normalized embeddings, float32 [n, d_embed], of RGB pictures."""
        return self.edited(super().image_embeds(pictures))


class Method(Protocol):
    """One way to classify.

    Attributes:
        record: Where it comes from.
    """

    record: ClassVar[Record]

    @property
    def name(self) -> str:
        """What tables and file names call it."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return, as JSON values, all that decides the embeddings beside the CLIP: another setting, another row.

        Asked for after `fit`; what was learned there belongs to it, as a hash where it is large.
        """
        ...

    def fit(self, clip: Clip, task: Task) -> None:
        """Learn from `task.train` and `task.val`.

        Raises:
            ConfigError: The task has no such split, and the method needs it.
        """
        ...

    def apply(self, clip: Clip) -> AbstractContextManager[Encoder]:
        """Put the method into a CLIP; at the end of the context the CLIP is as it was."""
        ...


@runtime_checkable
class FromDefense(Protocol):
    """A method that starts from a defense, which was fitted before the run."""

    def fitted_before(self) -> Mapping[str, Any]:
        """Return what the defense says of its fit; see `defended.fit_of`."""
        ...


Make = Callable[[str, Defense | None, float | None], Method]
"""From the name as typed, the defense that was given and the number after "@" to the method."""


@dataclass(frozen=True)
class Factory:
    """How a method is made from what was typed, and where it comes from.

    Attributes:
        make: Makes it.
        record: Of the method.
    """

    make: Make
    record: Record

    def __call__(self, name: str, defense: Defense | None, strength: float | None) -> Method:
        """Return the method."""
        return self.make(name, defense, strength)


def by_name(method: Callable[[str], Method], record: Record) -> Factory:
    """Return the factory of a method that takes neither a defense nor a strength.

    Args:
        method: Its class. The factory raises `ConfigError` where a strength was given.
        record: The class's.
    """

    def make(name: str, _defense: Defense | None, strength: float | None) -> Method:
        if strength is not None:
            raise ConfigError(f"{name!r}: this method has no strength; leave out what follows @")
        return method(name)

    return Factory(make, record)


@dataclass(frozen=True)
class Unmade:
    """In place of a method that could not even be made: it fails to fit, as others do that are not applicable.

    Attributes:
        name: Of that method.
        reason: Why not.
    """

    record: ClassVar[Record] = Record("a method that could not be made")
    name: str
    reason: str

    def settings(self) -> Mapping[str, Any]:
        """Return nothing."""
        return {}

    def fit(self, clip: Clip, task: Task) -> None:
        """Raise `NotApplicableError`."""
        raise NotApplicableError(self.reason)

    def apply(self, clip: Clip) -> AbstractContextManager[Encoder]:
        """Raise `NotApplicableError`."""
        raise NotApplicableError(self.reason)
