"""A CLIP and what results call it; with random weights of a fixed seed, too, for rehearsals without a download.

Reading this module loads no torch.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError, cannot_import
from defense.hosts.clip import Clip, load_clip, resolve_device

RANDOM = "random"
"""In place of open_clip's tag of weights: a rehearsal, whose results say so."""

_SEED_OF_WEIGHTS = 0


@dataclass(frozen=True)
class NamedClip:
    """A CLIP and what results call it.

    Attributes:
        clip: The CLIP.
        model: open_clip's name, "photo" or "embedded".
        pretrained: open_clip's tag of its weights; "random"; or the name of a CLIP that ships.
        sha256: Of all its weights; see `weights_sha256`.
    """

    clip: Clip
    model: str
    pretrained: str
    sha256: str

    @property
    def is_random(self) -> bool:
        """Whether the weights are random, so that no figure means anything."""
        return self.pretrained == RANDOM

    @property
    def logit_scale(self) -> float:
        """Factor between cosine and logit."""
        return self.clip.logit_scale


def load_named_clip(model: str, pretrained: str | None, *, device: str = "cpu") -> NamedClip:
    """Return a CLIP by name.

    Args:
        model: open_clip's name, "photo" or "embedded"; see `defense.hosts.clip.load_clip`.
        pretrained: open_clip's tag of weights, or "random" for weights of a fixed seed; None for one that ships.
        device: "auto", "cpu", "cuda" or "cuda:1".

    Raises:
        MissingDependencyError: torch or open_clip is not installed.
        ConfigError: There is no such model, or random weights cannot be drawn for it.
    """
    clip = _random_clip(model, device) if pretrained == RANDOM else load_clip(model, pretrained, device=device)
    from defense.hosts.open_clip_names import spelled  # open_clip is there by now

    model = spelled(model)
    return NamedClip(clip, model, pretrained or model, weights_sha256(clip.model))


def _random_clip(model: str, device: str) -> Clip:
    try:
        import open_clip
        import torch

        from defense.hosts.open_clip_names import known_name
    except ImportError as error:
        raise cannot_import("torch", error) from error
    model = known_name(model)
    text_cfg = open_clip.get_model_config(model)["text_cfg"]
    if text_cfg.get("hf_model_name") or text_cfg.get("hf_tokenizer_name"):
        raise ConfigError(f"{model} takes its text tower from Hugging Face; random weights are for CLIP's own")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED_OF_WEIGHTS)
        net = open_clip.create_model(model, device=resolve_device(device))
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(net))
    return Clip(net.eval().requires_grad_(False), preprocess, ClipTokenizer(text_cfg.get("context_length", 77)))


def weights_sha256(model: Any) -> str:
    """Return a sha256 of a model's parameters and buffers: names, types, shapes and values."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
