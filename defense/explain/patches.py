"""What each patch of a picture says in the words of the labels, and the region of the picture that a phrase names.

    pixel_values --blocks 0..L-->              CLS, patch 1, patch 2, ...
    [CLS, patch i] --blocks L+1.., pool, proj--> image_embeds of patch i      one short sequence for each patch
    logit_scale * cos with text_embeds          -> logits [rows, columns, n_labels]

From block L on, the CLS token sees one patch and nothing else. Where a tower pools patches, that patch alone is pooled.

To read the last block's patches by the final norm and projection (a "logit lens", as arXiv:2410.02762 reads the image
tokens of a language model) says little in a CLIP that pools its CLS token: nothing trained these tokens to be read.
`python -m defense.benchmarks.patches` has both, and CLIP's own attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.data import labels
from defense.data.labels import Prompts
from defense.errors import ConfigError, HookPointError

if TYPE_CHECKING:
    from torch import Tensor

    from defense.classify.classifier import Probe, RobustClassifier
    from defense.hosts.controls import Controls
    from defense.hosts.tower import VisionTower


__all__ = ["PatchLabels", "Region", "patch_labels", "region_of"]


@dataclass(frozen=True, eq=False)
class Region:
    """Where in a picture something is that a phrase names.

    Attributes:
        phrase: What is looked for.
        less: What it is told from; None where it is told from the rest of the picture.
        plain: Logit of the phrase at each patch of the undefended network, less that of `less`, float32
            [rows, columns].
        robust: The same with the defense; None without one.
    """

    phrase: str
    less: str | None
    plain: np.ndarray
    robust: np.ndarray | None

    @property
    def name(self) -> str:
        """What to call it."""
        return self.phrase if self.less is None else f"{self.phrase} less {self.less}"

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values, with the patches of the region on either side."""
        found: dict[str, Any] = {"phrase": self.phrase, "less": self.less}
        for side in ("plain", "robust"):
            heat = getattr(self, side)
            found[side] = None if heat is None else heat.tolist()
            found[f"{side}_region"] = None if heat is None else region_of(heat).tolist()
        return found


@dataclass(frozen=True, eq=False)
class PatchLabels:
    """What each patch of a picture says.

    Attributes:
        hook_point: From where on a patch is seen alone.
        labels: What there was to say.
        plain: Logits of the undefended network, float32 [rows, columns, n_labels].
        robust: The same with the defense; None without one.
        region: Where a phrase is, if one was asked for.
    """

    hook_point: str
    labels: tuple[str, ...]
    plain: np.ndarray
    robust: np.ndarray | None
    region: Region | None = None

    def best(self, *, robust: bool = False) -> np.ndarray:
        """Return the index of the label that each patch says, int64 [rows, columns].

        Args:
            robust: With the defense.

        Raises:
            ConfigError: There is no defense.
        """
        if robust and self.robust is None:
            raise ConfigError("this picture was read without a defense; leave robust=False")
        logits = self.robust if robust and self.robust is not None else self.plain
        best: np.ndarray = logits.argmax(-1)
        return best

    def shares(self, *, robust: bool = False) -> list[tuple[str, float]]:
        """Return the labels that patches say, each with its share of the patches, the largest first.

        Args:
            robust: With the defense.

        Raises:
            ConfigError: There is no defense.
        """
        index, count = np.unique(self.best(robust=robust), return_counts=True)
        order = np.argsort(-count, kind="stable")
        return [(self.labels[index[i]], float(count[i] / count.sum())) for i in order]

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values."""
        return {
            "hook_point": self.hook_point,
            "labels": list(self.labels),
            "plain": self.plain.tolist(),
            "robust": None if self.robust is None else self.robust.tolist(),
            "region": None if self.region is None else self.region.to_dict(),
        }


def patch_labels(
    clf: RobustClassifier,
    image: Any,
    *,
    phrase: str | None = None,
    less: str | None = None,
    hook_point: str | None = None,
    controls: Controls | None = None,
) -> PatchLabels:
    """Return what each patch of a picture says, without and with the defense.

    Costs, beside two passes of the picture, twice as many tokens as it has through the blocks behind `hook_point`,
    before and after.

    Args:
        clf: With labels set; with a defense, or without one.
        image: See `images.decode`.
        phrase: Something to find; put into the templates of the labels.
        less: Something to tell it from: the phrase's logit less this one's, as contrastive segmentation
            (arXiv:2409.06579) does by heads.
        hook_point: From where on a patch is seen alone; by default `middle_of` the tower.
        controls: What of the defense is active; by default all of it.

    Raises:
        ConfigError: No labels are set, `less` without `phrase`, a phrase that is no label, or `controls` without a
            defense.
        HookPointError: See `patch_embeds`.
    """
    from defense.hosts.controls import Controls

    if less is not None and phrase is None:
        raise ConfigError(f"less={less!r} without a phrase; say what it is to be told from: phrase=")
    if clf.defense is None and controls is not None:
        raise ConfigError("this classifier has no defense to control; leave controls=None")
    probe = clf.probe(image)
    point = middle_of(clf.clip.tower) if hook_point is None else hook_point
    names = [each for each in (phrase, less) if each is not None]
    assert clf.prompts is not None  # the probe has seen to that
    sides = [None] if clf.defense is None else [None, controls or Controls()]
    embeds = [_embeds_of(probe, point, side) for side in sides]
    scale = clf.clip.logit_scale
    region = None
    if phrase is not None:
        found = clf.clip.text_embeds(Prompts(labels.check_labels(names), clf.prompts.templates))
        target = found[0] - found[1] if less is not None else found[0]
        region = Region(phrase, less, *_both([scale * each @ target for each in embeds]))
    return PatchLabels(point, probe.labels, *_both([scale * each @ probe.text_embeds.T for each in embeds]), region)


def _both(sides: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray | None]:
    """Return plain and robust; None for what there is none of."""
    return sides[0], sides[1] if len(sides) > 1 else None


def _embeds_of(probe: Probe, hook_point: str, controls: Controls | None) -> np.ndarray:
    """Return a picture's patches, float32 [rows, columns, d_embed]; undefended where `controls` is None."""
    import torch

    with torch.inference_mode(), probe.inside(controls) as (clip, pixel_values):
        resid = clip.tower.resid(pixel_values, hook_point, edited=False)
        found: np.ndarray = patch_embeds(clip.tower, resid, hook_point)[0].cpu().numpy()
    return found.reshape(*clip.tower.grid_size, -1)


