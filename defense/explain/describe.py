"""Make a catalogue of an SAE's latents: what each fires on, what it does to the answer, what to call it.

    pictures --CLIP--> resid, image_embeds --SAE--> acts        one pass; sums only, so memory does not grow
                                                                 -> when and on what a latent fires, its top pictures
    some of them, drawn at random                                -> Jacobian of the rest of the network -> names
                                                                 -> each latent steered              -> steerability
                                                                 -> and some neurons, channels, random directions

Everything is measured on the undefended network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.core.coding import CodingByKind
from defense.core.config import fingerprint
from defense.core.latents import token_slice
from defense.core.norms import HighNormSums
from defense.core.sae import SparseAutoencoder
from defense.data import labels
from defense.data.labels import Prompts
from defense.data.sources import Picture, Pictures, prepared
from defense.errors import ConfigError
from defense.hosts.attention_alone import check_attention_alone
from defense.hosts.clip import Clip

from .against import Against
from .baselines import Others, Sweep, latent_units, median_of, sweep
from .by_class import ClassSums, found_of, masking_curve
from .catalogue import Catalogue
from .naming import Lens, attention_share, effects_of, names_of, wording_beside_random, words_apart
from .other_encoder import OtherEncoder
from .searching import by_templates, search_beside_random
from .steering import Steering, steerability
from .sums import Example, Reservoir, Sums
from .taxonomy import Tree, depths_of, summary_of


def examples(
    clip: Clip,
    pictures: Pictures,
    unreadable: Callable[[str], None] = lambda _: None,
    classes: Sequence[str] = (),
) -> Iterator[Example]:
    """Yield the pictures of a source that can be read, as a CLIP takes them.

    Args:
        clip: Whose preprocessing.
        pictures: The source.
        unreadable: Called with the name of each picture that cannot be read.
        classes: What `Pictures.class_of` names labels by; by default a label is what the source says.

    Raises:
        ConfigError: A picture's label is none of `classes`.
    """

    def label_of(picture: Picture) -> str | None:
        if not classes:
            return _label(picture)
        number = pictures.class_of(picture, classes)
        return None if number is None else classes[number]

    stream = iter(pictures)
    while chunk := list(islice(stream, 256)):
        for batch in prepared(clip.preprocess, chunk):
            for picture, pixel_values in batch:
                if pixel_values is None:
                    unreadable(picture.name)
                else:
                    yield Example(picture.name, pixel_values, label_of(picture))


def _label(picture: Picture) -> str | None:
    label = picture.read_label()
    return None if label is None else str(label)


# Longer than functions here are: what a catalogue may be asked for are its parameters, one line each.
def describe(
    clip: Clip,
    hook_point: str,
    sae: SparseAutoencoder,
    source: Iterable[Example],
    words: Sequence[str],
    *,
    columns: Mapping[str, np.ndarray] | None = None,
    templates: str | Sequence[str] = "simple",
    n_top: int = 8,
    n_names: int = 3,
    n_probed: int = 16,
    n_steered: int = 8,
    n_sampled: int = 64,
    encoder: OtherEncoder | None = None,
    classes: Sequence[str] = (),
    against: Clip | None = None,
    phrases: Sequence[str] = (),
    tree: Tree | None = None,
    lens: Lens = "whole",
    batch: int = 50,
    seed: int = 0,
    provenance: Mapping[str, Any] | None = None,
) -> Catalogue:
    """Return the catalogue of an SAE's latents.

    A latent's activation on a picture is its largest over the tokens that the SAE was trained on; negative ones count
    as none. Columns:

    | name | what | source |
    |---|---|---|
    | frequency | share of tokens on which it fires | PatchSAE, arXiv:2412.05276 |
    | mean_activation | mean where it fires | PatchSAE |
    | largest_activation | over all pictures | |
    | monosemanticity | mean cosine of the pictures on which it fires (see `Sums.monosemanticity`) | arXiv:2504.02821 |
    | class_entropy | of classes weighted by its activation, in nats; where pictures have classes | PatchSAE |
    | n_classes | classes on whose pictures it fires | PatchSAE |
    | consistency | whether the words nearest to it are alike (see `naming.wording`) | arXiv:2409.06579 |
    | n_same_word | other latents with the same nearest word | arXiv:2409.06579 |
    | spread | share of pictures on which it matters to the embedding (see `Spread`) | after arXiv:2406.04341 |
    | steerability | how far steering it moves the answer (see `steerability`) | arXiv:2504.08729, from its notebooks |

    The names follow the latent's decoder row through the rest of the network, linearized: the mean Jacobian of the
    image embedding by a CLS token and by a patch, weighted by how much the latent writes to each. The direction, less
    what all words share, is a sparse sum of words (`sparse_words`). The second-order lens (arXiv:2406.04341) reads
    neurons in this way, and follows later attention alone: `lens`.

    `provenance["baselines"]` has what neurons, channels and random directions come to (see `baselines.Sweep`), and
    `provenance["steer"]` the strength of the column steerability: that at which a sample of latents is ahead of random
    directions by most. `provenance["tokens"]` says how well the SAE codes each kind of token (`core.coding.Coding`),
    and `provenance["high_norm"]` which patches stand out by their norm (`core.norms.HighNorm`).

    Args:
        clip: The CLIP. A defense attached to it is bypassed.
        hook_point: Where the SAE reads.
        sae: The SAE.
        source: The pictures; see `examples`.
        words: Candidates for names, which are also the answers that steering is measured on; at least two.
        columns: Further columns, float [d_sae] each, such as `vars(TextFit(...).rank())`.
        templates: Prompts for the words; see `labels.resolve_templates`.
        n_top: Pictures to keep per latent.
        n_names: Words to keep per latent, at most.
        n_probed: Pictures, drawn at random, for the Jacobian.
        n_steered: As many of these to steer on: a pass through the rest of the network for each latent that fires.
        n_sampled: Units of each kind, latents too, that the sweep of strengths steers.
        encoder: Whose embeddings of the pictures monosemanticity takes; the CLIP's own where None.
        classes: Of the pictures' labels; `provenance["classes"]` then has the latents of each, and what masking them
            does (see `by_class`).
        against: Another CLIP with the same blocks, as one that was trained on from the first: columns and
            `provenance["against"]` then say which latents differ there (see `against.Against`), for one more pass over
            the pictures and one more steering of each latent.
        phrases: Templates with a {} for a name; `provenance["phrases"]` then has longer names of each latent, found by
            search from the words, and what random directions gain by such a search (see `searching`).
        tree: Of the pictures' classes; the column "tree_depth" is then the depth of the deepest node above all classes
            of a latent's top pictures, and `provenance["tree"]` what random pictures have (see `taxonomy`).
        lens: What names and `spread` follow. "attention" leaves later MLPs out and holds attention patterns (see
            `hosts.attention_alone`); the column "attention_share" is then how much of the whole effect that is.
        batch: Pictures at once.
        seed: Of that drawing.
        provenance: Where pictures and words came from, as JSON values.

    Raises:
        ConfigError: Fewer than two pictures (all, or to steer on), fewer than two words, a number below 1, a CLIP
            without a text tower, another CLIP that does not fit the first, a class that the tree does not have, or a
            tower in which attention alone cannot be followed.
        ShapeError: The SAE is made for another width.
        HookPointError: There is no such block.
    """
    _check_numbers(
        {"n_top": n_top, "n_names": n_names, "n_sampled": n_sampled, "batch": batch},
        {"n_probed": n_probed, "n_steered": n_steered, "the number of words": len(words)},
    )
    clip.tower.check_width(sae.config.d_model, "this SAE")
    if lens == "attention":
        check_attention_alone(clip.tower, hook_point)
    sae = sae.to(clip.device)
    prompts = Prompts(labels.check_labels(words), labels.resolve_templates(templates))
    text_embeds = torch.from_numpy(clip.text_embeds(prompts)).to(clip.device)
    others = Others(clip.tower, hook_point, seed)
    classes = labels.check_labels(classes) if classes else ()
    by_class = ClassSums(classes, sae.config.d_sae, clip.device, seed) if classes else None
    with clip.undefended(), nullcontext() if against is None else against.undefended():
        compared = None
        if against is not None:
            compared = Against(
                clip, against, hook_point, sae, replace(prompts, labels=classes or prompts.labels), n_probed, seed
            )
        seen = _pass(
            clip, hook_point, sae, source, others, encoder, by_class, compared, n_top=n_top, n_probed=n_probed,
            batch=batch, seed=seed,
        )  # fmt: skip
        shared = functional.normalize(text_embeds.mean(0), dim=0)
        effects = effects_of(clip.tower, hook_point, seen.resid, sae, shared)
        by_attention = {}
        if lens == "attention":
            whole, effects = effects, effects_of(clip.tower, hook_point, seen.resid, sae, shared, lens)
            by_attention["attention_share"] = attention_share(effects.mean(seen.sums), whole.mean(seen.sums))
        directions = functional.normalize(effects.mean(seen.sums), dim=1).cpu().numpy()
        steering = Steering(clip, hook_point, seen.resid[:n_steered], text_embeds, sae.config.norm)
        swept = _swept(steering, sae, seen, others, n_sampled, seed)
        steered = steerability(steering, sae, seen.sums.fires, swept.strength)
        found = {**seen.sums.columns(), "spread": seen.sums.spread.shares(*effects), "steerability": steered}
        found |= by_attention
        columns_of_words, in_words = wording_beside_random(directions, words_apart(text_embeds), seed)
        found |= columns_of_words
        asked: dict[str, Any] = {"wording": in_words}
        if by_class is not None:
            asked["classes"] = _of_classes(clip, hook_point, sae, by_class, prompts, seed)
        if compared is not None:
            found |= compared.columns(prompts, n_steered, seen.sums.fires, swept.strength)
            asked["against"] = compared.result(found)
        if tree is not None:
            top = seen.sums.top.cpu().numpy()
            found["tree_depth"] = depths_of(top, seen.sums.labels, tree)
            asked["tree"] = summary_of(found["tree_depth"], top, seen.sums.labels, tree, seed)
        if phrases:
            asked["phrases"] = _searched(clip, directions, prompts, phrases, seed)
    return _catalogue(
        hook_point,
        seen.sums,
        {**found, **(columns or {})},
        names_of(directions, text_embeds, words, n_names),
        directions,
        {
            "n_pictures": len(seen.sums.keys), "n_words": len(words), "templates": list(prompts.templates),
            "n_probed": len(seen.resid), "n_steered": len(steering.resid), "steer": swept.strength,
            "lens": lens, "baselines": _baselines(seen.sums, others, swept, encoder),
            "tokens": {kind: asdict(coded) for kind, coded in seen.coding.results().items()},
            "high_norm": None if (high := seen.high.result()) is None else asdict(high),
            **asked, "seed": seed, "host": clip.tower.fingerprint(), "sae": fingerprint(sae.parameters_numpy()),
            **(provenance or {}),
        },
    )  # fmt: skip


def _check_numbers(ones: Mapping[str, int], twos: Mapping[str, int]) -> None:
    """Refuse numbers that mean nothing: some must be at least 1, some at least 2."""
    for least, numbers in ((1, ones), (2, twos)):
        if min(numbers.values()) < least:
            listed = ", ".join(f"{name}={number}" for name, number in numbers.items())
            raise ConfigError(f"{listed}: each of these must be at least {least}")


def measure_baselines(
    clip: Clip,
    hook_point: str,
    sae: SparseAutoencoder,
    source: Iterable[Example],
    words: Sequence[str],
    *,
    n_sampled: int = 64,
    n_steered: int = 4,
    batch: int = 50,
    seed: int = 0,
) -> dict[str, Any]:
    """Return what `describe` has in `provenance["baselines"]`, without a column for each latent, which takes longer.

    Args and errors: see `describe`.
    """
    _check_numbers(
        {"n_sampled": n_sampled, "batch": batch}, {"n_steered": n_steered, "the number of words": len(words)}
    )
    clip.tower.check_width(sae.config.d_model, "this SAE")
    sae = sae.to(clip.device)
    prompts = Prompts(labels.check_labels(words), labels.resolve_templates("simple"))
    text_embeds = torch.from_numpy(clip.text_embeds(prompts)).to(clip.device)
    others = Others(clip.tower, hook_point, seed)
    with clip.undefended():
        seen = _pass(
            clip, hook_point, sae, source, others, None, None, None, n_top=1, n_probed=n_steered, batch=batch,
            seed=seed,
        )  # fmt: skip
        steering = Steering(clip, hook_point, seen.resid, text_embeds, sae.config.norm)
        swept = _swept(steering, sae, seen, others, n_sampled, seed)
    return _baselines(seen.sums, others, swept, None)


def _catalogue(
    hook_point: str,
    sums: Sums,
    columns: Mapping[str, np.ndarray],
    names: tuple[tuple[tuple[str, float], ...], ...],
    directions: np.ndarray,
    provenance: Mapping[str, Any],
) -> Catalogue:
    """Return the catalogue that holds these; of the pictures, the ones that are some latent's best."""
    used, top = np.unique(sums.top.cpu().numpy(), return_inverse=True)
    has_blank = int(used[0] == -1)
    return Catalogue(
        hook_point,
        {name: np.asarray(column, np.float32) for name, column in columns.items()},
        names,
        directions.astype(np.float16),
        (top - has_blank).reshape(sums.top.shape).astype(np.int32),
        sums.top_activation.float().cpu().numpy(),
        sums.histogram.cpu().numpy().astype(np.int32),
        tuple(sums.keys[index] for index in used[has_blank:]),
        provenance,
    )


