"""Where and how the tests of a fit of the tiny CLIP fit."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")

from defense.fit.config import FitConfig
from defense.fit.sites import SitePlan

from ..conftest import random_sae

POINT = "blocks.{}.hook_resid_post"
EASY = FitConfig(n_candidates=40, steps=8, batch=8, clean_budget=1.0, sparsity=0.0)


def plan(block: int = 1, config: FitConfig = EASY, **sae) -> SitePlan:
    return SitePlan(POINT.format(block), random_sae(block, **{"act": "topk", "k": 8, **sae}), config)
