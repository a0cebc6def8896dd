"""A defense, in memory and on disk: a folder of safetensors and JSON whose every byte is accounted for.

    manifest.json        schema, host, preprocess, sites (SAE semantics, latent sets), hash and size of each other file
    site-0.safetensors   the SAE at the first site, or of a slim site the part that it holds; site-1 and so on for more
    golden.safetensors   three pictures with their plain and defended embeddings, as computed when the defense was made

Nothing here imports torch.
"""

from __future__ import annotations

import difflib
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from defense.core.config import SAEConfig
from defense.core.latents import LatentSet
from defense.data.preprocess import Preprocess
from defense.errors import CheckpointError, NotThereError
from defense.hosts import shipped
from defense.hosts.defense import ClipId, Defense, Golden, Part, Site

from . import folders
from .folders import Verify, typed
from .hub import SCHEME, Hub, hub_source

SCHEMA = 2
"""The newest that can be read. A defense without a slim site is written as schema 1, which older versions read too."""
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
    "stream_sha256": str | None,
}
_SINCE_FIRST = {"stream_sha256": None}
"""Keys of the host that a manifest may be without, as those of before they were there are -> what that means."""
_SITE_FIELDS = {"hook_point": str, "sae": dict, "sets": list}
_PART_FIELDS = {"latents": list, "hashes": list, "elsewhere": float | int | None}


