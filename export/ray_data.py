"""Pictures in a folder or in Parquet files to answers in Parquet files, with Ray Data.

    python -m defense.export.ray_data IN OUT --bundle BUNDLE --workers 8

Needs `pip install "clip-defense[onnx]" "ray[data]"`. IN is a folder of pictures, or of Parquet files with a column of
encoded pictures. The work is cut into shards, which are the same in every run. Whoever works on a shard writes its
result under a temporary name and then gives it its own: a killed worker leaves nothing half-done, Ray starts another
one, and a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from defense.data.sources import PICTURE_SUFFIXES
from defense.export.batch import BatchPredictor
from defense.store.folders import replacing


def list_shards(source: Path, rows: int) -> list[dict[str, Any]]:
    """Return what to do, in pieces whose names depend on the input alone.

    Args:
        source: A folder with Parquet files, or else with pictures at any depth.
        rows: Pictures per shard.

    Returns:
        For each {"name", "parquet": path or "", "row_group", "files": paths below `source`}. A shard of Parquet is one
        row group.
    """
    shards = []
    if tables := sorted(source.rglob("*.parquet")):
        for table in tables:
            name = table.relative_to(source).as_posix()
            for group in range(pq.ParquetFile(table).num_row_groups):
                shards.append({"name": _name(f"{name}#{group}"), "parquet": name, "row_group": group, "files": []})
        return shards
    files = sorted(
        path.relative_to(source).as_posix() for path in source.rglob("*") if path.suffix.lower() in PICTURE_SUFFIXES
    )
    for start in range(0, len(files), rows):
        chosen = files[start : start + rows]
        shards.append({"name": _name("\n".join(chosen)), "parquet": "", "row_group": 0, "files": chosen})
    return shards


def _name(content: str) -> str:
    return f"part-{hashlib.sha256(content.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}.parquet"


def pending(shards: Sequence[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Return the shards whose result is not there yet."""
    return [shard for shard in shards if not (out / shard["name"]).exists()]


class ShardWorker:
    """Works on one shard at a time; what Ray runs in each of its actors.

    Args:
        source: The input folder.
        out: The output folder.
        predictor: Told where pictures are in Parquet by its `column`.
        batch: Pictures in memory at once.
    """

    def __init__(self, source: Path, out: Path, predictor: BatchPredictor, batch: int = 256) -> None:
        self.source, self.out, self.predictor, self.batch = source, out, predictor, batch

    def __call__(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Write the result of a shard, if it has a row, and return its name and counts."""
        done = {"name": shard["name"], "rows": 0, "errors": 0}
        tables = self._answers(shard)
        first = next(tables, None)
        if first is None:
            return done
        with replacing(self.out / shard["name"]) as partial, pq.ParquetWriter(partial, first.schema) as writer:
            for table in itertools.chain([first], tables):
                writer.write_table(table)
                done["rows"] += len(table)
                done["errors"] += sum(error != "" for error in table["error"].to_pylist())
        return done

    def _answers(self, shard: dict[str, Any]) -> Iterator[pa.Table]:
        """Yield the predictor's answers to the batches of a shard."""
        for columns in self._batches(shard):
            answer = self.predictor(columns)
            answer["embedding"] = list(answer["embedding"])
            yield pa.table({name: pa.array(values) for name, values in answer.items()})

    def _batches(self, shard: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the columns of at most `batch` rows of a shard at a time."""
        if not shard["parquet"]:
            for start in range(0, len(shard["files"]), self.batch):
                files = list(shard["files"][start : start + self.batch])
                yield {"file": files, self.predictor.column: [self.source / file for file in files]}
            return
        table = pq.ParquetFile(self.source / shard["parquet"])
        for batch in table.iter_batches(self.batch, row_groups=[shard["row_group"]]):
            yield batch.to_pydict()


def run(source: Path, out: Path, predictor: BatchPredictor, *, workers: int, rows: int) -> dict[str, int]:
    """Work on everything that is not done yet, and return what this run did. One run at a time for an output folder.

    Args:
        source: The input folder.
        out: The output folder; made where it is not there.
        predictor: What to ask.
        workers: Processes, each with a model of its own.
        rows: Pictures per shard of a folder.
    """
    import ray

    out.mkdir(parents=True, exist_ok=True)
    for left_behind in out.glob(".*.partial"):  # by a worker that was killed
        left_behind.unlink()
    shards = list_shards(source, rows)
    todo = pending(shards, out)
    done = {"shards": len(shards), "worked_on": len(todo), "rows": 0, "errors": 0}
    if todo:
        worker: Any = ShardWorker  # a class is what `map` starts actors of; Ray's annotation knows functions only
        dataset = ray.data.from_items(todo, override_num_blocks=len(todo)).map(
            worker, fn_constructor_args=(source, out, predictor), concurrency=workers, num_cpus=1
        )
        for result in dataset.iter_rows():
            done["rows"] += result["rows"]
            done["errors"] += result["errors"]
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print what was done as JSON, and return the exit code: 4 where some pictures could not be read."""
    parser = argparse.ArgumentParser(prog="python -m defense.export.ray_data", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of pictures, or of Parquet files")
    parser.add_argument("out", type=Path, help="folder for the answers")
    parser.add_argument("--bundle", type=Path, required=True, help="what `defense export` wrote")
    parser.add_argument("--column", default="bytes", help="column of the pictures in Parquet (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="pictures per output file (default: %(default)s)")
    arguments = parser.parse_args(argv)
    predictor = BatchPredictor(
        arguments.bundle.resolve(), column=arguments.column, session_options={"intra_op_num_threads": 1}
    )
    done = run(
        arguments.source.resolve(), arguments.out.resolve(), predictor, workers=arguments.workers, rows=arguments.rows
    )
    sys.stdout.write(json.dumps(done) + "\n")
    return 4 if done["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
