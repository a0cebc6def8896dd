"""Turn a TopK rule into one threshold per latent, so that each latent decides alone.

A TopK rule makes latents compete: whether one counts depends on all the others, and a graph has to encode all of them
to know. A threshold needs the columns of S alone (`delta` in export/vision.py). The rule that results is that of
BatchTopK at inference: f_i = h_i where h_i > threshold_i.

Thresholds are chosen on some pictures and judged on others: how often is the answer that of the exact rule, and how
close are the embeddings? Pictures should be of the kind the classifier will see, with and without the cue.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.core.latents import Scope, token_slice
from defense.core.sae import normalize
from defense.errors import CalibrationError, ConfigError, NonFiniteError, ShapeError
from defense.hosts.attach import AttachedDefense, sae_of
from defense.hosts.clip import Clip
from defense.hosts.defense import Defense, Site
from defense.hosts.golden import make_golden
from defense.hosts.tower import VisionTower

from .chunks import COPIES, chunks

_LEAST_PICTURES = 16
_N_ANCHORS = 100
"""Pictures that stand in for labels where there are none. Of many more, two would be alike, and which is nearest would
mean nothing."""
_BATCH = 50


@dataclass(frozen=True)
class Calibration:
    """How the calibrated defense compares with the exact one.

    Attributes:
        n_fitted: Pictures that the thresholds were chosen on.
        n_held_out: Other pictures, that everything below was measured on.
        compared: What a prediction is: the best of the given "labels", or the nearest of up to 100 fitted "pictures".
        agreement: Share of pictures with the same prediction.
        cosine_mean: Mean cosine between the two embeddings of a picture.
        cosine_worst: The smallest.
        wrong_energy: Hook point -> the energy of activations that one rule removes and the other keeps, over the energy
            that the exact rule removes. On the fitted pictures.
    """

    n_fitted: int
    n_held_out: int
    compared: str
    agreement: float
    cosine_mean: float
    cosine_worst: float
    wrong_energy: Mapping[str, float]


def calibrated(
    clip: Clip,
    defense: Defense,
    pixel_values: Tensor | Sequence[Tensor],
    *,
    least_agreement: float = 0.99,
    text_embeds: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> tuple[Defense, Calibration]:
    """Return a defense whose TopK sites decide by thresholds, and how well it stands in for the exact one.

    Every other group (in a random order that is always the same) fits, the others are held out. What was measured is
    also in the defense's provenance, under "calibration"; its golden vectors are those of the new rule.

    Args:
        clip: The CLIP that the defense was fitted on, undefended; it is left as it was.
        defense: Any of its sites may have a TopK rule, one at least.
        pixel_values: As the CLIP's preprocess makes them, float32 [n, 3, height, width]; or several such tensors, whose
            pictures count one behind the other, as if they were joined.
        least_agreement: Share of held-out pictures that must keep their prediction.
        text_embeds: Labels to predict, normalized, [n_labels, d_embed]. Without them, a prediction is the nearest
            of up to 100 fitted pictures, by the exact embeddings of those.
        groups: Pictures with the same number, int [n], are alike (an attacked picture and its clean twin), and stay
            together: either all fit or all are held out. By default each picture is a group of its own.

    Raises:
        CalibrationError: The two defenses agree on fewer pictures.
        ConfigError: No site has a TopK rule, one lets negative latents count, or there are too few pictures. See also
            `wrap`.
        ShapeError: `pixel_values` or `groups` has another shape.
    """
    parts = [pixel_values] if isinstance(pixel_values, Tensor) else list(pixel_values)
    groups = np.arange(sum(map(len, parts))) if groups is None else np.asarray(groups)
    _check(defense, parts, groups)
    rows, rows_held_out = _halves(groups)
    with clip.defended(defense) as attachment:
        sites, wrong_energy, fitted_embeds = _threshold_sites(clip, attachment, defense, parts, rows)
        wanted = _embeds(clip, parts, rows_held_out)
    firsts = np.sort(np.unique(groups[rows], return_index=True)[1])  # one of each group: the others are alike
    anchors = fitted_embeds[firsts[:_N_ANCHORS]] if text_embeds is None else text_embeds
    result = replace(defense, sites=sites, golden=None)
    with clip.defended(result):
        got = _embeds(clip, parts, rows_held_out)
        golden = None if defense.golden is None else make_golden(clip, defense.golden.pictures)
    cosines = (got * wanted).sum(1)
    calibration = Calibration(
        n_fitted=len(rows),
        n_held_out=len(rows_held_out),
        compared="pictures" if text_embeds is None else "labels",
        agreement=float(((got @ anchors.T).argmax(1) == (wanted @ anchors.T).argmax(1)).mean()),
        cosine_mean=float(cosines.mean()),
        cosine_worst=float(cosines.min()),
        wrong_energy=wrong_energy,
    )
    if calibration.agreement < least_agreement:
        raise CalibrationError(calibration.agreement, least_agreement, calibration.n_held_out)
    provenance = {**defense.provenance, "calibration": asdict(calibration)}
    return replace(result, golden=golden, provenance=provenance), calibration


def _check(defense: Defense, parts: Sequence[Tensor], groups: np.ndarray) -> None:
    if not any(site.sae_config.act == "topk" for site in defense.sites):
        raise ConfigError("no site of this defense has a topk SAE; its latents decide alone already")
    for site in defense.sites:
        if site.sae_config.act == "topk" and site.sae_config.topk_relu == "none":
            raise ConfigError(f"the topk SAE at {site.hook_point} lets negative latents count; no threshold does")
    want = (3, *defense.preprocess.size)
    for part in parts:
        if part.ndim != 4 or tuple(part.shape[1:]) != want:
            raise ShapeError(
                f"pixel_values is {list(part.shape)}, want [n, {', '.join(map(str, want))}] as the CLIP's preprocess "
                "makes them"
            )
    n = sum(map(len, parts))
    if n < _LEAST_PICTURES:
        raise ConfigError(
            f"{n} pictures are too few to calibrate on; give {_LEAST_PICTURES} at least, and some "
            "hundreds for a figure to rely on"
        )
    if groups.shape != (n,):
        raise ShapeError(f"groups is {list(groups.shape)}, want [{n}], a number for each picture")
    if (groups == groups[0]).all():
        raise ConfigError("all pictures are of one group, so none could be held out; give several groups")


def _halves(groups: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return which pictures fit and which are held out, by index: every other group of a random order."""
    names, group = np.unique(groups, return_inverse=True)
    place = np.argsort(np.random.default_rng(0).permutation(len(names)))[group]
    rows = np.argsort(place, kind="stable")
    is_fitted = place[rows] % 2 == 0
    return torch.from_numpy(rows[is_fitted]), torch.from_numpy(rows[~is_fitted])


