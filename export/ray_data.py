"""Pictures in a folder or in Parquet files to answers in Parquet files, with Ray Data.

    python -m defense.export.ray_data IN OUT --bundle BUNDLE --workers 8

Needs the extra `ray`. IN is a folder of pictures, of Parquet files with a column of pictures, or of
WebDataset tars. The work is cut into shards, named after all that decides a result: the bundle, labels
and columns, and the names, sizes and times of the files. Whoever works on a shard writes its result under a temporary
name and then gives it its own: a killed worker leaves nothing half-done, Ray starts another one, and a run that was
stopped goes on where it was. Results of other pictures, labels or bundles in OUT are moved to OUT/.superseded.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from defense.cli.common import exit_code, harmless, log_warnings
from defense.data.cells import picture_in
from defense.data.images import DEFAULT_LIMITS, Limits
from defense.data.listing import in_words, list_files
from defense.data.shards import TarShard
from defense.data.sources import name_below
from defense.errors import ConfigError, DefenseError, cannot_import
from defense.export.batch import BatchPredictor
from defense.store.defenses import MANIFEST
from defense.store.folders import led_to, replacing, sha256_of

log = logging.getLogger(__name__)

_FILE = "file"
"""Column with the name of a picture that does not come from a table."""
_SUPERSEDED = ".superseded"


def list_shards(source: Path, rows: int, predictor: BatchPredictor | None = None) -> list[dict[str, Any]]:
    """Return what to do, in pieces whose names depend on all that decides their results.

    Args:
        source: A folder with pictures at any depth, or with Parquet files, or with tars.
        rows: Pictures per shard.
        predictor: What will be asked, which is a part of the names; without one they depend on the input alone.

    Returns:
        For each {"name", "parquet": path or "", "row_group", "files": paths below `source`, "tar": path or ""}. A shard
        of Parquet is one row group, and a tar is one shard.

    Raises:
        ConfigError: There are no pictures or several kinds of files, or a table's columns do not do; see
            `BatchPredictor.check_columns`.
    """
    listing = list_files(source)
    kind, files = listing.of_one_kind()
    if listing.passed_over:
        log.warning("passed over: %s", in_words(listing.passed_over))
    job = {} if predictor is None else _job(predictor)
    shards = []

    def add(chosen: Sequence[Path], row_group: int = 0, **more: Any) -> None:
        states = [(_relative(file, source), file.stat()) for file in chosen]
        content = [job, row_group, [(name, state.st_size, state.st_mtime_ns) for name, state in states]]
        name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
        fields: dict[str, Any] = {"parquet": "", "row_group": row_group, "files": [], "tar": "", **more}
        shards.append({"name": f"part-{name}.parquet", **fields})

    if kind == "pictures":
        for start in range(0, len(files), rows):
            chosen = files[start : start + rows]
            add(chosen, files=[_relative(file, source) for file in chosen])
    for file in files if kind != "pictures" else ():
        if kind == "tar":
            add([file], tar=_relative(file, source))
            continue
        with _table(file) as table:
            if predictor is not None:
                predictor.check_columns(table.schema_arrow.names)
            for group in range(table.num_row_groups):
                add([file], group, parquet=_relative(file, source))
    return shards


def _relative(file: Path, source: Path) -> str:
    return file.relative_to(source).as_posix() if file != source else file.name


def _job(predictor: BatchPredictor) -> dict[str, Any]:
    """Return what decides the answers, apart from the pictures."""
    return {
        "bundle": sha256_of(Path(predictor.source) / MANIFEST),  # it lists the hash of every other file
        "labels": predictor.candidate_labels,
        "columns": [predictor.column, *predictor.answer_columns()],
        "limits": repr(predictor.options.get("limits", DEFAULT_LIMITS)),
    }


def _table(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(pa.OSFile(os.fsencode(file)))  # as bytes: the name may be no UTF-8
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{file} cannot be read as Parquet: {error}") from error


def pending(shards: Sequence[dict[str, Any]], out: Path) -> list[dict[str, Any]]:
    """Return the shards whose result is not there yet."""
    return [shard for shard in shards if not (out / shard["name"]).exists()]


def set_aside(shards: Sequence[dict[str, Any]], out: Path) -> int:
    """Move results that belong to none of the shards out of the way, and return how many those were.

    They are of other pictures, labels or another bundle: whoever reads the folder would take them for answers.
    """
    current = {shard["name"] for shard in shards}
    others = [file for file in out.glob("part-*.parquet") if file.name not in current]
    for file in others:
        (out / _SUPERSEDED).mkdir(exist_ok=True)
        file.replace(out / _SUPERSEDED / file.name)
    if others:
        log.warning("%d results of other pictures, labels or bundles are now in %s", len(others), out / _SUPERSEDED)
    return len(others)


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
        """Write the result of a shard and return its name and counts.

        Args:
            shard: One of `list_shards`, or {"json": one of them}, since Ray would guess types for its fields.
        """
        if "json" in shard:
            shard = json.loads(shard["json"])
        done = {"name": shard["name"], "rows": 0, "errors": 0}
        schema, batches = self._read(shard)
        for name in self.predictor.answer_columns():
            schema = schema.append(pa.field(name, _ANSWER_TYPES[name.removeprefix(self.predictor.prefix)]))
        with (
            replacing(self.out / shard["name"]) as partial,
            partial.open("wb") as stream,
            pq.ParquetWriter(stream, schema) as writer,
        ):
            for others, cells in batches:
                answers = self.predictor({self.predictor.column: cells})
                *_, errors = answers.values()
                writer.write_table(pa.Table.from_arrays([*others, *_arrow(answers)], schema=schema))
                done["rows"] += len(cells)
                done["errors"] += sum(error != "" for error in errors)
        return done

    def _read(self, shard: dict[str, Any]) -> tuple[pa.Schema, Iterator[tuple[list[pa.Array], list[Any]]]]:
        """Return the schema of a shard without its pictures, and its batches: the other columns, and the pictures."""
        if shard["parquet"]:
            return self._read_table(shard)
        if shard.get("tar"):
            members = ((picture.name, picture.open()) for picture in TarShard(self.source / shard["tar"]).pictures())
        else:
            paths = (self.source / file for file in shard["files"])
            members = ((name_below(path, self.source), path) for path in paths)
        return pa.schema([(_FILE, pa.string())]), self._named(members)

    def _named(self, members: Iterator[tuple[str, Any]]) -> Iterator[tuple[list[pa.Array], list[Any]]]:
        while part := list(itertools.islice(members, self.batch)):
            yield [pa.array([name for name, _ in part], pa.string())], [source for _, source in part]

    def _read_table(self, shard: dict[str, Any]) -> tuple[pa.Schema, Iterator[tuple[list[pa.Array], list[Any]]]]:
        """Read a row group. Columns pass through as Arrow has them: a batch alone does not show their types."""
        path = self.source / shard["parquet"]
        table, folder = _table(path), path.parent
        schema = table.schema_arrow.remove_metadata()  # it describes a table with pictures
        self.predictor.check_columns(schema.names)
        at = schema.get_field_index(self.predictor.column)

        def batches() -> Iterator[tuple[list[pa.Array], list[Any]]]:
            for batch in table.iter_batches(self.batch, row_groups=[shard["row_group"]]):
                columns = list(batch.columns)
                cells = [picture_in(cell, folder) for cell in columns[at].to_pylist()]
                yield columns[:at] + columns[at + 1 :], cells

        return schema.remove(at), batches()


_ANSWER_TYPES = {
    "label": pa.string(),
    "score": pa.float32(),
    "embedding": pa.list_(pa.float32()),
    "plain_label": pa.string(),
    "removed_energy": pa.float32(),
    "error": pa.string(),
}


def _arrow(answers: dict[str, np.ndarray]) -> list[pa.Array]:
    """Return the columns of an answer in Arrow's form."""
    return [
        _listed(values) if values.ndim == 2 else pa.array(values, pa.string() if values.dtype == object else None)
        for values in answers.values()
    ]


