"""The benchmark of training: its floor, its table, and how it reads the other package's SAEs."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks import train as benchmark
from defense.train import TrainConfig


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


def test_the_floor_grows_with_the_work():
    small, large = (benchmark.floor_s(32, d_sae, 64, repeats=3) for d_sae in (64, 8192))
    assert 0 < small < large


def test_our_trainer_is_timed_on_the_steps_that_train_takes():
    from defense.train import train_in_memory

    resid = torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    config = TrainConfig(d_sae=32, k=3, steps=12, batch=50, variant="batchtopk")
    sae, rate = benchmark.train_ours(resid, config)
    want = train_in_memory(resid, config)
    assert all(torch.equal(getattr(sae, name), getattr(want, name)) for name in want.config.parameter_shapes)
    assert rate > 0


@pytest.mark.parametrize("variant", benchmark.VARIANTS)
def test_the_other_trainer_gives_an_sae_of_ours(variant):
    pytest.importorskip("dictionary_learning")
    resid = torch.randn(600, 16, generator=torch.Generator().manual_seed(0)) * 3 + 1
    sae, rate = benchmark.train_theirs(resid, TrainConfig(d_sae=32, k=3, steps=150, batch=50, variant=variant))
    assert sae.config.act == ("topk" if variant == "topk" else "batchtopk")
    assert rate > 0


def test_without_the_other_package_the_command_says_so(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "_version", lambda _package: None)
    assert benchmark.main([]) == 3
    assert "pip install dictionary-learning" in capsys.readouterr().err
