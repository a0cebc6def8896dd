"""One callable for batch engines, and the shards of the Ray example."""

from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys

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
