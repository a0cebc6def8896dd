"""Which CLIPs have a defense or an SAE, and where: `registry.json`, and files of that form that users keep.

`registry.schema.json` says what such a file holds. A field that is null is not known. One that is named under
"unverified" is stated, and nobody has checked it; `verify` asks the hub about all of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from defense.errors import CheckpointError, ConfigError, NotThereError

from . import folders
from .hub import Hub, HubSource, hub_source, in_words

SCHEMA = 1
FILE = "registry.json"

_ROWS = {"schema": int, "hosts": list}
_HOST = {
    "model": str,
    "pretrained": str | None,
    "sha256": str | None,
    "quick_gelu": bool | None,
    "defense": dict | None,
    "saes": list,
    "fit": dict | None,
    "train": dict | None,
    "unverified": list,
    "note": str | None,
}
_AT_HUB = {"repo": str | None, "file": str | None, "revision": str | None, "sha256": str | None}
_DEFENSE = {**_AT_HUB, "license": str | None, "figures": dict | None, "unverified": list, "note": str | None}
_SAE = {
    **_AT_HUB,
    "format": str | None,
    "hook_point": str | None,
    "tokens": str | None,
    "license": str | None,
    "unverified": list,
    "note": str | None,
}
_FIT = {"hook_points": list, "n_pictures": int, "clean_budget": int | float, "steps": int}
_TRAIN = {
    "block": int,
    "d_sae": int | None,
    "k": int,
    "variant": str,
    "tokens": str,
    "n_tokens": int,
    "batch": int,
    "text_rate": int | float,
}


@dataclass(frozen=True)
class DefenseRow:
    """A defense on the hub.

    Attributes:
        repo: Its repository.
        file: Its folder there; None for the repository itself.
        revision: Commit.
        sha256: Of its manifest.
        license: SPDX identifier.
        figures: What was measured and on what, as JSON values.
        unverified: Which of these nobody has checked.
        note: A sentence.
    """

    repo: str | None
    file: str | None
    revision: str | None
    sha256: str | None
    license: str | None
    figures: Mapping[str, Any] | None
    unverified: tuple[str, ...]
    note: str | None


@dataclass(frozen=True)
class SaeRow:
    """A published SAE.

    Attributes:
        repo: Its repository; None where nobody knows it.
        file: Its weights there.
        revision: Commit.
        sha256: Of the weights.
        format: As `importers.FORMATS` names it.
        hook_point: "blocks.{L}.hook_resid_post".
        tokens: What it was trained on.
        license: SPDX identifier.
        unverified: Which of these nobody has checked.
        note: A sentence.
    """

    repo: str | None
    file: str | None
    revision: str | None
    sha256: str | None
    format: str | None
    hook_point: str | None
    tokens: str | None
    license: str | None
    unverified: tuple[str, ...]
    note: str | None

    @property
    def source(self) -> HubSource:
        """Where its weights are.

        Raises:
            CheckpointError: Nobody knows that.
        """
        if self.repo is None:
            raise CheckpointError(f"the registry does not know where this SAE is: {self.note or 'no note'}")
        return HubSource(self.repo, self.file, self.revision)


@dataclass(frozen=True)
class FitSettings:
    """How to fit a defense with these SAEs.

    Attributes:
        hook_points: Which of the SAEs to try, in order; the first whose defense passes is it.
        n_pictures: Pictures to use, at most.
        clean_budget: Accuracy that may be lost where nothing is wrong, as a fraction.
        steps: Of the joint step; see `FitConfig`.
    """

    hook_points: tuple[str, ...] = ()
    n_pictures: int = 300
    clean_budget: float = 0.01
    steps: int = 200


@dataclass(frozen=True)
class TrainSettings:
    """How to train an SAE.

    Attributes:
        block: After which block; None for three quarters of the way through the tower.
        d_sae: Latents; None for 16 times the width of the residual.
        k: Latents kept per token.
        variant: See `TrainConfig`.
        tokens: Which tokens.
        n_tokens: How many tokens to train on.
        batch: Tokens per step.
        text_rate: Share of pictures to write a word on.
    """

    block: int | None = None
    d_sae: int | None = None
    k: int = 32
    variant: str = "batchtopk"
    tokens: str = "all"
    n_tokens: int = 50_000_000
    batch: int = 4096
    text_rate: float = 0.25


@dataclass(frozen=True)
class HostRow:
    """A CLIP and what there is for it.

    Attributes:
        model: open_clip's name.
        pretrained: open_clip's tag.
        sha256: Fingerprint of its vision tower.
        quick_gelu: Whether its MLPs use QuickGELU.
        defense: A ready one.
        saes: SAEs of its residual stream.
        fit: How to fit with them.
        train: How to train one.
        unverified: Which of these nobody has checked.
        note: A sentence.
    """

    model: str
    pretrained: str | None
    sha256: str | None
    quick_gelu: bool | None
    defense: DefenseRow | None
    saes: tuple[SaeRow, ...]
    fit: FitSettings
    train: TrainSettings
    unverified: tuple[str, ...]
    note: str | None

    @property
    def name(self) -> str:
        """What the CLIP is called, in one line."""
        return self.model if self.pretrained is None else f"{self.model}, {self.pretrained}"

    def candidates(self) -> tuple[SaeRow, ...]:
        """Return the SAEs to fit with, in the order in which they are tried; none whose file is not known."""
        return tuple(
            sae
            for hook_point in self.fit.hook_points
            for sae in self.saes
            if sae.hook_point == hook_point and None not in (sae.repo, sae.file)
        )


def rows(source: str | os.PathLike[str] | None = None, hub: Hub | None = None) -> tuple[HostRow, ...]:
    """Return the rows of the package's registry, and before them those of another one.

    Args:
        source: A file of a user's own, or a repository on the hub with a `registry.json`.
        hub: How the hub is asked.

    Raises:
        CheckpointError: It cannot be read or fetched, or is no registry; the message names the row.
        ConfigError: An address on the hub of another form.
    """
    own = read(Path(str(resources.files(__package__).joinpath(FILE))))
    if source is None:
        return own
    address = hub_source(source)
    path = Path(source) if address is None else (hub or Hub()).fetch_file(address, address.file or FILE)
    if not path.is_file():
        kind, what = (CheckpointError, "no file") if path.exists() else (NotThereError, "not there")
        raise kind(f"{source} is {what}; a registry is a JSON file, or a hub id with a {FILE}")
    return read(path) + own


def row_of(found: Sequence[HostRow], model: str, pretrained: str | None, sha256: str | None = None) -> HostRow | None:
    """Return the first row of a CLIP: with its fingerprint, or with its name and no other fingerprint; else None."""
    for row in found:
        if row.sha256 is not None and sha256 is not None:
            if row.sha256 == sha256:
                return row
        elif (_base(row.model), row.pretrained) == (_base(model), pretrained):
            return row
    return None


def _base(model: str) -> str:
    """Return a model's name without the kind of its GELU, which its weights decide."""
    return model.removesuffix("-quickgelu")


