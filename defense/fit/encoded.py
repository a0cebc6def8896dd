"""The residuals of the pictures of a fit, and what latents do on them: computed once; folds and placements slice it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from defense.core.sae import SparseAutoencoder
from defense.data.progress import SILENT, Progress
from defense.hosts.clip import Clip
from defense.hosts.tower import block_of

from .chunks import bytes_behind, chunks
from .kept import KeptResiduals
from .material import Groups, Pairs
from .seen import Seen


class Encoded:
    """Pictures to fit on, and their residuals, which are encoded when they are first asked for.

    Each block that was asked for takes 4 bytes times pos * d_model of each picture and each of its twins; each SAE, 4
    bytes times d_sae of each.

    Args:
        clip: The CLIP. A defense that is attached to it stays out of what is kept.
        data: The pictures; without pixels where `take` made this, which has those of all.
        folder: Where residuals are kept for other fits too; None to keep nothing.
        progress: Told of the pictures.
    """

    def __init__(
        self, clip: Clip, data: Pairs | Groups, folder: Path | None = None, progress: Progress = SILENT
    ) -> None:
        self.clip, self.data, self.progress = clip, data, progress
        self.kept = KeptResiduals(clip.tower, folder)
        self._whole: dict[str, dict[str, Tensor]] = {}  # hook point -> kind of picture -> plain residuals of all
        self._seen: dict[tuple[str, int, bool], Seen] = {}  # hook point, SAE, whether it spares -> on all pictures
        self._all = data
        self._rows: Tensor | None = None

    @property
    def rows(self) -> Tensor:
        """Which of all the pictures these are, by index, int64 [n]."""
        return torch.arange(self.data.n) if self._rows is None else self._rows

    def take(self, rows: Tensor) -> Encoded:
        """Return some of the pictures, by their index, int64 [m]; the two share pixels and what is computed."""
        part = Encoded(self.clip, self.data.without_pixels(rows), None, self.progress)
        part.kept, part._whole, part._seen, part._all = self.kept, self._whole, self._seen, self._all
        part._rows = rows if self._rows is None else self._rows[rows]
        return part

    def resid(self, hook_point: str, edited: Sequence[str] = ()) -> dict[str, Tensor]:
        """Return residuals float32 [n, pos, d_model] by kind of picture (see `Pairs.pictures`, `Groups.pictures`).

        Args:
            hook_point: Where they are taken out.
            edited: Hook points at which the CLIP is edited now.
        """
        before = [point for point in edited if block_of(point) < block_of(hook_point)]
        if not before:
            return self._plain(hook_point)
        start = min(before, key=block_of)
        return {
            kind: self.clip.tower.resid_from(resid, start, hook_point) for kind, resid in self._plain(start).items()
        }

    def seen(
        self,
        hook_point: str,
        sae: SparseAutoencoder,
        text_embeds: Tensor,
        edited: Sequence[str] = (),
        *,
        spares_high_norm: bool = False,
    ) -> tuple[Seen, Tensor]:
        """Return what the latents of an SAE do on pictures, and which of those pictures these are, int64 [n].

        Without an edit, that is shared by all who take from the same pictures. With one, it is made anew, of these
        pictures alone: folds edit differently.

        Args:
            hook_point: Where the SAE reads.
            sae: The SAE.
            text_embeds: Of all answers, [n_labels, d_embed], normalized.
            edited: Hook points at which the CLIP is edited now.
            spares_high_norm: See `Seen`.
        """
        if edited:
            resid = self.resid(hook_point, edited)
            seen = Seen(self.clip, hook_point, sae, text_embeds, self.data, resid, self.progress, spares_high_norm)
            return seen, torch.arange(self.data.n)
        key = hook_point, id(sae), spares_high_norm
        if key not in self._seen:
            with self.clip.undefended():
                resid = self._plain_of_all(hook_point)
            self._seen[key] = Seen(
                self.clip, hook_point, sae, text_embeds, self._all, resid, self.progress, spares_high_norm
            )
        return self._seen[key], self.rows

    def image_embeds(self, hook_point: str) -> dict[str, Tensor]:
        """Return image_embeds float32 [n, d_embed], normalized, by kind of picture, of the CLIP as it is now.

        Args:
            hook_point: From where on the network is run: no edit may be in front of it.
        """
        with torch.no_grad():
            return {kind: self._embeds(resid, hook_point) for kind, resid in self._plain(hook_point).items()}

    def _embeds(self, resid: Tensor, hook_point: str) -> Tensor:
        tower = self.clip.tower
        each = bytes_behind(tower, hook_point, resid.shape[1])
        return torch.cat([tower.embeds_from(resid[part], hook_point) for part in chunks(len(resid), each)])

    def _plain(self, hook_point: str) -> dict[str, Tensor]:
        whole = self._plain_of_all(hook_point)
        return whole if self._rows is None else {kind: resid[self._rows] for kind, resid in whole.items()}

    def _plain_of_all(self, hook_point: str) -> dict[str, Tensor]:
        if hook_point not in self._whole:
            pictures = self._all.pictures()
            total = sum(map(len, pictures.values()))
            with self.clip.undefended(), self.progress.stage(f"residuals of block {block_of(hook_point)}", total) as on:
                self._whole[hook_point] = {
                    kind: self.kept.resid(pixel_values, hook_point, on) for kind, pixel_values in pictures.items()
                }
        return self._whole[hook_point]
