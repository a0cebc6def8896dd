"""The deep host: any precision, any number of prefix tokens, in and out of the residual, defended and undone."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import open_clip
import timm
import torch

from defense.core.latents import LatentSet
from defense.errors import ConfigError, HookPointError
from defense.fit.config import FitConfig
from defense.fit.material import Pairs
from defense.fit.selecting import TextFit
from defense.hosts.attach import is_wrapped
from defense.hosts.clip import Clip
from defense.hosts.families import tower_of
from defense.hosts.golden import golden_difference, make_golden

from ..conftest import D_MODEL, clip_of, random_defense, random_sae

POINT = "blocks.1.hook_resid_post"
PRECISIONS = {
    # open_clip's precision -> dtype of the patch embedding, tolerance of embeddings
    "fp32": (torch.float32, 1e-5),
    "fp16": (torch.float16, 2e-2),
    "bf16": (torch.bfloat16, 1e-1),
    "pure_fp16": (torch.float16, 2e-2),
    "pure_bf16": (torch.bfloat16, 1e-1),
}


@pytest.fixture(params=PRECISIONS)
def clip(request, tiny_folder) -> Clip:
    """The tiny CLIP in each of open_clip's precisions; "fp16" and "bf16" keep norms in float32."""
    model = open_clip.create_model(f"local-dir:{tiny_folder}", precision=request.param).eval().requires_grad_(False)
    return clip_of(model)


@pytest.fixture
def precise(tiny_clip) -> Clip:
    return clip_of(tiny_clip)


def pixels(n: int = 5, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, 3, 32, 32)).astype(np.float32)


def tolerance(clip: Clip) -> float:
    return next(atol for dtype, atol in PRECISIONS.values() if dtype == clip.tower.dtype)


def a_defense(clip: Clip, **fields):
    latent_set = LatentSet("text", tuple(range(60)), **fields)
    return random_defense(clip.model, (1, random_sae(act="topk", k=20), latent_set))


# --- precisions -------------------------------------------------------------------------------------------------------


def test_embeddings_and_residuals_are_those_of_float32(clip, precise):
    assert clip.tower.dtype in {dtype for dtype, _ in PRECISIONS.values()}

    def everything(of: Clip) -> list[torch.Tensor]:
        resid = of.tower.resid(pixels(), POINT)
        return [resid, of.image_embeds(pixels()), *of.tower.resid_and_embeds(pixels(), POINT)]

    for got, want in zip(everything(clip), everything(precise), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=10 * tolerance(clip), rtol=tolerance(clip))
    lengths = clip.image_embeds(pixels()).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(5))


def test_the_rest_of_the_network_takes_up_where_the_residual_was_taken_out(clip):
    want = clip.image_embeds(pixels())
    resid = clip.tower.resid(pixels(), POINT)
    torch.testing.assert_close(clip.tower.embeds_from(resid, POINT), want, atol=1e-6, rtol=0)
    early = clip.tower.resid(pixels(), "blocks.0.hook_resid_post")
    torch.testing.assert_close(
        clip.tower.resid_from(early, "blocks.0.hook_resid_post", POINT), resid, atol=tolerance(clip), rtol=0
    )
    assert torch.equal(clip.image_embeds(pixels()), want), "the blocks must be back in place"


def test_the_rest_of_the_network_embeds_the_patches_of_one_picture(clip):
    if clip.tower.embed is None:
        pytest.skip("its patches are embedded by no module of its own")
    seen = []
    handle = clip.tower.embed.register_forward_hook(lambda _module, _inputs, output: seen.append(output.stride(0)))
    resid = clip.tower.resid(pixels(), POINT)
    clip.tower.embeds_from(resid, POINT)
    clip.tower.resid(pixels(), POINT)
    handle.remove()
    assert [stride == 0 for stride in seen] == [False, True, False], "one picture's, for all; and whole again"


def test_gradients_reach_the_residual(clip):
    resid = clip.tower.resid(pixels(), POINT).requires_grad_()
    (gradient,) = torch.autograd.grad(clip.tower.embeds_from(resid, POINT).sum(), resid)
    assert gradient.dtype == torch.float32
    assert gradient.isfinite().all()
    assert (gradient != 0).any()


