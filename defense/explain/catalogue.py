"""What is known of each latent of an SAE: a table, names, the pictures on which it fires most. Needs no torch.

    catalogue.json       schema, and per site: hook point, columns, words, picture keys, bin edges, provenance
    site-0.safetensors   the numbers of the first site; site-1 and so on for more

`describe.py` makes such a catalogue in one pass over pictures; explanations and the demo read it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.numpy import save_file

from defense.errors import CheckpointError, ConfigError, NonFiniteError, ShapeError
from defense.hosts import shipped
from defense.store import folders

if TYPE_CHECKING:
    from PIL import Image

    from defense.hosts.defense import Site


SCHEMA = 1
MANIFEST = "catalogue.json"
BIN_EDGES = tuple(2.0**power for power in range(-6, 11))
"""Edges of the bins of the histogram of activations, each twice the one before; the outermost bins take what is
beyond."""

_MANIFEST_FIELDS = {"schema": int, "package_version": str, "sites": list, "files": dict}
_SITE_FIELDS = {
    "hook_point": str,
    "columns": list,
    "words": list,
    "pictures": list,
    "bin_edges": list,
    "provenance": dict,
}
_TENSORS = {"columns", "is_defined", "name", "name_score", "direction", "top", "top_activation", "histogram"}
_SCENE = "scene:"
_INT8 = 127
_EVEN, _FEWEST_CLASSES = 0.97, 20
"""A latent names no class if its entropy over the classes is at least this share of the largest possible one, and there
are at least so many classes: among few, to fire on all of them says little. In the embedded model 45 of the 51 latents
of the text defense are such, but only 1 of the 81 latents that have one object on most of their top pictures."""


@dataclass(frozen=True, eq=False)
class Catalogue:
    """What is known of the latents of one SAE; every part has a row for each latent.

    Attributes:
        hook_point: Where the SAE reads.
        columns: Name -> float32 [d_sae]; NaN where a number means nothing, as for a latent that never fired.
            `describe.describe` says what each column is.
        names: Per latent, words that say what it writes, best first, each with its weight.
        directions: Where in the space of image and text embeddings a latent pushes, without what all words have in
            common, float16 [d_sae, d_embed], of length 1; zero for a latent that never fired.
        top: Indices into `pictures` by falling activation, int32 [d_sae, n_top]; -1 where there are fewer.
        top_activation: The largest activation over tokens there, float32 [d_sae, n_top]; 0 where there is none.
        histogram: Tokens by activation, in the bins of `BIN_EDGES`, int32 [d_sae, n_bins].
        pictures: Keys for `picture`: paths relative to the folder that was read, or "scene:<seed>:<index>".
        provenance: How it was made, as JSON values; `provenance["sae"]` is the `fingerprint` of its SAE.

    Raises:
        ShapeError: The parts disagree on the number of latents.
    """

    hook_point: str
    columns: Mapping[str, np.ndarray]
    names: tuple[tuple[tuple[str, float], ...], ...]
    directions: np.ndarray
    top: np.ndarray
    top_activation: np.ndarray
    histogram: np.ndarray
    pictures: tuple[str, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = {"names": len(self.names), "directions": len(self.directions), "top": len(self.top)}
        sizes |= {"top_activation": len(self.top_activation), "histogram": len(self.histogram)}
        sizes |= {name: len(column) for name, column in self.columns.items()}
        if len(set(sizes.values())) != 1:
            raise ShapeError(f"a catalogue has one row per latent in each part; these have {sizes}")

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return len(self.names)

    def names_of(self, latent: int) -> tuple[tuple[str, float], ...]:
        """Return the names of a latent, best first; none if it fires alike on pictures of all classes.

        Such a latent tells no class from another (one that reads letters, say), so a word is near it by chance. Where
        the pictures had no classes, or fewer than 20, this cannot be seen, and the names are returned.
        """
        entropy, n_classes = self.columns.get("class_entropy"), self.columns.get("n_classes")
        if entropy is None or n_classes is None:
            return self.names[latent]
        most = float(np.nan_to_num(n_classes).max(initial=0))
        is_even = most >= _FEWEST_CLASSES and entropy[latent] >= _EVEN * math.log(most)
        return () if is_even else self.names[latent]

    def is_of(self, site: Site) -> bool:
        """Return whether this was made of the SAE at a defense's site, also after `calibrate` gave that thresholds."""
        return self.hook_point == site.hook_point and self.provenance.get("sae") in site.hashes


# --- on disk ----------------------------------------------------------------------------------------------------------


