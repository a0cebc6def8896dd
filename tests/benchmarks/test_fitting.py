"""What a fit costs: every stage is timed, and the joint step takes all of its steps."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
import torch

from defense.benchmarks import fitting
from defense.benchmarks.fitting import FitCase, measure
from defense.errors import ConfigError
from defense.fit import joint

from ..conftest import clip_of


def test_a_fit_is_timed_by_stages(tiny_clip, monkeypatch):
    monkeypatch.setattr(fitting, "random_clip", lambda _model: clip_of(tiny_clip))
    threads, patience = torch.get_num_threads(), joint.PATIENCE
    case = FitCase(model="tiny", block=1, d_sae=160, k=8, n=20, steps=60, folds=2, threads=1)
    result = measure(case, "test")
    torch.set_num_threads(threads)
    assert patience == joint.PATIENCE
    assert result["steps"]["joint step"] == 3 * 60, "two folds and all pictures, none stopped early"
    assert result["steps"]["residuals"] == 3 * 20
    assert set(result["stages"]) == set(result["cpu_stages"])
    assert {"residuals", "joint step", "clean budget", "measuring", "thresholds"} <= set(result["stages"])
    assert sum(result["stages"].values()) <= result["seconds"] + 0.1 * len(result["stages"])
    assert result["peak_mib"] is None or result["peak_mib"] > 100
    assert result["stored"] in ("slim", "whole")


def test_an_architecture_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="knows no model 'ViT-Q-1'"):
        fitting.random_clip("ViT-Q-1")
