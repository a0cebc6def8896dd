"""How fast the demo answers one visitor and many: start-up, first page, updates.

    python -m defense.benchmarks.demo --out benchmarks/results/demo.json

The server runs in a process of its own, on loopback. Each visitor opens the page's configuration, uploads the same
picture at the same time as all others, then types letters into the box for the word, as the browser does it: an event
joins the queue, its answer comes back as a stream. The next letter follows after the answer and a pause. Nothing is
cached between letters.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import httpx

from defense.benchmarks.environment import environment_of, write_json
from defense.hosts.clip import embedded_folder

_PATIENCE_S = 120.0
_PICTURE = embedded_folder("examples") / "apple-pizza.png"
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


@contextmanager
def demo_process(arguments: Sequence[str] = ()) -> Iterator[tuple[str, float]]:
    """Run `defense demo` in a process, and yield its address and the seconds until its page was there.

    Args:
        arguments: More of its command line.

    Raises:
        RuntimeError: It does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-c", "from defense.cli import main; main()", "demo", "--port", str(port), *arguments]
    address = f"http://127.0.0.1:{port}/"
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        try:
            while not _answers(address):
                if process.poll() is not None or time.perf_counter() - started > _PATIENCE_S:
                    raise RuntimeError(f"{shlex.join(command)} did not start (exit code {process.returncode})")
                time.sleep(0.05)
            yield address, time.perf_counter() - started
        finally:
            process.terminate()


def _answers(address: str) -> bool:
    try:
        return httpx.get(address, timeout=1).status_code == 200
    except httpx.HTTPError:
        return False


class Visitor:
    """Sends the requests that one browser would.

    Args:
        address: Of the demo.
    """

    def __init__(self, address: str) -> None:
        self.address = address
        self.session = uuid.uuid4().hex
        self.http = httpx.Client(timeout=_PATIENCE_S)
        config = self.http.get(f"{address}config").json()
        by_id = {each["id"]: each for each in config["components"]}
        by_name = {each["props"].get("elem_id"): i for i, each in by_id.items()}
        self.word, self.button = by_name["word"], by_name["upload"]
        self.typed, self.uploaded = (
            next(each for each in config["dependencies"] if target in each["targets"])
            for target in ([self.word, "change"], [self.button, "upload"])
        )
        self.values = {i: each["props"].get("value") for i, each in by_id.items()}

    def page(self) -> float:
        """Return how long the page itself takes to arrive, in milliseconds."""
        started = time.perf_counter()
        self.http.get(self.address).raise_for_status()
        return 1000 * (time.perf_counter() - started)

    def write(self, word: str) -> float:
        """Write a word, and return how long the page's answer takes, in milliseconds.

        Raises:
            RuntimeError: The demo answered with an error.
        """
        return self._ask(self.typed, {self.word: word})

    def upload(self, picture: Path) -> float:
        """Put a picture on the page, and return how long the page's answer takes, in milliseconds.

        Raises:
            RuntimeError: The demo answered with an error.
        """
        started = time.perf_counter()
        with picture.open("rb") as file:
            answer = self.http.post(f"{self.address}gradio_api/upload", files={"files": (picture.name, file)})
        if answer.status_code != 200:
            raise RuntimeError(answer.text)
        data = {"path": answer.json()[0], "orig_name": picture.name, "meta": {"_type": "gradio.FileData"}}
        self._ask(self.uploaded, {self.button: data})
        return 1000 * (time.perf_counter() - started)

    def _ask(self, event: dict[str, Any], given: dict[int, Any]) -> float:
        """Fire an event of the page, and return how long its answer takes, in milliseconds."""
        values = [given.get(i, self.values[i]) for i in event["inputs"]]
        body = {"data": values, "fn_index": event["id"], "session_hash": self.session}
        started = time.perf_counter()
        joined = self.http.post(f"{self.address}gradio_api/queue/join", json=body)
        if joined.status_code != 200:
            raise RuntimeError(joined.text)
        answer = self._answer(joined.json()["event_id"])
        if not answer["success"]:
            raise RuntimeError(str(answer["output"]))
        said = str(answer["output"]["data"][-1])
        if 'role="alert"' in said:
            raise RuntimeError(said)
        return 1000 * (time.perf_counter() - started)

    def _answer(self, event: str) -> dict[str, Any]:
        """Return the message with the answer to an event, from the visitor's stream."""
        url = f"{self.address}gradio_api/queue/data"
        with self.http.stream("GET", url, params={"session_hash": self.session}) as stream:
            for line in stream.iter_lines():
                message = json.loads(line[5:]) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed" and message.get("event_id") == event:
                    return message
        raise RuntimeError("the stream ended without an answer")


