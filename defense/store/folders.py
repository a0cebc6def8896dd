"""Folders of safetensors and JSON, written whole or not at all, and read with every byte checked.

A folder has a manifest (JSON) with schema, hash and size of each other file. It is written beside its final place, read
back, and only then given its name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors
from safetensors.numpy import load_file

from defense.errors import CheckpointError, ConfigError, DefenseError, IntegrityError, NonFiniteError

Verify = Literal["sha256", "size"]
_FILE_FIELDS = {"sha256": str, "size": int}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file: its hash and size."""
    return {"sha256": sha256_of(path), "size": path.stat().st_size}


def package_version() -> str:
    """Return the version of clip-defense that is running."""
    try:
        return version("clip-defense")
    except PackageNotFoundError:
        return "0"  # a checkout that was never installed


def writable_target(
    folder: str | os.PathLike[str], what: str, manifest: str, files: Callable[[Path], Iterable[str]]
) -> Path:
    """Return the absolute path of a folder that may be written, or replaced as a whole.

    Args:
        folder: Where to.
        what: What may be replaced there, for the message.
        manifest: The file that such a thing is known by.
        files: Names of the other files of one that is there.

    Raises:
        ConfigError: It is there and holds something else, or its parent is not there.
    """
    target = Path(folder).resolve()  # through a link: what it leads to is replaced, not the link
    if not _is_replaceable(target, manifest, files):
        raise ConfigError(f"{target} exists and is no {what}, or holds other files too; choose another folder")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not there, so {target.name} cannot be written into it; make it first")
    return target


def publish(target: Path, write: Callable[[Path], None], read: Callable[[Path], object]) -> None:
    """Write a folder beside its final place, read it back, and only then give it its name.

    A failure leaves what was there before.

    Args:
        target: The folder's final place; what is there is replaced as a whole.
        write: Fills an empty folder.
        read: Reads the folder; raises where it is not what it should be.
    """
    workshop = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    staging, retired = workshop / "new", workshop.with_name(f"{workshop.name}.old")
    try:
        staging.mkdir()  # not `workshop` itself: only its owner may read that
        write(staging)
        read(staging)
        try:
            if target.exists():
                target.rename(retired)
            staging.rename(target)
        except BaseException:
            if retired.exists() and not target.exists():
                retired.rename(target)
            raise
    finally:
        shutil.rmtree(workshop, ignore_errors=True)
    if retired.exists():
        shutil.rmtree(retired)


def _is_replaceable(target: Path, manifest: str, files: Callable[[Path], Iterable[str]]) -> bool:
    """Whether a path is free, an empty folder, or holds just a manifest (damaged or not) and the files it lists."""
    if not target.exists():
        return True
    if not target.is_dir():
        return False
    present = {path.name for path in target.iterdir()}
    if not present:
        return True
    try:
        return present <= {manifest, *files(target)}
    except CheckpointError:
        return False


def write_manifest(path: Path, manifest: Mapping[str, Any], what: str) -> None:
    """Write a folder's JSON, last of its files, and let who may read it read the others too.

    Raises:
        ConfigError: A value has no JSON form; the message calls its owner `what`.
    """
    try:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")
    for name in manifest["files"]:
        shutil.copymode(path, path.with_name(name))  # safetensors gives only its owner leave to read


def check_verify(verify: str) -> None:
    """Raise `ConfigError` where it is not one of `Verify`."""
    if verify not in get_args(Verify):
        raise ConfigError(f"verify={verify!r}; it must be one of {', '.join(get_args(Verify))}")


@contextmanager
def reading(manifest: Path, schema: int) -> Iterator[None]:
    """Turn whatever reading a folder by its manifest can raise into `CheckpointError`, with the file's name."""
    try:
        yield
    except ConfigError as error:
        raise CheckpointError(f"{manifest}: {error}") from error
    except DefenseError:
        raise
    except OSError as error:
        raise CheckpointError(f"{manifest.parent} cannot be read: {error}") from error
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise CheckpointError(f"{manifest} does not have the values of schema {schema}: {error!r}") from error


