"""A defense published on the hub: its files, a card, and nothing that tells of the machine it was made on."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

from defense.errors import ConfigError
from defense.hosts.defense import ClipId, Defense

from . import defenses
from .cards import MARK, card
from .hub import SCHEME, Hub, HubSource, hub_source
from .hub_failures import failures

_CARD = "README.md"
_LOCAL = "local-dir:"


def portable(defense: Defense) -> Defense:
    """Return a defense that names no path of this machine: what is left of one is its last part.

    It is the same defense: what binds it to a CLIP is the fingerprint of the weights.
    """
    clip = ClipId(
        **{**vars(defense.clip), **_without_paths({"model": defense.clip.model, "pretrained": _tag(defense)})}
    )
    provenance = _without_paths(dict(defense.provenance))
    if (clip, provenance) == (defense.clip, dict(defense.provenance)):
        return defense
    return replace(defense, clip=clip, provenance=provenance)


def push(
    source: str | os.PathLike[str] | Defense,
    repo: str,
    *,
    private: bool = False,
    token: str | None = None,
    report: Callable[[str], None] = lambda _: None,
) -> str:
    """Publish a defense and return its address, with the commit: "hf://org/repo@...".

    The files of one that is there are replaced. A card that a person wrote stays.

    Args:
        source: A defense, or the folder of one, which is checked first.
        repo: "org/repo"; made where it is not there.
        private: Make it for its owners alone, where it is made.
        token: By default the one that the client is logged in with.
        report: Called with a line before the upload.

    Raises:
        CheckpointError: The folder holds no defense or a damaged one, or the hub refuses; the message says what to do.
        ConfigError: `repo` has another form.
    """
    address = hub_source(f"{SCHEME}{repo.removeprefix(SCHEME)}")
    if address is None or address != HubSource(address.repo):
        raise ConfigError(f"{repo!r} is no name of a repository alone; want org/repo")
    defense = source if isinstance(source, Defense) else defenses.load(source)
    published = portable(defense)
    with tempfile.TemporaryDirectory() as workshop:
        folder = Path(workshop) / "defense"
        if published is defense and not isinstance(source, Defense):
            folder.mkdir()
            for name in defenses.files_of(source):  # as they are: their manifest may be pinned
                shutil.copyfile(Path(source) / name, folder / name)
        else:
            defenses.save(published, folder)
        return _upload(published, folder, address.repo, private, token, report)


def _upload(
    defense: Defense, folder: Path, repo: str, private: bool, token: str | None, report: Callable[[str], None]
) -> str:
    from huggingface_hub import HfApi

    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=token)
    with failures(repo, None, f"{repo} cannot be written"):
        api.create_repo(repo, private=private, exist_ok=True)
    if _keeps_card(repo, token):
        report(f"{repo} has a card that a person wrote; it stays")
    else:
        (folder / _CARD).write_text(card(defense, repo), encoding="utf-8")
    names = sorted(path.name for path in folder.iterdir())
    report(f"uploading {', '.join(names)} to {repo}")
    with failures(repo, None, f"{repo} cannot be written"):
        commit = api.upload_folder(
            repo_id=repo,
            folder_path=folder,
            commit_message="Publish a defense",
            delete_patterns=["site-*.safetensors", "golden.safetensors"],  # of one with more sites
        )
    return str(HubSource(repo, None, commit.oid))


def _keeps_card(repo: str, token: str | None) -> bool:
    """Return whether a repository has a card that was not made here."""
    with tempfile.TemporaryDirectory() as cache:
        hub = Hub(cache_dir=cache, token=token)
        listing = hub.listing(HubSource(repo))
        if _CARD not in listing.files:
            return False
        found = hub.fetch_file(HubSource(repo, None, listing.commit), _CARD)
        return MARK not in found.read_text(encoding="utf-8", errors="replace")


def _tag(defense: Defense) -> str | None:
    """Return the tag of a CLIP's weights; of a file, an absolute path, which `_without_paths` knows."""
    tag = defense.clip.pretrained
    return str(Path(tag).absolute()) if tag is not None and len(PurePath(tag).parts) > 1 else tag


def _without_paths(value: Any) -> Any:
    """Return JSON values with the last part of every absolute path, and of every folder that open_clip was given."""
    if isinstance(value, Mapping):
        return {key: _without_paths(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_paths(each) for each in value]
    if isinstance(value, str) and (value.startswith(_LOCAL) or PurePath(value).is_absolute()):
        return PurePath(value.removeprefix(_LOCAL)).name
    return value
