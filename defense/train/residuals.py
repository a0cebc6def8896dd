"""Residuals of a CLIP at one hook point, by the million: encoded as training asks for them, or kept in shards.

    Pictures --decode, words drawn on some, Preprocess--> pixel_values
             --blocks 0..L, no further-->                 residuals of the chosen tokens
             --as many pictures as the buffer holds-->    Chunk                         (`Stream`, or `Shards` on disk)
             --rows in random order-->                    batches                       (`Batches`)

The shuffle buffer is filled, shuffled, emptied and filled again. So a place in the stream is a handful of integers: a
training that was stopped fills the same buffer again and goes on with the next batch, bit for bit the same.

With several processes each encodes its share of a buffer's pictures and gets the rows of each batch that it has
encoded itself. Which rows make up a batch does not depend on the number of processes.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from defense.core.config import Tokens
from defense.data.sources import HELD_OUT_EVERY, START, Picture, Pictures, Position, prepared
from defense.data.writing import write_word
from defense.errors import CheckpointError, ConfigError, IntegrityError, NonFiniteError
from defense.hosts.clip import Clip
from defense.store import folders

from .parallel import World

SCHEMA = 1
MANIFEST = "activations.json"

_MANIFEST_FIELDS = {"schema": int, "package_version": str, "source": dict, "d_model": int, "files": dict}
_ALONE = World()


class Chunk(NamedTuple):
    """What fills the buffer once.

    Attributes:
        resid: This process's rows, float32 [n_own, d_model].
        numbers: Which of the chunk's rows they are, int64 [n_own].
        n: Rows of the chunk over all processes.
        next: Where the next chunk starts. If one chunk holds the whole epoch, `next` is its own position.
    """

    resid: Tensor
    numbers: Tensor
    n: int
    next: Position


class Source(Protocol):
    """Where chunks come from: `Stream` or `Shards`."""

    d_model: int

    def chunk(self, position: Position) -> Chunk:
        """Return the chunk that starts at a position; the first starts at `sources.START`."""

    def describe(self) -> dict[str, Any]:
        """Return what decides the numbers, as JSON values."""


class Stream:
    """Residuals that are encoded when they are asked for.

    Args:
        clip: The CLIP.
        hook_point: Where they are taken out.
        pictures: What they are residuals of.
        tokens: Which tokens; after the last block of a tower that pools its CLS token, that one only.
        buffer: Tokens in the shuffle buffer, over all processes (d_model * 4 bytes each).
        text_rate: Share of the pictures that get a word written on them, in [0, 1].
        seed: Decides the order of pictures and what is written.
        batch: Pictures that are encoded at once.
        world: The processes that share the work.

    Attributes:
        unreadable: Names of the pictures that were left out because they cannot be read, over all processes.

    Raises:
        ConfigError: A number outside its range.
        HookPointError: No such block, or tokens that mean nothing there.
    """

    def __init__(
        self,
        clip: Clip,
        hook_point: str,
        pictures: Pictures,
        *,
        tokens: Tokens = "all",
        buffer: int = 2**17,
        text_rate: float = 0.0,
        seed: int = 0,
        batch: int = 64,
        world: World = _ALONE,
    ) -> None:
        if not 0 <= text_rate <= 1 or buffer < 1 or batch < 1:
            raise ConfigError(
                f"text_rate={text_rate}, buffer={buffer}, batch={batch}; text_rate must lie in [0, 1], the others must "
                "be at least 1"
            )
        clip.tower.block(hook_point)  # raises where there is none
        self.clip, self.hook_point, self.pictures, self.world = clip, hook_point, pictures, world
        self.tokens: Tokens = clip.tower.effective_scope(hook_point, tokens)
        self.text_rate, self.seed, self.batch = text_rate, seed, batch
        self.d_model = clip.tower.d_model
        self.buffer = max(1, buffer // self.n_tokens)
        self.unreadable: set[str] = set()

    @property
    def n_tokens(self) -> int:
        """How many tokens a picture gives."""
        return self.clip.tower.n_tokens(self.hook_point, self.tokens)

    def describe(self) -> dict[str, Any]:
        """Return what decides the numbers, as JSON values."""
        return {
            "host": self.clip.tower.fingerprint(),
            "preprocess": self.clip.preprocess.to_dict(),
            "hook_point": self.hook_point,
            "tokens": self.tokens,
            "pictures": self.pictures.fingerprint,
            "pictures_per_chunk": self.buffer,
            "text_rate": self.text_rate,
            "seed": self.seed,
        }

    def chunk(self, position: Position) -> Chunk:
        """Return the residuals of the next pictures, at most up to the end of the epoch.

        Raises:
            ConfigError: None of the pictures can be read, or there are none.
            NonFiniteError: The CLIP gives NaN or infinity.
        """
        pictures, following = self._next_pictures(position)
        mine = slice(self.world.rank, None, self.world.size)
        resid, is_readable = self._encode(pictures[mine], position.epoch)
        readable = torch.zeros(len(pictures), dtype=torch.bool, device=resid.device)
        readable[mine] = is_readable
        readable = self.world.any(readable)
        n_readable = int(readable.sum())
        self.unreadable |= {p.name for p, is_fine in zip(pictures, readable.tolist(), strict=True) if not is_fine}
        if n_readable == 0:
            raise ConfigError(
                f"none of {len(pictures)} pictures in a row can be read, from {pictures[0].name} on; is this the "
                "right folder?"
            )
        number = readable.cumsum(0) - 1  # of each picture among the readable ones
        own = number[mine][is_readable]
        n_tokens = self.n_tokens
        numbers = (own[:, None] * n_tokens + torch.arange(n_tokens, device=own.device)).flatten()
        return Chunk(resid, numbers, n_readable * n_tokens, following)

    def _next_pictures(self, position: Position) -> tuple[list[Picture], Position]:
        """Return what fills the buffer, and where the next chunk starts."""
        found: list[Picture] = []
        for picture, behind in self.pictures.epoch(self.seed, position):
            found.append(picture)
            if len(found) == self.buffer:
                return found, behind
        is_whole = (position.shard, position.picture) == (0, 0)
        if not found and is_whole:
            raise ConfigError(
                f"there is no picture to train on: the first of every {HELD_OUT_EVERY} is kept to measure with, and "
                "there are no more; give more pictures"
            )
        if is_whole:
            return found, position  # all there is: the next epoch would encode the same again
        return (found, Position(position.epoch + 1)) if found else self._next_pictures(Position(position.epoch + 1))

    @torch.no_grad()
    def _encode(self, pictures: list[Picture], epoch: int) -> tuple[Tensor, Tensor]:
        """Return residuals [n_readable * n_tokens, d_model], and which pictures can be read, bool [n]."""
        n_tokens, device = self.n_tokens, self.clip.device
        resid = torch.empty(len(pictures) * n_tokens, self.d_model, device=device)
        is_readable = torch.zeros(len(pictures), dtype=torch.bool, device=device)
        n_done = n_rows = 0
        for batch in prepared(self.clip.preprocess, pictures, self.batch, partial(self._write, epoch)):
            kept = [pixels for _, pixels in batch if pixels is not None]
            if kept:
                rows = self.clip.tower.resid(np.stack(kept), self.hook_point, self.tokens).flatten(0, 1)
                resid[n_rows : n_rows + len(rows)] = rows
                n_rows += len(rows)
            is_readable[n_done : n_done + len(batch)] = torch.tensor([pixels is not None for _, pixels in batch])
            n_done += len(batch)
        resid = resid[:n_rows]
        if not resid.isfinite().all():
            raise NonFiniteError(f"the residual at {self.hook_point}")
        return resid, is_readable

    def _write(self, epoch: int, picture: Picture, image: Image.Image) -> Image.Image:
        """Return the image, with a word on it if it is this picture's turn."""
        rng = np.random.default_rng([self.seed, epoch, zlib.crc32(picture.name.encode())])
        return write_word(image, rng) if rng.random() < self.text_rate else image


