"""The benchmark of training: its floor, its table, and how it reads the other package's SAEs."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks import train as benchmark
from defense.train.runs import train_in_memory
from defense.train.trainer import TrainConfig


def result() -> dict:
    rows = [
        {"implementation": implementation, "variant": "topk", "seed": seed, "explained_variance": ev, "l0": 24.0,
         "alive": 0.5, "tokens_per_s": rate}
        for implementation, seed, ev, rate in (
            (benchmark.OURS, 0, 0.90, 6_000.0), (benchmark.OURS, 1, 0.92, 4_000.0), (benchmark.THEIRS, 0, 0.8, 2_000.0),
        )
    ]  # fmt: skip
    return {"rows": rows, "floor_tokens_per_s": 10_000.0}


def test_the_table_gives_means_over_seeds_and_shares_of_the_floor():
    lines = benchmark.table(result()).splitlines()
    assert lines[2:] == [
        "| topk | defense train | 91.00 (90.00-92.00) | 24.0 | 50.0 | 5,000 | 50 % |",
        "| topk | dictionary-learning | 80.00 | 24.0 | 50.0 | 2,000 | 20 % |",
    ]


def duel(config: TrainConfig, *names: str):
    resid = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    floor = benchmark.Floor(16, config.d_sae, config.batch)
    return resid, *benchmark.duel(resid, config, names, floor)


def test_our_trainer_is_timed_on_the_steps_that_train_takes():
    config = TrainConfig(d_sae=32, k=3, steps=12, batch=50, variant="batchtopk")
    resid, saes, seconds = duel(config, benchmark.OURS)
    want = train_in_memory(resid, config)
    assert all(torch.equal(getattr(saes[benchmark.OURS], n), getattr(want, n)) for n in want.config.parameter_shapes)
    assert len(seconds[benchmark.OURS]) == 12
    assert len(seconds["floor"]) == 3
    assert all(min(each) > 0 for each in seconds.values())


@pytest.mark.parametrize("variant", benchmark.VARIANTS)
def test_the_other_trainer_gives_an_sae_of_ours(variant):
    pytest.importorskip("dictionary_learning")
    config = TrainConfig(d_sae=32, k=3, steps=150, batch=50, variant=variant)
    _, saes, seconds = duel(config, benchmark.THEIRS)
    assert saes[benchmark.THEIRS].config.act == ("topk" if variant == "topk" else "batchtopk")
    assert len(seconds[benchmark.THEIRS]) == 150


def test_without_the_other_package_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "installed_version", lambda _package: None)
    assert benchmark.main([]) == 3
    assert "pip install dictionary-learning" in capsys.readouterr().err
