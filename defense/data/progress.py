"""How far a long task is, for whoever shows it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

log = logging.getLogger(__name__)

Advance = Callable[[int], None]
"""Called with how many more of a stage's steps are done."""


class Progress:
    """Is told of the stages of a task and how far each is; logs them. Subclasses show more (cli/progress.py)."""

    def line(self, text: str) -> None:
        """Take a line on what was found."""
        log.info("%s", text)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Begin a stage of `total` steps, and yield what is called as they are done; it may end before all are."""
        log.info("%s: %d steps", name, total)
        yield lambda _: None

    def within(self, label: str) -> Progress:
        """Return what puts a label in front of the names of stages."""
        return _Within(self, label) if label else self


class _Within(Progress):
    def __init__(self, outer: Progress, label: str) -> None:
        self.outer, self.label = outer, label

    def line(self, text: str) -> None:
        self.outer.line(self.label + text)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        with self.outer.stage(self.label + name, total) as advance:
            yield advance


SILENT = Progress()
