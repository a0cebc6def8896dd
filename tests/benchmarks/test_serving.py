"""The load test: what it counts, what it refuses, and that it runs from end to end on the runtime itself."""

from __future__ import annotations

import io
import itertools
import json
import threading

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("onnxruntime")

from defense.benchmarks import serving
from defense.errors import ConfigError


def test_answers_and_refusals_of_all_clients_are_counted():
    numbers, lock = itertools.count(), threading.Lock()
    asked = []

    def ask() -> None:
        with lock:
            number = next(numbers)
        asked.append(number)
        if number % 2:
            raise RuntimeError("refused")

    row = serving.measure_load("direct", "pixels", ask, 3, 0.05)
    n_answers = round(row.answers_per_s * 0.05)
    assert n_answers + row.errors == len(asked) - 3  # each client asks once before the clock starts
    assert abs(n_answers - row.errors) <= 3
    assert (row.target, row.input, row.clients) == ("direct", "pixels", 3)
    assert 0 <= row.p50_ms <= row.p95_ms


def test_a_target_that_answers_nothing_is_no_row():
    def ask() -> None:
        raise RuntimeError("down")

    with pytest.raises(ConfigError, match="answered none of"):
        serving.measure_load("triton", "files", ask, 2, 0.01)


def test_a_draft_is_a_part_of_the_size_and_no_smaller_than_is_read():
    (file,) = serving.photographs(1)
    assert Image.open(io.BytesIO(file)).size == (1600, 1200)
    assert serving.drafted(file, 224).size == (400, 300)
    assert serving.drafted(file, 1000).size == (1600, 1200)


@pytest.mark.parametrize(
    ("option", "text"), [("--clients", "0"), ("--clients", "8,x"), ("--seconds", "0"), ("--seconds", "nan")]
)
def test_a_load_that_cannot_be_is_refused(option, text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        serving.main([str(tmp_path), option, text])
    assert f"{text!r}; want " in capsys.readouterr().err


@pytest.mark.parametrize("text", ["triton", "=127.0.0.1:1", "triton=127.0.0.1"])
def test_a_server_without_name_or_port_is_refused(text, tmp_path, capsys):
    with pytest.raises(SystemExit):
        serving.main([str(tmp_path), "--server", text])
    assert "want NAME=HOST:PORT" in capsys.readouterr().err


def test_every_target_kind_and_stage_has_its_row(tiny_bundle, tmp_path, monkeypatch, capsys):
    picture = io.BytesIO()
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(picture, "JPEG")
    monkeypatch.setattr(serving, "photographs", lambda n: [picture.getvalue()] * n)
    out = tmp_path / "serving.json"
    assert serving.main([str(tiny_bundle), "--clients", "1,2", "--seconds", "0.02", "--out", str(out)]) == 0
    result = json.loads(out.read_text(encoding="utf-8"))
    assert [(row["target"], row["input"], row["clients"]) for row in result["load"]] == [
        ("direct", kind, n) for kind in ("pixels", "files") for n in (1, 2)
    ]
    assert {(row["stage"], row["threads"]) for row in result["stages"]} == {
        (stage, n) for stage in ("decode", "decode, draft", "preprocess", "graph", "files to labels") for n in (1, 2)
    }
    assert all(row["errors"] == 0 for row in result["load"])
    assert result["environment"]["command"].startswith("python -m defense.benchmarks.serving")
    assert "| direct | files | 2 |" in capsys.readouterr().out
