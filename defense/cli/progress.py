"""How far a long command is, on stderr: a bar per stage with the time left, or lines where stderr is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

from defense.cli.common import say, stderr
from defense.fit.progress import Advance, Progress

_LINE_EVERY_S = 30.0


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Yield what shows the stages of a fit for as long as the context lasts."""
    if not stderr.is_terminal:
        yield _Lines()
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=stderr, transient=True) as bars:
        yield _Bars(bars)


class _Bars(Progress):
    def __init__(self, bars: RichProgress) -> None:
        self.bars = bars

    def line(self, text: str) -> None:
        say(text)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        bar = self.bars.add_task(name, total=total)
        try:
            yield lambda n: self.bars.advance(bar, n)
        finally:
            self.bars.remove_task(bar)


class _Lines(Progress):
    """A line when a stage begins, and one every half minute with what is left of it."""

    def line(self, text: str) -> None:
        say(text)

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[Advance]:
        say(name)
        begun = said = time.monotonic()
        done = 0

        def advance(n: int) -> None:
            nonlocal done, said
            done += n
            now = time.monotonic()
            if done and now - said >= _LINE_EVERY_S:
                said = now
                say(f"{name}: {done} of {total}, about {_lasting((total - done) * (now - begun) / done)} left")

        yield advance


def _lasting(seconds: float) -> str:
    """Return a time as people say it, never too precise."""
    return f"{seconds / 60:.0f} min" if seconds >= 90 else f"{10 * round(seconds / 10):.0f} s"
