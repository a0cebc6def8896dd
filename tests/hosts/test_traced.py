"""A defended model of any library, traced: by `torch.jit.trace`, `torch.export` and `torch.compile`."""

from __future__ import annotations

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("transformers")
import torch
from torch import Tensor, nn

from defense.hosts.attach import wrap

from . import twins
from .twins import a_defense, pixels


class Encoder(nn.Module):
    """A model's own call for pictures, as somebody would trace it who serves it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        for call in ("encode_image", "get_image_features"):
            if hasattr(self.model, call):
                answer = getattr(self.model, call)(pixel_values)
                break
        else:
            answer = self.model(pixel_values)
        return answer if isinstance(answer, Tensor) else answer.pooler_output


def by_trace(model: nn.Module, example: Tensor) -> nn.Module:
    return torch.jit.trace(model, example)


def by_export(model: nn.Module, example: Tensor) -> nn.Module:
    batch = torch.export.Dim("batch", min=2, max=64)
    return torch.export.export(model, (example,), dynamic_shapes=({0: batch},)).module()


def by_compile(model: nn.Module, example: Tensor) -> nn.Module:
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(example)
    return compiled


MODELS = {
    "open_clip": lambda: twins.open_clip_pair()[0],
    "timm in open_clip": lambda: twins.siglip_pair()[0],
    "timm": lambda: twins.dinov2_pair()[0],
    "CLIP of transformers": lambda: twins.open_clip_pair()[1],
    "SigLIP of transformers": lambda: twins.siglip_pair()[1],
    "DINOv2 of transformers": lambda: twins.dinov2_pair()[1],
}


@pytest.mark.parametrize("traced_by", [by_trace, by_export, pytest.param(by_compile, marks=pytest.mark.slow)])
@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
@pytest.mark.filterwarnings("ignore:.torch.jit.trace", "ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # torch asks transformers' models for all they have
def test_a_graph_traced_on_blank_pictures_defends_as_the_model_does(model, traced_by):
    """Blank pictures fire less than noise; neither they nor their number may decide what the graph does."""
    torch._dynamo.reset()  # it compiles one function so many times and no more
    encoder = Encoder(model()).eval()
    stock = encoder(pixels())
    wrap(encoder.model, a_defense(encoder.model))
    graph = traced_by(encoder, torch.zeros(3, 3, 32, 32))
    for batch in (pixels(), pixels(2, seed=1)):
        torch.testing.assert_close(graph(batch), encoder(batch), atol=1e-5, rtol=0)
    assert (graph(pixels()) - stock).abs().max() > 0.001
