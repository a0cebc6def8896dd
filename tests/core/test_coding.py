"""How well an SAE codes each kind of token: against the whole at once, and on tokens whose answer is planted."""

from __future__ import annotations

from dataclasses import asdict

import numpy as np
import pytest

pytest.importorskip("torch")
import torch

from defense.core.coding import CodingByKind, CodingSums
from defense.core.config import SAEConfig
from defense.core.sae import SparseAutoencoder

from ..conftest import D_MODEL, D_SAE, random_sae

KINDS = {"CLS": slice(0, 1), "register": slice(1, 3), "patch": slice(3, None)}
CPU = torch.device("cpu")


def tokens(n: int = 6) -> torch.Tensor:
    return 3 + torch.randn(n, 9, D_MODEL, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 10)[:, None]


def test_each_kind_and_all_together_are_those_of_the_whole_at_once():
    sae, resid = random_sae(act="topk", k=8), tokens()
    made = CodingByKind(sae, KINDS, CPU)
    for part in resid.split([1, 3, 2]):
        made.add(part, sae.encode(part))
    found = made.results() | {"all": made.result()}
    for kind, positions in (KINDS | {"all": slice(None)}).items():
        rows = resid[:, positions].flatten(0, 1).double()
        acts = sae.encode(rows.float())
        error = (rows - sae.decode(acts, rows.float())).square().sum()
        want = 1 - float(error / (rows - rows.mean(0)).square().sum())
        assert found[kind].n_tokens == len(rows)
        assert found[kind].explained_variance == pytest.approx(want, abs=1e-5)
        assert found[kind].l0 == pytest.approx(float((acts != 0).sum(1).double().mean()))
        assert found[kind].alive == pytest.approx(float((acts != 0).any(0).double().mean()))


def test_a_mean_far_from_zero_cancels_nothing():
    sae, resid = random_sae(), 1e4 + torch.randn(400, D_MODEL, generator=torch.Generator().manual_seed(0))
    sums = CodingSums(D_MODEL, D_SAE, CPU)
    for part in resid.split(37):
        sums.add(sae, part, sae.encode(part))
    assert sums.square == pytest.approx(float((resid.double() - resid.double().mean(0)).square().sum()), rel=1e-3)


def test_an_sae_of_what_cls_tokens_hold_codes_these_and_no_patches():
    """Its two latents are one axis and its opposite; CLS tokens lie on the axis, patches across it."""
    axis = np.zeros((1, D_MODEL), np.float32)
    axis[0, 0] = 1
    both = np.concatenate([axis, -axis])
    parameters = {"W_enc": both.T, "b_enc": np.zeros(2), "W_dec": both, "b_dec": np.zeros(D_MODEL)}
    sae = SparseAutoencoder(SAEConfig(D_MODEL, 2, "relu"), parameters)
    resid = torch.randn(20, 5, D_MODEL, generator=torch.Generator().manual_seed(0))
    resid[:, 0, 1:] = 0
    resid[:, 1:, 0] = 0
    made = CodingByKind(sae, {"CLS": slice(0, 1), "patch": slice(1, None)}, CPU)
    made.encode_and_add(resid)
    cls, patch = made.results().values()
    assert (cls.explained_variance, cls.l0, cls.alive) == (pytest.approx(1), 1, 1)
    assert (patch.explained_variance, patch.l0, patch.alive) == (pytest.approx(0, abs=0.02), 0, 0)


def test_a_token_that_is_always_the_same_has_no_variance_to_explain():
    made = CodingByKind(random_sae(), {"CLS": slice(0, 1)}, CPU)
    assert made.result().explained_variance is None
    made.encode_and_add(torch.ones(1, 1, D_MODEL))
    assert asdict(made.result()) == {**asdict(made.results()["CLS"]), "n_tokens": 1, "explained_variance": None}
