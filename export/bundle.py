"""A bundle: a folder with a defended CLIP in ONNX and everything that it takes to use it, without torch.

    manifest.json              what the rest is; hash and size of each other file
    model.onnx                 pixel_values -> image_embeds, logits_per_image (model.onnx.data beside it above 2 GiB)
    text.onnx                  input_ids -> text_embeds, where the bundle has an open vocabulary
    labels.safetensors         text_embeds of the labels that are baked in; the tokens that text.onnx never learned
    golden.safetensors         pictures with torch's answers
    README.md, LICENCES.md     for people

A server's layout puts model.onnx elsewhere in the folder and adds files; the manifest says where everything is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from defense.data.labels import Prompts
from defense.data.preprocess import Preprocess
from defense.errors import CheckpointError, IntegrityError
from defense.hosts.defense import Defense
from defense.store import folders
from defense.store.defenses import MANIFEST
from defense.store.folders import Verify, check_verify, read_tensors, reading, sha256_of

SCHEMA = 1
BLANK_TOKENS = "blank_tokens"
KIND = "clip-defense ONNX bundle"
LABELS, GOLDEN, README, LICENSES = "labels.safetensors", "golden.safetensors", "README.md", "LICENCES.md"

# What a manifest of this schema holds: key -> type of its value.
_FIELDS = {
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
_FILE_FIELDS = {"sha256": str, "size": int}
_TOLERANCE_FIELDS = {"atol": float, "cosine": float, "agreement": float, "tie": float}


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked.

    Attributes:
        folder: Where it is.
        clip: Name, tag and hash of the CLIP.
        defense: What is edited and where; None for a stock CLIP.
        preprocess: How pictures are prepared.
        prompts: The labels that are baked in, and their templates.
        context_length: Ids per text of the text graph; None where the labels are fixed.
        logit_scale: Factor between cosines and logits.
        model: The vision graph, by its path in the folder.
        text_model: The text graph, or None.
        mode: How the defense is written in the graph.
        dtype: "fp32", "fp16" or "int8".
        tolerance: What the graph's answers may differ from torch's: atol, cosine, agreement, tie.
        parity: By how much they did when it was made.
        license: Of the defense.
        text_embeds: Of the labels, float32 [n_labels, d_embed].
        blank_tokens: For each token id whether the text tower has no embedding for it, bool; None where unknown.
        golden: Reference answers: pictures uint8 [n, height, width, 3], image_embeds [n, d_embed].
        manifest_sha256: Names this bundle and no other.
    """

    folder: Path
    clip: Mapping[str, Any]
    defense: Mapping[str, Any] | None
    preprocess: Preprocess
    prompts: Prompts
    context_length: int | None
    logit_scale: float
    model: str
    text_model: str | None
    mode: str
    dtype: str
    tolerance: Mapping[str, float]
    parity: Mapping[str, Any]
    license: str
    text_embeds: np.ndarray
    blank_tokens: np.ndarray | None
    golden: Mapping[str, np.ndarray]
    manifest_sha256: str


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder says that it is a bundle (damaged or not)."""
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the manifest of a folder in which everything else is in place."""
    files = {
        path.relative_to(folder).as_posix(): folders.file_entry(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    head = {"schema": SCHEMA, "kind": KIND, "package_version": folders.package_version()}
    text = json.dumps({**head, **fields, "files": files}, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def load(folder: str | os.PathLike[str], *, verify: Verify = "sha256") -> Bundle:
    """Read a bundle.

    Args:
        folder: The folder; also a snapshot in the Hugging Face hub's cache.
        verify: "sha256" checks every byte of every file; "size" only the sizes.

    Raises:
        CheckpointError: A file is missing, unexpected or unreadable, or was written by a newer version.
        IntegrityError: A file's bytes are not the ones that were written.
        NonFiniteError: An embedding is NaN or infinite.
        ConfigError: `verify` is neither of the two.
    """
    check_verify(verify)
    root = Path(folder)
    with reading(root / MANIFEST, SCHEMA):
        return _load(root, verify)


def _load(root: Path, verify: Verify) -> Bundle:
    manifest = _read_manifest(root)
    check_files(root, manifest["files"], verify)
    for name in (manifest["model"], manifest["text_model"], LABELS, GOLDEN):
        if name is not None and name not in manifest["files"]:
            raise CheckpointError(f"{root / MANIFEST} names {name}, but does not list it among its files")
    prompts = Prompts(tuple(manifest["labels"]), tuple(manifest["templates"]))
    tensors = read_tensors(root / LABELS)
    text_embeds = tensors["text_embeds"]
    if text_embeds.ndim != 2 or len(text_embeds) != len(prompts.labels):
        raise CheckpointError(f"{root / LABELS} is {list(text_embeds.shape)}, for {len(prompts.labels)} labels")
    return Bundle(
        folder=root,
        clip=manifest["host"],
        defense=manifest["defense"],
        preprocess=Preprocess.from_dict(manifest["preprocess"]),
        prompts=prompts,
        context_length=manifest["context_length"],
        logit_scale=manifest["logit_scale"],
        model=manifest["model"],
        text_model=manifest["text_model"],
        mode=manifest["mode"],
        dtype=manifest["dtype"],
        tolerance=folders.typed("tolerance", manifest["tolerance"], _TOLERANCE_FIELDS),
        parity=manifest["parity"],
        license=manifest["licence"],
        text_embeds=text_embeds,
        blank_tokens=tensors.get(BLANK_TOKENS),
        golden=read_tensors(root / GOLDEN),
        manifest_sha256=sha256_of(root / MANIFEST),
    )


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a bundle is a folder that `defense export` wrote")
    manifest = folders.read_manifest(path, SCHEMA, "a bundle")
    if manifest.get("kind") != KIND:
        raise CheckpointError(f"{path} is not the manifest of a bundle; `defense export` writes one")
    return folders.typed(str(path), manifest, _FIELDS)


def check_files(root: Path, entries: Mapping[str, Any], verify: Verify) -> None:
    """Hold the files of a folder against the entries of its manifest.

    Raises:
        CheckpointError: A file is missing, unexpected, of another size, or a link that leads out of the folder.
        IntegrityError: A file's bytes are not the ones that were written.
    """
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if not path.is_dir()} - {MANIFEST}
    for name in sorted(set(entries) | present):
        if name not in present:
            raise CheckpointError(f"{root / name} is missing, though the manifest lists it")
        if name not in entries:
            raise CheckpointError(f"{root / name} is not in the manifest; remove it")
    for name, fields in entries.items():
        path = folders.own_file(root, name)
        entry = folders.typed(f"the manifest's entry for {name}", fields, _FILE_FIELDS)
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['size']}")
        if verify == "sha256" and (got := sha256_of(path)) != entry["sha256"]:
            raise IntegrityError(str(path), entry["sha256"], got)


def describe_defense(defense: Defense) -> dict[str, Any]:
    """Return what a bundle tells of the defense inside it, as JSON values."""
    return {
        "manifest_sha256": defense.manifest_sha256,
        "sites": [
            {
                "hook_point": site.hook_point,
                "act": site.sae_config.act,
                "d_sae": site.sae_config.d_sae,
                "sets": [
                    {"name": each.name, "latents": len(each.latents), "edit": each.edit, "scope": each.scope}
                    for each in site.sets
                ],
            }
            for site in defense.sites
        ],
    }