class Shards:
    """Residuals in a folder that `write_shards` wrote: each file is a chunk.

    Args:
        folder: The folder.
        source: What its residuals must be, as `Stream.describe` says.
        world: The processes that share the work.

    Raises:
        CheckpointError: A file is missing, or the folder is none of these.
        ConfigError: Its residuals are others.
    """

    def __init__(self, folder: str | os.PathLike[str], source: dict[str, Any], world: World = _ALONE) -> None:
        self.folder, self.world = Path(folder), world
        manifest = _read_manifest(self.folder)
        differing = [key for key in source if manifest["source"].get(key) != source[key]]
        if differing:
            raise ConfigError(
                f"{folder} holds other residuals: {', '.join(differing)} differ from what was asked for; give another "
                "folder for shards, or delete it"
            )
        self.source = manifest["source"]
        self.d_model: int = manifest["d_model"]
        self.files = sorted(manifest["files"].items())

    def describe(self) -> dict[str, Any]:
        """Return what decides the numbers, as JSON values."""
        return {**self.source, "n_shards": len(self.files)}

    def chunk(self, position: Position) -> Chunk:
        """Return the residuals of a file; the last is followed by the first.

        Raises:
            CheckpointError: The file is damaged.
            IntegrityError: Its bytes are not the ones that were written.
        """
        name, entry = self.files[position.shard]
        path = self.folder / name
        if (got := folders.sha256_of(path)) != entry["sha256"]:
            raise IntegrityError(str(path), entry["sha256"], got)
        resid = load_file(path)["resid"]
        numbers = torch.arange(self.world.rank, len(resid), self.world.size)
        following = START._replace(shard=(position.shard + 1) % len(self.files))
        return Chunk(resid[numbers], numbers, len(resid), following)


