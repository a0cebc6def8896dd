"""Embeddings of the same pictures by another encoder, from a file: what monosemanticity is defined with."""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from defense.errors import ConfigError, NonFiniteError


class OtherEncoder:
    """Image embeddings by the names of the pictures.

    Args:
        names: Of the pictures, as a catalogue has them: paths relative to the folder, all different.
        embeds: Theirs, float [n, d_embed], none of them zero.
        name: What to call it, e.g. the file.

    Raises:
        ConfigError: The two disagree, a name comes twice, or an embedding is zero.
        NonFiniteError: An embedding holds NaN or infinity.
    """

    def __init__(self, names: Sequence[str], embeds: np.ndarray, name: str) -> None:
        if embeds.ndim != 2 or embeds.dtype.kind != "f" or len(embeds) != len(names):
            raise ConfigError(
                f"{name}: want embeds of float type [n, d_embed] for n = {len(names)} names; got {embeds.dtype} "
                f"{list(embeds.shape)}"
            )
        self._row_of = {each: row for row, each in enumerate(names)}
        if len(self._row_of) != len(names):
            raise ConfigError(f"{name}: {len(names) - len(self._row_of)} names of pictures come twice; give each once")
        if not np.isfinite(embeds).all():
            raise NonFiniteError(f"an embedding of {name}")
        lengths = np.linalg.norm(embeds.astype(np.float64), axis=1, keepdims=True)
        if (lengths == 0).any():
            raise ConfigError(f"{name}: the embedding of {names[int(lengths.argmin())]} is zero, and points nowhere")
        self.name, self._embeds = name, (embeds / lengths).astype(np.float32)

    def of(self, names: Sequence[str]) -> np.ndarray:
        """Return the embeddings of pictures, float32 [n, d_embed], normalized.

        Raises:
            ConfigError: It lacks one of them.
        """
        missing = [name for name in names if name not in self._row_of]
        if missing:
            raise ConfigError(
                f"{self.name} has no embedding of the picture {missing[0]}; it must name every picture by its path "
                "relative to the folder, as catalogues do"
            )
        found: np.ndarray = self._embeds[[self._row_of[name] for name in names]]
        return found


def read_embeds(path: Path) -> OtherEncoder:
    """Read what `numpy.savez(path, names=..., embeds=...)` wrote.

    Raises:
        ConfigError: It is no such file, or see `OtherEncoder`.
        NonFiniteError: See `OtherEncoder`.
    """
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            names, embeds = file["names"], file["embeds"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, zipfile.BadZipFile, EOFError) as error:
        raise ConfigError(
            f"{path} is no file of embeddings ({error}); write it by numpy.savez(path, names=..., embeds=...), names "
            "as strings and not as objects"
        ) from error
    if names.ndim != 1 or names.dtype.kind != "U":
        raise ConfigError(f"{path}: names must be strings [n]; got {names.dtype} {list(names.shape)}")
    return OtherEncoder(names.tolist(), embeds, path.name)
