"""The residuals of the pictures of a fit: each picture is encoded once per block; folds and placements slice that."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from defense.hosts.clip import Clip
from defense.hosts.tower import block_of

from .material import Groups, Pairs


class Encoded:
    """Pictures to fit on, and their residuals, which are encoded when they are first asked for.

    Each block that was asked for takes 4 bytes times pos * d_model of each picture and each of its twins.

    Args:
        clip: The CLIP. A defense that is attached to it stays out of what is kept.
        data: The pictures.
    """

    def __init__(self, clip: Clip, data: Pairs | Groups) -> None:
        self.clip, self.data = clip, data
        self._whole: dict[str, dict[str, Tensor]] = {}  # hook point -> kind of picture -> plain residuals of all
        self._all = data
        self._rows: Tensor | None = None

    def take(self, rows: Tensor) -> Encoded:
        """Return some of the pictures, by their index, int64 [m]; the two share what is encoded."""
        part = Encoded(self.clip, self.data.take(rows))
        part._whole, part._all = self._whole, self._all
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

    def image_embeds(self, hook_point: str) -> dict[str, Tensor]:
        """Return image_embeds float32 [n, d_embed], normalized, by kind of picture, of the CLIP as it is now.

        Args:
            hook_point: From where on the network is run: no edit may be in front of it.
        """
        return {kind: self.clip.tower.embeds_from(resid, hook_point) for kind, resid in self._plain(hook_point).items()}

    def _plain(self, hook_point: str) -> dict[str, Tensor]:
        if hook_point not in self._whole:
            with self.clip.undefended():
                self._whole[hook_point] = {
                    kind: self.clip.tower.resid(pixel_values, hook_point)
                    for kind, pixel_values in self._all.pictures().items()
                }
        whole = self._whole[hook_point]
        return whole if self._rows is None else {kind: resid[self._rows] for kind, resid in whole.items()}
