"""ONNX Runtime in a process of its own, so that its threads and PyTorch's are never in one."""

from __future__ import annotations

import time
from collections.abc import Mapping
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np

from defense.benchmarks.cost import Elsewhere

_SETTLE_S = 0.1
"""Threads that wait for more work spin for a while: 30 ms, measured as the CPU time of such a thread after a run."""


class OnnxProcess:
    """Runs graphs in another process, which must be entered as a context.

    Args:
        threads: Of ONNX Runtime.
        inputs: Input of the graphs -> array.
        output: Name of the output.
    """

    def __init__(self, threads: int, inputs: Mapping[str, np.ndarray], output: str) -> None:
        context = get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, threads, dict(inputs), output), daemon=True)
        self._there = there

    def __enter__(self) -> Self:
        self._process.start()
        self._there.close()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._here.close()
        self._process.join()

    def load(self, path: Path) -> np.ndarray:
        """Open a graph and return its output.

        Raises:
            EOFError: The process ended; its own error stands on stderr.
        """
        self._here.send((path, True))
        output: np.ndarray = self._here.recv()
        return output

    def run(self, path: Path) -> Elsewhere:
        """Run a graph that was loaded, once, and return what that took; the process is at rest after it.

        Raises:
            EOFError: As above.
        """
        self._here.send((path, False))
        return Elsewhere(self._here.recv())


def _serve(pipe: Connection, threads: int, inputs: Mapping[str, np.ndarray], output: str) -> None:
    """Answer until the other side hangs up: with the output of a new graph, or with the time of a known one in ms."""
    from defense.export.sessions import CPU, open_session

    sessions = {}
    while True:
        try:
            path, is_new = pipe.recv()
        except EOFError:
            return
        if is_new:
            sessions[path] = open_session(path, [CPU], {"intra_op_num_threads": threads})
        start = time.perf_counter()
        (got,) = sessions[path].run([output], inputs)
        ms = 1e3 * (time.perf_counter() - start)
        time.sleep(_SETTLE_S)
        pipe.send(got if is_new else ms)