def middle_of(tower: VisionTower) -> str:
    """Return the hook point half way through the blocks that count.

    On the drawn world that is where a phrase is found best by the area under its curve, with and without writing.
    """
    return f"blocks.{max(tower.n_read // 2 - 1, 0)}.hook_resid_post"


def patch_embeds(tower: VisionTower, resid: Tensor, hook_point: str) -> Tensor:
    """Return the image embedding of each patch seen alone from a block on, float32 [batch, n_patches, d_embed].

    Args:
        tower: The tower. What is attached to this block and to later ones is at work.
        resid: Behind the block, before what is attached to it edits it, [batch, pos, d_model].
        hook_point: Which block; before the last one where the embedding is read from the CLS token.

    Raises:
        HookPointError: There is no such block, no later one lets the CLS token see a patch, or the tower's blocks take
            whole pictures only.
    """
    import torch

    from defense.hosts.tower import block_of

    tower.block(hook_point)
    if tower.places_in_blocks:
        raise HookPointError(
            "what single patches say cannot be read here: the blocks of this tower tell places by rotary or relative "
            "positions, so they take whole pictures only; use a tower without these, as those of CLIP and SigLIP"
        )
    if tower.reads == "cls" and block_of(hook_point) >= tower.n_read - 1:
        raise HookPointError(
            f"{hook_point}: behind it the CLS token sees no patch any more, so that all would say the same; use a "
            f"block before block {tower.n_read - 1}"
        )
    prefix, patches = resid[:, : tower.n_prefix], resid[:, tower.n_prefix :]
    n_patches = patches.shape[1]
    alone = torch.cat([prefix[:, None].expand(-1, n_patches, -1, -1), patches[:, :, None]], 2)
    embeds: Tensor = tower.embeds_from(alone.flatten(0, 1), hook_point)
    return embeds.view(-1, n_patches, embeds.shape[-1])


def region_of(heat: np.ndarray) -> np.ndarray:
    """Return which patches belong to a region, bool [rows, columns]: those above the threshold of their heat.

    Args:
        heat: Logits, [rows, columns].
    """
    inside: np.ndarray = heat > threshold_of(heat)
    return inside


def threshold_of(heat: np.ndarray) -> float:
    """Return the threshold that tells patches apart best: between two groups of the least variance within.

    Args:
        heat: float [rows, columns].

    Source: Otsu 1979, doi:10.1109/TSMC.1979.4310076; over the values themselves instead of bins.
    """
    values = np.sort(heat, axis=None).astype(np.float64)
    n_below = np.arange(1, len(values))
    below = np.cumsum(values)[:-1]
    between = n_below * (len(values) - n_below) * (below / n_below - (values.sum() - below) / n_below[::-1]) ** 2
    cut = int(between.argmax()) if len(between) else 0
    return float(values[cut])