def visit(address: str, n_users: int, n_letters: int, pause_s: float) -> dict[str, Any]:
    """Let visitors write at the same time; return the times of their updates, and what went wrong.

    Args:
        address: Of the demo.
        n_users: Visitors.
        n_letters: Updates of each.
        pause_s: Between an answer and the next letter.
    """
    uploads: list[float] = []
    times: list[float] = []
    errors: list[str] = []
    together = threading.Barrier(n_users)

    def write(number: int) -> None:
        try:
            visitor = Visitor(address)
            together.wait(_PATIENCE_S)
            uploads.append(visitor.upload(_PICTURE))
            for i in range(n_letters):
                times.append(visitor.write(_LETTERS[(number + i) % len(_LETTERS)]))
                time.sleep(pause_s)
        except (RuntimeError, httpx.HTTPError, ValueError) as error:  # a broken barrier is a RuntimeError
            errors.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=write, args=(number,)) for number in range(n_users)]
    started = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    took = time.perf_counter() - started
    return {
        "n_users": n_users,
        "n_updates": len(times),
        "pause_s": pause_s,
        "n_errors": len(errors),
        "errors": sorted(set(errors))[:5],
        "updates_per_s": len(times) / took,
        **{f"{name}_ms": value for name, value in quantiles(times).items()},
        **{f"upload_{name}_ms": value for name, value in quantiles(uploads).items()},
    }


def quantiles(times: Sequence[float]) -> dict[str, float]:
    """Return "p50", "p95" and "max" of times, in their unit; an empty dictionary where there are none."""
    if not times:
        return {}
    cuts = statistics.quantiles(times, n=100, method="inclusive") if len(times) > 1 else [times[0]] * 99
    return {"p50": cuts[49], "p95": cuts[94], "max": max(times)}


def measure_demo(n_users: int, n_letters: int, pause_s: float, command: str) -> dict[str, Any]:
    """Return how fast the demo answers one visitor and many, as JSON values.

    Args:
        n_users: Of the many.
        n_letters: Updates of each visitor.
        pause_s: Between an answer and the next letter, where there are many; one alone makes no pause.
        command: What was typed, for the record.
    """
    with demo_process() as (address, start_s):
        visitor = Visitor(address)
        pages = [visitor.page() for _ in range(5)]
        visitor.write("a")  # the first update embeds the labels
        alone = visit(address, 1, n_letters, 0.0)
        many = visit(address, n_users, n_letters, pause_s)
    return {
        "environment": asdict(environment_of(command)),
        "n_cores": len(os.sched_getaffinity(0)),
        "start_s": start_s,
        "page_ms": statistics.median(pages),
        "alone": alone,
        "many": many,
    }


def table(result: dict[str, Any]) -> str:
    """Return the Markdown table of a result of `measure_demo`."""
    lines = [
        "| users | updates | errors | median ms | p95 ms | largest ms | upload p95 ms | updates/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in (result["alone"], result["many"]):
        times = " | ".join(f"{row.get(f'{name}_ms', float('nan')):.0f}" for name in ("p50", "p95", "max", "upload_p95"))
        lines.append(
            f"| {row['n_users']} | {row['n_updates']} | {row['n_errors']} | {times} | {row['updates_per_s']:.1f} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table, and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=20)
    parser.add_argument("--letters", type=int, default=10, help="updates of each user")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between an answer and the next letter")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    command = shlex.join(["python", "-m", "defense.benchmarks.demo", *sys.argv[1:]])
    result = measure_demo(arguments.users, arguments.letters, arguments.pause, command)
    print(table(result))
    print(f"\nstart-up {result['start_s']:.1f} s, page {result['page_ms']:.0f} ms")
    if arguments.out is not None:
        write_json(arguments.out, result)


if __name__ == "__main__":
    main()