def _listed(rows: np.ndarray) -> pa.Array:
    """Return rows [n, d] as an array of n lists."""
    offsets = np.arange(len(rows) + 1, dtype=np.int32) * rows.shape[1]
    return pa.ListArray.from_arrays(offsets, rows.ravel())


def run(source: Path, out: Path, predictor: BatchPredictor, *, workers: int, rows: int) -> dict[str, int]:
    """Work on everything that is not done yet, and return what this run did. One run at a time for an output folder.

    Args:
        source: The input folder.
        out: The output folder; made where it is not there.
        predictor: What to ask.
        workers: Processes at most, each with a model of its own. Ray begins with one, and adds to it while it is busy.
        rows: Pictures per shard of a folder.
    """
    try:
        import ray
    except ImportError as missing:
        raise cannot_import("ray", missing) from missing
    if out.is_relative_to(source) and source.is_dir():
        raise ConfigError(f"OUT {out} lies in IN {source}: the next run would read the answers; choose another folder")
    out.mkdir(parents=True, exist_ok=True)
    for left_behind in out.glob(".*.partial"):  # by a worker that was killed
        left_behind.unlink()
    shards = list_shards(source, rows, predictor)
    set_aside(shards, out)
    todo = pending(shards, out)
    done = {"shards": len(shards), "worked_on": len(todo), "rows": 0, "errors": 0}
    if todo:
        worker: Any = ShardWorker  # a class is what `map` starts actors of; Ray's annotation knows functions only
        items = [{"json": json.dumps(shard)} for shard in todo]
        dataset = ray.data.from_items(items, override_num_blocks=len(items)).map(
            worker, fn_constructor_args=(source, out, predictor), concurrency=(1, workers), num_cpus=1
        )
        for result in dataset.iter_rows():
            done["rows"] += result["rows"]
            done["errors"] += result["errors"]
    return done


def main(argv: Sequence[str] | None = None) -> int:
    """Run, print what was done as JSON, and return the exit code, as `defense` has them."""
    parser = argparse.ArgumentParser(prog="python -m defense.export.ray_data", description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, help="folder of pictures, of Parquet files or of tars")
    parser.add_argument("out", type=Path, help="folder for the answers")
    parser.add_argument("--bundle", type=Path, required=True, help="what `defense export` wrote")
    parser.add_argument("--column", default="bytes", help="column of the pictures in Parquet (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="processes at most (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=1000, help="pictures per output file (default: %(default)s)")
    parser.add_argument("--prefix", default="", help="before the names of the columns with the answers")
    parser.add_argument(
        "--watch", action="store_true", help="add what each answer is without the defense, and how much it took"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=DEFAULT_LIMITS.max_pixels, help="largest picture that is read"
    )
    arguments = parser.parse_args(argv)
    log_warnings()
    try:
        source, out = led_to(arguments.source), led_to(arguments.out)
        predictor = BatchPredictor(
            led_to(arguments.bundle), column=arguments.column, prefix=arguments.prefix,
            watch=arguments.watch, limits=Limits(max_pixels=arguments.max_pixels),
            session_options={"intra_op_num_threads": 1},
        )  # fmt: skip
        done = run(source, out, predictor, workers=arguments.workers, rows=arguments.rows)
    except (DefenseError, OSError) as error:
        sys.stderr.write(f"error: {harmless(str(error))}\n")
        return exit_code(error)
    sys.stdout.write(json.dumps(done) + "\n")
    return 4 if done["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
