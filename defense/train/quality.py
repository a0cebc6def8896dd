"""How good an SAE is: explained variance, L0, and what its reconstruction costs the network."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from defense.core.coding import Coding, CodingByKind, CodingSums
from defense.core.sae import SparseAutoencoder
from defense.data.labels import Prompts, check_distinct, check_labels, resolve_templates
from defense.data.sources import Pictures, prepared
from defense.errors import ConfigError
from defense.hosts.clip import Clip


@dataclass(frozen=True)
class Quality:
    """How good an SAE is on held-out tokens.

    Attributes:
        explained_variance: 1 - squared error / variance of the residuals around their mean; NaN where nothing varies.
        l0: Latents that fire per token, on average.
        alive: Fraction of latents that fire at least once.
        by_kind: The same for each kind of token ("CLS", "register", "patch"), each around its own mean; empty where
            the kinds are not known.
    """

    explained_variance: float
    l0: float
    alive: float
    by_kind: Mapping[str, Coding] = field(default_factory=dict)


@dataclass(frozen=True)
class ZeroShot:
    """What an SAE costs the network when its reconstruction takes the residual's place, error and all.

    Attributes:
        n: Pictures, none of which was trained on.
        plain: Accuracy of the CLIP as it is.
        spliced: Accuracy with the reconstruction.
        agreement: Share of pictures that get the same answer from both.
    """

    n: int
    plain: float
    spliced: float
    agreement: float


# --- what came of it ------------------------------------------------------------------------------


@torch.inference_mode()
def measure(sae: SparseAutoencoder, resid: Tensor, *, chunk: int = 4096) -> Quality:
    """Return an SAE's quality on residuals [n, d_model]."""
    sums = CodingSums(sae.config.d_model, sae.config.d_sae, resid.device)
    for rows in resid.split(chunk):
        sums.add(sae, rows.float(), sae.encode(rows.float()))
    return _quality(sums.result())


def _quality(found: Coding, by_kind: Mapping[str, Coding] | None = None) -> Quality:
    explained = math.nan if found.explained_variance is None else found.explained_variance
    return Quality(explained, found.l0, found.alive, by_kind or {})


@contextmanager
def spliced(clip: Clip, hook_point: str, sae: SparseAutoencoder) -> Iterator[None]:
    """Let the SAE's reconstruction take the place of the residual, for as long as the context lasts."""
    tokens = clip.tower.positions(hook_point, sae.config.tokens)

    def change(resid: Tensor) -> Tensor:
        resid = resid.clone()
        rows = resid[:, tokens].float()
        resid[:, tokens] = sae.decode(sae.encode(rows), rows).to(resid.dtype)
        return resid

    with clip.tower.changed(hook_point, change):
        yield


def class_embeds(clip: Clip, names: Sequence[str]) -> Tensor | None:
    """Return the classes' embeddings, float32 [n_names, d_embed], normalized; None where there are none.

    Raises:
        ConfigError: See `labels.check_labels` and `labels.check_distinct`.
    """
    if not names:
        return None
    prompts = Prompts(check_labels(names), resolve_templates("simple"))
    check_distinct(prompts, clip.tokenizer)
    return torch.from_numpy(clip.text_embeds(prompts)).to(clip.device)


@torch.no_grad()
def evaluate(
    clip: Clip,
    hook_point: str,
    sae: SparseAutoencoder,
    pictures: Pictures,
    *,
    n: int = 1000,
    names: tuple[str, ...] = (),
    text_embeds: Tensor | None = None,
) -> tuple[Quality, ZeroShot | None]:
    """Return an SAE's quality on up to `n` pictures that were kept from training, and what splicing it in costs.

    Args:
        clip: The CLIP.
        hook_point: Where the SAE reads.
        sae: The SAE.
        pictures: The source that it was trained on.
        n: How many pictures to measure on.
        names: The classes, for zero-shot accuracy; left out without them or where no picture says its class.
        text_embeds: What `class_embeds` gives for them; computed where None.

    Raises:
        ConfigError: No held-out picture can be read, or a label is none of `names`.
    """
    sae = sae.to(clip.device)
    text_embeds = class_embeds(clip, names) if text_embeds is None else text_embeds
    coding = CodingByKind(sae, clip.tower.kinds(hook_point, sae.config.tokens), clip.device)
    answers: list[tuple[int, int, int]] = []
    for batch in prepared(clip.preprocess, list(pictures.held_out(n))):
        readable = [(picture, pixels) for picture, pixels in batch if pixels is not None]
        if not readable:
            continue
        pixel_values = np.stack([pixels for _, pixels in readable])
        coding.encode_and_add(clip.tower.resid(pixel_values, hook_point, sae.config.tokens))
        if text_embeds is None:
            continue
        labels = [pictures.class_of(picture, names) for picture, _ in readable]
        plain = (clip.image_embeds(pixel_values) @ text_embeds.T).argmax(1).tolist()
        with spliced(clip, hook_point, sae):
            edited = (clip.image_embeds(pixel_values) @ text_embeds.T).argmax(1).tolist()
        answers += [(label, a, b) for label, a, b in zip(labels, plain, edited, strict=True) if label is not None]
    found = coding.result()
    if not found.n_tokens:
        raise ConfigError("none of the pictures that were kept from training can be read; there is nothing to measure")
    quality = _quality(found, coding.results())
    if not answers:
        return quality, None
    label, first, second = np.array(answers).T
    shares = [float(hits.mean()) for hits in (first == label, second == label, first == second)]
    return quality, ZeroShot(len(answers), *shares)
