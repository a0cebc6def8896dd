"""The time that is left: by what the parts that are done took, in the unit that suits it."""

from __future__ import annotations

import time

import pytest

from defense.data.remaining import TimeLeft, in_words


@pytest.mark.parametrize(
    ("seconds", "said"),
    [(0.2, "1 s"), (44, "44 s"), (89, "89 s"), (100, "2 min"), (4000, "67 min"), (9000, "2.5 h"), (360_000, "100.0 h")],
)
def test_a_time_is_said_as_people_say_it(seconds, said):
    assert in_words(seconds) == said


def test_what_is_left_takes_as_long_as_what_is_done_and_is_not_said_at_either_end(monkeypatch):
    now = [50.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    left = TimeLeft(10)
    now[0] += 60
    assert left.after(2) == ", about 4 min left"
    assert (left.after(0), left.after(10)) == ("", "")
