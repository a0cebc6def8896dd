"""Folders and files that are written whole or not at all, and folders whose every byte is checked when they are read.

Such a folder has a manifest: a JSON file with a schema, what the folder holds, and under "files" the hash and the size
of each other file. Every kind of folder (a defense, an SAE, a catalogue, residuals, a bundle) names its manifest and
its schema itself, and reads what is its own; what they have in common is here.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import numpy as np
import safetensors
from safetensors.numpy import load_file

from defense.errors import CheckpointError, ConfigError, DefenseError, IntegrityError, NonFiniteError, NotThereError

from .atomic import check_writable, exclusive, led_to, publishing, replacing, restore, write_tensors

__all__ = [
    "Verify",
    "check_files",
    "check_verify",
    "check_writable",
    "file_entries",
    "file_entry",
    "led_to",
    "own_file",
    "package_version",
    "publishing",
    "read_files",
    "read_manifest",
    "read_tensors",
    "read_whole",
    "replacing",
    "restore",
    "sha256_of",
    "typed",
    "writable_target",
    "write_manifest",
    "write_tensors",
]

T = TypeVar("T")

Verify = Literal["sha256", "size"]
_FILE_FIELDS = {"sha256": str, "size": int}


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_entry(path: Path) -> dict[str, Any]:
    """Return what a manifest says of a file: its hash and its size in bytes."""
    return {"sha256": sha256_of(path), "size": path.stat().st_size}


def file_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """Return what a manifest says of every file in a folder, at any depth, by its path from there with "/"."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): file_entry(path) for path in files}


def package_version() -> str:
    """Return the version of clip-defense that is running."""
    try:
        return version("clip-defense")
    except PackageNotFoundError:
        return "0"  # a checkout that was never installed


def lacks_manifest(path: Path, what: str) -> CheckpointError:
    """Return the error for a folder without its manifest, or for a file; `NotThereError` where there is neither.

    Args:
        path: Of the manifest.
        what: What has one, and what writes it, for the message.
    """
    if not path.parent.exists():
        return NotThereError(f"{path.parent} is not there; check the path: {what}")
    if not path.parent.is_dir():
        return CheckpointError(f"{path.parent} is a file; {what}")
    return CheckpointError(f"{path} is missing; {what}")


def writable_target(
    folder: str | os.PathLike[str], what: str, manifest: str, files: Callable[[Path], Iterable[str]]
) -> Path:
    """Return the absolute path of a folder that may be written, or replaced as a whole.

    It may if it is not there, is empty, or holds what such a folder holds and nothing else.

    Args:
        folder: Where to.
        what: What may be replaced there, for the message.
        manifest: The file that such a thing is known by.
        files: Names of the other files of one that is there; raises `CheckpointError` where it is none.

    Raises:
        ConfigError: It is there and holds something else, its parent is not there, or links to it lead nowhere.
        OSError: See `check_writable`.
    """
    target = led_to(folder)
    restore(target)
    with exclusive(target.parent, is_shared=True):  # not between two renames of another writer
        is_replaceable = _is_replaceable(target, manifest, files)
    if not is_replaceable:
        raise ConfigError(f"{target} exists and is no {what}, or holds other files too; choose another folder")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not there, so {target.name} cannot be written into it; make it first")
    check_writable(target.parent)
    return target


def _is_replaceable(target: Path, manifest: str, files: Callable[[Path], Iterable[str]]) -> bool:
    """Return whether a path is free, an empty folder, or one with just a manifest and files that the manifest lists.

    The files may be damaged, or some of them missing.
    """
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


def write_manifest(path: Path, schema: int, fields: Mapping[str, Any], what: str) -> None:
    """Write a folder's JSON, last of its files, and let who may read it read the others too.

    Args:
        path: Where to.
        schema: Of the manifest; it and the version of this package come first in it.
        fields: What the manifest says beside these; under "files" the entries of the other files.
        what: What the folder is, for the message.

    Raises:
        ConfigError: A value has no JSON form.
    """
    manifest = {"schema": schema, "package_version": package_version(), **fields}
    try:
        text = json.dumps(manifest, indent=1, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what} cannot be written as JSON: {error}") from error
    path.write_text(text + "\n", encoding="utf-8")
    for name in fields["files"]:
        shutil.copymode(path, path.parent / name)  # safetensors gives only its owner leave to read


def check_verify(verify: str) -> None:
    """Raise `ConfigError` where it is not one of `Verify`."""
    if verify not in get_args(Verify):
        raise ConfigError(f"verify={verify!r}; it must be one of {', '.join(get_args(Verify))}")


def read_whole(manifest: Path, schema: int, read: Callable[[], T]) -> T:
    """Return what `read` makes of a folder, all of it from one state of the folder, whoever replaces it meanwhile.

    A folder that a process left under another name when it was killed (`publishing`) is restored first.

    Args:
        manifest: The manifest's path, for the message; the folder is its parent.
        schema: Of the manifest, for the message.
        read: Reads the folder.

    Raises:
        CheckpointError: In place of whatever reading can raise. Other errors of this package than `ConfigError` pass
            as they are: they name the file themselves.
    """
    root = manifest.parent
    restore(root)
    before = _state(root)
    if before is not None:  # else another process may be between its two renames
        try:
            with _reading(manifest, schema):
                found = read()
            if _state(root) == before:
                return found
        except DefenseError:
            if _state(root) == before:
                raise
    with exclusive(root.parent, is_shared=True), _reading(manifest, schema):  # nobody can replace it now
        return read()


