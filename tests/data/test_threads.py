"""How many threads a process can keep busy, and locks that a fork waits for."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from defense.data import threads
from defense.data.locks import fork_safe_lock


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """Write the files of control groups, and what the process says of its own; 64 cores may be used."""

    def write(own: str, files: dict[str, str]) -> None:
        for name, text in files.items():
            (tmp_path / "cgroup" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "cgroup" / name).write_text(text + "\n")
        (tmp_path / "own").write_text(own)

    monkeypatch.setattr(threads, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(threads, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    return write


V1 = "12:memory:/docker/1f\n4:cpu,cpuacct:/docker/1f\n"


@pytest.mark.parametrize(
    ("own", "files", "cores"),
    [
        pytest.param("0::/\n", {"cpu.max": "150000 100000"}, 2, id="v2, one and a half"),
        pytest.param("0::/\n", {"cpu.max": "50000 100000"}, 1, id="v2, half a core"),
        pytest.param("0::/\n", {"cpu.max": "400000 200000"}, 2, id="v2, another period"),
        pytest.param("0::/\n", {"cpu.max": "max 100000"}, 64, id="v2, no quota"),
        pytest.param("0::/\n", {"cpu.max": "9900000 100000"}, 64, id="v2, more than there are"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3, id="v2, the outer"),
        pytest.param("0::/a/b\n", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2, id="v2, both"),
        pytest.param("0::/host/path\n", {"cpu.max": "200000 100000"}, 2, id="v2, a path of the host"),
        pytest.param("0::/../../x\n", {"cpu.max": "200000 100000"}, 2, id="v2, a path beyond the namespace"),
        pytest.param(
            V1, {"cpu/docker/1f/cpu.cfs_quota_us": "250000", "cpu/docker/1f/cpu.cfs_period_us": "100000"}, 3, id="v1"
        ),
        pytest.param(V1, {"cpu/cpu.cfs_quota_us": "100000", "cpu/cpu.cfs_period_us": "50000"}, 2, id="v1, at the root"),
        pytest.param(V1, {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "50000"}, 64, id="v1, no quota"),
        pytest.param("0::/\n", {"cpu.max": "what is this"}, 64, id="text of another kind"),
        pytest.param("0::/\n", {}, 64, id="no such files"),
        pytest.param("", {}, 64, id="no groups"),
    ],
)
def test_fault_a_quota_of_the_container_bounds_the_threads(groups, own, files, cores):
    groups(own, files)
    assert threads.usable_cores() == cores
    assert threads.decoding_threads() <= min(cores, 8)


def test_affinity_bounds_the_threads_where_it_is_less_than_the_quota(groups, monkeypatch):
    groups("0::/\n", {"cpu.max": "800000 100000"})
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {3, 5}, raising=False)
    assert threads.usable_cores() == 2


def test_a_limit_on_memory_counts_in_any_group_around_the_process(groups):
    groups("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": str(3 * 2**30)})
    assert threads._memory_limit() <= 3 * 2**30
    assert threads.decoding_threads() == 1


@pytest.mark.parametrize(("gib", "cores", "n_threads"), [(64, 16, 8), (64, 2, 2), (4, 16, 2), (1, 16, 1), (0.1, 16, 1)])
def test_fault_72_large_pictures_at_once_fit_into_the_memory_there_is(monkeypatch, gib, cores, n_threads):
    monkeypatch.setattr(threads, "_memory_limit", lambda: int(gib * 2**30))
    monkeypatch.setattr(threads, "usable_cores", lambda: cores)
    assert threads.decoding_threads() == n_threads


def test_fault_72_a_limit_on_the_process_counts():
    code = """
import resource
from defense.data import threads
resource.setrlimit(resource.RLIMIT_AS, (3 * 2**30, 3 * 2**30))
print(threads._memory_limit() <= 3 * 2**30, threads.decoding_threads())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "True 1"


# --- locks ------------------------------------------------------------------------------------------------------------

BUSY = """
import os, sys, threading, time, warnings
from defense.data import images
from defense.data.locks import fork_safe_lock

warnings.simplefilter("ignore", DeprecationWarning)  # of a fork with threads, which is what this is about
{busy}
codes = []
for _ in range(20):
    time.sleep(0.003)
    child = os.fork()
    if child == 0:
        threading.Timer(10, os._exit, [9]).start()
        {child}
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
os.write(1, str(sorted(set(codes))).encode())
os._exit(0)
"""


def forked(busy: str, child: str) -> str:
    """Return the exit codes of children that were forked while a thread was busy."""
    code = BUSY.format(busy=busy, child=child)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120).stdout


posix_only = pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork; runs on Linux and macOS")


@posix_only
def test_fault_73_a_child_finds_free_what_a_thread_held_and_what_it_guards_whole():
    busy = """
lock, guarded = fork_safe_lock(), [0, 0]
def work():
    while True:
        with lock:
            guarded[0] += 1
            time.sleep(0.002)
            guarded[1] += 1
threading.Thread(target=work, daemon=True).start()
"""
    child = "lock.acquire(); os._exit(guarded[0] - guarded[1])"
    assert forked(busy, child) == "[0]"


@posix_only
def test_fault_73_a_child_decodes_pictures_though_a_thread_was_decoding_when_it_was_forked():
    busy = """
import io
from PIL import Image
file = io.BytesIO()
Image.new("RGB", (30, 30)).save(file, "PNG")
before = list(warnings.filters)
def work():
    while True:
        images.decode(file.getvalue())
for _ in range(3):
    threading.Thread(target=work, daemon=True).start()
"""
    child = "images.decode(file.getvalue()); os._exit(0 if warnings.filters == before else 3)"
    assert forked(busy, child) == "[0]"


@posix_only
@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_fork_in_a_thread_that_holds_the_lock_is_no_deadlock():
    lock = fork_safe_lock()
    codes = []

    def fork() -> None:
        with lock:
            child = os.fork()
            if child == 0:
                os._exit(0)
            codes.append(os.waitpid(child, 0)[1])

    thread = threading.Thread(target=fork, daemon=True)
    thread.start()
    thread.join(30)
    assert codes == [0]
