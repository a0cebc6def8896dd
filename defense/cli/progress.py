"""Progress on stderr: a bar on a terminal; elsewhere a line at the start of each stage, and one now and then."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bars

from defense.cli.common import say, stderr
from defense.data.progress import Advance, Progress
from defense.data.remaining import TimeLeft

T = TypeVar("T")

_EVERY_S = 30.0
"""Seconds between two lines of one stage, where there is no terminal."""


class _Stage:
    """A stage that has begun.

    Args:
        name: What it is.
        n_parts: How many parts it has; None where nobody knows.
        bars: What draws on a terminal; None where there is none.
        is_shown: False says nothing at all.
    """

    def __init__(self, name: str, n_parts: int | None, bars: Bars | None, is_shown: bool) -> None:
        self._name, self._n_parts, self._bars, self._is_shown = name, n_parts or 0, bars, is_shown
        self._left = TimeLeft(self._n_parts)
        self._told = time.monotonic()
        if bars is not None:
            self._bar = bars.add_task(name, total=n_parts)
        elif is_shown:
            say(f"{name}: {n_parts}" if n_parts else name)

    def done(self, n: int, note: str = "") -> None:
        """Say that `n` parts are done, and what there is to say about it."""
        if self._bars is not None:
            description = f"{self._name}  {note}" if note else self._name
            self._bars.update(self._bar, completed=n, description=description)
        elif self._is_shown and time.monotonic() - self._told >= _EVERY_S:
            self._told = time.monotonic()
            of = f" of {self._n_parts}" if self._n_parts else ""
            say(f"{self._name}: {n}{of}{self._left.after(n)}" + (f"; {note}" if note else ""))

    def end(self) -> None:
        if self._bars is not None:
            self._bars.remove_task(self._bar)


class Stages(Progress):
    """What a command is doing, stage after stage. `stages` makes one.

    Args:
        bars: What draws on a terminal; None where there is none.
        is_shown: False says nothing at all.
    """

    def __init__(self, bars: Bars | None, is_shown: bool) -> None:
        self.bars, self._is_shown = bars, is_shown
        self._stage: _Stage | None = None

    def start(self, name: str, n_parts: int | None = None) -> None:
        """Begin a stage, which ends the one that was started before.

        Args:
            name: What it is.
            n_parts: How many parts it has; None where nobody knows.
        """
        if self._stage is not None:
            self._stage.end()
        self._stage = _Stage(name, n_parts, self.bars, self._is_shown)

    def done(self, n: int, note: str = "") -> None:
        """Say that `n` parts of the stage that was started are done.

        Args:
            n: How many.
            note: What there is to say about it.
        """
        assert self._stage is not None  # `start` comes first
        self._stage.done(n, note)

    def track(self, items: Collection[T], name: str) -> Iterator[T]:
        """Yield items, as the parts of a stage of their own."""
        self.start(name, len(items))
        for n_done, item in enumerate(items):
            self.done(n_done)
            yield item

    def line(self, text: str) -> None:
        """Print a line on what was found."""
        if self._is_shown:
            say(text)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        """Show a stage of `total` steps for as long as the context lasts; what it yields is called as they are done."""
        stage, n_done = _Stage(name, total, self.bars, self._is_shown), 0

        def advance(n: int) -> None:
            nonlocal n_done
            n_done += n
            stage.done(n_done)

        try:
            yield advance
        finally:
            stage.end()


@contextmanager
def stages(*, is_shown: bool = True) -> Iterator[Stages]:
    """Yield what shows the stages of a command for as long as the context lasts.

    Args:
        is_shown: False for what takes no time, and for all but one of several processes.
    """
    if not (is_shown and stderr.is_terminal):
        yield Stages(None, is_shown)
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=stderr, transient=True) as bars:
        yield Stages(bars, is_shown)
