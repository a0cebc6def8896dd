"""What jobs cost: all take turns equally often, and memory is seen that is gone at the end."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from defense.benchmarks.cost import Elsewhere, Ratio, peak_rise_mib, percentiles, time_interleaved, torch_threads


def test_interleaved_jobs_run_equally_often_after_one_unmeasured_call():
    calls = []
    times = time_interleaved({name: lambda name=name: calls.append(name) for name in "abc"}, rounds=4, seed=0)
    assert [sorted(calls[start : start + 3]) for start in range(0, 15, 3)] == [list("abc")] * 5
    assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_job_of_another_process_took_what_it_says():
    times = time_interleaved({"there": lambda: Elsewhere(7.5), "here": lambda: None}, rounds=3, seed=0)
    assert times["there"].tolist() == [7.5] * 3
    assert (times["here"] > 0).all()


@pytest.mark.skipif(peak_rise_mib(int) is None, reason="runs where /proc/self/clear_refs can be written")
def test_peak_rise_sees_memory_that_is_freed_before_the_job_ends():
    assert peak_rise_mib(lambda: torch.ones(64, 2**18).sum()) == pytest.approx(64, abs=4)


@pytest.mark.skipif(peak_rise_mib(int) is None, reason="runs where /proc/self/clear_refs can be written")
def test_an_error_of_the_job_is_not_taken_for_memory_that_cannot_be_told():
    def broken():
        raise OSError("of the job")

    with pytest.raises(OSError, match="of the job"):
        peak_rise_mib(broken)


def test_percentiles_are_the_20th_the_median_and_the_80th():
    assert percentiles(np.arange(11.0)) == (2, 5, 8)


def test_ratios_are_taken_within_rounds():
    """Both jobs were slow in the second round: neither lost."""
    ratio = Ratio.of(np.array([2.0, 20.0, 2.0]), np.array([1.0, 10.0, 1.0]))
    assert (ratio.p20, ratio.median, ratio.p80) == (2.0, 2.0, 2.0)


def test_threads_are_as_before_afterwards():
    before = torch.get_num_threads()
    with torch_threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
