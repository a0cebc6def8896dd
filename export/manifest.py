"""What the manifest of a bundle and the tensors beside it may say: no value that the API itself would refuse."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, get_args

import numpy as np

from defense.data import labels
from defense.data.labels import Prompts
from defense.errors import CheckpointError, ConfigError
from defense.export.layouts import Dtype, Mode
from defense.store.folders import typed

FIELDS = {
    "schema": int,
    "kind": str,
    "package_version": str,
    "host": dict,
    "defense": dict | None,
    "preprocess": dict,
    "labels": list,
    "templates": list,
    "context_length": int | None,
    "d_embed": int,
    "logit_scale": float,
    "model": str,
    "text_model": str | None,
    "mode": str,
    "dtype": str,
    "tolerance": dict,
    "parity": dict,
    "licence": str,
    "files": dict,
}
"""What a manifest of this schema holds: key -> type of its value."""
_DEFENSE_FIELDS = {"manifest_sha256": str | None, "sites": list}
_SITE_FIELDS = {"hook_point": str, "act": str, "d_sae": int, "sets": list}
_SET_FIELDS = {"name": str, "latents": int, "edit": str, "scope": str}
_TOLERANCE_RANGES = {"atol": (0.0, 0.1), "cosine": (0.9, 1.0), "agreement": (0.9, 1.0), "tie": (0.0, 0.1)}
"""Beyond these no check of golden vectors would say anything."""
_MAX_LOGIT_SCALE = 1e4
_MAX_CONTEXT = 4096
_UNIT = 1e-3
"""How far the length of a normalized embedding may be from 1."""


def check_logit_scale(value: float) -> None:
    """Raise `ConfigError` unless a factor between cosines and logits is above 0 and at most 10,000; CLIP's is 100."""
    if not 0 < value <= _MAX_LOGIT_SCALE:  # also where it is NaN
        raise ConfigError(f"logit_scale is {value}; want a number above 0 and at most {_MAX_LOGIT_SCALE:g}")


def check_values(manifest: Mapping[str, Any]) -> Prompts:
    """Hold the values of a manifest, whose types are those of `FIELDS`, to what the API accepts; return its labels.

    What `Preprocess` and `check_files` see to is left to them.

    Raises:
        ConfigError, CheckpointError: A value that cannot be right.
    """
    _check_clip(manifest["host"])
    if manifest["defense"] is not None:
        _check_defense(manifest["defense"])
    for name, choices in (("mode", get_args(Mode)), ("dtype", get_args(Dtype))):
        if manifest[name] not in choices:
            raise ConfigError(f"{name} is {manifest[name]!r}; want one of {', '.join(choices)}")
    check_logit_scale(manifest["logit_scale"])
    if manifest["d_embed"] < 1:
        raise ConfigError(f"d_embed is {manifest['d_embed']}; want at least 1")
    context_length = manifest["context_length"]
    if (context_length is None) != (manifest["text_model"] is None):
        raise ConfigError("one of text_model and context_length is there without the other")
    if context_length is not None and not 1 <= context_length <= _MAX_CONTEXT:
        raise ConfigError(f"context_length is {context_length}; want 1 to {_MAX_CONTEXT}")
    _check_tolerance(manifest["tolerance"])
    names = labels.check_labels(manifest["labels"], are_stored=True)
    return Prompts(names, labels.resolve_templates(manifest["templates"]))


def _check_clip(clip: Mapping[str, Any]) -> None:
    if not re.fullmatch("[0-9a-f]{64}", str(clip.get("sha256"))):
        raise ConfigError(f"host names no weights by their sha256, 64 hexadecimal digits, but {clip.get('sha256')!r}")
    for key in ("model", "pretrained"):
        if not isinstance(clip.get(key), str | None):
            raise ConfigError(f"host: {key} is {clip[key]!r}; want a text")


def _check_defense(defense: Any) -> None:
    for site in typed("defense", defense, _DEFENSE_FIELDS)["sites"]:
        for each in typed("a site of the defense", site, _SITE_FIELDS)["sets"]:
            typed("a set of the defense", each, _SET_FIELDS)


def _check_tolerance(tolerance: Mapping[str, Any]) -> None:
    typed("tolerance", tolerance, dict.fromkeys(_TOLERANCE_RANGES, float))
    for name, (low, high) in _TOLERANCE_RANGES.items():
        if not low <= tolerance[name] <= high:
            raise ConfigError(f"tolerance: {name} is {tolerance[name]}; want {low:g} to {high:g}")


def check_embeds(what: str, embeds: np.ndarray, shape: tuple[int, int]) -> None:
    """Hold embeddings to their shape, and to length 1.

    Args:
        what: What they are, for the message.
        embeds: Finite numbers.
        shape: Rows, d_embed.

    Raises:
        CheckpointError: They are not float32, have another shape, or a row is zero or not normalized.
    """
    if embeds.dtype != np.float32 or embeds.shape != shape:
        raise CheckpointError(f"{what} are {embeds.dtype} {list(embeds.shape)}; want float32 {list(shape)}")
    lengths = np.linalg.norm(embeds.astype(np.float64), axis=1)
    for row in np.flatnonzero(np.abs(lengths - 1) > _UNIT)[:1]:
        raise CheckpointError(f"{what}: row {row} has the length {lengths[row]:g}; want normalized ones, of length 1")


def check_golden(golden: Mapping[str, np.ndarray], d_embed: int, what: str) -> None:
    """Hold golden vectors to what `OnnxClassifier.check_golden` compares.

    Raises:
        CheckpointError: There are none, or their shapes or types cannot be right.
    """
    if golden.keys() != {"pictures", "image_embeds"}:
        raise CheckpointError(f"{what} holds {sorted(golden)}; want image_embeds and pictures")
    pictures = golden["pictures"]
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != 3 or not pictures.size:
        raise CheckpointError(f"{what}: pictures are {pictures.dtype} {list(pictures.shape)}; want uint8 [n, h, w, 3]")
    check_embeds(f"{what}: image_embeds", golden["image_embeds"], (len(pictures), d_embed))


def check_blank_tokens(is_blank: np.ndarray | None, what: str) -> None:
    """Raise `CheckpointError` unless it is None, or bool with an entry per token."""
    if is_blank is not None and (is_blank.dtype != np.bool_ or is_blank.ndim != 1):
        raise CheckpointError(f"{what}: blank_tokens are {is_blank.dtype} {list(is_blank.shape)}; want bool [tokens]")
