"""How long a task with a known number of parts will still take."""

from __future__ import annotations

import time


class TimeLeft:
    """The time that is left, by that of the parts that are done.

    Args:
        n_parts: How many there are.
    """

    def __init__(self, n_parts: int) -> None:
        self.n_parts = n_parts
        self._start = time.monotonic()

    def after(self, n_done: int) -> str:
        """Return ", about 3 min left" for a line of progress; "" before the first part is done and after the last."""
        if not 0 < n_done < self.n_parts:
            return ""
        seconds = (time.monotonic() - self._start) * (self.n_parts - n_done) / n_done
        return f", about {in_words(seconds)} left"


def in_words(seconds: float) -> str:
    """Return a duration in the unit that suits it: "40 s", "3 min", "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    return f"{round(seconds / 60)} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
