r"""The vision tower of the CLIP for photographs, under timm's name `vit_photo_lite0_160`.

Importing this registers it, so that open_clip builds it from a configuration that names it as `timm_model_name`.

    pixel_values -> stem (EfficientNet-Lite0, frozen) --multi-scale map--> patch tokens \
                                                      --pooled features--> CLS token     -> blocks -> CLS token

The tower is a vision transformer whose patches are the stem's features instead of pixels, and whose CLS token holds
what the stem saw in the whole picture. Where its blocks do nothing, it answers as the stem does.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
from timm.models import build_model_with_cfg, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

NAME = "vit_photo_lite0_160"
STEM = "tf_efficientnet_lite0"
D_POOLED = 1280
"""Width of the stem's pooled features."""
STRIDE = 16
"""Pixels along each side of a patch."""
MAP_CHANNELS = {4: 24, 8: 40, 16: 112}
"""Channels of the stem's maps by their stride. A patch sees all that lies on it: finer maps are unshuffled."""
D_PATCH = sum(channels * (STRIDE // stride) ** 2 for stride, channels in MAP_CHANNELS.items())
"""Channels of a patch, all scales side by side."""


def fold_norms(network: nn.Module) -> nn.Module:
    """Return a network whose batch norms are folded into the convolutions before them, in place.

    Of a norm (timm's `BatchNormAct2d`) its activation stays. The network must be in eval mode; its answers stay.
    """
    for parent in list(network.modules()):
        convolution = ""
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Conv2d):
                convolution = name
            elif isinstance(child, nn.BatchNorm2d):
                setattr(parent, convolution, fuse_conv_bn_eval(getattr(parent, convolution), child))
                setattr(parent, name, child.act)
    return network


class Stem(nn.Module):
    """EfficientNet-Lite0 without its classifier: a map for each patch, and what it saw in all.

    float [batch, 3, height, width] -> patches [batch, n_patches, D_PATCH] and pooled features [batch, D_POOLED].
    """

    def __init__(self) -> None:
        super().__init__()
        self.network: Any = fold_norms(timm.create_model(STEM, num_classes=0).eval()).requires_grad_(False)

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        x = self.network.bn1(self.network.conv_stem(pixel_values))
        maps = []
        for stage, blocks in enumerate(self.network.blocks):
            x = blocks(x)
            if stage in _MAP_STAGES:
                maps.append(functional.pixel_unshuffle(x, STRIDE // _MAP_STAGES[stage]).flatten(2))
        x = self.network.bn2(self.network.conv_head(x))
        return torch.cat(maps, dim=1).transpose(1, 2), x.mean((2, 3))


_MAP_STAGES = {1: 4, 2: 8, 4: 16}
"""Stage of the network -> stride of its map. Later stages only make the pooled features."""


class PhotoEmbed(nn.Module):
    """What stands in for timm's patch embedding: pictures -> tokens [batch, 1 + n_patches, embed_dim], CLS first.

    Args:
        img_size: Height and width, multiples of 32.
        embed_dim: Width of the tokens.
        _timm: What timm passes to every patch embedding and this one has no use for.
    """

    def __init__(self, *, img_size: int, embed_dim: int, **_timm: Any) -> None:
        super().__init__()
        self.grid_size = (img_size // STRIDE, img_size // STRIDE)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.stem = Stem()
        self.patches = nn.Linear(D_PATCH, embed_dim)
        self.pooled = nn.Linear(D_POOLED, embed_dim)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches, pooled = self.stem(pixel_values)
        return torch.cat([self.pooled(pooled)[:, None], self.patches(patches)], dim=1)


class PhotoTransformer(VisionTransformer):
    """A vision transformer whose patch embedding gives the CLS token too; `cls_token` is added to it."""

    # As timm sets them; it ships no types.
    embed_dim: int
    patch_embed: PhotoEmbed
    cls_token: nn.Parameter
    pos_embed: nn.Parameter
    blocks: nn.Sequential

    def _pos_embed(self, x: Tensor) -> Tensor:
        return torch.cat([x[:, :1] + self.cls_token, x[:, 1:] + self.pos_embed], dim=1)


@register_model
def vit_photo_lite0_160(pretrained: bool = False, **settings: Any) -> PhotoTransformer:
    """Return the tower with fresh weights: 160 px, 100 patches, width 256, 6 blocks.

    Args:
        pretrained: As timm has it; must be False, since the weights come with the CLIP.
        settings: Of timm's `VisionTransformer`, in place of these.
    """
    if pretrained:
        raise ValueError(f"{NAME} has no weights of its own; load the CLIP that it belongs to")
    settings |= {"pretrained_cfg": {"input_size": (3, 160, 160)}}
    return build_model_with_cfg(PhotoTransformer, NAME, pretrained, **{**_SETTINGS, **settings})


_SETTINGS: dict[str, Any] = {
    "img_size": 160,
    "patch_size": STRIDE,
    "embed_dim": 256,
    "depth": 6,
    "num_heads": 4,
    "num_classes": 0,
    "no_embed_class": True,
    "embed_layer": PhotoEmbed,
}