def write_shards(stream: Stream, folder: str | os.PathLike[str], n_tokens: int) -> Path:
    """Write the first residuals of a stream as a folder for `Shards`, and return the folder.

    A failure leaves nothing behind.

    Args:
        stream: Of one process.
        folder: Where to; must not exist yet, its parent must.
        n_tokens: Stop with the file that reaches so many, or at the end of the first epoch.

    Raises:
        ConfigError: `folder` exists, or the stream has several processes.
    """
    target = folders.led_to(folder)
    if target.exists() or stream.world.size > 1:
        raise ConfigError(f"shards are written by one process, into a folder that is not there yet; got {folder}")

    with folders.publishing(target, read=_read_manifest) as staging:
        files = _write_chunks(stream, staging, n_tokens)
        fields = {"source": stream.describe(), "d_model": stream.d_model, "files": files}
        folders.write_manifest(staging / MANIFEST, SCHEMA, fields, "the activations")
    return Path(folder)


def _write_chunks(stream: Stream, folder: Path, n_tokens: int) -> dict[str, dict[str, Any]]:
    """Write chunks, a file each, up to `n_tokens` tokens or the end of the first epoch; return their entries."""
    position, n_written = START, 0
    files: dict[str, dict[str, Any]] = {}
    while n_written < n_tokens:
        chunk = stream.chunk(position)
        name = f"resid-{len(files):05d}.safetensors"
        folders.write_tensors({"resid": chunk.resid.cpu()}, folder / name, save_file)
        files[name] = folders.file_entry(folder / name)  # now, while the file is in memory: there may be many
        n_written += chunk.n
        if chunk.next == position or chunk.next.epoch > 0:
            break
        position = chunk.next
    return files


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; shards are a folder that `defense train --shards` wrote")
    manifest = folders.typed(str(path), folders.read_manifest(path, SCHEMA, "activations"), _MANIFEST_FIELDS)
    for name, entry in manifest["files"].items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != entry["size"]:
            raise CheckpointError(f"{folder / name} is missing or has not {entry['size']} bytes; write the shards anew")
    return manifest


class Batches:
    """Batches of rows in random order, chunk after chunk; rows that do not fill a batch are left out.

    Args:
        source: Where chunks come from.
        batch: Tokens of a batch, over all processes.
        seed: Decides the order.
        world: The processes that share the work.
        state: Where to go on: what `state` returned.

    Raises:
        ConfigError: All there is does not fill a batch.
    """

    def __init__(
        self,
        source: Source,
        batch: int,
        *,
        seed: int = 0,
        world: World = _ALONE,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.source, self.batch, self.seed, self.world = source, batch, seed, world
        self.d_model = source.d_model
        self.position, self.n_chunks, self.n_taken = START, 0, 0
        if state is not None:
            self.position, self.n_chunks, self.n_taken = Position(*state["position"]), state["chunk"], state["taken"]
        self._fill(source.chunk(self.position))

    def state(self) -> dict[str, Any]:
        """Return where the next batch is, as JSON values."""
        return {"position": list(self.position), "chunk": self.n_chunks, "taken": self.n_taken}

    def _fill(self, chunk: Chunk) -> None:
        if chunk.n < self.batch and chunk.next == self.position:
            raise ConfigError(
                f"all pictures together give {chunk.n} tokens, less than a batch of {self.batch}; give more pictures "
                "or a smaller batch"
            )
        self.chunk = chunk
        self._order = torch.from_numpy(np.random.default_rng([self.seed, self.n_chunks]).permutation(chunk.n))
        self._own_row = torch.full((chunk.n,), -1)
        self._own_row[chunk.numbers.cpu()] = torch.arange(len(chunk.numbers))

    def _rows(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of the given rows of the chunk are this process's, bool [n], and those rows."""
        own_row = self._own_row[numbers]
        return own_row >= 0, self.chunk.resid[own_row[own_row >= 0].to(self.chunk.resid.device)]

    def next(self) -> Tensor:
        """Return this process's rows of the next batch, float32 [n_own, d_model]."""
        while (self.n_taken + 1) * self.batch > self.chunk.n:
            was_short = self.chunk.n < self.batch
            position, self.n_taken = self.chunk.next, 0
            self.n_chunks += 1
            chunk = self.chunk if position == self.position else self.source.chunk(position)
            self.position = position
            self._fill(chunk)
            if was_short and chunk.n < self.batch:
                raise ConfigError(
                    f"the buffer gives {chunk.n} tokens at a time, less than a batch of {self.batch}; give a larger "
                    "buffer or a smaller batch"
                )
        numbers = self._order[self.n_taken * self.batch : (self.n_taken + 1) * self.batch]
        self.n_taken += 1
        return self._rows(numbers)[1]

    def sample(self, n: int) -> Tensor:
        """Return the first `n` rows of the order (all if there are fewer), on every process, [n, d_model]."""
        numbers = self._order[:n]
        is_own, rows = self._rows(numbers)
        sample = torch.zeros(len(numbers), self.d_model, device=rows.device)
        sample[is_own.to(rows.device)] = rows
        return self.world.sum(sample)