def save(defense: Defense, folder: str | os.PathLike[str], *, dtype: type[np.floating] = np.float32) -> Path:
    """Write a defense as a folder, replacing one that is there, and return the folder.

    A failure leaves what was there before. The folder is replaced as a whole: a defense to which other files were added
    is refused, because they would be lost.

    Args:
        defense: What to write.
        folder: Where to; its parent must exist.
        dtype: Float type of the SAE's weights on disk. Thresholds stay float32, and so do the biases of a slim site.

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
                name: np.ascontiguousarray(tensor, _stored_type(site, name, dtype))
                for name, tensor in site.parameters.items()
            }
    if defense.golden is not None:
        files[_GOLDEN] = {name: np.ascontiguousarray(array) for name, array in vars(defense.golden).items()}
    for name, tensors in files.items():
        folders.write_tensors(tensors, folder / name, save_file)
    fields = {
        "host": {key: value for key, value in asdict(defense.clip).items() if (key, value) not in _SINCE_FIRST.items()},
        "preprocess": defense.preprocess.to_dict(),
        "sites": [_site_fields(site) for site in defense.sites],
        "licence": defense.license,
        "provenance": dict(defense.provenance),
        "files": folders.file_entries(folder),
    }
    schema = 2 if any(site.part is not None for site in defense.sites) else 1
    folders.write_manifest(folder / MANIFEST, schema, fields, "the defense")


def _stored_type(site: Site, name: str, dtype: type[np.floating]) -> type[np.floating]:
    """Return the float type in which a tensor is stored. The biases of a slim site hold a sum, made in float32."""
    is_exact = name == "threshold" or (site.part is not None and name in ("b_enc", "b_mag"))
    return np.float32 if is_exact else dtype


def _site_fields(site: Site) -> dict[str, Any]:
    """Return what the manifest says of a site; only of a slim one, which part it holds."""
    fields = {
        "hook_point": site.hook_point,
        "sae": site.sae_config.to_dict(),
        "sets": [latent_set.to_dict() for latent_set in site.sets],
    }
    return fields if site.part is None else {**fields, "part": asdict(site.part)}


def _site_of(where: str, given: Any, tensors: dict[str, np.ndarray]) -> Site:
    """Return the site that `_site_fields` describes."""
    is_slim = isinstance(given, dict) and "part" in given
    fields = typed(where, given, _SITE_FIELDS | ({"part": dict} if is_slim else {}))
    sets = tuple(LatentSet.from_dict(each) for each in fields["sets"])
    config = SAEConfig.from_dict(fields["sae"])
    return Site(fields["hook_point"], config, tensors, sets, _part_of(where, fields["part"]) if is_slim else None)


def _part_of(where: str, given: Any) -> Part:
    part = typed(f"the part of {where}", given, _PART_FIELDS)
    latents, hashes = part["latents"], part["hashes"]
    if not all(type(latent) is int for latent in latents) or not (
        len(hashes) == 2 and all(isinstance(each, str) for each in hashes)
    ):
        raise CheckpointError(f"the part of {where} needs latents that are whole numbers and two hashes")
    elsewhere = part["elsewhere"]
    return Part(tuple(latents), (hashes[0], hashes[1]), None if elsewhere is None else float(elsewhere))


def _site_file(index: int | str) -> str:
    return f"site-{index}.safetensors"


def files_of(folder: str | os.PathLike[str]) -> list[str]:
    """Return the names of a defense's files: its manifest, and what that lists.

    Raises:
        CheckpointError: It is no defense.
    """
    return [MANIFEST, *_read_manifest(Path(folder))["files"]]


def load(folder: str | os.PathLike[str], *, verify: Verify = "sha256") -> Defense:
    """Read a defense that `save` wrote.

    A file may be a link within the folder, or from a snapshot in the Hugging Face hub's cache to a blob of that cache;
    no other link is followed. What the SAE's numbers mean is checked where they are used (`SparseAutoencoder`).

    Args:
        folder: The folder.
        verify: "sha256" checks every byte of every file; "size" only the sizes.

    Raises:
        CheckpointError: A file is missing or unreadable, or was written by a newer version.
        IntegrityError: A file's bytes are not the ones that were written.
        NonFiniteError: A weight is NaN or infinite.
        ConfigError: `verify` is neither of the two.
    """
    folders.check_verify(verify)
    root = Path(folder)
    return folders.read_whole(root / MANIFEST, SCHEMA, lambda: _load(root, verify))


def _load(root: Path, verify: Verify) -> Defense:
    manifest = _read_manifest(root)
    site_files = [_site_file(index) for index in range(len(manifest["sites"]))]
    if set(manifest["files"]) - {_GOLDEN} != set(site_files):
        raise CheckpointError(
            f"{root / MANIFEST} lists the files {sorted(manifest['files'])}, but its sites have {site_files}; "
            f"beside them only {_GOLDEN} may be there"
        )
    for path in (*root.glob(_site_file("*")), *root.glob(_GOLDEN)):
        if path.name not in manifest["files"]:
            raise CheckpointError(f"{path} is a defense's, and {MANIFEST} does not list it: one of them was changed")
    tensors = folders.read_files(root / MANIFEST, manifest["files"], verify)
    sites = tuple(
        _site_of(f"site {index}", site, tensors[file])
        for index, (site, file) in enumerate(zip(manifest["sites"], site_files, strict=True))
    )
    defense = Defense(
        ClipId(**typed("host", {**_SINCE_FIRST, **manifest["host"]}, _HOST_FIELDS)),
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
        raise folders.lacks_manifest(path, "a defense is a folder that `defense fit` or `defenses.save` wrote")
    return typed(str(path), folders.read_manifest(path, SCHEMA, "a defense"), _MANIFEST_FIELDS)


def find_defense(
    source: str | os.PathLike[str],
    *,
    revision: str | None = None,
    cache_dir: str | None = None,
    local_files_only: bool = False,
    token: str | None = None,
) -> Defense:
    """Load a defense by name: "photo" or "embedded:waterbirds" (shipped.py), a folder, or on the hub (hub.py).

    Args:
        source: The name; "hf://org/repo[/folder][@revision]" or "org/repo" on the hub.
        revision: Commit, branch or tag on the hub, where the name has none.
        cache_dir: Where hub files are kept.
        local_files_only: Do not use the network.
        token: For private hub repositories.

    Raises:
        NotThereError: There is no such defense.
        CheckpointError: It cannot be used.
        ConfigError: An address on the hub of another form, or two revisions.
    """
    ours = shipped.find(source)
    if ours is not None:
        shipped.check_there(ours.model)
        if ours.defense not in ours.model.defenses:
            raise NotThereError(
                f"the {ours.model.name} model has no defense {ours.defense!r}; it has {', '.join(ours.model.defenses)}"
            )
        return load(ours.model.folder(ours.defense))
    address = hub_source(source)
    if address is not None:
        hub = Hub(cache_dir, local_files_only, token)
        try:
            return load(hub.fetch_folder(address.at(revision), MANIFEST, "a defense"))
        except CheckpointError as error:
            if type(error) is not CheckpointError or str(source).startswith(SCHEME):
                raise
            raise CheckpointError(f"there is no folder {source} here, so the hub was asked for it: {error}") from error
    if not folders.restore(Path(source)):
        ships = [name if task == "text" else f"{name}:{task}" for name, model in shipped.MODELS.items()
                 for task in model.defenses]  # fmt: skip
        near = difflib.get_close_matches(str(source), ships, n=1)
        raise NotThereError(
            f"{source} is not there; check the name: it is neither a folder, nor a hub id ('org/repo'), nor one that "
            f"ships ({', '.join(ships)})" + (f". Did you mean {near[0]}?" if near else "")
        )
    return load(source)