def test_a_defense_is_at_work_inside_the_context_and_gone_after_it(clip):
    stock, keys = clip.image_embeds(pixels()), set(clip.model.state_dict())
    with clip.defended(a_defense(clip), allow_mismatch=True):
        defended = clip.image_embeds(pixels())
        assert not torch.equal(defended, stock)
        with clip.undefended():
            assert torch.equal(clip.image_embeds(pixels()), stock)
        resid = clip.tower.resid(pixels(), "blocks.0.hook_resid_post")
        onward = clip.tower.embeds_from(resid, "blocks.0.hook_resid_post")
        torch.testing.assert_close(onward, defended, atol=tolerance(clip) / 10, rtol=0)
    assert torch.equal(clip.image_embeds(pixels()), stock)
    assert set(clip.model.state_dict()) == keys
    assert not is_wrapped(clip.model)


def test_a_failure_inside_the_context_takes_the_defense_out_all_the_same(clip):
    stock = clip.image_embeds(pixels())

    def fail() -> None:
        with clip.defended(a_defense(clip), allow_mismatch=True):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert torch.equal(clip.image_embeds(pixels()), stock)


def test_a_defense_can_be_fitted(clip):
    text_embeds = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)), dim=1)
    clean = torch.from_numpy(pixels(12))
    label = (clip.image_embeds(clean) @ text_embeds.T).argmax(1)
    pairs = Pairs(clean, torch.from_numpy(pixels(12, 1)), torch.from_numpy(pixels(12, 2)), label, (label + 1) % 5)
    fit = TextFit(clip, POINT, random_sae(act="topk", k=8), pairs, text_embeds)
    selection = fit.choose(fit.rank().order(), FitConfig(n_candidates=20, steps=3, clean_budget=1.0))
    assert selection.before.kept_accuracy == 1.0


def test_golden_vectors_are_reproduced_and_notice_other_weights(clip):
    pictures = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    with clip.defended(a_defense(clip), allow_mismatch=True):
        golden = make_golden(clip, pictures)
        assert np.abs(golden.plain - golden.defended).max() > 1e-3
        assert golden_difference(clip, golden) == 0
        with torch.no_grad():
            clip.model.visual.proj[:8] += 0.5
        assert golden_difference(clip, golden) > 1e-2
        with torch.no_grad():
            clip.model.visual.proj[0] = torch.nan
        assert not golden_difference(clip, golden) <= 1


# --- registers --------------------------------------------------------------------------------------------------------


class TimmVision(torch.nn.Module):
    """The vision tower of a model with a CLS token and four registers, as open_clip wraps timm's."""

    image_size = (32, 32)

    def __init__(self) -> None:
        super().__init__()
        self.trunk = timm.create_model(
            "vit_tiny_patch16_224", pretrained=False, img_size=32, patch_size=8, embed_dim=D_MODEL, depth=3,
            num_heads=2, reg_tokens=4, global_pool="token", num_classes=0,
        )  # fmt: skip

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.trunk(pixel_values)


