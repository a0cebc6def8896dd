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
from defense.errors import CheckpointError
from defense.export import manifest as values
from defense.hosts.defense import Defense
from defense.store import folders
from defense.store.defenses import MANIFEST
from defense.store.folders import Verify, read_tensors

SCHEMA = 1
BLANK_TOKENS = "blank_tokens"
_READ = (".onnx", ".onnx.data", ".safetensors")
KIND = "clip-defense ONNX bundle"
LABELS, GOLDEN, README, LICENSES = "labels.safetensors", "golden.safetensors", "README.md", "LICENCES.md"


@dataclass(frozen=True)
class Bundle:
    """A bundle whose files were checked.

    Attributes:
        folder: Where it is.
        clip: Which CLIP it is: the fields of `ClipId`, or for a stock CLIP its "sha256" alone.
        defense: What is edited and where, as `describe_defense` says; None for a stock CLIP.
        preprocess: How pictures are prepared.
        prompts: The labels that are baked in, and their templates.
        context_length: Ids per text of the text graph; None where the labels are fixed.
        logit_scale: Factor between cosines and logits.
        model: The vision graph, by its path in the folder.
        text_model: The text graph, or None.
        mode: How the defense is written in the graph; see the table in vision.py.
        dtype: "fp32", "fp16" or "int8".
        tolerance: How far the graph's answers may be from torch's: the fields of `verify.Tolerance`.
        parity: How far they were when the bundle was made: the fields of `verify.Parity`.
        license: Of the defense.
        text_embeds: Of the labels, float32 [n_labels, d_embed].
        blank_tokens: For each token id whether the text tower has no embedding for it, bool; None where unknown.
        golden: Reference answers: pictures uint8 [n, height, width, 3], image_embeds [n, d_embed].
        manifest_sha256: Of the manifest, which lists the hash of every other file: it names this bundle and no other.
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

    @property
    def set_names(self) -> tuple[str, ...]:
        """Names of the latent sets that the graph removes."""
        sites = () if self.defense is None else self.defense["sites"]
        return tuple(dict.fromkeys(each["name"] for site in sites for each in site["sets"]))


def is_bundle(folder: str | os.PathLike[str]) -> bool:
    """Return whether a folder says that it is a bundle (damaged or not)."""
    folders.restore(Path(folder))
    try:
        manifest = json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def write_manifest(folder: Path, fields: Mapping[str, Any]) -> None:
    """Write the manifest of a folder in which everything else is in place.

    Args:
        folder: The folder.
        fields: What a manifest of this schema holds, but for schema, kind, version and files.
    """
    fields = {"kind": KIND, **fields, "files": folders.file_entries(folder)}
    folders.write_manifest(folder / MANIFEST, SCHEMA, fields, "the bundle")


def load(folder: str | os.PathLike[str], *, verify: Verify = "sha256", is_served: bool = False) -> Bundle:
    """Return a bundle, after checking that nothing in its folder is missing, changed or there besides.

    Args:
        folder: The folder; also a snapshot in the Hugging Face hub's cache.
        verify: "sha256" checks every byte of every file; "size" only the sizes.
        is_served: Check the files that are read and no others: a server's operator changes its configuration, and the
            server leaves files behind.

    Raises:
        CheckpointError: A file is missing, unexpected or unreadable, was written by a newer version, or says what
            cannot be right.
        IntegrityError: A file's bytes are not the ones that were written.
        NonFiniteError: An embedding is NaN or infinite.
        ConfigError: `verify` is neither of the two.
    """
    folders.check_verify(verify)
    root = Path(folder)
    return folders.read_whole(root / MANIFEST, SCHEMA, lambda: _load(root, verify, is_served))


def _load(root: Path, verify: Verify, is_served: bool) -> Bundle:
    manifest = _read_manifest(root)
    entries = manifest["files"]
    if is_served:
        entries = {name: entry for name, entry in entries.items() if name.endswith(_READ)}
    folders.check_files(root / MANIFEST, entries, verify, is_alone=not is_served)
    for name in (manifest["model"], manifest["text_model"], LABELS, GOLDEN):
        if name is not None and name not in manifest["files"]:
            raise CheckpointError(f"{root / MANIFEST} names {name}, but does not list it among its files")
    prompts = values.check_values(manifest)
    tensors, golden = read_tensors(root / LABELS), read_tensors(root / GOLDEN)
    text_embeds = tensors["text_embeds"]
    values.check_embeds(f"{root / LABELS}: text_embeds", text_embeds, (len(prompts.labels), manifest["d_embed"]))
    values.check_blank_tokens(tensors.get(BLANK_TOKENS), str(root / LABELS))
    values.check_golden(golden, manifest["d_embed"], str(root / GOLDEN))
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
        tolerance=manifest["tolerance"],
        parity=manifest["parity"],
        license=manifest["licence"],
        text_embeds=text_embeds,
        blank_tokens=tensors.get(BLANK_TOKENS),
        golden=golden,
        manifest_sha256=folders.sha256_of(root / MANIFEST),
    )


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise folders.lacks_manifest(path, "a bundle is a folder that `defense export` wrote")
    manifest = folders.read_manifest(path, SCHEMA, "a bundle")
    if manifest.get("kind") != KIND:
        raise CheckpointError(f"{path} is not the manifest of a bundle; `defense export` writes one")
    return folders.typed(str(path), manifest, values.FIELDS)


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
                    {"name": each.name, "latents": len(each.latents), "edit": each.edit, "scope": each.tokens}
                    for each in site.sets
                ],
            }
            for site in defense.sites
        ],
    }
