"""The latents of a class, and what masking them does to accuracy: do they carry the decision?

    three labeled pictures of four --largest activation--> mean by class, less the mean over all -> a class's latents
    the fourth                     --their residuals-----> a sample of fixed size -> classified with latents masked

So no picture is masked by what it said itself. PatchSAE (arXiv:2412.05276) ranks by how often a latent fires in a
class; what fires in every class alike, as backgrounds do, then comes first, so here the mean over all is taken off.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from defense.core.intervals import wilson
from defense.core.sae import SparseAutoencoder
from defense.errors import ConfigError
from defense.hosts.clip import Clip

from .sums import NUMBERS_AT_ONCE, Example, Reservoir

WAYS = ("remove the class's", "keep only the class's", "remove the most active", "remove random ones")
"""What is masked, k latents at a time; the last two are controls, the same latents for every picture."""
N_MASKED = 256
"""Pictures that are masked, at most."""
N_TOP = 10
"""Latents of a class that a catalogue names."""
_KS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_MASKED_EVERY = 4
_N_SHOWN = 20
"""Classes whose latents are printed."""


class ClassSums:
    """What one pass adds up for the classes.

    Args:
        names: Of the classes, at least two.
        d_sae: Latents.
        device: Where the sums are.
        seed: Of the pictures that are kept.
        n_masked: How many of these at most.

    Raises:
        ConfigError: Fewer than two classes.
    """

    def __init__(
        self, names: Sequence[str], d_sae: int, device: torch.device, seed: int, n_masked: int = N_MASKED
    ) -> None:
        if len(names) < 2:
            raise ConfigError(f"{len(names)} classes; it takes at least two to tell one from another")
        self.names = tuple(names)
        self._number = {name: number for number, name in enumerate(self.names)}
        self.total = torch.zeros(len(names), d_sae, dtype=torch.float64, device=device)
        self.n = torch.zeros(len(names), dtype=torch.int64, device=device)
        # Of the same seed and size, so that both keep the same pictures.
        self.resid, self.label = Reservoir(n_masked, seed), Reservoir(n_masked, seed)
        self._n_labeled = 0

    def add(self, chunk: Sequence[Example], largest: Tensor, resid: Tensor) -> None:
        """Take in pictures: each latent's largest activation [batch, d_sae], and residuals [batch, pos, d_model]."""
        for row, example in enumerate(chunk):
            number = None if example.label is None else self._number.get(example.label)
            if number is None:
                continue
            self._n_labeled += 1
            if self._n_labeled % _MASKED_EVERY == 0:
                self.resid.add(resid[row : row + 1].clone())
                self.label.add(torch.tensor([number], device=resid.device))
            else:
                self.total[number] += largest[row]
                self.n[number] += 1

    def leads(self) -> Tensor:
        """Return how far each class's mean activation is above that of all its pictures, float64 [n_classes, d_sae].

        0 for a class without pictures.
        """
        mean = self.total / self.n.clamp(min=1)[:, None]
        return (mean - self.total.sum(0) / self.n.sum().clamp(min=1)) * (self.n > 0)[:, None]

    def top(self, k: int) -> dict[str, list[tuple[int, float]]]:
        """Return the latents of each class, the one furthest ahead first, each with its lead; only what is ahead."""
        found = self.leads().topk(min(k, self.total.shape[1]), dim=1)
        return {
            name: [(latent, lead) for latent, lead in zip(latents, leads, strict=True) if lead > 0]
            for name, latents, leads in zip(self.names, found.indices.tolist(), found.values.tolist(), strict=True)
        }


