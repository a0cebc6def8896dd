"""Patches of high norm: counted where they were planted, and nowhere else."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
import torch

from defense.core.norms import FACTOR, HighNormSums


def patches(n: int = 10) -> torch.Tensor:
    drawn = torch.randn(n, 20, 64, generator=torch.Generator().manual_seed(0))
    return drawn / drawn.norm(dim=-1, keepdim=True)


def found(*parts: torch.Tensor):
    sums = HighNormSums()
    for part in parts:
        sums.add(part)
    return sums.result()


def test_patches_that_were_made_long_are_found_and_counted_by_picture():
    resid = patches()
    resid[2, 5] *= 9
    resid[2, 6] *= FACTOR + 0.1
    resid[7, 0] *= FACTOR - 0.1
    result = found(resid)
    assert result == found(resid[:4], resid[4:], resid[:0]), "whatever the cut"
    assert result.n_patches == 200
    assert result.share == 2 / 200
    assert result.share_of_pictures == 1 / 10
    assert result.largest == pytest.approx(9)
    assert "1 % of patches, on 10 % of the pictures" in result.words()


def test_a_picture_of_long_patches_alone_has_none_that_stand_out():
    resid = patches()
    resid[3] *= 50
    assert found(resid).share == 0


def test_without_patches_there_is_nothing_to_say():
    assert found() is None
    assert found(torch.zeros(2, 0, 8)) is None
    assert found(torch.zeros(2, 5, 8)).share == 0