# --- reading ------------------------------------------------------------------------------------------------------


def read(path: Path) -> tuple[HostRow, ...]:
    """Return the rows of a registry.

    Raises:
        CheckpointError: It is none; the message names the row and the field.
    """

    def rows() -> tuple[HostRow, ...]:
        fields = folders.typed(str(path), folders.read_manifest(path, SCHEMA, "a registry"), _ROWS)
        return tuple(_host(f"{path}: host {number}", value) for number, value in enumerate(fields["hosts"], start=1))

    return folders.read_whole(path, SCHEMA, rows)


def _host(what: str, value: Any) -> HostRow:
    fields = _filled(what, value, _HOST, "model")
    what = f"{what} ({fields['model']})"
    defense, saes = fields["defense"], fields["saes"]
    fields["defense"] = (
        None if defense is None else DefenseRow(**_filled(f"{what}: defense", defense, _DEFENSE, "repo"))
    )
    fields["saes"] = tuple(
        SaeRow(**_filled(f"{what}: SAE {number}", sae, _SAE, "repo")) for number, sae in enumerate(saes, start=1)
    )
    fields["fit"] = FitSettings(**_settings(f"{what}: fit", fields["fit"] or {"hook_points": []}, _FIT, "hook_points"))
    fields["train"] = TrainSettings(**_settings(f"{what}: train", fields["train"], _TRAIN, "block"))
    return HostRow(**fields)