def _state(folder: Path) -> tuple[int, ...] | None:
    """Return what tells a folder from one that takes its place; None where there is none.

    The number alone does not: a file system soon gives that of a deleted folder to a new one.
    """
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns


@contextmanager
def _reading(manifest: Path, schema: int) -> Iterator[None]:
    """Turn whatever reading a folder can raise in this context into `CheckpointError`."""
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
    """Return a value read from JSON, which is an object with exactly the given keys and values of the given types.

    Args:
        what: What it is, for the message.
        value: What was read.
        fields: Key -> type of its value, or a union of types. A bool is no int here.

    Raises:
        CheckpointError: It is something else.
    """
    if not isinstance(value, dict) or value.keys() != fields.keys():
        got = sorted(value) if isinstance(value, dict) else value
        raise CheckpointError(f"{what} has the keys {got!r}; this version has {sorted(fields)}")
    for key, kind in fields.items():
        is_bool = isinstance(value[key], bool) and bool not in (get_args(kind) or (kind,))
        if is_bool or not isinstance(value[key], kind):
            raise CheckpointError(f"{what}: {key} is {value[key]!r}; want {getattr(kind, '__name__', kind)}")
    return value


def read_manifest(path: Path, schema: int, what: str) -> dict[str, Any]:
    """Return a folder's JSON; of its keys only "schema" is checked.

    Args:
        path: The manifest's path.
        schema: The newest that can be read.
        what: What it would be the manifest of, for the message.

    Raises:
        CheckpointError: It is no JSON, has a key twice, states no schema, or a newer one.
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
    """Return the path of a file in a folder.

    Raises:
        CheckpointError: It is not there, is no regular file, or is a link that leads out of the folder; from a snapshot
            in the Hugging Face hub's cache it may lead to a blob of that cache.
    """
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


def check_files(manifest: Path, entries: Mapping[str, Any], verify: Verify, *, is_alone: bool = True) -> None:
    """Hold the files of a folder, at any depth, against the entries of its manifest.

    Args:
        manifest: The manifest's path.
        entries: What it has under "files".
        verify: "sha256" checks every byte of every file; "size" only the sizes.
        is_alone: Refuse whatever the manifest does not list. That is for folders which others than this package read: a
            server takes what it finds.

    Raises:
        CheckpointError: A file is missing, of another size, no file or a link that leads out of the folder; or, with
            `is_alone`, there is something in the folder that the manifest does not list.
        IntegrityError: A file's bytes are not the ones that were written (only with "sha256").
    """
    root = manifest.parent
    present = {path.relative_to(root).as_posix() for path in root.rglob("*") if _is_leaf(path)} - {manifest.name}
    for name in sorted(entries.keys() - present):
        raise CheckpointError(f"{root / name} is missing, though the manifest lists it")
    for name in sorted(present - entries.keys()) if is_alone else ():
        raise CheckpointError(f"{root / name} is not in the manifest; remove it")
    for name, fields in entries.items():
        path = own_file(root, name)
        entry = typed(f"the manifest's entry for {name}", fields, _FILE_FIELDS)
        if path.stat().st_size != entry["size"]:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['size']}")
        if verify == "sha256" and (got := sha256_of(path)) != entry["sha256"]:
            raise IntegrityError(str(path), entry["sha256"], got)


def _is_leaf(path: Path) -> bool:
    """Return whether nothing lies below a path: it is a file, a link or an empty folder."""
    return path.is_symlink() or not path.is_dir() or not any(path.iterdir())


def read_files(manifest: Path, entries: Mapping[str, Any], verify: Verify) -> dict[str, dict[str, np.ndarray]]:
    """Return the tensors of a folder whose files are all safetensors, by the file's name and the tensor's.

    What the manifest does not list, such as the card of a repository, is not opened.

    Args:
        manifest: See `check_files`.
        entries: See `check_files`.
        verify: See `check_files`.

    Raises:
        CheckpointError, IntegrityError: See `check_files`; or a file is no safetensors file, or a damaged one.
        NonFiniteError: A number is NaN or infinite.
    """
    check_files(manifest, entries, verify, is_alone=False)
    return {name: read_tensors(manifest.parent / name) for name in entries}


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """Return the tensors of a safetensors file, by name; all their numbers are finite.

    Raises:
        CheckpointError: It is no safetensors file, or a damaged one.
        NonFiniteError: A number is NaN or infinite.
    """
    try:
        tensors = load_file(path)
    except (safetensors.SafetensorError, OSError, KeyError, ValueError, AttributeError, TypeError) as error:
        # the last two: numbers that numpy does not know, such as float8 and bfloat16
        raise CheckpointError(f"{path} is not a readable safetensors file, or not of numpy's types: {error}") from error
    for name, tensor in tensors.items():
        if np.issubdtype(tensor.dtype, np.floating) and not np.isfinite(tensor).all():
            raise NonFiniteError(f"{path.name}: {name}")
    return tensors