class _Seen(NamedTuple):
    """What one pass over the pictures gives.

    Attributes:
        sums: Of the latents.
        coding: How well the SAE codes each kind of token.
        high: Patches of high norm.
        resid: Of some pictures, drawn at random, [n_probed, pos, d_model].
        hidden: The neurons there, [n_probed, pos, n_neurons]; None without neurons.
    """

    sums: Sums
    coding: CodingByKind
    high: HighNormSums
    resid: Tensor
    hidden: Tensor | None


def _swept(steering: Steering, sae: SparseAutoencoder, seen: _Seen, others: Others, n: int, seed: int) -> Sweep:
    """Return what a sample of each kind of unit comes to when it is steered."""
    at_tokens = None if seen.hidden is None else seen.hidden[: len(steering.resid), steering.tokens]
    units = {"latents": latent_units(sae, steering, seen.sums.fires), **others.units(steering, at_tokens)}
    return sweep(steering, units, n, seed)


def _of_classes(
    clip: Clip, hook_point: str, sae: SparseAutoencoder, sums: ClassSums, prompts: Prompts, seed: int
) -> dict[str, Any]:
    """Return the latents of each class, and what masking them does, as JSON values."""
    text_embeds = torch.from_numpy(clip.text_embeds(Prompts(sums.names, prompts.templates))).to(clip.device)
    return found_of(masking_curve(clip, hook_point, sae, sums, text_embeds, seed), sums)