def save(catalogues: Sequence[Catalogue], folder: str | os.PathLike[str]) -> Path:
    """Write catalogues as a folder, replacing one that is there, and return the folder.

    Numbers are kept small: directions in 8 bits, names' weights and top activations in 16. A failure leaves what was
    there before.

    Args:
        catalogues: One per hook point.
        folder: Where to; its parent must exist.

    Raises:
        ConfigError: `folder` is there and holds something else than a catalogue, or its parent is not there, or two
            catalogues have one hook point.
    """
    if len({each.hook_point for each in catalogues}) != len(catalogues):
        raise ConfigError(f"one catalogue per hook point, please; got {[each.hook_point for each in catalogues]}")
    with folders.publishing(check_target(folder), read=load) as staging:
        _write(catalogues, staging)
    return Path(folder)


def check_target(folder: str | os.PathLike[str]) -> Path:
    """Return the absolute path of a folder that `save` could write now.

    Raises:
        ConfigError: It is there and holds something else than a catalogue, or its parent is not there.
    """
    return folders.writable_target(folder, "catalogue", MANIFEST, lambda target: _read_manifest(target)["files"])


def _write(catalogues: Sequence[Catalogue], folder: Path) -> None:
    sites = []
    for index, each in enumerate(catalogues):
        words = sorted({word for names in each.names for word, _ in names})
        folders.write_tensors(_tensors_of(each, words), folder / _site_file(index), save_file)
        sites.append(
            {
                "hook_point": each.hook_point,
                "columns": list(each.columns),
                "words": words,
                "pictures": list(each.pictures),
                "bin_edges": list(BIN_EDGES),
                "provenance": dict(each.provenance),
            }
        )
    fields = {"sites": sites, "files": folders.file_entries(folder)}
    folders.write_manifest(folder / MANIFEST, SCHEMA, fields, "the catalogue")


def _tensors_of(catalogue: Catalogue, words: Sequence[str]) -> dict[str, np.ndarray]:
    number = {word: index for index, word in enumerate(words)}
    n_names = max(map(len, catalogue.names), default=0)
    name = np.full((catalogue.d_sae, n_names), -1, _integers(len(words)))
    name_score = np.zeros((catalogue.d_sae, n_names), np.float16)
    for latent, names in enumerate(catalogue.names):
        for place, (word, score) in enumerate(names):
            name[latent, place], name_score[latent, place] = number[word], score
    columns = np.stack(list(catalogue.columns.values())) if catalogue.columns else np.zeros((0, catalogue.d_sae))
    return {
        "columns": np.nan_to_num(columns, nan=0.0).astype(np.float32),
        "is_defined": ~np.isnan(columns),
        "name": name,
        "name_score": name_score,
        "direction": np.rint(catalogue.directions.astype(np.float32) * _INT8).astype(np.int8),
        "top": catalogue.top.astype(_integers(len(catalogue.pictures))),
        "top_activation": catalogue.top_activation.astype(np.float16),
        "histogram": catalogue.histogram.astype(_integers(int(catalogue.histogram.max(initial=0)))),
    }


def _integers(largest: int) -> type[np.signedinteger[Any]]:
    """Return int16 if it holds the given number, else int32; both hold -1."""
    return np.int16 if largest <= np.iinfo(np.int16).max else np.int32


def _site_file(index: int) -> str:
    return f"site-{index}.safetensors"


def load(folder: str | os.PathLike[str]) -> dict[str, Catalogue]:
    """Read a folder that `save` wrote, check every byte of it, and return its catalogues by hook point.

    Raises:
        CheckpointError: A file is missing, unexpected or unreadable, or was written by a newer version.
        IntegrityError: A file's bytes are not the ones that were written.
    """
    root = Path(folder)
    return folders.read_whole(root / MANIFEST, SCHEMA, lambda: _load(root))


def _load(root: Path) -> dict[str, Catalogue]:
    manifest = _read_manifest(root)
    names = [_site_file(index) for index in range(len(manifest["sites"]))]
    if set(manifest["files"]) != set(names):
        raise CheckpointError(f"{root / MANIFEST} lists {sorted(manifest['files'])}; its sites have {names}")
    tensors = folders.read_files(root / MANIFEST, manifest["files"], "sha256")
    found = [_read(site, tensors[name]) for site, name in zip(manifest["sites"], names, strict=True)]
    return {each.hook_point: each for each in found}


def _read_manifest(root: Path) -> dict[str, Any]:
    path = root / MANIFEST
    if not path.is_file():
        raise folders.lacks_manifest(path, "a catalogue is a folder that `defense describe` wrote")
    return folders.typed(str(path), folders.read_manifest(path, SCHEMA, "a catalogue"), _MANIFEST_FIELDS)


