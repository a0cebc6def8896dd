"""A defense, in memory and on disk: a folder of safetensors and JSON whose every byte is accounted for.

    manifest.json        schema, host, preprocess, sites (SAE semantics, latent sets), hash and size of each other file
    site-0.safetensors   the SAE at the first site; site-1 and so on for more
    golden.safetensors   three pictures with their plain and defended embeddings, as computed when the defense was made

Nothing here imports torch. Files are written to a temporary folder, read back, and only then given their name.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import safetensors
from safetensors.numpy import load_file, save_file

from .errors import CheckpointError, ConfigError, DefenseError, IntegrityError, NonFiniteError
from .images import Preprocess
from .latents import LatentSet

SCHEMA = 1
MANIFEST = "manifest.json"
_GOLDEN = "golden.safetensors"

Verify = Literal["sha256", "size"]

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
_FILE_FIELDS = {"sha256": str, "size": int}


@dataclass(frozen=True)
class HostSpec:
    """The CLIP that a defense was fitted on.

    Attributes:
        model: open_clip's name, e.g. "ViT-B-32", "hf-hub:..." or "embedded".
        pretrained: open_clip's tag; None where the name says it all.
        sha256: Fingerprint of the vision tower's weights (`hosts.VisionHost.fingerprint`).
        quick_gelu: Whether its MLPs use QuickGELU.
        d_model: Width of its residual stream.
        n_layers: Number of its blocks.
    """

    model: str
    pretrained: str | None
    sha256: str
    quick_gelu: bool
    d_model: int
    n_layers: int


@dataclass(frozen=True)
class Site:
    """One block that is edited.

    Attributes:
        hook_point: "blocks.{L}.hook_resid_post".
        sae_config: Fields of `sae.SAEConfig`.
        parameters: The SAE's tensors.
        sets: What is edited there.
    """

    hook_point: str
    sae_config: Mapping[str, Any]
    parameters: Mapping[str, np.ndarray]
    sets: tuple[LatentSet, ...]


@dataclass(frozen=True)
class Golden:
    """What the host must answer: three pictures and their normalised embeddings.

    Attributes:
        pictures: uint8 [3, height, width, 3].
        plain: Embeddings without the defense, float32 [3, d_embed].
        defended: Embeddings with it, float32 [3, d_embed].
    """

    pictures: np.ndarray
    plain: np.ndarray
    defended: np.ndarray


@dataclass(frozen=True)
class Defense:
    """Everything that turns a stock CLIP into a defended one.

    Attributes:
        host: The CLIP it was fitted on.
        preprocess: How that CLIP's pictures are prepared.
        sites: The blocks that are edited.
        golden: Reference answers; None before they were computed.
        licence: SPDX identifier, or a sentence.
        provenance: How it was made, and what was measured.
        manifest_sha256: Of the manifest it was read from; None for one that was not read from disk.
    """

    host: HostSpec
    preprocess: Preprocess
    sites: tuple[Site, ...]
    golden: Golden | None = None
    licence: str = "MIT"
    provenance: Mapping[str, Any] = field(default_factory=dict)
    manifest_sha256: str | None = field(default=None, compare=False)

    @property
    def sets(self) -> tuple[str, ...]:
        """Names of all latent sets, in order of their first appearance."""
        return tuple(dict.fromkeys(latent_set.name for site in self.sites for latent_set in site.sets))

    def only(self, *names: str) -> Defense:
        """Return the defense with just the named sets.

        Raises:
            ConfigError: There is no such set.
        """
        for name in names:
            if name not in self.sets:
                raise ConfigError(f"this defense has no set {name!r}; it has {', '.join(self.sets) or 'none'}")
        kept = [(site, tuple(s for s in site.sets if s.name in names)) for site in self.sites]
        sites = tuple(Site(site.hook_point, site.sae_config, site.parameters, sets) for site, sets in kept if sets)
        return Defense(self.host, self.preprocess, sites, None, self.licence, self.provenance)


def join(defenses: Sequence[Defense]) -> Defense:
    """Return one defense that does what several for the same host do; golden answers and provenance are left behind.

    Raises:
        ConfigError: There is none, or they are for different hosts or preparations of pictures, or two have a set of
            the same name.
    """
    if not defenses:
        raise ConfigError("no defenses to join; give at least one")
    first = defenses[0]
    for other in defenses[1:]:
        if (other.host, other.preprocess) != (first.host, first.preprocess):
            raise ConfigError(
                f"these defenses are for different hosts: {first.host.model} and {other.host.model}, weights "
                f"{first.host.sha256[:16]} and {other.host.sha256[:16]}"
            )
    names = [name for defense in defenses for name in defense.sets]
    repeated = [name for name, count in Counter(names).items() if count > 1]
    if repeated:
        raise ConfigError(f"several of these defenses have a set {repeated[0]!r}, so its name would mean two things")
    sites: list[Site] = []
    for site in (site for defense in defenses for site in defense.sites):
        place = next((i for i, there in enumerate(sites) if _has_same_sae(there, site)), None)
        if place is None:
            sites.append(site)
        else:  # one site, where a latent of several sets is edited once
            sites[place] = replace(sites[place], sets=sites[place].sets + site.sets)
    licence = ", ".join(dict.fromkeys(defense.licence for defense in defenses))
    return Defense(first.host, first.preprocess, tuple(sites), licence=licence)


def _has_same_sae(a: Site, b: Site) -> bool:
    return (a.hook_point, dict(a.sae_config), a.parameters.keys()) == (
        b.hook_point, dict(b.sae_config), b.parameters.keys()
    ) and all(np.array_equal(a.parameters[name], b.parameters[name]) for name in a.parameters)  # fmt: skip


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
    """
    target = check_target(folder)
    publish(target, lambda staging: _write(defense, staging, dtype), load)
    return Path(folder)


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that `save` could write now.

    Raises:
        ConfigError: It is there and holds something else than a defense, or its parent is not there.
    """
    return writable_target(folder, "defense", MANIFEST, lambda target: _typed_manifest(target)["files"])


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
        save_file(tensors, folder / name)
    manifest = {
        "schema": SCHEMA,
        "package_version": package_version(),
        "host": asdict(defense.host),
        "preprocess": defense.preprocess.to_dict(),
        "sites": [
            {
                "hook_point": site.hook_point,
                "sae": dict(site.sae_config),
                "sets": [latent_set.to_dict() for latent_set in site.sets],
            }
            for site in defense.sites
        ],
        "licence": defense.licence,
        "provenance": dict(defense.provenance),
        "files": {name: file_entry(folder / name) for name in files},
    }
    write_manifest(folder / MANIFEST, manifest, "the defense")


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


def _site_file(index: int) -> str:
    return f"site-{index}.safetensors"


def load(folder: str | os.PathLike[str], *, verify: Verify = "sha256") -> Defense:
    """Read a defense that `save` wrote.

    A file may be a link within the folder, or from a snapshot in the Hugging Face hub's cache to a blob of that cache;
    no other link is followed. What the SAE's numbers mean is checked where they are used (`sae.SparseAutoencoder`).

    Args:
        folder: The folder.
        verify: "sha256" checks every byte of every file; "size" only the sizes.

    Raises:
        CheckpointError: A file is missing, unexpected or unreadable, or was written by a newer version.
        IntegrityError: A file's bytes are not the ones that were written.
        NonFiniteError: A weight is NaN or infinite.
        ConfigError: `verify` is neither of the two.
    """
    check_verify(verify)
    root = Path(folder)
    with reading(root / MANIFEST, SCHEMA):
        return _load(root, verify)


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


def _load(root: Path, verify: Verify) -> Defense:
    manifest = _typed_manifest(root)
    manifest_sha256 = sha256_of(root / MANIFEST)
    fields = [typed(f"site {index}", site, _SITE_FIELDS) for index, site in enumerate(manifest["sites"])]
    site_files = [_site_file(index) for index in range(len(fields))]
    if set(manifest["files"]) - {_GOLDEN} != set(site_files):
        raise CheckpointError(
            f"{root / MANIFEST} lists the files {sorted(manifest['files'])}, but its sites have {site_files}; "
            f"beside them only {_GOLDEN} may be there"
        )
    tensors = read_files(root / MANIFEST, manifest["files"], verify)
    sites = tuple(
        Site(site["hook_point"], site["sae"], tensors[file], tuple(LatentSet.from_dict(each) for each in site["sets"]))
        for site, file in zip(fields, site_files, strict=True)
    )
    return Defense(
        HostSpec(**typed("host", manifest["host"], _HOST_FIELDS)),
        Preprocess.from_dict(manifest["preprocess"]),
        sites,
        Golden(**tensors[_GOLDEN]) if _GOLDEN in tensors else None,
        manifest["licence"],
        manifest["provenance"],
        manifest_sha256,
    )


def _typed_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a defense is a folder that `defense fit` or `artefact.save` wrote")
    return typed(str(path), read_manifest(path, SCHEMA, "a defense"), _MANIFEST_FIELDS)


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
