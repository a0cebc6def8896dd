"""Which latents confuse two classes: they fire most on pictures of the one, and push the answer to the other.

    classified pictures --CLIP--> resid --SAE--> acts          mean activation of each latent on each class
    some of them        --Jacobian of the rest of the network, class texts--> what each latent adds to each logit

Whoever composes a picture of such things attacks the model without a word ("semantic" attack, arXiv:2406.04341,
section 6). There, neurons are read through later attention alone, words that describe them are put into the prompt of
a text-to-image model, and one asks for two classes; here latents are read through all that follows, and the thing is
the class on whose pictures the latent fires most.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from defense.core.latents import token_slice
from defense.core.sae import SparseAutoencoder, normalize
from defense.data import labels
from defense.data.labels import Prompts
from defense.errors import ConfigError
from defense.hosts.clip import Clip

from .naming import mean_jacobians
from .sums import Example, Reservoir

N_PROBED = 16
"""Pictures, drawn at random, for the Jacobian."""


@dataclass(frozen=True)
class Confusion:
    """A latent that fires on one class and pushes the answer to another.

    Attributes:
        latent: Its number.
        shown: The class on whose pictures it fires most, above its mean over classes.
        aimed: The other class whose logit it raises most.
        push: By how much on a mean picture of `shown`, in logits above the mean over classes, to first order.
    """

    latent: int
    shown: str
    aimed: str
    push: float


def confusions(
    clip: Clip,
    hook_point: str,
    sae: SparseAutoencoder,
    source: Iterable[Example],
    classes: Sequence[str],
    *,
    templates: str | Sequence[str] = "simple",
    batch: int = 50,
    seed: int = 0,
) -> list[Confusion]:
    """Return, for each class that some latent confuses, the latent that does most, the strongest first.

    Costs a pass for each picture, and the Jacobian of the rest of the network at `N_PROBED` of them.

    Args:
        clip: The CLIP. A defense attached to it is bypassed.
        hook_point: Where the SAE reads.
        sae: The SAE.
        source: Pictures with labels; those whose label is none of `classes` are passed over.
        classes: At least three.
        templates: Prompts for the classes; see `labels.resolve_templates`.
        batch: Pictures at once.
        seed: Of the drawing of pictures for the Jacobian.

    Raises:
        ConfigError: Fewer than three classes, or a class without a picture.
        ShapeError: The SAE is made for another width.
        HookPointError: There is no such block.
    """
    names = labels.check_labels(classes)
    if len(names) < 3:
        raise ConfigError(f"{len(names)} classes; it takes three: the picture's own, the one shown, the one aimed at")
    clip.tower.check_width(sae.config.d_model, "this SAE")
    sae = sae.to(clip.device)
    with clip.undefended():
        means, resid = _means(clip, hook_point, sae, source, names, batch, seed)
        text_embeds = torch.from_numpy(clip.text_embeds(Prompts(names, labels.resolve_templates(templates))))
        apart = (text_embeds - text_embeds.mean(0)).to(clip.device)
        pushes = torch.stack(
            [clip.logit_scale * (sae.W_dec @ to.T) @ apart.T for to in mean_jacobians(clip.tower, hook_point, resid)]
        ).detach()
    return found_of(means, pushes, names)


def found_of(means: Tensor, pushes: Tensor, names: Sequence[str]) -> list[Confusion]:
    """Return the strongest confusion of each class, from what latents do on each.

    Args:
        means: What a latent writes on a mean picture of each class, as a multiple of its decoder row, summed over
            CLS-like tokens and over patches, [2, n_classes, d_sae].
        pushes: What its decoder row there adds to each class's logit, less what it adds to all of them,
            [2, d_sae, n_classes].
        names: Of the classes.
    """
    excess = (means - means.mean(1, keepdim=True)).clamp(min=0)
    shown = excess.sum(0).argmax(0)  # [d_sae]
    latents = torch.arange(len(shown), device=shown.device)
    logits = (excess[:, shown, latents][:, :, None] * pushes).sum(0)  # [d_sae, n_classes]
    logits[latents, shown] = -torch.inf  # its own class is no confusion
    push, aimed = logits.max(1)
    best: dict[int, Confusion] = {}
    for latent in push.argsort(descending=True, stable=True).tolist():
        place = int(shown[latent])
        if push[latent] > 0 and place not in best:
            best[place] = Confusion(latent, names[place], names[int(aimed[latent])], round(float(push[latent]), 4))
    return list(best.values())


def _means(
    clip: Clip,
    hook_point: str,
    sae: SparseAutoencoder,
    source: Iterable[Example],
    names: Sequence[str],
    batch: int,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Return `means` of `found_of`, and some residuals [n, pos, d_model], drawn at random."""
    scope = clip.tower.effective_scope(hook_point, sae.config.tokens)
    n_cls = {"all": clip.tower.n_prefix, "cls": 1, "patch": 0}[scope]  # of the tokens that are read
    tokens, place_of = token_slice(scope, clip.tower.n_prefix), {name: place for place, name in enumerate(names)}
    sums = torch.zeros(2, len(names), sae.config.d_sae, dtype=torch.float64, device=clip.device)
    counts, probed = np.zeros(len(names), np.int64), Reservoir(N_PROBED, seed)
    stream = (each for each in source if each.label in place_of)
    with torch.inference_mode():
        while chunk := list(islice(stream, batch)):
            resid = clip.tower.resid(np.stack([each.pixel_values for each in chunk]), hook_point)
            probed.add(resid)
            acts = sae.encode(resid[:, tokens]).clamp(min=0)
            scale = normalize(resid[:, tokens], sae.config.norm)[1]
            acts = (acts if scale is None else acts * scale).double()  # what it writes is made as long as its input
            where = [place_of[str(each.label)] for each in chunk]
            np.add.at(counts, where, 1)
            for part, each in enumerate((acts[:, :n_cls], acts[:, n_cls:])):
                sums[part].index_add_(0, torch.tensor(where, device=clip.device), each.sum(1))
    if missing := [name for name, count in zip(names, counts, strict=True) if not count]:
        raise ConfigError(f"no picture of {missing[0]!r} can be read; give some of each class, or leave it out")
    means = sums / torch.from_numpy(counts).to(clip.device)[None, :, None]
    return means.float().clone(), torch.stack(probed.kept).clone()  # clones take part in gradients
