"""What a latent's write comes to, through attention alone and on how many pictures: against what is known."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from torch.nn import functional

from defense.errors import ConfigError
from defense.explain import catalogue
from defense.explain.naming import attention_share, effect_lines, mean_jacobians
from defense.explain.spread import Spread
from defense.hosts.attention_alone import attention_alone, check_attention_alone
from defense.hosts.clip import Clip

from ..command import run
from ..conftest import clip_of
from .described import POINT, described


@pytest.fixture
def clip(tiny_clip) -> Clip:
    return clip_of(tiny_clip)


def residuals(clip: Clip) -> torch.Tensor:
    return torch.randn(2, clip.tower.n_pos, clip.tower.d_model, generator=torch.Generator().manual_seed(3))


def alone_and_whole(clip: Clip) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    with attention_alone(clip.tower, POINT):
        alone = mean_jacobians(clip.tower, POINT, residuals(clip))
    return alone, mean_jacobians(clip.tower, POINT, residuals(clip))


def zero(clip: Clip, *names: str) -> None:
    """Let the named layers of the block behind `POINT`, the last one, write nothing."""
    for name in names:
        layer = clip.tower.blocks[2].get_submodule(name)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)


# --- attention alone --------------------------------------------------------------------------------------------------


def test_values_stay_and_afterwards_all_is_as_before(clip) -> None:
    resid, attention = residuals(clip).requires_grad_(), functional.scaled_dot_product_attention
    want = clip.tower.embeds_from(resid, POINT)
    hooks = [len(part._forward_hooks) for part in clip.model.modules()]
    with attention_alone(clip.tower, POINT):
        assert torch.equal(clip.tower.embeds_from(resid, POINT), want)
    assert functional.scaled_dot_product_attention is attention
    assert [len(part._forward_hooks) for part in clip.model.modules()] == hooks


def test_it_differs_where_mlps_and_patterns_carry_something(clip) -> None:
    alone, whole = alone_and_whole(clip)
    for one, all_ in zip(alone, whole, strict=True):
        assert (one - all_).norm() > 0.05 * all_.norm()


def test_without_mlps_and_with_even_patterns_it_is_the_whole(clip) -> None:
    """Attention with queries and keys of 0 is even, whatever the residual is."""
    zero(clip, "mlp.c_proj")
    attn, d_model = clip.tower.blocks[2].attn, clip.tower.d_model
    with torch.no_grad():
        attn.in_proj_weight[: 2 * d_model] = 0
        attn.in_proj_bias[: 2 * d_model] = 0
    alone, whole = alone_and_whole(clip)
    for one, all_ in zip(alone, whole, strict=True):
        torch.testing.assert_close(one, all_, atol=1e-6, rtol=1e-4)


def test_where_attention_writes_nothing_a_patch_has_no_effect(clip) -> None:
    zero(clip, "attn.out_proj")
    (to_cls, to_patch), _ = alone_and_whole(clip)
    assert not to_patch.any()
    assert to_cls.any()  # past the block


def test_a_pattern_that_cannot_be_held_is_refused_before_the_work(clip, pictures) -> None:
    block = clip.tower.blocks[2]
    block.attention = lambda q_x, **_: q_x  # an attention of its own
    with pytest.raises(ConfigError, match="scaled_dot_product_attention"):
        check_attention_alone(clip.tower, POINT)
    seen = []
    with pytest.raises(ConfigError, match="scaled_dot_product_attention"):
        described(clip, (seen.append(each) or each for each in pictures), lens="attention")
    assert not seen
    block.mlp = None
    with pytest.raises(ConfigError, match="no MLP that is known"):
        check_attention_alone(clip.tower, POINT)


def test_the_share_is_the_part_along_the_whole() -> None:
    whole = torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 0, 2], [0, 0, 0]])
    alone = torch.tensor([[2.0, 5, 0], [0, 1, 0], [0, 0, -1], [0, 0, 0]])
    np.testing.assert_array_equal(attention_share(alone, whole), [1, 0.5, -0.5, np.nan])


def test_names_follow_the_lens_that_was_asked_for(clip, pictures) -> None:
    whole, alone = described(clip, pictures), described(clip, pictures, lens="attention")
    assert (whole.provenance["lens"], alone.provenance["lens"]) == ("whole", "attention")
    assert "attention_share" not in whole.columns
    fires = whole.columns["frequency"] > 0
    cosine = (whole.directions.astype(float) * alone.directions.astype(float)).sum(1)[fires]
    assert cosine.min() < 0.95
    share = alone.columns["attention_share"]
    assert np.isnan(share[~fires]).all()
    assert not np.isnan(share[fires]).any()
    assert len(effect_lines(whole.columns)) == 1
    assert len(effect_lines(alone.columns)) == 2
    assert effect_lines({}) == []


# --- on how many pictures ---------------------------------------------------------------------------------------------


def planted(n: int, shares: list[int], n_cls: int = 1, n_pos: int = 5) -> torch.Tensor:
    """Activations [n, n_pos, latents] that are the same on the first so many pictures, and 0 on the others."""
    acts = torch.zeros(n, n_pos, len(shares))
    for latent, k in enumerate(shares):
        acts[:k, :, latent] = torch.rand(n_pos, generator=torch.Generator().manual_seed(latent)) + 0.1
    return acts


def test_the_share_of_pictures_that_was_planted_is_found() -> None:
    acts, generator = planted(40, [1, 2, 20, 40, 0]), torch.Generator().manual_seed(0)
    u, v = (torch.randn(5, 8, generator=generator) for _ in range(2))
    spread = Spread(5, torch.device("cpu"))
    for part in acts.split(7):
        spread.add(part, n_cls=1)
    np.testing.assert_allclose(spread.shares(u, v), [1 / 40, 2 / 40, 0.5, 1, np.nan], rtol=1e-9)


@pytest.mark.parametrize("n_cls", [0, 1, 5])
def test_it_is_the_participation_ratio_of_the_effects_energy(n_cls) -> None:
    generator = torch.Generator().manual_seed(1)
    acts = torch.rand(30, 5, 6, generator=generator).double() ** 4
    u, v = (torch.randn(6, 8, generator=generator).double() for _ in range(2))
    spread = Spread(6, torch.device("cpu"))
    spread.add(acts, n_cls=n_cls)
    moved = acts[:, :n_cls].sum(1)[..., None] * u + acts[:, n_cls:].sum(1)[..., None] * v  # [n, latents, d_embed]
    energy = moved.square().sum(-1)
    want = energy.sum(0) ** 2 / (30 * energy.square().sum(0))
    np.testing.assert_allclose(spread.shares(u, v), want, rtol=1e-9)


def test_a_latent_that_matters_to_nothing_has_no_share() -> None:
    spread = Spread(1, torch.device("cpu"))
    spread.add(planted(4, [2]), n_cls=1)
    assert np.isnan(spread.shares(torch.zeros(1, 8), torch.zeros(1, 8))).all()


def test_a_catalogue_has_the_share_of_each_latent_that_fires(clip, pictures) -> None:
    found = described(clip, pictures)
    fires, spread = found.columns["frequency"] > 0, found.columns["spread"]
    assert np.isnan(spread[~fires]).all()
    assert (spread[fires] >= 1 / len(pictures) - 1e-6).all()
    assert (spread[fires] <= 1 + 1e-6).all()


def test_the_command_says_both(describing, tmp_path) -> None:
    code, out, err = run(*describing, "--lens", "attention")
    assert code == 0, err
    assert "share of pictures on which a latent matters, median" in out
    assert "part of a latent's effect that goes through attention alone, median" in out
    found = catalogue.load(tmp_path / "out")[POINT]
    assert {"spread", "attention_share"} <= found.columns.keys()
    code, _, err = run(*describing, "--lens", "mlp")
    assert code == 2
    assert "mlp" in err
