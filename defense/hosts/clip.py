"""Load a CLIP and what prepares its inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from defense.data.preprocess import Preprocess
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError, MissingDependencyError

from .defense import HostSpec

EMBEDDED = "embedded"


@dataclass(frozen=True)
class Host:
    """A CLIP and what prepares its inputs."""

    model: Any  # an open_clip model; its own classes carry no types
    preprocess: Preprocess
    tokenizer: Callable[[list[str]], Any]


def load_host(model: str = EMBEDDED, pretrained: str | None = None, *, device: str = "cpu") -> Host:
    """Load a CLIP through open_clip.

    Args:
        model: "embedded", or whatever open_clip takes: a name such as "ViT-B-32", "hf-hub:org/repo", "local-dir:path".
        pretrained: open_clip's tag or a path, for a plain name. A tag that is not cached is downloaded.
        device: "cpu", "cuda", "cuda:1" or "auto".

    Raises:
        MissingDependencyError: torch or open_clip is not installed.
        ConfigError: A plain name without `pretrained`, or one that open_clip does not know.
    """
    try:
        import open_clip
    except ImportError as error:
        raise MissingDependencyError(error.name or "torch", "torch") from error
    has_schema = model.startswith(("hf-hub:", "local-dir:"))
    if model == EMBEDDED:
        model, has_schema = f"local-dir:{embedded_folder('clip')}", True
    if not has_schema:
        if model not in open_clip.list_models():
            raise ConfigError(f"open_clip knows no model {model!r}; `open_clip.list_models()` names them all")
        if pretrained is None:
            raise ConfigError(
                f"{model} needs weights: give pretrained=, one of {open_clip.list_pretrained_tags_by_model(model)}"
            )
    try:
        net = open_clip.create_model(model, pretrained=pretrained, device=resolve_device(device))
    except (RuntimeError, ValueError, OSError) as error:
        raise ConfigError(f"open_clip cannot load {model!r} (pretrained={pretrained!r}): {error}") from error
    config = open_clip.get_model_config(model)
    if config is None:
        raise ConfigError(f"open_clip gives no configuration of {model!r}, so its tokenizer is unknown")
    text_cfg = config["text_cfg"]
    if text_cfg.get("hf_tokenizer_name") or text_cfg.get("hf_model_name"):
        tokenizer = open_clip.get_tokenizer(model)
    else:
        tokenizer = ClipTokenizer(text_cfg.get("context_length", 77))
    preprocess = Preprocess.from_open_clip(open_clip.get_model_preprocess_cfg(net))
    return Host(net.eval().requires_grad_(False), preprocess, tokenizer)


def resolve_device(device: str) -> str:
    """Return the torch device for "auto" or a name.

    Raises:
        BackendError: CUDA was asked for and is not there.
    """
    import torch

    from defense.errors import BackendError

    has_cuda = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if has_cuda else "cpu"
    if device.startswith("cuda") and not has_cuda:
        raise BackendError(
            f"device={device!r} was asked for, but torch {torch.__version__} sees no CUDA device; use 'cpu'"
        )
    return device


def embedded_folder(name: str) -> Path:
    """Return a folder of the embedded model: "clip", or the name of one of its defenses."""
    return Path(str(resources.files("defense.embedded").joinpath(name)))


def host_spec(host: Host, model: str, pretrained: str | None) -> HostSpec:
    """Return what identifies a host on disk; `model` and `pretrained` are what it was loaded by."""
    from .tower import VisionHost

    vision = VisionHost.of(host.model)
    return HostSpec(model, pretrained, vision.fingerprint(), vision.quick_gelu, vision.d_model, len(vision.blocks))
