"""Which pictures are nearest to this one by some latents, and which by the whole embedding.

    overlap = sum over latents of min(a, b) / sum over latents of max(a, b)

a and b are the activations of the two pictures, each the largest over tokens, in the plain network: 1 where they are
the same, 0 where no latent fires on both. Beside it, the cosine of the image embeddings. CLIP-InterpreT
(arXiv:2409.06579) compares pictures by what single heads write; here it is latents.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from defense.data.images import decode
from defense.data.sources import Picture, Pictures, prepared
from defense.errors import ConfigError

if TYPE_CHECKING:
    from defense.classify.classifier import RobustClassifier
    from defense.core.sae import SparseAutoencoder
    from defense.hosts.clip import Clip
    from defense.hosts.controls import LatentKey

N_NEAREST = 5
"""Pictures that are kept of either kind."""
N_STRONGEST = 3
"""Latents that are taken where none are named."""
_SIDE = 160
"""Of a picture that is kept, in pixels along its longer side."""


@dataclass(frozen=True, eq=False)
class Neighbor:
    """A picture that is near.

    Attributes:
        name: Its path below the folder.
        score: Overlap or cosine.
        picture: It, made small.
    """

    name: str
    score: float
    picture: Image.Image


@dataclass(frozen=True, eq=False)
class Nearest:
    """The pictures nearest to one.

    Attributes:
        latents: By which.
        by_latents: The nearest by overlap, best first; none whose overlap is 0.
        by_embedding: The nearest by the cosine of the embeddings, best first.
        n_pictures: Pictures that were compared.
        n_same: Pictures that are left out, as they are the picture itself to the model.
        n_unreadable: Pictures that could not be read.
    """

    latents: tuple[LatentKey, ...]
    by_latents: tuple[Neighbor, ...]
    by_embedding: tuple[Neighbor, ...]
    n_pictures: int
    n_same: int
    n_unreadable: int

    @property
    def n_shared(self) -> int:
        """Pictures that are among the nearest of both kinds."""
        return len({each.name for each in self.by_latents} & {each.name for each in self.by_embedding})

    def to_dict(self) -> dict[str, Any]:
        """Return the attributes as JSON values, without the pictures."""
        sides = {
            name: [{"name": each.name, "score": round(each.score, 6)} for each in getattr(self, name)]
            for name in ("by_latents", "by_embedding")
        }
        counts = {name: getattr(self, name) for name in ("n_pictures", "n_same", "n_unreadable")}
        return {"latents": [list(each) for each in self.latents], **sides, **counts}


def nearest(
    clf: RobustClassifier,
    image: Any,
    source: Pictures,
    latents: Sequence[LatentKey] = (),
    *,
    n: int = N_NEAREST,
) -> Nearest:
    """Return the pictures of a source that are nearest to one, by latents and by the whole embedding.

    Costs a pass for each picture, and one more up to each further block that has some of the latents.

    Args:
        clf: With a defense and labels set.
        image: See `images.decode`.
        source: To compare with. What is the same picture to the model is left out.
        latents: By which; of a slim defense those that it holds. By default the `N_STRONGEST` of the defense's latents
            that fire most on the picture.
        n: Pictures to keep of either kind.

    Raises:
        ConfigError: There is no defense or no such latent, none of them fires on the picture, or no picture of the
            source can be compared.
    """
    import torch

    groups = _by_point(clf, latents)
    probe = clf.probe(image)
    with torch.inference_mode(), probe.inside(None) as (clip, pixel_values):
        if not latents:
            groups = _strongest(clip, groups, pixel_values)
        own, own_embed = _read(clip, groups, pixel_values)
        if not own.any():
            named = ", ".join(f"{latent} at {point}" for point, _, some in groups for latent in some)
            raise ConfigError(
                f"no picture is near to this one by {named}: none fires on it; `defense explain` without --latent "
                "lists those of the defense that do"
                if latents
                else "no latent of the defense fires on this picture; name others with latents="
            )
        best = [_Best(n), _Best(n)]
        n_seen = n_same = n_unreadable = 0
        for chunk, pixels in _batches(clip, source):
            n_unreadable += sum(each is None for each in pixels)
            found = [(p, x) for p, x in zip(chunk, pixels, strict=True) if x is not None]
            others = [(p, x) for p, x in found if not np.array_equal(x, pixel_values[0])]
            n_same, n_seen = n_same + len(found) - len(others), n_seen + len(others)
            if others:
                acts, embeds = _read(clip, groups, np.stack([x for _, x in others]))
                for score, kept in zip((overlaps(acts, own[0]), embeds @ own_embed[0]), best, strict=True):
                    kept.add([picture for picture, _ in others], score)
    if not n_seen:
        raise ConfigError(f"no picture to compare with: {n_unreadable} cannot be read, {n_same} are this one itself")
    keys = tuple((point, latent) for point, _, some in groups for latent in some)
    by_latents, by_embedding = best[0].neighbors(above=0.0), best[1].neighbors(above=-np.inf)
    return Nearest(keys, by_latents, by_embedding, n_seen, n_same, n_unreadable)


def overlaps(acts: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Return how far the activations of pictures are one picture's, in [0, 1], float [n].

    Args:
        acts: Of the pictures, none below 0, float [n, n_latents].
        own: Of the one, none below 0 and some above, float [n_latents].

    Source: Ruzicka 1958; also known as the weighted Jaccard index.
    """
    shared: np.ndarray = np.minimum(acts, own).sum(1) / np.maximum(acts, own).sum(1)
    return shared


