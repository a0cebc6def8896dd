"""Real servers around a bundle, each in a process of its own on loopback, and ended by its process id."""

from __future__ import annotations

import ctypes.util
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

_START_S = 90
HOST = "127.0.0.1"


def free_ports(n: int) -> list[int]:
    """Ports that nobody listens on; all are different."""
    sockets = [socket.socket() for _ in range(n)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def status(url: str) -> int:
    """The status of an answer; 0 where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


class Server:
    """A process that serves, what it prints being kept in a file, in whose folder it runs.

    Not in the checkout: there the folder `defense` would be the package, without what is installed beside it.
    """

    def __init__(self, command: Sequence[object], log: Path, ready: str, environment: dict[str, str]) -> None:
        self.command, self.log, self.ready = list(map(str, command)), log, ready
        self.environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, waits: bool = True) -> None:
        with self.log.open("ab") as stream:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.log.parent,
                stdout=stream,
                stderr=stream,
                env=self.environment,
                start_new_session=True,
            )
        if waits:
            self.wait_for(lambda: status(self.ready) == 200)

    def wait_for(self, holds: Callable[[], bool]) -> None:
        """Wait until something holds, which must be before the server ends."""
        assert self.process is not None
        limit = time.monotonic() + _START_S
        while not holds():
            text = self.log.read_text(errors="replace")[-4000:]
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}:\n{text}"
            assert time.monotonic() < limit, f"waited for {_START_S} s:\n{text}"
            time.sleep(0.1)

    def kill(self) -> None:
        """End the process and those that it started, at once."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None


def triton_home() -> Path:
    """The folder of the real Triton in the package nvidia-pytriton; the test is skipped where it cannot run."""
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        pytest.skip('needs the real Triton, of nvidia-pytriton: pip install -e ".[server]"')
    return Path(found.origin).parent / "tritonserver"


def backends(folder: Path) -> Path:
    """Triton's Python backend with the stub for this Python beside it, in a folder of the test's own."""
    home = triton_home()
    target = folder / "python"
    shutil.copytree(home / "backends" / "python", target)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    stub = home / "python_backend_stubs" / version / "triton_python_backend_stub"
    if not stub.is_file():
        pytest.skip(f"nvidia-pytriton has no stub for Python {version}")
    shutil.copy(stub, target)
    for path in (target / stub.name, home / "bin" / "tritonserver"):
        path.chmod(path.stat().st_mode | 0o111)
    return folder


def _libraries() -> str:
    """Where the stub finds its libraries: those of the wheel, and Python's own where that is not in the system."""
    folders = [str(triton_home().parents[1] / "nvidia_pytriton.libs")]
    if sysconfig.get_config_var("Py_ENABLE_SHARED"):
        folders.append(sysconfig.get_config_var("LIBDIR"))
    elif ctypes.util.find_library(name := f"python{sys.version_info.major}.{sys.version_info.minor}") is None:
        pytest.skip(f"the stub of Triton's Python backend needs the library of this Python: apt install lib{name}")
    return os.pathsep.join(folders)


class Triton(Server):
    """The real Triton with some repositories, and nothing that it could talk to.

    Args:
        repositories: What it serves.
        folder: For its log and its backend.
        python: The virtual environment of its Python backend.
        more: Options.
    """

    def __init__(self, repositories: Sequence[Path], folder: Path, python: Path, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.http, self.grpc, self.metrics = free_ports(3)
        here = backends(folder / "backends")
        super().__init__(
            [
                triton_home() / "bin" / "tritonserver",
                *(f"--model-repository={each}" for each in repositories),
                f"--backend-directory={here}",
                *(f"--{name}-address={HOST}" for name in ("http", "grpc", "metrics")),
                f"--http-port={self.http}",
                f"--grpc-port={self.grpc}",
                f"--metrics-port={self.metrics}",
                "--metrics-interval-ms=100",
                *more,
            ],
            folder / "log",
            f"http://{HOST}:{self.http}/v2/health/ready",
            {
                # The stub embeds the Python whose python3 is first in PATH, with that environment's packages; neither
                # PYTHONPATH nor PYTHONHOME means anything to it.
                "PATH": os.pathsep.join([str(python / "bin"), os.environ["PATH"]]),
                "LD_LIBRARY_PATH": _libraries(),
            },
        )

    def metric(self, name: str) -> float:
        """The value of one of the metrics."""
        with urllib.request.urlopen(f"http://{HOST}:{self.metrics}/metrics", timeout=5) as answer:
            lines = answer.read().decode().splitlines()
        (value,) = [line.split()[-1] for line in lines if line.split("{")[0].split(" ")[0] == name]
        return float(value)


@contextmanager
def running(server: Server) -> Iterator[Server]:
    """A server from when it is ready to the end of the context."""
    try:
        server.start()
        yield server
    finally:
        server.kill()
