"""What cannot be wrapped is refused, and the model stays as it was."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest

pytest.importorskip("open_clip")
import open_clip
import torch

from defense.errors import ConfigError, HookPointError, ShapeError
from defense.hosts.attach import detach, wrap
from defense.hosts.families import tower_of
from defense.hosts.tower import block_of

from ..conftest import D_MODEL, random_defense, random_sae
from .attaching import a_set


def test_fault_a_defended_model_takes_no_other_weights(tiny_clip):
    stock = copy.deepcopy(tiny_clip)
    same = {name: tensor.half().float() for name, tensor in tiny_clip.state_dict().items()}
    other = {name: tensor * 2 if name == "visual.proj" else tensor for name, tensor in same.items()}
    wrap(tiny_clip, random_defense(tiny_clip, (1, random_sae(), a_set())))
    tiny_clip.load_state_dict(same)
    for module, prefix in (
        (tiny_clip, ""),
        (tiny_clip.visual, "visual."),
        (torch.nn.ModuleDict({"clip": tiny_clip}), None),
    ):
        if prefix is None:
            state = {f"clip.{name}": tensor for name, tensor in other.items()}
        else:
            state = {name.removeprefix(prefix): tensor for name, tensor in other.items() if name.startswith(prefix)}
        with pytest.raises(ConfigError, match=r"proj of what is being loaded differs. Call detach"):
            module.load_state_dict(state)
    assert torch.equal(tiny_clip.visual.conv1.weight.half(), stock.visual.conv1.weight.half())
    assert torch.equal(tiny_clip.visual.proj.half(), stock.visual.proj.half()), "nothing was copied"
    detach(tiny_clip)
    tiny_clip.load_state_dict(other)
    wrap(tiny_clip, random_defense(stock, (1, random_sae(), a_set())), allow_mismatch=True)
    tiny_clip.load_state_dict(same)


def test_a_compiled_model_is_refused(tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(), a_set()))
    compiled = torch.compile(tiny_clip, backend="eager")
    with pytest.raises(ConfigError, match="wrap it first, then compile"):
        wrap(compiled, defense)
    tiny_clip.visual.compile(backend="eager")
    with pytest.raises(ConfigError, match="wrap it first, then compile"):
        wrap(tiny_clip, defense)


def test_wrapping_twice_and_detaching_the_undefended_are_refused(tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(), a_set()))
    with pytest.raises(ConfigError, match="not defended"):
        detach(tiny_clip)
    wrap(tiny_clip, defense)
    with pytest.raises(ConfigError, match="defended already"):
        wrap(tiny_clip, defense)


def test_a_refused_defense_leaves_the_model_as_it_was(tiny_clip):
    good, bad = random_sae(), random_sae(1)
    defense = random_defense(tiny_clip, (1, good, a_set()), (7, bad, a_set()))
    keys = list(dict(tiny_clip.named_modules()))
    with pytest.raises(HookPointError, match="blocks 0 to 2"):
        wrap(tiny_clip, defense)
    assert list(dict(tiny_clip.named_modules())) == keys
    assert not any(module._forward_hooks for module in tiny_clip.modules())


def test_fault_56_an_sae_of_another_width_is_refused(tiny_clip):
    narrow = random_sae(d_model=D_MODEL - 1)
    with pytest.raises(ShapeError, match=r"d_model=63.*64 wide"):
        wrap(tiny_clip, random_defense(tiny_clip, (1, narrow, a_set())))


@pytest.mark.parametrize(
    "hook_point", ["blocks.-1.hook_resid_post", "blocks.1.hook_mlp_out", "visual.transformer.resblocks.1", "1", ""]
)
def test_fault_56_another_kind_of_hook_point_is_refused(hook_point):
    with pytest.raises(HookPointError, match="hook_resid_post"):
        block_of(hook_point)


def test_fault_56_a_patch_edit_at_the_last_block_is_refused(tiny_clip):
    with pytest.raises(HookPointError, match="after the last block only the CLS token"):
        wrap(tiny_clip, random_defense(tiny_clip, (2, random_sae(), a_set(scope="patch"))))


def test_fault_58_other_weights_are_refused_unless_asked_for(tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(), a_set()))
    with torch.no_grad():
        tiny_clip.visual.proj[0, 0] += 1
    with pytest.raises(ConfigError, match="fitted on the weights of tiny"):
        wrap(tiny_clip, defense)
    wrap(tiny_clip, defense, allow_mismatch=True)


def test_fault_58_the_fingerprint_is_the_same_in_half_precision(tiny_clip):
    assert tower_of(tiny_clip).fingerprint() == tower_of(copy.deepcopy(tiny_clip).half()).fingerprint()


def test_fault_59_quick_gelu_against_gelu_is_refused(tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(), a_set()))
    other = replace(defense, clip=replace(defense.clip, quick_gelu=True))
    with pytest.raises(ConfigError, match="force_quick_gelu=True"):
        wrap(tiny_clip, other)


def test_another_depth_is_refused(tiny_clip):
    defense = random_defense(tiny_clip, (1, random_sae(), a_set()))
    with pytest.raises(ConfigError, match=r"12 blocks.*has 3"):
        wrap(tiny_clip, replace(defense, clip=replace(defense.clip, n_layers=12)))


def test_a_model_without_a_vision_transformer_is_refused():
    with pytest.raises(ConfigError, match="no vision tower"):
        tower_of(torch.nn.Linear(1, 1))
    resnet = open_clip.CLIP(
        16,
        {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "head_width": 8},
        {"width": 8, "heads": 1, "layers": 1},
    )
    with pytest.raises(HookPointError, match="no transformer blocks"):
        tower_of(resnet)


def test_quick_gelu_is_recognized():
    tower = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
    text = {"width": 8, "heads": 1, "layers": 1, "vocab_size": 16}
    assert tower_of(open_clip.CLIP(8, tower, text, quick_gelu=True)).quick_gelu
    assert not tower_of(open_clip.CLIP(8, tower, text)).quick_gelu