_Group = tuple[str, "SparseAutoencoder", list[int]]


def _by_point(clf: RobustClassifier, latents: Sequence[LatentKey]) -> list[_Group]:
    """Return hook point, SAE and latents of each: those that are named, or all that the defense edits."""
    if clf.defense is None:
        raise ConfigError("this classifier has no defense, so it knows no latents")
    edited = [(site.hook_point, latent) for site in clf.defense.sites for each in site.sets for latent in each.latents]
    chosen = list(dict.fromkeys(latents or edited))
    groups = []
    for point in dict.fromkeys(point for point, _ in chosen):
        sae, some = clf.sae(point), [latent for own, latent in chosen if own == point]
        sae.columns(some)  # refuses what it does not have
        groups.append((point, sae, some))
    return groups


def _strongest(clip: Clip, groups: list[_Group], pixel_values: np.ndarray) -> list[_Group]:
    """Return the same with the latents alone that fire most on a picture."""
    acts = _read(clip, groups, pixel_values)[0][0]
    keys = [(point, latent) for point, _, some in groups for latent in some]
    kept = {keys[place] for place in np.argsort(-acts, kind="stable")[:N_STRONGEST] if acts[place] > 0}
    left = [(point, sae, [latent for latent in some if (point, latent) in kept]) for point, sae, some in groups]
    return [group for group in left if group[2]]


def _read(clip: Clip, groups: Sequence[_Group], pixel_values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the largest activation of each latent, [n, n_latents], and image_embeds [n, d_embed], normalized."""
    columns, embeds = [np.zeros((len(pixel_values), 0), np.float32)], None
    for point, sae, some in groups:
        if embeds is None:
            resid, embeds = clip.tower.resid_and_embeds(pixel_values, point)
        else:
            resid = clip.tower.resid(pixel_values, point)
        read = resid[:, clip.tower.positions(point, sae.config.tokens)]
        columns.append(sae.acts_of(read, some).clamp(min=0).amax(1).float().cpu().numpy())
    if embeds is None:
        return columns[0], np.zeros((len(pixel_values), 0), np.float32)
    return np.concatenate(columns, 1), embeds.cpu().numpy()


def _batches(clip: Clip, source: Pictures) -> Iterator[tuple[list[Picture], list[np.ndarray | None]]]:
    """Yield pictures with their pixel_values, some at a time; None for one that cannot be read."""
    stream = iter(source)
    while chunk := list(islice(stream, 256)):
        for batch in prepared(clip.preprocess, chunk):
            yield [picture for picture, _ in batch], [pixels for _, pixels in batch]


class _Best:
    """Keeps the n pictures of a stream with the largest scores; of equal ones the first."""

    def __init__(self, n: int) -> None:
        self.n = n
        self._heap: list[tuple[float, int, Picture]] = []
        self._count = 0

    def add(self, pictures: Sequence[Picture], scores: np.ndarray) -> None:
        for picture, score in zip(pictures, scores.tolist(), strict=True):
            self._count += 1
            keep: Callable[..., Any] = heapq.heappush if len(self._heap) < self.n else heapq.heappushpop
            keep(self._heap, (score, -self._count, picture))  # the count tells equal scores apart

    def neighbors(self, *, above: float) -> tuple[Neighbor, ...]:
        return tuple(
            Neighbor(picture.name, score, _small(picture))
            for score, _, picture in sorted(self._heap, key=lambda entry: entry[:2], reverse=True)
            if score > above
        )


def _small(picture: Picture) -> Image.Image:
    image = decode(picture.open(), limits=picture.limits).image.convert("RGB")
    image.thumbnail((_SIDE, _SIDE))
    return image
