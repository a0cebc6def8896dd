"""Load on servers that run, beside calling the runtime directly, and what each stage of the runtime does in a second.

    python -m defense.benchmarks.serving BUNDLE --server triton=127.0.0.1:8001 --server kserve=127.0.0.1:8081

Servers are asked by gRPC; docs/serve.md says how they are started. For a row without dynamic batching serve a bundle
from whose model_repository the line `dynamic_batching` was taken, in the config.pbtxt of its graph. It is bounded: a
row takes `--seconds`, and there are two for each target and number of clients.
"""

from __future__ import annotations

import argparse
import io
import math
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from defense.benchmarks.cost import per_s
from defense.benchmarks.environment import environment_of, write_json
from defense.data import images
from defense.errors import ConfigError, DefenseError
from defense.export.repository import PICTURES_NAME, VISION_NAME
from defense.export.runtime import OnnxClassifier
from defense.export.serving import pictures
from defense.world.draws import typographic
from defense.world.scenes import render

Ask = Callable[[], None]
"""Asks for the answer to one picture, and raises where there is none."""
_PICTURE_PX = (1600, 1200)
_N_PICTURES = 8
_BATCH = 32


@dataclass(frozen=True)
class Load:
    """What a target answered while so many clients asked, each for one picture at a time.

    Attributes:
        target: "direct", or the name of a server.
        input: "pixels", or "files" of 1600 x 1200 pixels.
        clients: How many asked at once.
        answers_per_s: Answers, per second.
        p50_ms: Half of the answers took no longer.
        p95_ms: Of 20 answers 19 took no longer.
        errors: Requests that were refused.
    """

    target: str
    input: str
    clients: int
    answers_per_s: float
    p50_ms: float
    p95_ms: float
    errors: int


@dataclass(frozen=True)
class Stage:
    """What one process does in a second.

    Attributes:
        stage: "decode", "decode, draft", "preprocess", "graph" or "files to labels".
        threads: Of the stage.
        pictures_per_s: The fastest of three.
    """

    stage: str
    threads: int
    pictures_per_s: float


def measure_load(target: str, kind: str, ask: Ask, n_clients: int, seconds: float) -> Load:
    """Return what happens while so many clients ask one after the other for some seconds, each once at least.

    Raises:
        ConfigError: Nothing was answered.
    """
    times: list[float] = []
    errors = 0
    lock = threading.Lock()
    all_warm = threading.Barrier(n_clients)

    def client() -> None:
        nonlocal errors
        with suppress(Exception):  # what fails then fails again below, and is counted
            ask()
        all_warm.wait()
        own, failed = [], 0
        end = time.perf_counter() + seconds
        while (start := time.perf_counter()) < end:
            try:
                ask()
                own.append(time.perf_counter() - start)
            except Exception:  # each library has its own
                failed += 1
        with lock:
            times.extend(own)
            errors += failed

    with ThreadPoolExecutor(n_clients) as pool:
        for done in [pool.submit(client) for _ in range(n_clients)]:
            done.result()
    if not times:
        raise ConfigError(f"{target} answered none of {errors} requests; is it ready, and does it serve this bundle?")
    p50, p95 = np.percentile(times, [50, 95]) * 1000
    return Load(target, kind, n_clients, len(times) / seconds, float(p50), float(p95), errors)


def direct(clf: OnnxClassifier, files: Sequence[bytes], pixel_values: np.ndarray) -> dict[str, Ask]:
    """Return what asks the runtime in this process, by what it is given."""
    one = np.ones(1, np.float32)
    choice = pictures.choose(clf, None)

    def ask_file() -> None:
        prepared = pictures.prepare(clf, files[:1])
        embeds, _ = clf.outputs(prepared.pixel_values, one)
        pictures.answer(clf, embeds, prepared.errors, choice)

    return {"pixels": lambda: _nothing(clf.outputs(pixel_values[:1], one)), "files": ask_file}


def remote(address: str, files: Sequence[bytes], pixel_values: np.ndarray, *, has_strength: bool) -> dict[str, Ask]:
    """Return what asks a server at host:port by gRPC, by what it is given.

    Raises:
        ConfigError: tritonclient is not installed.
    """
    try:
        import tritonclient.grpc as grpc
    except ImportError as error:
        raise ConfigError('servers are asked by tritonclient; run: pip install "tritonclient[grpc]"') from error

    client = grpc.InferenceServerClient(address)

    def tensor(name: str, array: np.ndarray) -> Any:
        given = grpc.InferInput(name, list(array.shape), "BYTES" if array.dtype == object else "FP32")
        given.set_data_from_numpy(array)
        return given

    strength = [tensor("strength", np.ones((1, 1), np.float32))] if has_strength else []
    pixels = [tensor("pixel_values", pixel_values[:1]), *strength]
    picture = [tensor("picture", np.array([files[0]], dtype=object)[:, None])]
    return {
        "pixels": lambda: _nothing(client.infer(VISION_NAME, pixels)),
        "files": lambda: _nothing(client.infer(PICTURES_NAME, picture)),
    }


def _nothing(_answer: object) -> None:
    pass


