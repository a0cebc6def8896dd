"""A folder of pictures on a cluster of Ray with several nodes, one of which is killed."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("ray", reason='needs Ray: pip install -e ".[ray]"')
pytest.importorskip("pyarrow.parquet")

import pyarrow.parquet as pq
import ray
from PIL import Image

from defense.export.batch import BatchPredictor
from defense.export.ray_data import run
from defense.export.runtime import OnnxClassifier

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore"),  # Ray leaves sockets and files to the end of the process
]

_OBJECTS = 80 * 2**20


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head and two nodes, with a core each, on this machine; nobody is told of it."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 1, "object_store_memory": _OBJECTS, "include_dashboard": False},
    )
    try:
        made.workers = [made.add_node(num_cpus=1, object_store_memory=_OBJECTS) for _ in range(2)]
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


def write_pictures(folder: Path, n: int) -> list[np.ndarray]:
    """Write n small pictures, a thousand to a sub-folder, of which every 50th is broken; return those that differ."""
    kinds = list(np.random.default_rng(0).integers(0, 256, (10, 40, 48, 3), dtype=np.uint8))
    files = []
    for kind in kinds:
        stream = io.BytesIO()
        Image.fromarray(kind).save(stream, "PNG")
        files.append(stream.getvalue())
    for number in range(n):
        inner = folder / f"{number // 1000:03}"
        inner.mkdir(parents=True, exist_ok=True)
        (inner / f"{number:06}.png").write_bytes(b"<html>" if number % 50 == 7 else files[number % len(files)])
    return kinds


def answers(out: Path) -> dict[str, tuple[str, str]]:
    """The name of each picture, and its label and error; no name is there twice."""
    rows: dict[str, tuple[str, str]] = {}
    for file in sorted(out.glob("part-*.parquet")):
        for row in pq.read_table(file, columns=["file", "label", "error"]).to_pylist():
            assert row["file"] not in rows
            rows[row["file"]] = (row["label"], row["error"])
    return rows


@pytest.mark.parametrize(("n", "rows"), [(1500, 25), (100_000, 1000)])
def test_a_killed_node_costs_no_answer_and_a_second_run_has_nothing_to_do(cluster, tiny_bundle, tmp_path, n, rows):
    source, out = tmp_path / "in", tmp_path / "out"
    kinds = write_pictures(source, n)
    predictor = BatchPredictor(tiny_bundle, session_options={"intra_op_num_threads": 1})

    def kill_one() -> None:
        while len(list(out.glob("part-*.parquet"))) < 3:
            time.sleep(0.05)
        cluster.remove_node(cluster.workers[0], allow_graceful=False)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    done = run(source, out, predictor, workers=3, rows=rows)
    killer.join(60)
    assert not killer.is_alive()
    limit = time.monotonic() + 60
    while sum(node["Alive"] for node in ray.nodes()) != 2:  # the head notices when the node is silent for a while
        assert time.monotonic() < limit
        time.sleep(0.5)
    got = answers(out)
    assert len(got) == n
    labels = OnnxClassifier(tiny_bundle).predict(kinds)
    for number in range(n):
        label, error = got[f"{number // 1000:03}/{number:06}.png"]
        assert (label, error) == (("", "not_an_image") if number % 50 == 7 else (labels[number % len(kinds)], ""))
    assert (done["shards"], done["worked_on"]) == (-(-n // rows), -(-n // rows))
    assert not list(out.glob(".*.partial"))
    assert run(source, out, predictor, workers=3, rows=rows)["worked_on"] == 0
