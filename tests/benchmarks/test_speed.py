import json
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("open_clip")
import open_clip
import torch

from defense.benchmarks import speed, speed_timing
from defense.benchmarks.environment import environment_of
from defense.benchmarks.firing import firing_bias
from defense.benchmarks.speed_rows import Case, load_rows, table
from defense.benchmarks.speed_variants import NaiveProject, NaiveSplice, SparseDecode, make_rivals
from defense.benchmarks.speed_workloads import make_workloads, set_stage
from defense.errors import ConfigError

CASE = Case(model="tiny", batch=2, d_sae=512, k=8, n_set=16, block=1, rounds=2, seed=3)
ARGUMENTS = [
    "--model=tiny",
    "--batch=2",
    "--d-sae=512",
    "--k=8",
    "--n-set=16",
    "--block=1",
    "--rounds=2",
    "--seed=3",
    "--threads=1",
]


def tiny_clip(case):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(case.seed)
        return open_clip.CLIP(
            embed_dim=16,
            vision_cfg={"image_size": 32, "patch_size": 8, "width": 48, "layers": 3, "head_width": 16},
            text_cfg={"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
        )


@pytest.fixture
def tiny_model(monkeypatch):
    monkeypatch.setattr(speed, "create_model", tiny_clip)


@pytest.fixture
def stage():
    with torch.inference_mode():
        yield set_stage(tiny_clip(CASE), CASE)


@pytest.fixture
def field(stage):
    return [make_rivals(stage, workload) for workload in make_workloads(stage)]


def test_gate_passes_and_all_times_are_positive(stage, field):
    assert speed_timing.gate(stage, field) == []
    rows = speed_timing.time_variants(stage, field, environment_of("test"))
    assert [row.arm for row in rows] == [
        "plain CLIP",
        "naive splice",
        "sparse decode",
        "ours, TopK, scale, 0 % of tokens firing",
        "ours, TopK, scale, 5 % of tokens firing",
        "ours, TopK, scale, 20 % of tokens firing",
        "ours, TopK, scale, 63 % of tokens firing",
        "ours, TopK, scale, 100 % of tokens firing",
        "ours, TopK, project, 5 % of tokens firing",
        "ours, relu, scale, 100 % of tokens firing",
    ]
    assert all(len(row.rounds_ms) == 2 and min(row.rounds_ms) > 0 and row.x_plain > 0 for row in rows)
    assert all(row.p20_ms <= row.latency_ms <= row.p80_ms for row in rows)
    assert [row.floor_ms is None for row in rows] == [True] * 3 + [False] * 6 + [True]
    assert rows[3].floor_ms == 0
    assert 0 < rows[4].floor_ms < rows[5].floor_ms < rows[6].floor_ms < rows[7].floor_ms


def test_share_of_firing_tokens_is_as_asked(field):
    n_tokens = 2 * 17
    firing = [rivals.firing for rivals in field]
    assert [(f.share, f.n_tokens, f.n_firing) for f in firing] == [
        (0.0, n_tokens, 0),
        (0.05, n_tokens, 2),
        (0.2, n_tokens, 7),
        (0.63, n_tokens, 21),
        (1.0, n_tokens, n_tokens),
        (0.05, n_tokens, 2),
        (1.0, n_tokens, n_tokens),
    ]
    assert firing[0].n_surviving == 0
    assert all(0 < f.n_surviving <= f.n_firing for f in firing[1:])


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.99, 1.0])
def test_firing_bias_is_exact_for_peaks_of_either_sign(share):
    peaks = np.random.default_rng(0).standard_normal(100) - 5
    assert (peaks + firing_bias(peaks, share) > 0).sum() == 100 * share


@pytest.mark.parametrize("broken", [NaiveSplice, NaiveProject, SparseDecode])
def test_broken_variant_fails_the_gate_and_nothing_is_timed(tiny_model, monkeypatch, tmp_path, capsys, broken):
    monkeypatch.setattr(broken, "forward", lambda _self, resid: resid * 1.01 + 0.1 * resid[:, :1])
    assert speed.main([*ARGUMENTS, "--out", str(tmp_path / "rows.json")]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "parity gate failed" in printed.err
    assert not (tmp_path / "rows.json").exists()


def test_gate_refuses_an_edit_too_small_to_tell_variants_apart(stage, field, monkeypatch):
    monkeypatch.setattr(speed_timing, "_ATOL", 10.0)
    assert all("cannot tell variants apart" in failure for failure in speed_timing.gate(stage, field))
    assert len(speed_timing.gate(stage, field)) == 6


def test_main_prints_the_table_of_the_rows_it_saves(tiny_model, tmp_path, capsys):
    out = tmp_path / "rows.json"
    assert speed.main([*ARGUMENTS, "--out", str(out)]) == 0
    rows = load_rows(out)
    assert table(rows) in capsys.readouterr().out
    assert {row.case for row in rows} == {replace(CASE, threads=1)}
    assert rows[0].environment.command.endswith(f"--out {out}")
    for fields in json.loads(out.read_text()):
        assert {"cpu", "cores", "torch", "open_clip", "commit", "is_dirty", "timestamp"} <= set(fields["environment"])


def test_table_has_one_line_per_row_and_a_dash_where_nothing_was_measured(stage, field):
    rows = speed_timing.time_variants(stage, field, environment_of("test"), memory=False)
    head, rule, *lines = table(rows).splitlines()
    assert head == "| arm | ms (p20-p80) | x plain | floor ms | extra MiB |"
    assert set(rule) == set("|-")
    assert len(lines) == len(rows)
    assert re.fullmatch(r"\| plain CLIP \| [\d.]+ \([\d.]+-[\d.]+\) \| 1\.00 \| - \| - \|", lines[0])


@pytest.mark.parametrize("fields", [{"rounds": 0}, {"k": 600}, {"n_set": 600}, {"dtype": "float16"}])
def test_case_that_cannot_work_is_refused(fields):
    with pytest.raises(ConfigError):
        replace(CASE, **fields)


def test_last_block_and_missing_folder_exit_with_2(tiny_model, tmp_path, capsys):
    assert speed.main([*ARGUMENTS, "--block", "2"]) == 2
    assert speed.main([*ARGUMENTS, "--out", str(tmp_path / "missing" / "rows.json")]) == 2
    assert capsys.readouterr().out == ""