def _read(fields: Any, tensors: dict[str, np.ndarray]) -> Catalogue:
    site = folders.typed("a site", fields, _SITE_FIELDS)
    if tensors.keys() != _TENSORS:
        raise CheckpointError(f"a catalogue has the tensors {sorted(_TENSORS)}; got {sorted(tensors)}")
    if site["bin_edges"] != list(BIN_EDGES):
        raise CheckpointError(f"this version has the bin edges {BIN_EDGES}; the catalogue has {site['bin_edges']}")
    name, top, words = tensors["name"], tensors["top"], site["words"]
    if name.max(initial=-1) >= len(words) or top.max(initial=-1) >= len(site["pictures"]):
        raise CheckpointError("the catalogue's numbers point at words or pictures that it does not have")
    columns = np.where(tensors["is_defined"], tensors["columns"], np.float32(np.nan))
    direction = tensors["direction"].astype(np.float32)
    length = np.linalg.norm(direction, axis=1, keepdims=True)
    return Catalogue(
        site["hook_point"],
        dict(zip(site["columns"], columns, strict=True)),
        tuple(
            tuple((words[i], float(score)) for i, score in zip(row, scores, strict=True) if i >= 0)
            for row, scores in zip(name.tolist(), tensors["name_score"], strict=True)
        ),
        np.divide(direction, length, out=np.zeros_like(direction), where=length > 0).astype(np.float16),
        top.astype(np.int32),
        tensors["top_activation"].astype(np.float32),
        tensors["histogram"].astype(np.int32),
        tuple(site["pictures"]),
        site["provenance"],
    )


def find(source: str | os.PathLike[str]) -> dict[str, Catalogue]:
    """Return the catalogues that go with a defense, by hook point; none where there are none.

    Args:
        source: What `find_defense` takes: "photo", "embedded:waterbirds", or a folder, whose catalogue is
            `<folder>.catalogue` beside it.

    Raises:
        CheckpointError: There is one, and it is damaged.
    """
    ours = shipped.find(source)
    if ours is not None:
        folder = ours.model.folder("catalogue") / ours.defense
    else:
        folder = Path(os.path.abspath(source))  # "." has no name; a link keeps its own, so not resolve()
        folder = folder.with_name(f"{folder.name}.catalogue")
    folders.restore(folder)
    return load(folder) if folder.is_dir() else {}


# --- use --------------------------------------------------------------------------------------------------------------


def picture(key: str, root: str | os.PathLike[str] | None = None) -> Image.Image:
    """Return a picture of a catalogue: a scene drawn again, or a file opened.

    Args:
        key: Of `Catalogue.pictures`.
        root: The folder that the catalogue was made from, for files.

    Raises:
        ConfigError: A file without a root, or one that is not in it (as a picture within a tar or Parquet file).
        InvalidImageError: The file cannot be read as a picture.
    """
    if key.startswith(_SCENE):
        from defense.world.draws import scene_of
        from defense.world.scenes import render

        return render(scene_of(key))
    if root is None:
        raise ConfigError(f"{key} is a file; give the folder that the catalogue was made from as root=")
    path = Path(root, key)
    if not (path.is_file() and path.resolve().is_relative_to(Path(root).resolve())):
        raise ConfigError(f"{key} is no file in {root}; is this the folder that the catalogue was made from?")
    from defense.data.images import decode

    return decode(path).image


def search(catalogue: Catalogue, text_embeds: np.ndarray, n: int = 10) -> list[tuple[int, float]]:
    """Return the latents that push nearest to a phrase, best first, each with its cosine.

    Args:
        catalogue: Where to look.
        text_embeds: Of the phrase, float [d_embed] or [1, d_embed], normalized.
        n: How many at most.

    Raises:
        ShapeError: The phrase was embedded by another model.
        NonFiniteError: The embedding holds NaN or infinity.
    """
    phrase = np.asarray(text_embeds, np.float32).reshape(-1)
    if len(phrase) != catalogue.directions.shape[1]:
        raise ShapeError(f"this catalogue's directions have {catalogue.directions.shape[1]} entries, not {len(phrase)}")
    if not np.isfinite(phrase).all():
        raise NonFiniteError("the phrase's embedding")
    cosine = catalogue.directions.astype(np.float32) @ phrase
    best = np.argsort(-cosine, kind="stable")[:n]
    return [(int(latent), float(cosine[latent])) for latent in best if catalogue.directions[latent].any()]
