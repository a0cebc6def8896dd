"""Locks that a forked process finds free, and what they guard whole."""

from __future__ import annotations

import os
import threading
import weakref

_registry = threading.Lock()
_locks: weakref.WeakSet[threading.RLock] = weakref.WeakSet()
_held: list[threading.RLock] = []


def fork_safe_lock() -> threading.RLock:
    """Return a re-entrant lock that a fork waits for.

    A child process gets every lock in the state that it has when the process forks, and no thread but the forking one:
    a lock that another thread holds would never be released there, and what it guards would stay half done. So the
    fork takes all of these locks first, which means that it waits until what they guard is done.
    """
    lock = threading.RLock()
    with _registry:
        _locks.add(lock)
    return lock


def _take_all() -> None:
    with _registry:
        found = sorted(_locks, key=id)  # in one order: two threads that fork at the same time do not block each other
    for lock in found:
        lock.acquire()
    _registry.acquire()
    _held.extend(found)


def _release_all() -> None:
    found = _held[::-1]
    _held.clear()
    _registry.release()
    for lock in found:
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_take_all, after_in_parent=_release_all, after_in_child=_release_all)
