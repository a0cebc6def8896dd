"""The plug-in for CLIP_benchmark: its harness, with a defended model.

    python -m defense.benchmarks.adapter eval --model_type defense --model MODEL --pretrained DEFENSE --dataset ...

is `clip_benchmark` with one more model type, and all its options. DEFENSE is a defense ("embedded", a folder, a hub
id), which names its weights; MODEL has to be the one that it was fitted on. For the figures beside it, run the same
model with its own `--model_type open_clip`. Its mixed precision is on by default; `--no_amp` gives the figures that
`defense bench` gives.

In a program, call `register()` before `clip_benchmark.cli.main()`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from defense.classify.classifier import RobustClassifier
from defense.data.images import decode
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError, MissingDependencyError
from defense.hosts.clip import load_clip
from defense.hosts.shipped import check_own_model
from defense.store.defenses import find_defense

if TYPE_CHECKING:
    from torch import Tensor

MODEL_TYPE = "defense"


@dataclass(frozen=True)
class Transform:
    """From a PIL picture to pixel_values, float32 [3, height, width]; EXIF is not applied. Can be pickled."""

    preprocess: Preprocess

    def __call__(self, picture: Image.Image) -> Tensor:
        """Return the picture as the model takes it."""
        import torch

        return torch.from_numpy(self.preprocess(decode(picture, rotate=False).image))


@dataclass(frozen=True)
class Tokenizer:
    """From texts to int64 ids [n, context_length], as a tensor."""

    tokenizer: Callable[[list[str]], Any]

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return the ids of texts."""
        import torch

        return torch.from_numpy(np.asarray(self.tokenizer(list(texts)), np.int64))


def load_defended(
    model_name: str, pretrained: str, cache_dir: str | None = None, device: str = "cpu"
) -> tuple[Any, Transform, Tokenizer]:
    """Return a defended model, its transform and its tokenizer, as CLIP_benchmark's loaders do.

    Args:
        model_name: The CLIP that the defense was fitted on, by open_clip's name.
        pretrained: The defense: "embedded", a folder or a hub id.
        cache_dir: Where a defense from the hub is kept.
        device: "cpu", "cuda" or "cuda:1".

    Raises:
        CheckpointError: There is no such defense, or it cannot be used.
        ConfigError: It was fitted on another model.
    """
    from defense.hosts.open_clip_names import spelled

    check_own_model(pretrained, model_name)
    defense = find_defense(pretrained, cache_dir=cache_dir)
    if spelled(model_name) != defense.clip.model:
        raise ConfigError(
            f"the defense {pretrained} was fitted on {defense.clip.model}, not on {model_name}; "
            f"give --model {defense.clip.model}"
        )
    clip = load_clip(defense.clip.model, defense.clip.pretrained, device=str(device))
    clf = RobustClassifier(clip, defense)
    return clf.clip.model, Transform(clf.clip.preprocess), Tokenizer(clf.clip.tokenizer)


def register() -> None:
    """Add the model type "defense" to CLIP_benchmark.

    Raises:
        MissingDependencyError: It is not installed.
    """
    try:
        from clip_benchmark import models
    except ImportError as error:
        raise MissingDependencyError("clip-benchmark", "clip-benchmark") from error
    models.TYPE2FUNC[MODEL_TYPE] = load_defended
    if MODEL_TYPE not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL_TYPE)  # in place: its command line holds the same list


def main() -> None:
    """Run CLIP_benchmark's command line with the model type added."""
    register()
    from clip_benchmark.cli import main as clip_benchmark

    clip_benchmark()


if __name__ == "__main__":
    main()