@torch.inference_mode()
def masking_curve(
    clip: Clip, hook_point: str, sae: SparseAutoencoder, sums: ClassSums, text_embeds: Tensor, seed: int
) -> dict[str, Any]:
    """Return accuracy with k latents masked, by way and k, as JSON values; "all" counts the latents that fire.

    Costs a pass through the blocks behind the hook point for each kept picture, way and k. The SAE's error stays.

    Args:
        clip: The CLIP.
        hook_point: Where the SAE reads.
        sae: The SAE.
        sums: Of the pass.
        text_embeds: Of the classes, [n_classes, d_embed], normalized.
        seed: Of the random latents.

    Raises:
        ConfigError: No picture of these classes was kept.
    """
    if not sums.label.kept:
        raise ConfigError(
            f"of the pictures fewer than {_MASKED_EVERY} have one of the {len(sums.names)} classes, so there is "
            "nothing to mask; give the classes that the pictures are labeled with"
        )
    label, orders = torch.stack(sums.label.kept), _orders(sums, seed)
    n_fire = int((sums.total.sum(0) > 0).sum())
    ks = [*(k for k in _KS if k < n_fire), n_fire]
    hits = {way: [0] * len(ks) for way in WAYS}
    n_plain = 0
    resid = torch.stack(sums.resid.kept)
    at_once = max(1, NUMBERS_AT_ONCE // (resid.shape[1] * sae.config.d_sae))
    for rows, answer in zip(resid.split(at_once), label.split(at_once), strict=True):
        masker = _Masker(clip, hook_point, sae, rows, text_embeds)
        n_plain += int((masker.answers(None) == answer).sum())
        for way in WAYS:
            order = orders[way][answer]  # [batch, d_sae], the first to mask first
            for place, k in enumerate(ks):
                chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order[:, :k], True)
                is_masked = ~chosen if way.startswith("keep") else chosen
                hits[way][place] += int((masker.answers(is_masked) == answer).sum())
    n = len(label)
    return {"n": n, "plain": _figures(n_plain, n), "ks": ks,
            "ways": {way: [_figures(each, n) for each in hits[way]] for way in WAYS}}  # fmt: skip


def _orders(sums: ClassSums, seed: int) -> dict[str, Tensor]:
    """Return in which order latents are masked for each class, int64 [n_classes, d_sae], by way."""
    own = sums.leads().argsort(dim=1, descending=True, stable=True)
    active = sums.total.sum(0)
    most_active = active.argsort(descending=True, stable=True)
    n_fire = int((active > 0).sum())
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.cat([torch.randperm(n_fire, generator=generator), torch.arange(n_fire, len(active))])
    random = most_active[shuffled.to(active.device)]  # those that fire come first in either
    return dict(zip(WAYS, (own, own, most_active.expand_as(own), random.expand_as(own)), strict=True))


def _figures(hits: int, n: int) -> list[float]:
    """Return a share with its 95 % interval."""
    return [round(each, 4) for each in wilson(hits, n)]


class _Masker:
    """Some pictures, and the answers to them with latents masked."""

    def __init__(self, clip: Clip, hook_point: str, sae: SparseAutoencoder, resid: Tensor, text_embeds: Tensor) -> None:
        self.clip, self.hook_point, self.sae, self.resid, self.text_embeds = clip, hook_point, sae, resid, text_embeds
        self.tokens = clip.tower.positions(hook_point, sae.config.tokens)
        self.read = resid[:, self.tokens]
        self.acts = sae.encode(self.read)
        self.whole = sae.decode(self.acts, self.read)

    def answers(self, is_masked: Tensor | None) -> Tensor:
        """Return the class of each picture, int64 [batch], with latents masked, bool [batch, d_sae]; None for none."""
        edited = self.resid
        if is_masked is not None:
            left = self.sae.decode(self.acts * ~is_masked[:, None], self.read)
            edited = self.resid.clone()
            edited[:, self.tokens] += left - self.whole
        return (self.clip.tower.embeds_from(edited, self.hook_point) @ self.text_embeds.T).argmax(1)


def lines_of(found: dict[str, Any], n_top: int = 3) -> list[str]:
    """Return lines on the classes of a catalogue: their first latents, and the masking curve.

    Args:
        found: As a catalogue's provenance holds it under "classes".
        n_top: Latents to name of each class.
    """
    lines = [
        f"{name}: {', '.join(f'{latent} (+{lead:.2f})' for latent, lead in top[:n_top]) or 'no latent is ahead'}"
        for name, top in islice(found["top"].items(), _N_SHOWN)
    ]
    if (n_more := len(found["top"]) - _N_SHOWN) > 0:
        lines.append(f"and {n_more} more classes, in the catalogue")
    curve = found["masking"]
    share, low, high = (100 * each for each in curve["plain"])
    lines.append(
        f"accuracy on {curve['n']} of the pictures: {share:.1f} % [{low:.1f}-{high:.1f}]; with k latents masked:"
    )
    lines.append(f"{'k':26}" + "".join(f"{k:>8}" for k in curve["ks"]))
    lines += [
        f"{way:26}" + "".join(f"{100 * figures[0]:>8.1f}" for figures in curve["ways"][way]) for way in curve["ways"]
    ]
    return lines


def found_of(curve: dict[str, Any], sums: ClassSums) -> dict[str, Any]:
    """Return what a catalogue keeps of the classes, as JSON values."""
    top = {name: [[latent, round(lead, 4)] for latent, lead in own] for name, own in sums.top(N_TOP).items()}
    return {"n_ranked": int(sums.n.sum()), "top": top, "masking": curve}
