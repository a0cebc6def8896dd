"""What open_clip calls its models, and which GELU their weights were trained with: QuickGELU or the exact one.

A file of weights does not say which, and with the wrong one a CLIP answers, only worse. Known are the weights that
open_clip has a tag for, a file with the sha256 of one of them, and a file beside its `open_clip_config.json`.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
import re
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import open_clip
from open_clip.pretrained import get_pretrained_cfg

from defense.errors import ConfigError

log = logging.getLogger(__name__)

_CONFIG = "open_clip_config.json"
_SHA256 = re.compile("[0-9a-f]{64}|[0-9a-f]{8}")


def spelled(model: str) -> str:
    """Return open_clip's own name of a model that may be written as in papers: "ViT-B/32", "ViT-L/14@336px".

    What is no model of open_clip is returned as it is.
    """
    names = open_clip.list_models()
    plain = re.sub(r"@(\d+)(px)?$", r"-\1", model.replace("/", "-"))
    return next((name for name in names if name.lower() == plain.lower()), model)


def known_name(model: str) -> str:
    """Return open_clip's own name of a model, which may be written as in papers.

    Raises:
        ConfigError: There is no such model.
    """
    names = {name.lower(): name for name in open_clip.list_models()}
    if (found := spelled(model)).lower() in names:
        return found
    near = [names[name] for name in difflib.get_close_matches(model.lower().replace("/", "-"), names, n=3)]
    hint = f"did you mean {' or '.join(near)}?" if near else "`open_clip.list_models()` names them all"
    raise ConfigError(f"open_clip knows no model {model!r}; {hint}")


def check_weights(model: str, pretrained: str | None) -> None:
    """Refuse weights that are neither one of open_clip's tags for a model nor a file.

    Args:
        model: open_clip's name.
        pretrained: The tag or file.

    Raises:
        ConfigError: There are none, or none of that name.
    """
    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained is None:
        raise ConfigError(
            f"{model} needs weights: give pretrained= (--pretrained), one of {', '.join(tags)}, or a file"
        )
    if get_pretrained_cfg(model, pretrained) or Path(pretrained).is_file():
        return
    begun = [tag for tag in tags if tag.startswith(pretrained.lower())]
    near = begun or difflib.get_close_matches(pretrained.lower(), tags, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(tags)}"
    raise ConfigError(f"open_clip knows no weights {pretrained!r} of {model}, and there is no such file; {hint}")


def needs_quick_gelu(model: str, pretrained: str) -> bool:
    """Return whether QuickGELU has to be forced on a model for its weights.

    Logs a warning where nothing tells which GELU a file of weights was trained with.

    Args:
        model: open_clip's name.
        pretrained: A tag, or a file.

    Raises:
        ConfigError: The name asks for QuickGELU and the weights were trained with the exact one.
    """
    config: dict[str, Any] = open_clip.get_model_config(model) or {}
    is_quick = bool(config.get("quick_gelu", False))
    trained = _trained_with_quick_gelu(model, pretrained)
    if trained is None:
        if "timm_model_name" not in config.get("vision_cfg", {}) and Path(pretrained).is_file():
            log.warning(
                "%s does not say whether it was trained with QuickGELU; %s takes %s, and with the wrong one all scores "
                "are off. OpenAI's weights, and what was tuned from them, want a name that ends in '-quickgelu'",
                pretrained, model, "it" if is_quick else "the exact GELU",
            )  # fmt: skip
        return False
    if is_quick and not trained:
        raise ConfigError(
            f"{model} takes QuickGELU, but {pretrained} was trained with the exact GELU; use the name "
            f"{model.removesuffix('-quickgelu')}"
        )
    return trained and not is_quick


def _trained_with_quick_gelu(model: str, pretrained: str) -> bool | None:
    """Return whether weights were trained with QuickGELU; None where that is not known."""
    if tagged := get_pretrained_cfg(model, pretrained):
        return bool(tagged.get("quick_gelu", False))
    path = Path(pretrained)
    if not path.is_file():
        return None
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    for name, tag in open_clip.list_pretrained():
        published = get_pretrained_cfg(name, tag)
        if any(sha256.startswith(digest) for digest in _digests(published.get("url") or "")):
            return bool(published.get("quick_gelu", False))
    beside = path.with_name(_CONFIG)
    if not beside.is_file():
        return None
    try:
        stated = json.loads(beside.read_text(encoding="utf-8"))["model_cfg"]
        return bool(stated.get("quick_gelu", False))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{beside} is no configuration of open_clip: {error!r}") from error


def _digests(url: str) -> list[str]:
    """Return the sha256 that an address of weights states: a folder of it, or its first 8 digits before the suffix."""
    path = PurePosixPath(urlsplit(url).path)
    parts = (*path.parts, path.stem.rpartition("-")[2])
    return [part for part in parts if _SHA256.fullmatch(part)]
