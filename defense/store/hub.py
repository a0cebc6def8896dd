"""Files of the Hugging Face hub, fetched once and checked: `hf://org/repo[/file][@revision]`, or `org/repo`.

The client's cache comes first. A source without a revision is what the cache has of it, where that is complete: add
`@main` to ask for what is newest. A revision that is no commit is looked up anew each time, and where the hub cannot be
reached, what the cache has of it is taken and that is logged.

All files of one source are of one commit. Each is held against the hash that the hub knows it by, whenever it is used:
the cache names a file by that hash (sha256 for a large file, git's own for a small one). What does not agree is removed
from the cache, so that nothing damaged stays behind.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from defense.errors import CheckpointError, ConfigError

from .folders import replacing, sha256_of
from .hub_failures import UnreachableError, failures

log = logging.getLogger(__name__)

SCHEME = "hf://"
WEIGHTS = (".safetensors", ".pt", ".pth", ".pkl", ".pkl.gz", ".bin", ".ckpt")
"""How names of files with weights end."""
COMPANIONS = re.compile(r"sparsity|whitening|activations_store|trainer_state|optimizer")
"""Found in the names of files that lie beside the weights of an SAE and are none."""
PICKLES = tuple(suffix for suffix in WEIGHTS if suffix != ".safetensors")

_REPO = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_SOURCE = re.compile(rf"hf://(?P<repo>{_REPO})(?:/(?P<file>[^@]+?))?/?(?:@(?P<revision>.+))?")
_COMMIT = re.compile("[0-9a-f]{40}")
_GRAMMAR = "hf://org/repo[/file][@revision]"
_SMALL = 2**20
"""Bytes of a JSON file that may be a configuration."""


class HubSource(NamedTuple):
    """A repository on the hub, or a file or folder in it."""

    repo: str
    file: str | None = None
    revision: str | None = None

    def __str__(self) -> str:
        file = "" if self.file is None else f"/{self.file}"
        return f"{SCHEME}{self.repo}{file}" + ("" if self.revision is None else f"@{self.revision}")

    def at(self, revision: str | None) -> HubSource:
        """Return the same at a revision that is stated beside it, if any.

        Raises:
            ConfigError: It states another one itself.
        """
        if revision is not None and self.revision not in (None, revision):
            raise ConfigError(f"{self} names a revision, and revision={revision!r} is another; give one of them")
        return self if revision is None else self._replace(revision=revision)


def hub_source(text: str | os.PathLike[str]) -> HubSource | None:
    """Return what a text names on the hub; None where it is a path.

    A path that exists is always taken for a path; so is "org/repo" where "org" is a folder here, or where it ends as a
    file of weights does: a slip of the pen should not use the network.

    Raises:
        ConfigError: It starts with "hf://" and is not of that form.
    """
    text = str(text)
    if text.startswith(SCHEME):
        match = _SOURCE.fullmatch(text)
        if match is None or ".." in PurePosixPath(match["file"] or "").parts:
            raise ConfigError(f"{text} is no address on the hub; want {_GRAMMAR}")
        return HubSource(match["repo"], match["file"], match["revision"])
    is_path = Path(text).exists() or Path(text).parent.is_dir() or text.endswith(WEIGHTS)
    return HubSource(text) if re.fullmatch(_REPO, text) and not is_path else None


class Entry(NamedTuple):
    """What the hub says of a file: its bytes, and its sha256 where it knows it."""

    size: int | None
    sha256: str | None


_UNKNOWN = Entry(None, None)


@dataclass(frozen=True)
class Listing:
    """A repository at one commit, as the hub lists it."""

    source: HubSource
    commit: str
    files: Mapping[str, Entry]

    def holds(self) -> str:
        """Return a few of its files in words, for a message."""
        names = sorted(self.files)
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return f"it holds {shown}" if names else "it is empty"


@dataclass(frozen=True)
class Hub:
    """The hub, and how it may be asked.

    Attributes:
        cache_dir: Where files are kept; the client's own folder by default.
        local_files_only: Do not use the network.
        token: For private repositories; by default the one that the client is logged in with.
        report: Called with a line before a download starts.
    """

    cache_dir: str | None = None
    local_files_only: bool = False
    token: str | None = None
    report: Callable[[str], None] = log.info

    # --- what is asked for ---

    def fetch_folder(self, source: HubSource, manifest: str, what: str) -> Path:
        """Return a folder with a manifest and the files that it lists, and with nothing else of the repository.

        Args:
            source: A repository, or a folder in it.
            manifest: Name of the manifest, whose "files" has the names of the others.
            what: What has such a manifest, for messages, e.g. "a defense".

        Raises:
            CheckpointError: It is not there, is none, or cannot be fetched; the message says what to do.
            ConfigError: There is no room for it.
        """
        prefix = "" if source.file is None else f"{source.file}/"
        cached = self._cached(source, prefix + manifest)
        if cached is not None:
            files = {name: self._cached(source, prefix + name) for name in [manifest, *_listed(cached)]}
            present = {name: path for name, path in files.items() if path is not None}
            if len(present) == len(files):
                for name, path in present.items():
                    self._check(source, prefix + name, path)
                return cached.parent
        listing = self.listing(source)
        if prefix + manifest not in listing.files:
            raise CheckpointError(
                f"{source} is not {what}: {prefix}{manifest} is not there; {listing.holds()}{_hint(listing)}"
            )
        first = self._file(listing, prefix + manifest)
        for name in _listed(first):
            if prefix + name not in listing.files:
                raise CheckpointError(f"{source}: {manifest} lists {name}, which is not there; {listing.holds()}")
            self._file(listing, prefix + name)
        return first.parent

    def fetch_file(self, source: HubSource, name: str, *, sha256: str | None = None) -> Path:
        """Return a file of a repository.

        Args:
            source: The repository; its own `file` does not count.
            name: The file's path in it.
            sha256: What the file must be, where that is known.

        Raises:
            CheckpointError: See `fetch_folder`; or it has another sha256.
            ConfigError: There is no room for it.
        """
        path = self._cached(source, name)
        if path is None:
            listing = self.listing(source)
            if name not in listing.files:
                raise CheckpointError(f"{source.repo} has no file {name}; {listing.holds()}")
            path = self._file(listing, name)
        else:
            self._check(source, name, path)
        if sha256 is not None and (got := sha256_of(path)) != sha256:
            raise CheckpointError(
                f"{source.repo}/{name} has sha256 {got}, and {sha256} was asked for: it is another file than the one "
                "that was checked. Ask for the revision that it was checked at, or state the new hash"
            )
        return path

    def fetch_weights(self, source: HubSource) -> Path:
        """Return the file of a published SAE, with the small JSON files of its folder and the ones above beside it.

        Args:
            source: A repository with one file of weights, or such a file.

        Raises:
            CheckpointError: See `fetch_folder`; or there are no weights, or several.
            ConfigError: There is no room for it.
        """
        path = None if None in (source.file, source.revision) else self._cached(source, str(source.file))
        if path is not None and _has_json(path):
            self._check(source, str(source.file), path)
            return path
        listing = self.listing(source)
        name = _weights_of(listing)
        for each, entry in listing.files.items():  # first: weights in the cache mean that these are there too
            is_near = PurePosixPath(each).parent in PurePosixPath(name).parents
            if each.endswith(".json") and is_near and (entry.size or 0) <= _SMALL:
                self._file(listing, each)
        return self._file(listing, name)

    def listing(self, source: HubSource) -> Listing:
        """Return what a repository holds, at one commit.

        Where the hub cannot be reached, that is what the cache has of it, which is logged.

        Raises:
            CheckpointError: There is no such repository or revision, or it cannot be asked.
        """
        from huggingface_hub import constants

        if self.local_files_only or constants.HF_HUB_OFFLINE:
            reason = "the network was not to be used" if self.local_files_only else "HF_HUB_OFFLINE is set"
            return self._cached_listing(source, f"{reason}; let it be fetched once")
        try:
            with failures(source.repo, source.revision, f"{source.repo} could not be looked up"):
                info = self._api().model_info(source.repo, revision=source.revision, files_metadata=True, timeout=30)
        except UnreachableError as error:
            found = self._cached_listing(source, str(error))
            log.warning("%s; taking what the cache has, of commit %s", error, found.commit)
            return found
        files = {
            each.rfilename: Entry(each.size, None if each.lfs is None else _sha256_of_lfs(each.lfs))
            for each in info.siblings or ()
        }
        return Listing(source, str(info.sha), files)

    # --- the cache ---

    def _cached(self, source: HubSource, name: str) -> Path | None:
        """Return a file where the cache has it and is asked first; None else."""
        is_moving = source.revision is not None and not _COMMIT.fullmatch(source.revision)
        return None if is_moving and not self.local_files_only else self._in_cache(source, name)

    def _in_cache(self, source: HubSource, name: str) -> Path | None:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source.repo, name, cache_dir=self.cache_dir, revision=source.revision)
        return Path(found) if isinstance(found, str) else None

    def _cached_listing(self, source: HubSource, reason: str) -> Listing:
        from huggingface_hub.constants import HF_HUB_CACHE

        repo = Path(self.cache_dir or HF_HUB_CACHE).expanduser() / f"models--{source.repo.replace('/', '--')}"
        revision = source.revision or "main"
        ref = repo / "refs" / revision
        commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
        snapshot = repo / "snapshots" / commit
        names = [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]
        if not names:
            raise CheckpointError(f"the cache has nothing of {source}, and {reason}")
        return Listing(source._replace(revision=commit), commit, dict.fromkeys(names, _UNKNOWN))

    # --- one file ---

    def _api(self) -> Any:
        from huggingface_hub import HfApi

        return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=self.token)

    def _file(self, listing: Listing, name: str) -> Path:
        """Return a file of a listing, from the cache or the hub, after checking it."""
        source, entry = listing.source._replace(revision=listing.commit), listing.files[name]
        path = self._in_cache(source, name)
        if path is None:
            self._check_room(source, name, entry)
            self.report(f"fetching {source.repo}/{name}" + ("" if entry.size is None else f", {in_words(entry.size)}"))
            with failures(source.repo, source.revision, f"the download of {name} broke off"):
                found = self._api().hf_hub_download(
                    source.repo,
                    name,
                    revision=listing.commit,
                    cache_dir=self.cache_dir,
                    local_files_only=self.local_files_only,
                    etag_timeout=10,
                )
            path = Path(found)
            self._note_ref(listing)
        self._check(source, name, path, entry)
        return path

    def _note_ref(self, listing: Listing) -> None:
        """Let the cache know which commit the revision was, as the client does for a file fetched by its branch."""
        from huggingface_hub.constants import HF_HUB_CACHE

        revision = listing.source.revision or "main"
        if revision == listing.commit:
            return
        repo = Path(self.cache_dir or HF_HUB_CACHE).expanduser() / f"models--{listing.source.repo.replace('/', '--')}"
        ref = repo / "refs" / revision
        ref.parent.mkdir(parents=True, exist_ok=True)
        with replacing(ref) as partial:  # an empty one would be taken for a revision of that name
            partial.write_text(listing.commit, encoding="utf-8")

    def _check_room(self, source: HubSource, name: str, entry: Entry) -> None:
        from huggingface_hub.constants import HF_HUB_CACHE

        folder = Path(self.cache_dir or HF_HUB_CACHE).expanduser()
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free
        if entry.size is not None and entry.size > free:
            raise ConfigError(
                f"{source.repo}/{name} takes {in_words(entry.size)}, and {there} has {in_words(free)} left; make room, "
                "or set HF_HOME to a folder on another disk"
            )

    def _check(self, source: HubSource, name: str, path: Path, entry: Entry = _UNKNOWN) -> None:
        """Hold a file against what the hub knows it by; remove it from the cache where it is another."""
        stated = Path(os.readlink(path)).name if path.is_symlink() else ""
        size = path.stat().st_size
        problem = ""
        if entry.size is not None and size != entry.size:
            problem = f"has {size} bytes, the hub says {entry.size}"
        for want in {entry.sha256 or stated, stated} - {""}:
            got = _git_hash(path) if len(want) == 40 else sha256_of(path) if len(want) == 64 else want
            if not problem and got != want:
                problem = f"has the hash {got[:16]}..., the hub says {want[:16]}..."
        if problem:
            path.resolve().unlink()
            path.unlink(missing_ok=True)
            raise CheckpointError(
                f"{source.repo}/{name} {problem}: it was damaged on the way, or the hub is wrong about it. It was "
                "removed from the cache; fetch it again, and if that does not help, ask its authors"
            )


def commit_of(path: Path) -> str | None:
    """Return the commit that a file or folder in the hub's cache is of; None for another one."""
    parts = path.absolute().parts
    found = [parts[i + 1] for i, part in enumerate(parts[:-1]) if part == "snapshots"]
    return found[-1] if found and _COMMIT.fullmatch(found[-1]) else None


