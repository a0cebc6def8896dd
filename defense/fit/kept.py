"""Residuals on disk, by the CLIP, the picture and the block: each is encoded once, by whichever fit comes first."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from defense.data.progress import Advance
from defense.errors import CheckpointError, NonFiniteError
from defense.hosts.tower import VisionTower, block_of
from defense.store import folders

from .chunks import bytes_of_pass, chunks

log = logging.getLogger(__name__)

MOST_BYTES = 8 * 2**30
"""What is kept of all fits together; the longest unused go first."""


class KeptResiduals:
    """Plain residuals of pictures, read where they are on disk, else encoded and kept there.

    Args:
        tower: The vision tower, undefended while it is asked.
        folder: Where they are kept; None to keep nothing.
    """

    def __init__(self, tower: VisionTower, folder: Path | None) -> None:
        self.tower = tower
        self._home = None if folder is None else folder / tower.fingerprint()[:32]
        self._root = folder

    def resid(self, pixel_values: Tensor, hook_point: str, advance: Advance = lambda _: None) -> Tensor:
        """Return residuals float32 [n, pos, d_model] on the tower's device.

        What is kept is picture by picture, what is encoded chunk by chunk: a chunk with a picture that is not there is
        encoded as a whole, so that it comes out as it would have without an interruption.

        Args:
            pixel_values: float32 [n, 3, height, width].
            hook_point: Where they are taken out.
            advance: Told of each picture.
        """
        shape = self.tower.n_pos, self.tower.d_model
        found = torch.empty(len(pixel_values), *shape, device=self.tower.device)
        for rows in chunks(len(pixel_values), bytes_of_pass(self.tower, 1, shape[0])):
            paths = [self._path(pixels, hook_point) for pixels in pixel_values[rows]]
            kept = [self._read(path, shape) for path in paths]
            fresh = None
            if any(resid is None for resid in kept):
                fresh = self.tower.resid(pixel_values[rows], hook_point)
            for index, (row, path) in enumerate(zip(range(rows.start, rows.stop), paths, strict=True)):
                resid = kept[index]
                if resid is None:
                    assert fresh is not None
                    found[row] = fresh[index]
                    self._write(path, fresh[index])
                else:
                    found[row] = torch.from_numpy(resid)
            advance(rows.stop - rows.start)
        return found

    def trim(self, most_bytes: int = MOST_BYTES) -> None:
        """Delete what was not used for longest, of this and other fits, until no more than so much is left."""
        if self._root is None or not self._root.is_dir():
            return
        files = [(path, path.stat()) for path in self._root.rglob("*.safetensors")]
        excess = sum(stat.st_size for _, stat in files) - most_bytes
        for path, stat in sorted(files, key=lambda each: each[1].st_mtime):
            if excess <= 0:
                return
            path.unlink(missing_ok=True)
            excess -= stat.st_size

    def _path(self, pixels: Tensor, hook_point: str) -> Path | None:
        if self._home is None:
            return None
        picture = hashlib.sha256(np.ascontiguousarray(pixels.numpy()).tobytes()).hexdigest()[:32]
        return self._home / f"block-{block_of(hook_point)}" / f"{picture}.safetensors"

    def _read(self, path: Path | None, shape: tuple[int, int]) -> np.ndarray | None:
        """Return a picture's residual; None where it is not there, or is damaged."""
        if path is None or not path.is_file():
            return None
        try:
            resid = folders.read_tensors(path).get("resid")
        except (CheckpointError, NonFiniteError) as error:
            log.warning("%s; the picture is encoded again", error)
            return None
        if resid is None or resid.shape != shape or resid.dtype != np.float32:
            log.warning("%s holds no residual of this block; the picture is encoded again", path)
            return None
        path.touch()  # for `trim`
        return resid

    def _write(self, path: Path | None, resid: Tensor) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        with folders.replacing(path) as partial:
            folders.write_tensors({"resid": resid.cpu().numpy()}, partial, save_file)
