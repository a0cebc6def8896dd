"""How many threads this process can keep busy: its cores, or fewer by the quota of a container."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from .images import Limits

_MAX_DECODING_THREADS = 8
_CGROUPS = Path("/sys/fs/cgroup")
_OWN_CGROUPS = Path("/proc/self/cgroup")


def usable_cores() -> int:
    """Return how many cores this process can keep busy: those it may run on, or fewer by a container's CPU quota.

    A quota of 1.5 cores counts as 2.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return allowed if quota is None else max(1, min(allowed, math.ceil(quota)))


def cpu_quota() -> float | None:
    """Return how many cores' worth of time the control groups of this process give it; None where they do not say."""
    shares = []
    for text in _settings("", "cpu.max"):  # v2: "150000 100000", or "max 100000"
        quota, _, period = text.partition(" ")
        shares += _share(quota, period)
    quotas = _settings("cpu", "cpu.cfs_quota_us")  # v1: a number, or -1
    for quota, period in zip(quotas, _settings("cpu", "cpu.cfs_period_us"), strict=False):
        shares += _share(quota, period)
    return min(shares, default=None)


def _share(quota: str, period: str) -> list[float]:
    is_limit = quota.isdigit() and period.isdigit() and int(quota) > 0 and int(period) > 0
    return [int(quota) / int(period)] if is_limit else []


def decoding_threads() -> int:
    """Return how many pictures to decode at once, 1 to 8: as many as there are cores to use.

    Fewer where so many pictures, each as large as `images.Limits` allows, would take more than a quarter of the memory.
    """
    per_picture = 8 * Limits().max_pixels  # RGB, and RGBA beside it while transparency is seen to
    return max(1, min(_MAX_DECODING_THREADS, usable_cores(), _memory_limit() // (4 * per_picture)))


def _memory_limit() -> int:
    """Return the bytes of memory that this process may use: the machine's, or fewer by a container's or ulimit's."""
    if sys.platform == "win32":
        return 8 * 2**30  # it does not tell
    import resource

    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    texts = [*_settings("", "memory.max"), *_settings("memory", "memory.limit_in_bytes")]
    limits += [int(text) for text in texts if text.isdigit()]
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits + ([soft] if soft != resource.RLIM_INFINITY else []))


def _settings(controller: str, name: str) -> Iterator[str]:
    """Yield what a control group's file says for this process's group and for each group around it, innermost first.

    Args:
        controller: Of version 1, e.g. "cpu"; "" for version 2, which has one hierarchy for all.
        name: Of the file.
    """
    root = _CGROUPS / controller
    group = root / _own_group(controller).lstrip("/")
    # Within a container the group's path may be the host's, which is not there; the container's own files are at the
    # root then.
    for folder in (group, *group.parents):
        with suppress(OSError, ValueError):  # not there, or no text
            yield (folder / name).read_text(encoding="ascii").strip()
        if folder == root:
            return


def _own_group(controller: str) -> str:
    """Return the path of this process's group in the hierarchy of a controller; "/" where that is not known."""
    try:
        lines = _OWN_CGROUPS.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError):
        return "/"
    for line in lines:  # "0::/system.slice", or of version 1 "4:cpu,cpuacct:/docker/1f2e"
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controller in controllers.split(",") and ".." not in path:
            return path
    return "/"