def _embeds(clip: Clip, parts: Sequence[Tensor], rows: Tensor) -> np.ndarray:
    embeds = []
    for index in rows.split(_BATCH):
        pixel_values = _taken(parts, index)
        if not pixel_values.isfinite().all():
            raise NonFiniteError("pixel_values")
        embeds.append(clip.image_embeds(pixel_values))
    return torch.cat(embeds).cpu().numpy()


def _taken(parts: Sequence[Tensor], rows: Tensor) -> Tensor:
    """Return the pictures of some rows: joining the parts, to take them from that, would copy all of them."""
    taken = parts[0].new_empty(len(rows), *parts[0].shape[1:])
    start = 0
    for part in parts:
        is_here = (rows >= start) & (rows < start + len(part))
        taken[is_here] = part[rows[is_here] - start]
        start += len(part)
    return taken


def _threshold_sites(
    clip: Clip, attachment: AttachedDefense, defense: Defense, parts: Sequence[Tensor], rows: Tensor
) -> tuple[tuple[Site, ...], dict[str, float], np.ndarray]:
    """Return the sites with thresholds for TopK rules, the energy that is wrong at each, and the exact embeddings."""
    observers = {
        index: _Observer(site, clip.tower) for index, site in enumerate(defense.sites) if site.sae_config.act == "topk"
    }
    embeds = []
    with attachment.recording() as told:
        for batch in rows.split(_BATCH):
            embeds.append(_embeds(clip, parts, batch))
            for observer in observers.values():
                observer.see(told[observer.site.hook_point].resid.float().cpu())
    sites = list(defense.sites)
    wrong_energy = {}
    for index, observer in observers.items():
        sites[index], wrong_energy[observer.site.hook_point] = observer.thresholded()
    return tuple(sites), wrong_energy, np.concatenate(embeds)


