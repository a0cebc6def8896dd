"""Methods on attention heads, in a tower of timm: the CLIP for photographs."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from torch import nn

from defense.benchmarks.methods import NotApplicableError, heads, textspan
from defense.benchmarks.methods.sampling_tar import contributions
from defense.hosts.clip import load_clip
from defense.hosts.shipped import PHOTO

from .tower_material import Drawn


@pytest.fixture
def photo():
    return load_clip(PHOTO)


@pytest.fixture
def pixel_values(photo):
    return torch.from_numpy(np.stack([photo.preprocess(Drawn(i).load()) for i in range(2)]))


@torch.inference_mode()
def embeds(clip, pixel_values):
    return clip.tower.encode(clip.tower.batch(pixel_values))


def test_the_heads_writes_add_up_to_what_the_attention_gives_the_cls_token(photo, pixel_values):
    seen = []

    def see(block, x, written):
        attention = heads.attention_of(photo.tower, block)
        found = heads.cls_attention(attention, x)
        torch.testing.assert_close(written, attention.proj.bias + found.writes.sum(1), atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(heads.cls_attention(attention, x, [1]).writes[:, 0], found.writes[:, 1])
        directions = torch.eye(attention.head_dim).expand(attention.num_heads, -1, -1)
        added = contributions(attention, x, directions).sum(2)  # in its own basis: what the head mixes
        out = heads.HeadWeights.of(attention).out
        torch.testing.assert_close(torch.einsum("bhe,dhe->bhd", added, out), found.writes, atol=1e-4, rtol=1e-4)
        seen.append(block)

    with heads.watching(photo.tower, range(6), see):
        embeds(photo, pixel_values)
    assert seen == list(range(6))


def test_silence_in_the_last_block_is_zero_output_weights_there(photo, pixel_values):
    tower = heads.vision_with_heads(photo.model, "dyslexify")
    stock = embeds(photo, pixel_values)
    with heads.ablated(tower, [(5, 1)]):
        silent = embeds(photo, pixel_values)
    width = heads.attention_of(tower, 5).head_dim
    with torch.no_grad():
        heads.attention_of(tower, 5).proj.weight[:, width : 2 * width] = 0
    torch.testing.assert_close(silent, embeds(photo, pixel_values))
    assert (silent - stock).abs().max() > 1e-3


def test_a_heads_part_is_what_it_adds_to_the_embedding(photo, pixel_values):
    late = heads.all_heads(photo.tower)
    encoder = textspan._Contributions(photo, late)
    pictures = [Drawn(i).load() for i in range(2)]
    whole, _ = encoder.decompose(pictures)
    np.testing.assert_allclose(whole, embeds(photo, pixel_values), atol=1e-4)
    with torch.no_grad():  # a head of the last block then reaches the embedding through the LayerNorm alone
        for parameter in photo.tower.blocks[5].mlp.fc2.parameters():
            parameter.zero_()
    _, parts = encoder.decompose(pictures)
    norm, projection = heads.readout_of(photo.tower)
    seen = []
    handle = norm.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0][:, 0]))
    embeds(photo, pixel_values)
    with heads.ablated(photo.tower, [(5, 1)]):
        embeds(photo, pixel_values)
    handle.remove()
    lost, deviation = seen[0] - seen[1], seen[0].std(-1, correction=0, keepdim=True)
    want = (lost - lost.mean(-1, keepdim=True)) / deviation * norm.weight @ projection
    np.testing.assert_allclose(parts[:, late.index((5, 1))], want.detach(), atol=1e-3)
    assert want.abs().max() > 0.01


@pytest.mark.parametrize("name", ["q_norm", "k_norm", "norm"])
def test_an_attention_with_a_norm_inside_is_refused(photo, name):
    setattr(heads.attention_of(photo.tower, 0), name, nn.LayerNorm(1))
    with pytest.raises(NotApplicableError, match="plain Attention"):
        heads.vision_with_heads(photo.model, "textspan")


def test_an_embedding_that_is_no_projection_of_a_norm_is_refused(photo):
    photo.model.visual.head.proj = nn.Linear(256, 256)
    with pytest.raises(NotApplicableError, match="no projection of a LayerNorm"):
        heads.readout_of(photo.tower)
