"""Real architectures with random weights: bit-equal without an edit, and changed by one."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
import open_clip
import torch

from defense.core.latents import LatentSet
from defense.errors import HookPointError
from defense.hosts.attach import detach, wrap
from defense.hosts.families import tower_of

from ..conftest import D_MODEL, random_defense, random_sae
from .attaching import TOPK, a_set, pictures


def test_a_sequence_first_tower_gives_the_same_answer(tiny_clip):
    sae = random_sae(**TOPK)
    batch = pictures(tiny_clip)
    other = open_clip.CLIP(
        32,
        {"image_size": 32, "layers": 3, "width": D_MODEL, "head_width": 32, "patch_size": 8},
        {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
    ).eval()
    other.load_state_dict(tiny_clip.state_dict())
    transformer = other.visual.transformer
    if not hasattr(transformer, "batch_first"):
        pytest.skip("this open_clip has no sequence-first layout any more")
    transformer.batch_first = False
    for block in transformer.resblocks:
        block.attn.batch_first = False
    with torch.inference_mode():
        want = wrap(tiny_clip, random_defense(tiny_clip, (1, sae, a_set()))).encode_image(batch)
        got = wrap(other, random_defense(other, (1, sae, a_set()))).encode_image(batch)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=0)


ARCHITECTURES = {
    # name: (block, scope, n_prefix, pools_cls)
    "ViT-B-32": (8, "all", 1, True),
    "ViT-B-16": (10, "patch", 1, True),
    "ViT-L-14": (22, "cls", 1, True),
    "ViT-B-16-SigLIP": (6, "patch", 0, False),
}


LARGE = ("ViT-L-14", "ViT-B-16-SigLIP")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in ARCHITECTURES]
)
def test_real_architectures_are_bit_equal_without_and_change_with_an_edit(name):
    block, scope, n_prefix, pools_cls = ARCHITECTURES[name]
    torch.manual_seed(0)
    model = open_clip.create_model(name, pretrained=None).eval().requires_grad_(False)
    tower = tower_of(model)
    assert (tower.n_prefix, tower.pools_cls) == (n_prefix, pools_cls)
    sae = random_sae(d_model=tower.d_model, **TOPK)
    batch = pictures(model, 2)
    for dtype in (torch.float32, torch.bfloat16):
        model.to(dtype)
        with torch.inference_mode():
            stock = model.encode_image(batch.to(dtype))
            for latent_set in (a_set(gains=(1.0,) * 40, scope=scope), LatentSet("empty", (), scope=scope)):
                wrap(model, random_defense(model, (block, sae, latent_set)), allow_mismatch=True)
                assert torch.equal(model.encode_image(batch.to(dtype)), stock)
                detach(model)
            wrap(model, random_defense(model, (block, sae, a_set(scope=scope))), allow_mismatch=True)
            assert not torch.equal(model.encode_image(batch.to(dtype)), stock)
            detach(model)
            assert torch.equal(model.encode_image(batch.to(dtype)), stock)


def test_a_tower_without_a_cls_token_refuses_the_cls_scope():
    import timm

    class Tower(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk = timm.create_model(
                "vit_tiny_patch16_224", pretrained=False, img_size=32, embed_dim=D_MODEL, depth=2, num_heads=2,
                class_token=False, global_pool="avg", num_classes=0,
            )  # fmt: skip
            self.image_size = (32, 32)

    model = torch.nn.Module()
    model.visual = Tower()
    assert tower_of(model).n_prefix == 0
    with pytest.raises(HookPointError, match="no CLS token"):
        wrap(model, random_defense(model, (0, random_sae(), a_set(scope="cls"))))