def in_words(n_bytes: float) -> str:
    """Return a size in words, e.g. "302 MB"."""
    for unit in ("bytes", "kB", "MB"):
        if n_bytes < 1000:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1000
    return f"{n_bytes:.1f} GB"


# --- what a repository holds --------------------------------------------------------------------------------------


def _listed(manifest: Path) -> list[str]:
    """Return the names under "files"; none where it is no such JSON, which reading the folder will say."""
    try:
        fields = json.loads(manifest.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return []
    files = fields.get("files") if isinstance(fields, dict) else None
    names = [PurePosixPath(str(name)) for name in files] if isinstance(files, dict) else []
    return [str(name) for name in names if not name.is_absolute() and ".." not in name.parts]


def _hint(listing: Listing) -> str:
    """Return what can be done with weights of another form."""
    weights = [name for name in sorted(listing.files) if name.endswith(WEIGHTS) and not COMPANIONS.search(name)]
    if not weights:
        return ""
    kind = "a pickle, of which nothing is run" if weights[0].endswith(PICKLES) else "in another form"
    source = HubSource(listing.source.repo, weights[0])
    return f". {weights[0]} is {kind}: if it is an SAE, `defense import {source} DIR` converts it once"


def _has_json(path: Path) -> bool:
    return any(path.parent.glob("*.json")) or any(path.parent.parent.glob("*.json"))


def _sha256_of_lfs(lfs: Any) -> str | None:
    found = lfs.get("sha256") if isinstance(lfs, Mapping) else getattr(lfs, "sha256", None)
    return None if found is None else str(found)


def _weights_of(listing: Listing) -> str:
    """Return the one file of weights of a source."""
    source = listing.source
    below = sorted(
        name
        for name in listing.files
        if name.endswith(WEIGHTS) and (source.file is None or name == source.file or name.startswith(f"{source.file}/"))
    )
    if source.file is not None and source.file in listing.files:
        return source.file
    if not below:
        raise CheckpointError(f"{source} has no weights (no file that ends in {', '.join(WEIGHTS)}); {listing.holds()}")
    weights = [name for name in below if not COMPANIONS.search(name)]
    if len(weights) != 1:
        names: Sequence[str] = weights or below
        shown = "\n".join(f"  {SCHEME}{source.repo}/{name}" for name in names[:20])
        more = f"\n  and {len(names) - 20} more" if len(names) > 20 else ""
        raise CheckpointError(f"{source} has {len(names)} files of weights; name one of them:\n{shown}{more}")
    return weights[0]


def _git_hash(path: Path) -> str:
    """Return what git calls a file with these bytes."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