def measure_stages(bundle: Path, files: Sequence[bytes], threads: int) -> list[Stage]:
    """Return what the stages from a file to its label do in a second.

    `draft` lets a JPEG be decoded at a part of its size, which is faster and changes pixels; nothing of this package
    does so.
    """
    clf = OnnxClassifier(bundle, session_options={"intra_op_num_threads": threads})
    decoded = [images.decode(file).image for file in files]
    batch = np.stack([clf.preprocess(decoded[i % len(decoded)]) for i in range(_BATCH)])
    shortest = min(clf.preprocess.size)
    with ThreadPoolExecutor(threads) as pool:
        jobs: dict[str, tuple[int, Callable[[], object]]] = {
            "decode": (len(files), lambda: list(pool.map(images.decode, files))),
            "decode, draft": (len(files), lambda: list(pool.map(lambda file: drafted(file, shortest), files))),
            "preprocess": (len(files), lambda: list(pool.map(clf.preprocess, decoded))),
            "graph": (_BATCH, lambda: clf.encode_pixels(batch)),
            "files to labels": (len(files), lambda: clf.predict(files)),
        }
        return [Stage(name, threads, per_s(n, job)) for name, (n, job) in jobs.items()]


def drafted(file: bytes, shortest: int) -> Image.Image:
    """Return a JPEG decoded at a half, a quarter or an eighth of its size, and no side below `shortest` pixels."""
    picture = Image.open(io.BytesIO(file))
    picture.draft("RGB", (shortest, shortest))
    picture.load()
    return picture.convert("RGB")


def photographs(n: int) -> list[bytes]:
    """Return drawn pictures as JPEG files of 1600 x 1200 pixels."""
    files = []
    for example in typographic(n, seed=0):
        stream = io.BytesIO()
        render(example.scene, max(_PICTURE_PX)).resize(_PICTURE_PX).save(stream, "JPEG", quality=90)
        files.append(stream.getvalue())
    return files


def measure(bundle: Path, servers: Mapping[str, str], clients: Sequence[int], seconds: float) -> dict[str, Any]:
    """Return all figures, as JSON values.

    Args:
        bundle: What the servers serve.
        servers: Name -> host:port of its gRPC.
        clients: How many ask at once, in turn.
        seconds: For each row.
    """
    clf = OnnxClassifier(bundle)
    files = photographs(_N_PICTURES)
    pixel_values = pictures.prepare(clf, files).pixel_values
    targets = {"direct": direct(clf, files, pixel_values)}
    for name, address in servers.items():
        targets[name] = remote(address, files, pixel_values, has_strength=clf.has_strength)
    rows = [
        measure_load(target, kind, ask, n, seconds)
        for target, asks in targets.items()
        for kind, ask in asks.items()
        for n in clients
    ]
    return {
        "load": [asdict(row) for row in rows],
        "stages": [asdict(row) for n in (1, 2) for row in measure_stages(bundle, files, n)],
        "seconds": seconds,
        "bundle": clf.bundle.manifest_sha256,
        "onnxruntime": version("onnxruntime"),
    }


def table(result: Mapping[str, Any]) -> str:
    """Return the figures as two tables of Markdown."""
    lines = ["| target | input | clients | answers/s | p50 ms | p95 ms | errors |", "|---|---|---|---|---|---|---|"]
    for row in result["load"]:
        lines.append(
            f"| {row['target']} | {row['input']} | {row['clients']} | {row['answers_per_s']:.1f} | "
            f"{row['p50_ms']:.1f} | {row['p95_ms']:.1f} | {row['errors']} |"
        )
    lines += ["", "| stage | threads | pictures/s |", "|---|---|---|"]
    lines += [f"| {row['stage']} | {row['threads']} | {row['pictures_per_s']:.1f} |" for row in result["stages"]]
    return "\n".join(lines)


def _clients(text: str) -> list[int]:
    try:
        counts = [int(each) for each in text.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; want numbers of clients, 1 or more, e.g. 1,8,32")
    return counts


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; want seconds above 0")
    return seconds


def _server(text: str) -> tuple[str, str]:
    name, is_named, address = text.partition("=")
    if not (name and is_named and ":" in address):
        raise argparse.ArgumentTypeError(f"{text!r}; want NAME=HOST:PORT, e.g. triton=127.0.0.1:8001")
    return name, address


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the tables and return the exit code: 2 for what cannot work."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m defense.benchmarks.serving", description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path, help="what `defense export` wrote")
    parser.add_argument("--server", type=_server, action="append", default=[], help="NAME=HOST:PORT of its gRPC")
    parser.add_argument("--clients", type=_clients, default="1,8,32", help="that ask at once (default: %(default)s)")
    parser.add_argument("--seconds", type=_seconds, default=5.0, help="for each row (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="write the result there, as JSON")
    arguments = parser.parse_args(argv)
    try:
        environment = environment_of(shlex.join(["python", "-m", "defense.benchmarks.serving", *argv]))
        result = measure(arguments.bundle, dict(arguments.server), arguments.clients, arguments.seconds)
    except (DefenseError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.out is not None:
        write_json(arguments.out, {**result, "environment": asdict(environment)})
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
