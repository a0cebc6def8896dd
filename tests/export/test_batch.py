"""One callable for batch engines, and the shards of the Ray example."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from defense.errors import ConfigError
from defense.export.batch import BatchPredictor
from defense.export.runtime import OnnxClassifier


def encoded(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    return file.getvalue()


def test_rows_keep_their_places_and_their_errors(tiny_bundle, seven_pictures):
    files = [encoded(picture) for picture in seven_pictures]
    files[2] = b"<html>"
    files[5] = b""
    answer = BatchPredictor(tiny_bundle, batch_size=3)({"bytes": files, "id": np.arange(7)})
    assert list(answer) == ["id", "label", "score", "embedding", "error"]
    assert list(answer["error"]) == ["", "", "not_an_image", "", "", "empty", ""]
    clf = OnnxClassifier(tiny_bundle)
    good = [0, 1, 3, 4, 6]
    want = clf.predict_proba([files[row] for row in good])
    assert list(answer["label"][good]) == list(clf.classes_[want.argmax(1)])
    np.testing.assert_allclose(answer["score"][good], want.max(1), atol=1e-5)
    np.testing.assert_allclose(answer["embedding"][good], clf.transform([files[row] for row in good]), atol=1e-6)
    for row in (2, 5):
        assert answer["label"][row] == ""
        assert np.isnan(answer["score"][row])
        assert np.isnan(answer["embedding"][row]).all()


def test_a_batch_of_nothing_has_the_same_columns(tiny_bundle):
    answer = BatchPredictor(tiny_bundle)({"bytes": []})
    assert answer["embedding"].shape == (0, 32)
    assert len(answer["label"]) == len(answer["score"]) == len(answer["error"]) == 0


def test_fault_74_what_is_sent_to_workers_is_small_and_works_there(tiny_bundle, seven_pictures):
    predictor = BatchPredictor(tiny_bundle, ["stone", "tree"], column="image")
    want = predictor({"image": seven_pictures})
    sent = pickle.dumps(predictor)
    assert len(sent) < 2000
    other = pickle.loads(sent)
    assert other._clf is None
    np.testing.assert_array_equal(other({"image": seven_pictures})["embedding"], want["embedding"])
    assert set(want["label"]) <= {"stone", "tree"}


def test_a_column_that_is_not_there_is_named(tiny_bundle):
    with pytest.raises(ConfigError, match=r"\['data'\]; the pictures should be in 'bytes'"):
        BatchPredictor(tiny_bundle)({"data": []})


# --- shards -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, seven_pictures):
    """Seven pictures, one of them in a subfolder, one of them damaged, and a file that is none."""
    source = tmp_path / "in"
    (source / "more").mkdir(parents=True)
    for index, picture in enumerate(seven_pictures):
        name = f"more/{index}.png" if index == 3 else f"{index}.png"
        (source / name).write_bytes(b"<html>" if index == 5 else encoded(picture))
    (source / "notes.txt").write_text("none")
    return source


@pytest.fixture
def ray_data():
    pytest.importorskip("pyarrow")
    from defense.export import ray_data

    return ray_data


def rows_of(out) -> dict[str, dict]:
    import pyarrow.parquet as pq

    return {row["file"]: row for path in sorted(out.glob("*.parquet")) for row in pq.read_table(path).to_pylist()}


def test_a_folder_is_cut_into_shards_that_stay_the_same(ray_data, folder):
    shards = ray_data.list_shards(folder, 3)
    assert [len(shard["files"]) for shard in shards] == [3, 3, 1]
    assert shards == ray_data.list_shards(folder, 3)
    assert len({shard["name"] for shard in shards}) == 3
    assert sorted(file for shard in shards for file in shard["files"])[-1] == "more/3.png"


def test_fault_75_finished_shards_are_not_worked_on_again(ray_data, folder, tmp_path, tiny_bundle):
    out = tmp_path / "out"
    out.mkdir()
    worker = ray_data.ShardWorker(folder, out, BatchPredictor(tiny_bundle), batch=2)
    shards = ray_data.list_shards(folder, 3)
    assert worker(shards[0]) == {"name": shards[0]["name"], "rows": 3, "errors": 0}
    assert ray_data.pending(shards, out) == shards[1:]
    assert sum(worker(shard)["errors"] for shard in shards[1:]) == 1
    assert ray_data.pending(shards, out) == []
    rows = rows_of(out)
    assert len(rows) == 7
    assert rows["5.png"]["error"] == "not_an_image"
    label = OnnxClassifier(tiny_bundle).predict([folder / "more" / "3.png"])[0]
    assert rows["more/3.png"]["label"] == label


def test_fault_75_a_shard_that_fails_leaves_nothing(ray_data, folder, tmp_path, tiny_bundle, monkeypatch):
    out = tmp_path / "out"
    out.mkdir()
    predictor = BatchPredictor(tiny_bundle)
    monkeypatch.setattr(BatchPredictor, "__call__", lambda *_arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        ray_data.ShardWorker(folder, out, predictor)(ray_data.list_shards(folder, 3)[0])
    assert list(out.iterdir()) == []


def test_parquet_is_read_by_row_group(ray_data, tmp_path, tiny_bundle, seven_pictures):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    out.mkdir()
    table = pa.table({"file": [str(i) for i in range(7)], "bytes": [encoded(picture) for picture in seven_pictures]})
    pq.write_table(table, source / "pictures.parquet", row_group_size=4)
    shards = ray_data.list_shards(source, 1000)
    assert [shard["row_group"] for shard in shards] == [0, 1]
    worker = ray_data.ShardWorker(source, out, BatchPredictor(tiny_bundle))
    assert [worker(shard)["rows"] for shard in shards] == [4, 3]
    rows = rows_of(out)
    assert [rows[str(i)]["label"] for i in range(7)] == list(OnnxClassifier(tiny_bundle).predict(seven_pictures))


# --- what decides a result, and what passes through -------------------------------------------------------------------


def worked(ray_data, source, out, predictor, rows=1000) -> int:
    """Do what a run does, in this process; return how many shards there were to do."""
    out.mkdir(exist_ok=True)
    shards = ray_data.list_shards(source, rows, predictor)
    ray_data.set_aside(shards, out)
    todo = ray_data.pending(shards, out)
    for shard in todo:
        ray_data.ShardWorker(source, out, predictor, batch=3)({"json": json.dumps(shard)})
    return len(todo)


def test_fault_109_one_more_picture_gives_one_more_row(ray_data, folder, tmp_path, tiny_bundle, seven_pictures):
    out, predictor = tmp_path / "out", BatchPredictor(tiny_bundle)
    assert worked(ray_data, folder, out, predictor, rows=4) == 2
    assert worked(ray_data, folder, out, predictor, rows=4) == 0
    (folder / "00.png").write_bytes(encoded(seven_pictures[0]))
    assert worked(ray_data, folder, out, predictor, rows=4) == 2
    assert sum(len(pq_rows(path)) for path in out.glob("*.parquet")) == 8
    assert len(list((out / ".superseded").iterdir())) == 2, "nothing is deleted"


def pq_rows(path) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def test_fault_109_a_replaced_picture_or_other_labels_are_worked_on_anew(ray_data, folder, tmp_path, tiny_bundle):
    out = tmp_path / "out"
    assert worked(ray_data, folder, out, BatchPredictor(tiny_bundle)) == 1
    (folder / "0.png").write_bytes(b"")
    assert worked(ray_data, folder, out, BatchPredictor(tiny_bundle)) == 1
    assert rows_of(out)["0.png"]["error"] == "empty"
    assert worked(ray_data, folder, out, BatchPredictor(tiny_bundle, ["stone", "tree"])) == 1
    assert {row["label"] for row in rows_of(out).values()} <= {"stone", "tree", ""}
    assert worked(ray_data, folder, out, BatchPredictor(tiny_bundle, ["stone", "tree"], prefix="clip_")) == 1
    assert "clip_label" in rows_of(out)["1.png"]
    assert len(list(out.glob("*.parquet"))) == 1


def test_fault_109_another_bundle_makes_other_names(ray_data, folder, tiny_bundle, copied):
    from ..conftest import restated

    restated(copied, logit_scale=7.0)
    names = [ray_data.list_shards(folder, 9, BatchPredictor(source))[0]["name"] for source in (tiny_bundle, copied)]
    assert names[0] != names[1]


def test_fault_110_columns_pass_through_with_their_types(ray_data, tmp_path, tiny_bundle, seven_pictures):
    import pyarrow as pa
    import pyarrow.parquet as pq

    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    columns = {
        "late": pa.array([None] * 5 + ["text", None]),
        "number": pa.array([1, None, 3, None, None, None, 7], pa.int64()),
        "tags": pa.array([[]] * 6 + [["a"]], pa.list_(pa.string())),
        "id": pa.array([2**64 - 1 - i for i in range(7)], pa.uint64()),
        "when": pa.array([0] * 7, pa.timestamp("us", "UTC")),
        "raw": pa.array([b"\xff\xfe"] * 7, pa.binary()),
        "kind": pa.array(["x", "y"] * 3 + ["x"]).dictionary_encode(),
        "nothing": pa.nulls(7),
    }
    cells = [{"bytes": encoded(picture), "path": None} for picture in seven_pictures[:6]] + [None]
    table = pa.table({**columns, "image": cells})
    pq.write_table(table, source / "x.parquet")
    assert worked(ray_data, source, out, BatchPredictor(tiny_bundle, column="image")) == 1
    result = pq.read_table(next(out.glob("*.parquet")))
    assert result.column_names == [*columns, "label", "score", "embedding", "error"]
    for name in columns:
        assert result.schema.field(name).type == table.schema.field(name).type
        assert result[name].to_pylist() == table[name].to_pylist()
    assert result["error"].to_pylist() == [""] * 6 + ["empty"]


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_fault_110_names_that_are_no_utf8_become_escapes(ray_data, tmp_path, tiny_bundle, seven_pictures):
    import os

    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    with open(os.fsencode(source) + b"/a\xff.png", "wb") as file:
        file.write(encoded(seven_pictures[0]))
    assert worked(ray_data, source, out, BatchPredictor(tiny_bundle)) == 1
    assert rows_of(out)["a\\xff.png"]["error"] == ""


@pytest.mark.skipif(sys.platform != "linux", reason="names that are no UTF-8 are Linux's")
def test_fault_122_a_job_goes_on_at_names_that_are_no_utf8(ray_data, tmp_path, tiny_bundle, seven_pictures):
    import os
    import tarfile

    import pyarrow as pa
    import pyarrow.parquet as pq

    root = Path(os.fsdecode(os.fsencode(tmp_path) + b"/f\xff"))
    source, tables, out = root / "in", root / "tables", root / "out"
    for folder in (source, tables):
        folder.mkdir(parents=True)
    with tarfile.open(source / os.fsdecode(b"x\xfe.tar"), "w") as tar:
        member = tarfile.TarInfo(os.fsdecode(b"a\xfd.png"))
        member.size = len(data := encoded(seven_pictures[0]))
        tar.addfile(member, io.BytesIO(data))
    pq.write_table(pa.table({"bytes": [data]}), tmp_path / "x.parquet")
    (tmp_path / "x.parquet").rename(tables / os.fsdecode(b"x\xfc.parquet"))
    for folder in (source, tables):
        assert worked(ray_data, folder, out, BatchPredictor(tiny_bundle)) == 1
        (file,) = out.glob("part-*.parquet")
        with file.open("rb") as stream:
            (row,) = pq.read_table(stream).to_pylist()
        assert row["error"] == ""
        assert row.get("file") in ("x\\xfe.tar:a\\xfd.png", None)


def test_fault_124_a_column_of_pictures_that_stands_twice_is_refused(ray_data, tmp_path, tiny_bundle):
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.Table.from_arrays([pa.array([b""]), pa.array([b"x"])], names=["bytes", "bytes"])
    pq.write_table(table, tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="2 columns 'bytes'"):
        ray_data.list_shards(tmp_path, 9, BatchPredictor(tiny_bundle))


def test_tars_are_shards(ray_data, tmp_path, tiny_bundle, seven_pictures):
    import tarfile

    source, out = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    with tarfile.open(source / "x.tar", "w") as tar:
        for index, picture in enumerate(seven_pictures):
            member = tarfile.TarInfo(f"{index}.png")
            member.size = len(data := encoded(picture))
            tar.addfile(member, io.BytesIO(data))
    assert worked(ray_data, source, out, BatchPredictor(tiny_bundle)) == 1
    rows = rows_of(out)
    labels = OnnxClassifier(tiny_bundle).predict(seven_pictures)
    assert [rows[f"x.tar:{index}.png"]["label"] for index in range(7)] == list(labels)


def test_a_source_without_pictures_or_with_two_kinds_is_refused(ray_data, folder, tmp_path):
    (tmp_path / "none").mkdir()
    with pytest.raises(ConfigError, match="holds no pictures"):
        ray_data.list_shards(tmp_path / "none", 3)
    (folder / "more.tar").touch()
    with pytest.raises(ConfigError, match="pictures and tar"):
        ray_data.list_shards(folder, 3)


# --- columns that an answer would replace -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["label", "score", "embedding", "error"])
def test_fault_108_a_column_of_the_batch_is_never_lost(ray_data, tiny_bundle, seven_pictures, tmp_path, name):
    import pyarrow as pa
    import pyarrow.parquet as pq

    batch = {"bytes": [encoded(picture) for picture in seven_pictures], name: list("abcdefg")}
    with pytest.raises(ConfigError, match=rf"replace the columns {name} of the batch; pass a prefix"):
        BatchPredictor(tiny_bundle)(batch)
    answer = BatchPredictor(tiny_bundle, prefix="clip_")(batch)
    assert list(answer) == [name, "clip_label", "clip_score", "clip_embedding", "clip_error"]
    assert answer[name] == batch[name]
    pq.write_table(pa.table(batch), tmp_path / "x.parquet")
    with pytest.raises(ConfigError, match="pass a prefix"):  # before anything is worked on
        ray_data.list_shards(tmp_path, 3, BatchPredictor(tiny_bundle))


def test_fault_108_a_prefix_that_does_not_help_is_refused_too(tiny_bundle):
    with pytest.raises(ConfigError, match="clip_label"):
        BatchPredictor(tiny_bundle, prefix="clip_")({"bytes": [], "clip_label": []})


def test_fault_107_cells_as_datasets_hands_them_out(tiny_bundle, seven_pictures, tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(seven_pictures[0]))
    cells = [
        {"bytes": encoded(seven_pictures[0]), "path": None},
        {"bytes": None, "path": str(tmp_path / "a.png")},
        Image.fromarray(seven_pictures[0]),
        seven_pictures[0],
        None,
        {"bytes": None, "path": None},
    ]
    answer = BatchPredictor(tiny_bundle, column="image")({"image": cells})
    assert list(answer["error"]) == ["", "", "", "", "empty", "empty"]
    for row in range(1, 4):
        np.testing.assert_array_equal(answer["embedding"][row], answer["embedding"][0])


def test_notes_on_pictures_are_logged_once(tiny_bundle, caplog):
    predictor = BatchPredictor(tiny_bundle)
    small = encoded(np.full((8, 8, 3), 7, np.uint8))
    for _ in range(2):
        predictor({"bytes": [b"", small, small]})
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["row 1 of a batch"]


# --- with Ray ---------------------------------------------------------------------------------------------------------

MORTAL = """
import json, os, signal, sys
from pathlib import Path
from defense.export import ray_data

out, marker = Path(sys.argv[2]), Path(sys.argv[4])

class Mortal(ray_data.ShardWorker):
    def __call__(self, shard):
        if list(out.glob("*.parquet")) and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(shard)

ray_data.ShardWorker = Mortal
sys.exit(ray_data.main([*sys.argv[1:3], "--bundle", sys.argv[3], "--rows", "2"]))
"""


@pytest.mark.slow
def test_ray_survives_a_killed_worker_and_goes_on_where_it_was(folder, tmp_path, tiny_bundle):
    pytest.importorskip("ray")
    out, marker = tmp_path / "out", tmp_path / "killed"
    command = [sys.executable, "-P", "-c", MORTAL, *map(str, (folder, out, tiny_bundle, marker))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    assert marker.exists()
    assert json.loads(done.stdout.splitlines()[-1]) == {"shards": 4, "worked_on": 4, "rows": 7, "errors": 1}
    assert len(rows_of(out)) == 7
    next(out.glob("*.parquet")).unlink()
    again = subprocess.run(command, capture_output=True, text=True, check=False)
    assert json.loads(again.stdout.splitlines()[-1])["worked_on"] == 1
    assert len(rows_of(out)) == 7