def _searched(
    clip: Clip, directions: np.ndarray, prompts: Prompts, phrases: Sequence[str], seed: int
) -> dict[str, Any]:
    """Return longer names, found by search, as JSON values."""
    words = torch.from_numpy(clip.text_embeds(prompts))
    shared = functional.normalize(words.mean(0), dim=0)

    def embed(texts: Sequence[str]) -> np.ndarray:
        embeds = torch.from_numpy(clip.text_embeds(replace(prompts, labels=labels.check_labels(texts))))
        return functional.normalize(embeds - (embeds @ shared)[:, None] * shared, dim=1).numpy()

    templates = labels.resolve_templates(phrases)
    found = search_beside_random(directions, prompts.labels, embed, by_templates(templates), seed=seed)
    return {"templates": list(templates), **found}


def _baselines(sums: Sums, others: Others, swept: Sweep, encoder: OtherEncoder | None) -> dict[str, Any]:
    """Return what other units than latents come to, as JSON values."""
    kinds = {"latents": sums.likeness, **others.likeness}
    likeness = {kind: median_of(each.scores().cpu().numpy()) for kind, each in kinds.items()}
    return {
        "steerability": swept.to_dict(),
        "monosemanticity": {
            "encoder": "the CLIP itself" if encoder is None else encoder.name,
            "all_pairs": round(sums.likeness.all_pairs(), 4),
            "kinds": likeness,
        },
        "no_neurons": others.why_no_neurons,
    }


