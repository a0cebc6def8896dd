"""Which training pictures a method looks at while it is fitted: counted, not claimed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from PIL import Image

from defense.benchmarks.datasets import Dataset, Task
from defense.benchmarks.datasets.base import Picture
from defense.data.images import DEFAULT_LIMITS, Limits


@dataclass(frozen=True)
class _Counted:
    """A picture that notes when it is loaded.

    Attributes:
        picture: The picture.
        key: Its name in its data set.
        seen: Where the name goes.
    """

    picture: Picture
    key: str
    seen: set[str]

    def digest(self) -> str:
        """Return the picture's own digest."""
        return self.picture.digest()

    def load(self, limits: Limits = DEFAULT_LIMITS) -> Image.Image:
        """Return the picture, and note it."""
        self.seen.add(self.key)
        return self.picture.load(limits)


def counted(task: Task) -> tuple[Task, Mapping[str, set[str]]]:
    """Return a task whose pictures for fitting note when they are loaded, and their names so far by variant.

    Twins of the training pictures count as a variant of their own.
    """
    seen: dict[str, set[str]] = {}

    def watched(dataset: Dataset | None) -> Dataset | None:
        if dataset is None:
            return None
        names = seen.setdefault(dataset.variant, set())
        examples = (replace(each, picture=_Counted(each.picture, each.key, names)) for each in dataset.examples)
        return replace(dataset, examples=tuple(examples))

    train, val, train_clean = (watched(split) for split in (task.train, task.val, task.train_clean))
    return replace(task, train=train, val=val, train_clean=train_clean), seen
