"""What a run keeps: embeddings are computed once, and anew where anything that decides them changed."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks.methods import make_methods
from defense.benchmarks.named_clip import NamedClip, weights_sha256
from defense.benchmarks.robust_store import Store
from defense.errors import CheckpointError

from .runs import Counting, dataset_of, run_all, task_of, without_run, write_pictures


def test_two_runs_give_equal_results_but_for_the_block_run(named, tmp_path, defense):
    dataset = dataset_of(write_pictures(tmp_path / "pictures", 12))
    methods = make_methods(["zero-shot", "defense"], defense)
    first = run_all(named, [task_of(dataset)], methods, tmp_path / "a", command="one")
    second = run_all(named, [task_of(dataset)], methods, tmp_path / "b", command="two")
    assert without_run(first) == without_run(second)
    assert first != second


def test_pictures_are_encoded_once_and_a_chunk_at_a_time(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 150)))
    first, second = Counting(), Counting()
    a = run_all(named, [task], [first], tmp_path / "out")
    b = run_all(named, [task], [second], tmp_path / "out")
    assert first.batches == [64, 64, 22]
    assert second.batches == []
    assert a[0]["robust"]["run"]["encode_ms"] == b[0]["robust"]["run"]["encode_ms"]  # what it cost when it was done
    assert without_run(a) == without_run(b)


def test_an_interrupted_run_goes_on_where_it_was(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 150)))
    with pytest.raises(KeyboardInterrupt):
        run_all(named, [task], [Counting(fails_at=2)], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.json"))
    rest = Counting()
    resumed = run_all(named, [task], [rest], tmp_path / "out")
    assert rest.batches == [22]
    assert without_run(resumed) == without_run(run_all(named, [task], [Counting()], tmp_path / "fresh"))


def test_a_changed_picture_is_encoded_anew(named, tmp_path):
    paths = write_pictures(tmp_path / "pictures", 70)
    task = task_of(dataset_of(paths))
    (before,) = run_all(named, [task], [Counting()], tmp_path / "out")
    paths[0].write_bytes(paths[1].read_bytes())
    again = Counting()
    (after,) = run_all(named, [task], [again], tmp_path / "out")
    assert again.batches == [64]
    assert before["robust"]["data_sha256"] != after["robust"]["data_sha256"]


def test_other_methods_settings_and_weights_share_no_embeddings(named, tmp_path, defense):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 8)))
    store = tmp_path / "out" / "embeddings"
    run_all(named, [task], make_methods(["zero-shot", "defense", "defense@0.5"], defense), tmp_path / "out")
    assert len(list(store.iterdir())) == 4  # three times the pictures, once the prompts
    import torch

    with torch.no_grad():
        named.clip.model.visual.proj.mul_(2)
    other = NamedClip(named.clip, "other", "other", weights_sha256(named.clip.model))
    assert other.sha256 != named.sha256
    run_all(other, [task], make_methods(["zero-shot"], None), tmp_path / "out")
    assert len(list(store.iterdir())) == 6


def test_what_is_kept_is_what_was_computed_views_included(tmp_path):
    store = Store(tmp_path)
    square = np.arange(6.0).reshape(2, 3)
    for name, array in {"plain": square, "turned": square.T, "backwards": square[::-1], "one": square[:, 1]}.items():
        for _ in range(2):
            np.testing.assert_array_equal(store.get(name, lambda array=array: {"x": array})["x"], array)


def test_a_damaged_file_of_embeddings_is_an_error(named, tmp_path):
    task = task_of(dataset_of(write_pictures(tmp_path / "pictures", 8)))
    run_all(named, [task], make_methods(["zero-shot"], None), tmp_path / "out")
    for path in (tmp_path / "out" / "embeddings").iterdir():
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        run_all(named, [task], make_methods(["zero-shot"], None), tmp_path / "out")