class _Observer:
    """What the latents of one site's sets do on pictures: their activations, and which of them the TopK rule keeps.

    Each is watched at the tokens where it is edited: thresholds for the CLS token are not those of the many patches.
    """

    def __init__(self, site: Site, tower: VisionTower) -> None:
        self.site = site
        self.sae = sae_of(site)
        self.tower = tower
        self.latents: dict[Scope, list[int]] = {}
        self.kth_largest: list[Tensor] = []
        self.seen: dict[int, list[tuple[Tensor, Tensor]]] = {}
        for latent_set in site.sets:
            new = [latent for latent in latent_set.latents if latent not in self.seen]  # the first set that names it
            self.latents.setdefault(tower.effective_scope(site.hook_point, latent_set.scope), []).extend(new)
            self.seen |= {latent: [] for latent in new}

    @torch.inference_mode()
    def see(self, resid: Tensor) -> None:
        """Take in residuals [batch, pos, d_model]."""
        k = self.sae.config.k
        assert k is not None
        for scope, latents in self.latents.items():
            tokens = resid[:, token_slice(scope, self.tower.n_prefix)].flatten(0, 1)
            for part in chunks(len(tokens), 4 * COPIES * self.sae.config.d_sae):
                z = normalize(tokens[part], self.sae.config.norm).z
                pre_acts = z @ self.sae.W_enc + self.sae.folded_bias
                kth_largest = pre_acts.topk(k, dim=1).values[:, -1]
                self.kth_largest.append(kth_largest)
                for latent in latents:
                    positive = pre_acts[:, latent] > 0
                    acts = pre_acts[positive, latent]
                    self.seen[latent].append((acts, acts >= kth_largest[positive]))

    def thresholded(self) -> tuple[Site, float]:
        """Return the site with a threshold for every latent, and the share of energy on which the rules differ.

        Latents that no set names, or that were never positive, get the median of the k-th largest pre-activation.
        """
        typical = float(torch.cat(self.kth_largest).median().clamp(min=0))
        thresholds = np.full(self.sae.config.d_sae, typical, np.float32)
        wrong = kept = 0.0
        for latent, parts in self.seen.items():
            acts, is_kept = (torch.cat(column).double().numpy() for column in zip(*parts, strict=True))
            if len(acts):
                thresholds[latent], lost = best_threshold(acts, is_kept > 0)
                wrong += lost
                kept += float((acts**2 * is_kept).sum())
        config = replace(self.sae.config, act="batchtopk", k=None, topk_relu="before")
        parameters: dict[str, Any] = {**self.site.parameters, "threshold": thresholds}
        return replace(self.site, sae_config=config, parameters=parameters), wrong / kept if kept else 0.0


def best_threshold(acts: np.ndarray, is_kept: np.ndarray) -> tuple[float, float]:
    """Return the threshold that leaves the least energy on the wrong side, and that energy.

    Args:
        acts: Positive activations of one latent, [n], n >= 1.
        is_kept: Whether the exact rule keeps each, bool [n].

    Returns:
        A float32 between two of the activations, and the sum of squares of those that are kept though not above it, or
        above it though not kept.
    """
    order = np.argsort(acts)
    energy, kept = acts[order] ** 2, is_kept[order]
    # With the threshold below all: what is not kept is wrong. Each activation that it passes changes sides.
    wrong = energy[~kept].sum() + np.concatenate([[0.0], np.cumsum(np.where(kept, energy, -energy))])
    # A threshold cannot part equal activations.
    edges = np.concatenate([[0.0], acts[order], [np.inf]])
    wrong[edges[:-1] == edges[1:]] = np.inf
    best = int(wrong.argmin())
    threshold = edges[best] if best == len(acts) else (edges[best] + edges[best + 1]) / 2
    return float(np.float32(threshold)), float(wrong[best])