def _filled(what: str, value: Any, kinds: Mapping[str, Any], required: str) -> dict[str, Any]:
    """Return an object's fields, with what is missing as not known."""
    if not isinstance(value, dict) or required not in value:
        raise CheckpointError(f"{what} is no object with {required!r}; {FILE[:-5]}.schema.json says what it holds")
    empty: dict[str, Any] = {key: [] if kind is list else None for key, kind in kinds.items()}
    fields = folders.typed(what, {**empty, **value}, kinds)
    unknown = [name for name in fields["unverified"] if not isinstance(name, str) or name not in kinds]
    if unknown:
        raise CheckpointError(f"{what}: unverified names {unknown[0]!r}, and there is no such field")
    return {**fields, "unverified": tuple(fields["unverified"])}


def _settings(what: str, value: Any, kinds: Mapping[str, Any], required: str) -> dict[str, Any]:
    """Return what settings state; the rest has its defaults."""
    if value is None:
        return {}
    if not isinstance(value, dict) or required not in value:
        raise CheckpointError(f"{what} is no object with {required!r}; {FILE[:-5]}.schema.json says what it holds")
    stated = {key: kinds[key] for key in value if key in kinds}
    fields = folders.typed(what, value, stated)
    if not all(isinstance(each, str) for each in fields.get("hook_points", ())):
        raise CheckpointError(f"{what}: hook_points are {fields['hook_points']!r}; want names")
    return {key: tuple(each) if isinstance(each, list) else each for key, each in fields.items()}


# --- asking the hub about every row -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What the hub says of a row.

    Attributes:
        row: Which CLIP, and what of it.
        is_wrong: Whether it contradicts the row, or could not be found out.
        text: What was found; where the row does not know something, that too.
    """

    row: str
    is_wrong: bool
    text: str


def verify(found: Sequence[HostRow], hub: Hub) -> Iterator[Finding]:
    """Yield what the hub says of every SAE and defense of some rows: whether it is there, its commit and its hash.

    Nothing large is downloaded: the hub states the sha256 of large files. The fingerprint of a CLIP is not on the hub;
    `defense protect` prints it when it has loaded the weights.
    """
    for host in found:
        listed: list[DefenseRow | SaeRow] = [*([host.defense] if host.defense else []), *host.saes]
        for row in listed:
            kind = "defense" if isinstance(row, DefenseRow) else f"SAE at {row.hook_point or 'a block not known'}"
            yield _finding(f"{host.name}: {kind}", row, hub)


def _finding(name: str, row: DefenseRow | SaeRow, hub: Hub) -> Finding:
    if row.repo is None:
        return Finding(name, False, f"nobody knows its repository. {row.note or ''}".strip())
    source = HubSource(row.repo, row.file, row.revision)
    try:
        listing = hub.listing(source)
        if isinstance(row, SaeRow) and row.file is None:
            return Finding(name, False, f"{source}: which file is not known; {listing.holds()}")
        file = row.file if isinstance(row, SaeRow) else "/".join(filter(None, (row.file, "manifest.json")))
        if file not in listing.files:
            return Finding(name, True, f"{source}: {file} is not there; {listing.holds()}")
        entry = listing.files[str(file)]
        sha256 = entry.sha256 or folders.sha256_of(hub.fetch_file(source._replace(revision=listing.commit), str(file)))
    except (CheckpointError, ConfigError) as error:
        return Finding(name, True, str(error))
    if row.sha256 not in (None, sha256):
        return Finding(name, True, f"{source}: sha256 is {sha256}, the row says {row.sha256}")
    size = "" if entry.size is None else f", {in_words(entry.size)}"
    told = [f"{file}{size} is there"]
    told += [] if row.revision else [f"revision {listing.commit} (not in the row)"]
    told += [f"sha256 {sha256}" + ("" if row.sha256 else " (not in the row)")]
    return Finding(name, False, f"{source}: {'; '.join(told)}")
