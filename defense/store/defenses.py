"""A defense, in memory and on disk: a folder of safetensors and JSON whose every byte is accounted for.

    manifest.json        schema, host, preprocess, sites (SAE semantics, latent sets), hash and size of each other file
    site-0.safetensors   the SAE at the first site; site-1 and so on for more
    golden.safetensors   three pictures with their plain and defended embeddings, as computed when the defense was made

Nothing here imports torch.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.errors import CheckpointError
from defense.hosts.clip import EMBEDDED, embedded_folder
from defense.hosts.defense import ClipId, Defense, Golden, Site

from . import folders
from .folders import Verify, typed

SCHEMA = 1
MANIFEST = "manifest.json"
_GOLDEN = "golden.safetensors"

# What a manifest of this schema holds: key -> type of its value.
_MANIFEST_FIELDS = {
    "schema": int,
    "package_version": str,
    "host": dict,
    "preprocess": dict,
    "sites": list,
    "licence": str,
    "provenance": dict,
    "files": dict,
}
_HOST_FIELDS = {
    "model": str,
    "pretrained": str | None,
    "sha256": str,
    "quick_gelu": bool,
    "d_model": int,
    "n_layers": int,
}
_SITE_FIELDS = {"hook_point": str, "sae": dict, "sets": list}


def save(defense: Defense, folder: str | os.PathLike[str], *, dtype: type[np.floating] = np.float32) -> Path:
    """Write a defense as a folder, replacing one that is there, and return the folder.

    A failure leaves what was there before. The folder is replaced as a whole: a defense to which other files were added
    is refused, because they would be lost.

    Args:
        defense: What to write.
        folder: Where to; its parent must exist.
        dtype: Float type of the SAE's weights on disk. Thresholds stay float32.

    Raises:
        ConfigError: `folder` is there and holds something else than a defense, or a field of the defense cannot be
            written as JSON.
        NonFiniteError: A weight is NaN or infinite, or becomes so in `dtype`.
        OSError: There is no space left, say.
    """
    with folders.publishing(check_target(folder), read=load) as staging:
        _write(defense, staging, dtype)
    return Path(folder)


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that `save` could write now.

    Raises:
        ConfigError: It is there and holds something else than a defense, or its parent is not there.
    """
    return folders.writable_target(folder, "defense", MANIFEST, lambda target: _read_manifest(target)["files"])


def _write(defense: Defense, folder: Path, dtype: type[np.floating]) -> None:
    files: dict[str, dict[str, np.ndarray]] = {}
    for index, site in enumerate(defense.sites):
        with np.errstate(over="ignore"):  # `load` refuses the infinities
            files[_site_file(index)] = {
                name: np.ascontiguousarray(tensor, np.float32 if name == "threshold" else dtype)
                for name, tensor in site.parameters.items()
            }
    if defense.golden is not None:
        files[_GOLDEN] = {name: np.ascontiguousarray(array) for name, array in vars(defense.golden).items()}
    for name, tensors in files.items():
        folders.write_tensors(tensors, folder / name, save_file)
    fields = {
        "host": asdict(defense.clip),
        "preprocess": defense.preprocess.to_dict(),
        "sites": [
            {
                "hook_point": site.hook_point,
                "sae": site.sae_config.to_dict(),
                "sets": [latent_set.to_dict() for latent_set in site.sets],
            }
            for site in defense.sites
        ],
        "licence": defense.license,
        "provenance": dict(defense.provenance),
        "files": folders.file_entries(folder),
    }
    folders.write_manifest(folder / MANIFEST, SCHEMA, fields, "the defense")


def _site_file(index: int) -> str:
    return f"site-{index}.safetensors"


def load(folder: str | os.PathLike[str], *, verify: Verify = "sha256") -> Defense:
    """Read a defense that `save` wrote.

    A file may be a link within the folder, or from a snapshot in the Hugging Face hub's cache to a blob of that cache;
    no other link is followed. What the SAE's numbers mean is checked where they are used (`SparseAutoencoder`).

    Args:
        folder: The folder.
        verify: "sha256" checks every byte of every file; "size" only the sizes.

    Raises:
        CheckpointError: A file is missing, unexpected or unreadable, or was written by a newer version.
        IntegrityError: A file's bytes are not the ones that were written.
        NonFiniteError: A weight is NaN or infinite.
        ConfigError: `verify` is neither of the two.
    """
    folders.check_verify(verify)
    root = Path(folder)
    return folders.read_whole(root / MANIFEST, SCHEMA, lambda: _load(root, verify))


def _load(root: Path, verify: Verify) -> Defense:
    manifest = _read_manifest(root)
    fields = [typed(f"site {index}", site, _SITE_FIELDS) for index, site in enumerate(manifest["sites"])]
    site_files = [_site_file(index) for index in range(len(fields))]
    if set(manifest["files"]) - {_GOLDEN} != set(site_files):
        raise CheckpointError(
            f"{root / MANIFEST} lists the files {sorted(manifest['files'])}, but its sites have {site_files}; "
            f"beside them only {_GOLDEN} may be there"
        )
    tensors = folders.read_files(root / MANIFEST, manifest["files"], verify)
    sites = tuple(
        Site(
            site["hook_point"],
            SAEConfig.from_dict(site["sae"]),
            tensors[file],
            tuple(LatentSet.from_dict(each) for each in site["sets"]),
        )
        for site, file in zip(fields, site_files, strict=True)
    )
    defense = Defense(
        ClipId(**typed("host", manifest["host"], _HOST_FIELDS)),
        Preprocess.from_dict(manifest["preprocess"]),
        sites,
        Golden(**tensors[_GOLDEN]) if _GOLDEN in tensors else None,
        manifest["licence"],
        manifest["provenance"],
    )
    # No argument of `Defense`: `dataclasses.replace` would hand it on to a defense that this manifest is not of.
    object.__setattr__(defense, "manifest_sha256", folders.sha256_of(root / MANIFEST))
    return defense


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a defense is a folder that `defense fit` or `defenses.save` wrote")
    return typed(str(path), folders.read_manifest(path, SCHEMA, "a defense"), _MANIFEST_FIELDS)


def embedded_defenses() -> tuple[str, ...]:
    """Return the names of the embedded model's defenses: "text" is "embedded", the others are "embedded:NAME"."""
    return tuple(sorted(path.parent.name for path in embedded_folder(".").glob(f"*/{MANIFEST}")))


def find_defense(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Defense:
    """Load a defense by name: "embedded" or "embedded:NAME", a folder, or a hub id ("org/repo").

    Raises:
        CheckpointError: There is no such defense, or it cannot be used.
    """
    if str(source).split(":")[0] == EMBEDDED:
        name = str(source).partition(":")[2] or "text"
        if name not in embedded_defenses():
            raise CheckpointError(
                f"the embedded model has no defense {name!r}; it has {', '.join(embedded_defenses())}"
            )
        return load(embedded_folder(name))
    path = Path(source)
    if folders.restore(path):
        return load(path)
    if str(source).count("/") != 1 or str(source).startswith((".", "/", "~")):
        raise CheckpointError(
            f"no defense at {source}: it is neither a folder, nor a hub id ('org/repo'), nor 'embedded'"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        folder = snapshot_download(
            str(source), revision=revision, cache_dir=cache_dir, local_files_only=local_files_only, token=token,
            allow_patterns=["*.json", "*.safetensors"], etag_timeout=10,
        )  # fmt: skip
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise CheckpointError(f"no folder {source}, and the hub did not give {source!r}: {error}") from error
    return load(folder)
