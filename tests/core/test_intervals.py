"""The interval of a share, against scipy's."""

from __future__ import annotations

import pytest

from defense.core.intervals import wilson


def test_intervals_are_those_of_scipy():
    stats = pytest.importorskip("scipy.stats")
    for hits, n in ((0, 7), (3, 10), (3, 40), (64, 64), (1, 400)):
        share, low, high = wilson(hits, n)
        want = stats.binomtest(hits, n).proportion_ci(method="wilson")
        assert share == hits / n
        assert (low, high) == pytest.approx((want.low, want.high), abs=1e-6)


def test_of_nothing_everything_is_possible_and_hits_need_not_be_whole():
    assert wilson(0, 0) == (0, 0, 1)
    ends = [wilson(hits, 10) for hits in (3, 3.5, 4)]
    assert sorted(ends) == ends