class TimmClip(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.visual = TimmVision()
        self.logit_scale = torch.nn.Parameter(torch.zeros(()))

    def encode_image(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return self.visual(pixel_values)


@pytest.fixture
def with_registers() -> Clip:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return clip_of(TimmClip().eval().requires_grad_(False))


def test_registers_are_no_patches(with_registers):
    tower = with_registers.tower
    assert (tower.n_prefix, tower.has_cls, tower.pools_cls, tower.grid_size) == (5, True, True, (4, 4))
    everything = tower.resid(pixels(), POINT)
    assert everything.shape == (5, 5 + 16, D_MODEL)
    assert torch.equal(tower.resid(pixels(), POINT, "patch"), everything[:, 5:])
    assert torch.equal(tower.resid(pixels(), POINT, "cls"), everything[:, :1])
    assert [tower.n_tokens(POINT, scope) for scope in ("all", "patch", "cls")] == [21, 16, 1]


@pytest.mark.parametrize(("scope", "touched"), [("all", range(21)), ("patch", range(5, 21)), ("cls", range(1))])
def test_an_edit_touches_the_tokens_of_its_scope_beside_registers(with_registers, scope, touched):
    clip = with_registers
    plain = clip.tower.resid(pixels(), POINT)
    with clip.defended(a_defense(clip, scope=scope)) as attachment, attachment.recording() as by_block:
        clip.image_embeds(pixels())
    told = by_block[POINT]
    assert torch.equal(told.resid, plain)
    changed = (told.edited != plain).any(-1).all(0)
    assert changed.nonzero()[:, 0].tolist() == list(touched)


def test_the_account_of_a_picture_gives_registers_no_place_on_the_map(with_registers):
    from defense.classify.explanation import account

    clip = with_registers
    with clip.defended(a_defense(clip)) as attachment, attachment.recording() as by_block:
        clip.image_embeds(pixels(1))
    removed, heatmap, _ = account(by_block, clip.tower.grid_size)
    told = by_block[POINT]
    difference = (told.resid - told.edited)[0]
    np.testing.assert_allclose(heatmap, difference[5:].square().sum(-1).reshape(4, 4), rtol=1e-4, atol=1e-6)
    assert {item.map.shape for item in removed} == {(4, 4)}
    on_patches, everywhere = sum(item.map.sum() for item in removed), sum(item.energy for item in removed)
    (part,), (acts,) = told.suppressors, told.acts
    on_the_others = float(part.energy(told.resid[:, :5], acts[:, :5]).sum())
    assert on_the_others > 0, "something was written to CLS and registers too"
    assert on_patches + on_the_others == pytest.approx(everywhere, rel=1e-4)


def test_a_map_of_a_latent_begins_behind_the_registers(with_registers):
    from PIL import Image

    clip, sae = with_registers, random_sae()
    image = Image.fromarray(np.random.default_rng(2).integers(0, 256, (32, 32, 3), dtype=np.uint8))
    acts = sae.encode(clip.tower.resid(clip.preprocess(image)[None], POINT))[0]
    latent = int((acts[5:].amax(0) - acts[:5].amax(0)).argmax())
    np.testing.assert_allclose(clip.latent_map(POINT, sae, latent, image), acts[5:, latent].reshape(4, 4), atol=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_a_model_without_a_vision_tower_is_refused():
    with pytest.raises(ConfigError, match="no vision tower"):
        tower_of(torch.nn.Linear(1, 1))


def test_another_hook_point_is_refused(precise):
    for hook_point in ("blocks.1.hook_mlp_out", "1", "blocks.-1.hook_resid_post"):
        with pytest.raises(HookPointError, match="not supported"):
            precise.tower.resid(pixels(), hook_point)
    with pytest.raises(HookPointError, match="blocks 0 to 2"):
        precise.tower.resid(pixels(), "blocks.3.hook_resid_post")


def test_tokens_have_their_kinds_in_every_layout(precise):
    """CLS, two registers and four patches; no CLS, with registers and without; the last block of one that pools CLS."""
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 64, "depth": 3, "num_heads": 2, "num_classes": 0}
    full = tower_of(timm.models.VisionTransformer(**sizes, reg_tokens=2, global_pool="avg"))
    bare = tower_of(timm.models.VisionTransformer(**sizes, class_token=False, global_pool="avg"))

    def found(tower, scope="all", point=POINT):
        n_tokens = tower.n_tokens(point, scope)
        return {kind: list(range(n_tokens))[where] for kind, where in tower.kinds(point, scope).items()}

    assert found(full) == {"CLS": [0], "register": [1, 2], "patch": [3, 4, 5, 6]}
    assert found(full, "patch") == {"patch": [0, 1, 2, 3]}
    assert found(full, "cls") == {"CLS": [0]}
    assert found(bare) == {"patch": [0, 1, 2, 3]}
    just_registers = tower_of(
        timm.models.VisionTransformer(**sizes, class_token=False, reg_tokens=2, global_pool="avg")
    )
    assert found(just_registers) == {"register": [0, 1], "patch": [2, 3, 4, 5]}
    assert found(precise.tower, point="blocks.2.hook_resid_post") == {"CLS": [0]}


def test_a_residual_is_taken_out_before_or_after_what_is_attached_there(precise):
    point, before = POINT, precise.tower.resid(pixels(), POINT)
    with precise.defended(a_defense(precise), allow_mismatch=True):
        edited = precise.tower.resid(pixels(), point)
        unedited = precise.tower.resid(pixels(), point, edited=False)
    assert torch.equal(unedited, before)
    assert not torch.equal(edited, before)