def typed(what: str, value: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return a JSON object that has exactly the given keys, with values of the given types.

    Raises:
        CheckpointError: It has not.
    """
    if not isinstance(value, dict) or value.keys() != fields.keys():
        got = sorted(value) if isinstance(value, dict) else value
        raise CheckpointError(f"{what} has the keys {got!r}; this version has {sorted(fields)}")
    for key, kind in fields.items():
        if not isinstance(value[key], kind) or (kind is int and isinstance(value[key], bool)):
            raise CheckpointError(f"{what}: {key} is {value[key]!r}; want {getattr(kind, '__name__', kind)}")
    return value


def read_manifest(path: Path, schema: int, what: str) -> dict[str, Any]:
    """Read a folder's JSON, up to a schema.

    Raises:
        CheckpointError: It is no JSON, states no schema, or a newer one; `what` says what it would be the manifest of.
    """
    try:
        text = own_file(path.parent, path.name).read_text(encoding="utf-8")
        manifest = json.loads(text, object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    if not isinstance(manifest, dict) or type(manifest.get("schema")) is not int or manifest["schema"] < 1:
        raise CheckpointError(f"{path} states no schema; it is not the manifest of {what}")
    if manifest["schema"] > schema:
        raise CheckpointError(
            f"{path} has schema {manifest['schema']}; this version reads up to {schema}. "
            f"It was written by clip-defense {manifest.get('package_version')}: install that or a newer one"
        )
    return manifest


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError(f"a key is there twice, among {sorted(key for key, _ in pairs)}")
    return fields


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON number")


def own_file(root: Path, name: str) -> Path:
    """Return the path of a regular file that belongs to the folder."""
    path, home = root / name, root.resolve()
    homes = [home]
    if home.parent.name == "snapshots":
        # <cache>/<repo>/snapshots/<commit>/<name> -> <cache>/<repo>/blobs/<etag>, itself a link to <cache>/blobs/<xet>
        homes += [folder / "blobs" for folder in home.parents[1:3]]
    if not path.is_file():
        raise CheckpointError(f"{path} is not a regular file")
    if not any(path.resolve().is_relative_to(folder) for folder in homes):
        raise CheckpointError(f"{path} is a link that leads out of the folder; put the file itself there")
    return path


def read_files(manifest: Path, entries: dict[str, Any], verify: Verify) -> dict[str, dict[str, np.ndarray]]:
    """Read the safetensors files that a manifest lists: name -> tensors.

    Raises:
        CheckpointError: One is missing, damaged or of another size, or there is one that the manifest does not list.
        IntegrityError: Its bytes are not those that were written (only with "sha256").
        NonFiniteError: A number is NaN or infinite.
    """
    root = manifest.parent
    present = {path.name for path in root.iterdir()} - {manifest.name}
    for name in sorted(set(entries) | present):
        if name not in present:
            raise CheckpointError(f"{root / name} is missing, though the manifest lists it")
        if name not in entries:
            raise CheckpointError(f"{root / name} is not in the manifest; remove it")
    tensors = {}
    for name, fields in entries.items():
        path = own_file(root, name)
        entry = typed(f"the manifest's entry for {name}", fields, _FILE_FIELDS)
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['size']}")
        if verify == "sha256" and (got := sha256_of(path)) != entry["sha256"]:
            raise IntegrityError(str(path), entry["sha256"], got)
        tensors[name] = read_tensors(path)
    return tensors


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Read a safetensors file whose numbers are all finite.

    Raises:
        CheckpointError: It is no safetensors file, or a damaged one.
        NonFiniteError: A number is NaN or infinite.
    """
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}") from error
    for name, tensor in tensors.items():
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            raise NonFiniteError(f"{path.name}: {name}")
    return tensors
