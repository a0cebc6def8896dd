"""What jobs cost on this machine: their times, measured in turns, and the memory that one needs at its peak.

A *job* is a function without arguments. Reading this module loads no torch.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from defense.data.remaining import TimeLeft

MIB = 2**20

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class Elsewhere:
    """What a job returns that ran in another process: the ms that it took there."""

    ms: float


def per_s(n: int, job: Callable[[], object]) -> float:
    """Return `n` over the time of the fastest of three calls."""
    fastest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        job()
        fastest = min(fastest, time.perf_counter() - start)
    return n / fastest


def time_interleaved(
    jobs: Mapping[str, Callable[[], object]],
    rounds: int,
    seed: int,
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, np.ndarray]:
    """Return each job's times in ms, [rounds], by name.

    Each job runs once unmeasured; then all run once a round, in an order drawn anew for each round, so that whatever
    else the machine does hits all alike.

    Args:
        jobs: By name. One that returns an `Elsewhere` took what that says.
        rounds: How often each is measured.
        seed: Of the order.
        report: Called with a line of progress, about ten times, between rounds.
    """
    names = list(jobs)
    for job in jobs.values():
        job()
    times = {name: np.zeros(rounds) for name in names}
    rng = np.random.default_rng([seed, 3])
    left = TimeLeft(rounds)
    for index in range(rounds):
        if index % max(1, rounds // 10) == 0:
            report(f"round {index + 1} of {rounds}{left.after(index)}")
        for place in rng.permutation(len(names)):
            start = time.perf_counter()
            done = jobs[names[place]]()
            ms = 1e3 * (time.perf_counter() - start)
            times[names[place]][index] = done.ms if isinstance(done, Elsewhere) else ms
    return times


def percentiles(values: np.ndarray) -> tuple[float, float, float]:
    """Return the 20th percentile, the median and the 80th percentile of values [n]."""
    p20, median, p80 = (float(value) for value in np.percentile(values, (20, 50, 80)))
    return p20, median, p80


@dataclass(frozen=True)
class Ratio:
    """Of two times measured in the same round: median over rounds, and 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @classmethod
    def of(cls, ms: np.ndarray, base_ms: np.ndarray) -> Ratio:
        """Return the ratio of two jobs' times, [rounds] each."""
        p20, median, p80 = percentiles(ms / base_ms)
        return cls(median, p20, p80)


def peak_rise_mib(job: Callable[[], object]) -> float | None:
    """Run a job and return by how much it raised the process's resident memory at its peak, in MiB.

    None where the system does not tell (only Linux does); the job was not run then.
    """
    if (before := begin_peak_mib()) is None:
        return None
    job()
    return peak_mib() - before


def begin_peak_mib() -> float | None:
    """Return the resident memory now, in MiB, and let `peak_mib` count anew; None where the system does not tell."""
    try:
        if (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
            trim(0)  # memory that was freed but kept would hide the same amount of the rise
        _CLEAR_REFS.write_text("5")  # VmHWM starts anew; getrusage's peak would be that of all that ran before
        return _resident_mib("VmRSS")
    except (OSError, TypeError):
        return None


def peak_mib() -> float:
    """Return the most resident memory since `begin_peak_mib`, in MiB."""
    return _resident_mib("VmHWM")


def _resident_mib(key: str) -> float:
    fields = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(fields[key].split()[0]) / 1024


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """Let torch use this many threads, and then as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