def _pass(
    clip: Clip,
    hook_point: str,
    sae: SparseAutoencoder,
    source: Iterable[Example],
    others: Others,
    encoder: OtherEncoder | None,
    by_class: ClassSums | None,
    against: Against | None,
    *,
    n_top: int,
    n_probed: int,
    batch: int,
    seed: int,
) -> _Seen:
    """Return what one pass over the pictures gives."""
    scope = clip.tower.effective_scope(hook_point, sae.config.tokens)
    n_cls = {"all": clip.tower.n_prefix, "cls": 1, "patch": 0}[scope]  # of the tokens that are read
    tokens = token_slice(scope, clip.tower.n_prefix)
    sums = Sums(sae.config.d_sae, n_top, clip.device)
    probed = Reservoir(n_probed, seed)
    coding = CodingByKind(sae, clip.tower.kinds(hook_point, sae.config.tokens), clip.device)
    high, stream = HighNormSums(), iter(source)
    with torch.inference_mode(), others.watched() as passed:
        while chunk := list(islice(stream, batch)):
            pixel_values = np.stack([example.pixel_values for example in chunk])
            resid, embeds = clip.tower.resid_and_embeds(pixel_values, hook_point)
            hidden = passed.pop() if passed else None
            acts = sae.encode(resid[:, tokens])
            if against is not None:
                against.add(chunk, resid[:, tokens], acts, embeds)
            if encoder is not None:
                embeds = torch.from_numpy(encoder.of([example.key for example in chunk])).to(clip.device)
            coding.add(resid[:, tokens], acts)
            high.add(resid[:, clip.tower.n_prefix :])
            sums.add(acts.clamp(min=0), embeds, chunk, n_cls=n_cls)
            if by_class is not None:
                by_class.add(chunk, acts.clamp(min=0).amax(1), resid)
            others.add(resid, hidden, embeds, tokens)
            probed.add(resid if hidden is None else torch.cat([resid, hidden], -1))
    if len(sums.keys) < 2:
        raise ConfigError(f"{len(sums.keys)} pictures can be read; it takes at least two to describe latents by")
    kept = torch.stack(probed.kept).clone()  # a clone takes part in gradients, which inference tensors cannot
    d_model = clip.tower.d_model
    return _Seen(sums, coding, high, kept[..., :d_model], kept[..., d_model:] if others.neurons is not None else None)
