"""The benchmark of exported graphs: its gate, its tables, and one run on a tiny model."""

from __future__ import annotations

import json
import re
from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import open_clip
import torch

from defense.benchmarks import export, export_graphs
from defense.benchmarks.cost import Ratio
from defense.benchmarks.export_graphs import GraphRow, check_embeds
from defense.errors import ConfigError


@pytest.fixture
def tiny_model(monkeypatch):
    def create(case):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(case.seed)
            return open_clip.CLIP(
                embed_dim=16,
                vision_cfg={"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16},
                text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
            )

    monkeypatch.setattr(export_graphs, "create_model", create)


@pytest.mark.parametrize(("rough", "shift"), [(False, 1e-3), (True, 1.0)])
def test_a_variant_that_computes_something_else_is_not_timed(rough, shift):
    want = torch.nn.functional.normalize(torch.ones(2, 4), dim=-1)
    got = want.numpy().copy()
    got[:, 0] -= shift
    with pytest.raises(ConfigError, match="arm differs by"):
        check_embeds("arm", got, want, rough=rough)
    assert check_embeds("arm", want.numpy(), want, rough=rough) == 0


def test_tables_show_every_row_and_say_what_they_rest_on():
    one, more = Ratio(1.0, 1.0, 1.0), Ratio(1.021, 1.01, 1.03)
    plain = GraphRow("ONNX, plain CLIP", 10.0, 9.0, 11.0, one, None, 2e-7, (10.0,))
    rows = [asdict(plain), asdict(GraphRow("ONNX int8", 10.2, 9.1, 11.3, more, one, 3e-7, (10.2,)))]
    head, rule, *lines = export.graph_table(rows).splitlines()
    assert lines[1] == ("| ONNX int8 | 10.2 (9.1-11.3) | 1.021 (1.010-1.030) | 1.000 (1.000-1.000) | 3e-07 |")
    assert head.count("|") == rule.count("|") == lines[0].count("|")


@pytest.mark.slow
def test_a_run_measures_every_variant_and_the_runtime(tiny_model, tmp_path, capsys):
    out = tmp_path / "export.json"
    sizes = ["--model=tiny", "--batch=2", "--d-sae=128", "--k=8", "--n-set=8", "--block=1", "--rounds=2", "--seed=3"]
    assert export.main([*sizes, "--threads=1", "--pictures=8", "--no-compile", "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["arm"] for row in result["graphs"]] == [
        "ONNX, plain CLIP",
        "ONNX, exact TopK, scale, 0 % of tokens firing",
        "ONNX, exact TopK, scale, 5 % of tokens firing",
        "ONNX, exact TopK, project, 5 % of tokens firing",
        "ONNX, delta, scale, 100 % of tokens firing",
        "ONNX int8, delta, scale",
        "PyTorch eager, delta, scale",
    ]
    assert all(min(row["rounds_ms"]) > 0 and len(row["rounds_ms"]) == 2 for row in result["graphs"])
    assert result["graphs"][0]["x_plain"] == {"median": 1.0, "p20": 1.0, "p80": 1.0}
    fp32 = result["graphs"][4]["rounds_ms"]
    for row in result["graphs"][5:]:
        assert row["x_fp32"]["median"] == pytest.approx(np.median(np.divide(row["rounds_ms"], fp32)))
    assert not any(row["x_fp32"] for row in result["graphs"][:5])
    printed = capsys.readouterr().out
    runtime = result["runtime"]
    assert runtime["n"] == 8
    assert [each["mode"] for each in runtime["eight_bits"]] == ["exact", "delta"]
    for each in runtime["eight_bits"]:
        assert 0.5 <= each["agreement"] <= 1
        assert min(each["x_fp32"]["median"], each["fp32_per_s"], each["int8_per_s"]) > 0
        assert f"| int8 gives the label of fp32, {each['mode']} | {100 * each['agreement']:.2f} % |" in printed
    assert all(value > 0 for name, value in runtime.items() if name.endswith(("_per_s", "_s")))
    assert re.search(r"\| import to first answer \| [\d.]+ s \|", printed)
    assert np.isfinite(result["environment"]["load"])
