"""Make a catalogue of an SAE's latents: what each fires on, what it does to the answer, what to call it.

    pictures --CLIP--> resid, image_embeds --SAE--> acts        one pass; sums only, so memory does not grow
                                                                 -> when and on what a latent fires, its top pictures
    some of them, drawn at random                                -> Jacobian of the rest of the network -> names
                                                                 -> each latent steered              -> steerability

Everything is measured on the undefended network.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from . import labels
from .activations import Tap, prepared
from .attach import attached, is_wrapped
from .catalogue import BIN_EDGES, Catalogue, fingerprint
from .classifier import Host
from .errors import ConfigError
from .fit import Tail
from .hosts import VisionHost
from .pictures import Picture, Pictures, Slice
from .sae import SparseAutoencoder, normalise
from .suppress import token_slice

log = logging.getLogger(__name__)

STEER = 2.0
"""Steered activation, as a multiple of the mean norm of what the encoder sees. On the embedded model steerability is
three quarters of what it is at twice that, from where on it hardly grows."""

_NUMBERS_AT_ONCE = 2**25
_CANCELLED = 1e-9


class Example(NamedTuple):
    """One picture to look at.

    Attributes:
        key: How `catalogue.picture` finds it again.
        pixel_values: float32 [3, height, width].
        label: Its class, if it has one.
    """

    key: str
    pixel_values: np.ndarray
    label: str | None = None


def examples(host: Host, pictures: Pictures, unreadable: Callable[[str], None] = lambda _: None) -> Iterator[Example]:
    """Yield the pictures of a source that can be read, as a host takes them.

    Args:
        host: Whose preprocessing.
        pictures: The source.
        unreadable: Called with the name of each picture that cannot be read.
    """
    stream = (picture for shard in pictures.shards for picture in shard.pictures())
    tap = Tap(host, "blocks.0.hook_resid_post")
    while chunk := list(islice(stream, 256)):
        for batch in prepared(tap, chunk):
            for picture, pixel_values in batch:
                if pixel_values is None:
                    unreadable(picture.name)
                else:
                    yield Example(picture.name, pixel_values, _label(picture))


def _label(picture: Picture) -> str | None:
    if isinstance(picture.label, Slice):
        return picture.label.read().decode("utf-8", "replace").strip()
    return None if picture.label is None else str(picture.label)


def describe(
    host: Host,
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
    | monosemanticity | mean cosine of the pictures on which it fires (see `_Sums.monosemanticity`) | arXiv:2504.02821 |
    | class_entropy | of classes weighted by its activation, in nats; where pictures have classes | PatchSAE |
    | n_classes | classes on whose pictures it fires | PatchSAE |
    | steerability | how far steering it moves the answer (see `steerability`) | arXiv:2504.08729, from its notebooks |

    The names follow the latent's decoder row through the rest of the network, linearised: the mean Jacobian of the
    image embedding by a CLS token and by a patch, weighted by how much the latent writes to each. The direction, less
    what all words share, is a sparse sum of words (`sparse_words`). The second-order lens (arXiv:2406.04341) reads
    neurons in this way; it follows later attention alone and this all that follows.

    Args:
        host: The CLIP. A defense attached to it is bypassed.
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
        batch: Pictures at once.
        seed: Of that drawing.
        provenance: Where pictures and words came from, as JSON values.

    Raises:
        ConfigError: Fewer than two pictures (all, or to steer on), fewer than two words, or a number below 1.
        ShapeError: The SAE is made for another width.
        HookPointError: There is no such block.
    """
    if min(n_top, n_names, batch) < 1 or min(n_probed, n_steered, len(words)) < 2:
        raise ConfigError(
            f"n_top={n_top}, n_names={n_names}, batch={batch} must be at least 1, n_probed={n_probed}, "
            f"n_steered={n_steered} and the number of words, {len(words)}, at least 2"
        )
    tap = Tap(host, hook_point, sae.config.tokens)
    tap.vision.check_width(sae.config.d_model, "this SAE")
    sae = sae.to(tap.device)
    sums = _Sums(sae.config.d_sae, n_top, tap.device)
    probed = _Reservoir(n_probed, seed)
    stream = iter(source)
    while chunk := list(islice(stream, batch)):
        pixel_values = np.stack([example.pixel_values for example in chunk])
        with torch.inference_mode():
            vision, resid, embeds = resid_and_embeds(host, hook_point, pixel_values)
            tokens = token_slice(tap.tokens, vision.n_prefix)
            sums.add(_acts(sae, resid[:, tokens]), embeds, chunk, n_cls=_n_cls(tap))
            probed.add(resid)
    if len(sums.keys) < 2:
        raise ConfigError(f"{len(sums.keys)} pictures can be read; it takes at least two to describe latents by")
    with _undefended(host.model):
        tail, resid = Tail(host.model, hook_point), torch.stack(probed.kept).clone()
        text_embeds = _text_embeds(host, words, templates)
        directions = _directions(tail, resid, sae, sums, functional.normalize(text_embeds.mean(0), dim=0))
        steered = steerability(tail, resid[:n_steered], sae, text_embeds, sums.fires)
    table = {**sums.columns(), "steerability": steered, **(columns or {})}
    used, top = np.unique(sums.top.cpu().numpy(), return_inverse=True)
    has_blank = int(used[0] == -1)
    return Catalogue(
        hook_point,
        {name: np.asarray(column, np.float32) for name, column in table.items()},
        _names(directions, text_embeds, words, n_names),
        directions.astype(np.float16),
        (top - has_blank).reshape(sums.top.shape).astype(np.int32),
        sums.top_activation.float().cpu().numpy(),
        sums.histogram.cpu().numpy().astype(np.int32),
        tuple(sums.keys[index] for index in used[has_blank:]),
        {
            "n_pictures": len(sums.keys),
            "n_words": len(words),
            "templates": list(labels.resolve_templates(templates)),
            "n_probed": len(resid),
            "n_steered": min(n_steered, len(resid)),
            "steer": STEER,
            "seed": seed,
            "host": tap.vision.fingerprint(),
            "sae": fingerprint(sae.parameters_numpy()),
            **(provenance or {}),
        },
    )


def resid_and_embeds(host: Host, hook_point: str, pixel_values: np.ndarray) -> tuple[VisionHost, Tensor, Tensor]:
    """Return the tower, the undefended residual [batch, pos, d_model] and image_embeds [batch, d_embed], normalised."""
    vision = VisionHost.of(host.model)
    kept: list[Tensor] = []
    handle = vision.block(hook_point).register_forward_hook(lambda _m, _i, out: kept.append(vision.to_batch_first(out)))
    try:
        with _undefended(host.model):
            embeds = host.model.encode_image(Tap(host, hook_point).batch(pixel_values))
    finally:
        handle.remove()
    return vision, kept[0].float(), functional.normalize(embeds.float(), dim=-1)


def _undefended(model: Any) -> Any:
    return attached(model).bypassed() if is_wrapped(model) else nullcontext()


def _n_cls(tap: Tap) -> int:
    """Return how many of the tokens that are read stand before the patches."""
    return {"all": tap.vision.n_prefix, "cls": 1, "patch": 0}[tap.tokens]


def _acts(sae: SparseAutoencoder, resid: Tensor) -> Tensor:
    """Return activations [batch, pos, d_sae], negative ones as 0."""
    return sae.encode(resid).clamp(min=0)


def _text_embeds(host: Host, words: Sequence[str], templates: str | Sequence[str]) -> Tensor:
    device = host.model.logit_scale.device

    def encode_text(input_ids: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return host.model.encode_text(torch.from_numpy(input_ids).to(device)).float().cpu().numpy()

    prompts = labels.Prompts(labels.check_labels(words), labels.resolve_templates(templates))
    return torch.from_numpy(labels.encode_prompts(prompts, host.tokenizer, encode_text)).to(device)


class _Reservoir:
    """Keeps n of a stream's rows, each with the same chance (Vitter's algorithm R)."""

    def __init__(self, n: int, seed: int) -> None:
        self.n, self.rng = n, np.random.default_rng(seed)
        self.kept: list[Tensor] = []
        self.n_seen = 0

    def add(self, rows: Tensor) -> None:
        for row in rows:
            self.n_seen += 1
            if len(self.kept) < self.n:
                self.kept.append(row)
            elif (place := int(self.rng.integers(self.n_seen))) < self.n:
                self.kept[place] = row


class _Sums:
    """What one pass adds up. It does not matter how the stream is cut into batches.

    Attributes:
        keys: Of the pictures seen.
        top: Indices of the pictures with the largest activations, int64 [d_sae, n_top]; -1 for none.
        top_activation: Those activations, [d_sae, n_top].
        histogram: int64 [d_sae, n_bins].
        written: Activations summed over CLS-like tokens and over patches, float64 [d_sae, 2], per token.
    """

    def __init__(self, d_sae: int, n_top: int, device: torch.device) -> None:
        def zeros(*shape: int) -> Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self.d_sae = d_sae
        self.keys: list[str] = []
        self.n_tokens = 0
        self.n_fired, self.total, self.written = zeros(d_sae), zeros(d_sae), zeros(d_sae, 2)
        self.picture_sum, self.picture_square = zeros(d_sae), zeros(d_sae)
        self.least = torch.full((d_sae,), torch.inf, dtype=torch.float64, device=device)
        self.embed_sum, self.act_embed_sum = zeros(0), zeros(0)
        self.n_bins = len(BIN_EDGES) - 1
        self.histogram = torch.zeros(d_sae, self.n_bins, dtype=torch.int64, device=device)
        self.top = torch.full((d_sae, n_top), -1, dtype=torch.int64, device=device)
        self.top_activation = torch.zeros(d_sae, n_top, device=device)
        self.by_class: dict[str, Tensor] = {}

    def add(self, acts: Tensor, embeds: Tensor, chunk: Sequence[Example], *, n_cls: int) -> None:
        """Take in pictures: acts [batch, pos, d_sae], image_embeds [batch, d_embed], normalised."""
        first = len(self.keys)
        self.keys += [example.key for example in chunk]
        self.n_tokens += acts.shape[0] * acts.shape[1]
        self._add_histogram(acts)
        self.n_fired += (acts > 0).sum((0, 1))
        self.total += acts.sum((0, 1), dtype=torch.float64)
        for place, tokens in enumerate((acts[:, :n_cls], acts[:, n_cls:])):
            self.written[:, place] += tokens.sum((0, 1), dtype=torch.float64)
        largest = acts.amax(1).double()  # [batch, d_sae]
        self.least = torch.minimum(self.least, largest.amin(0))
        self.picture_sum += largest.sum(0)
        self.picture_square += largest.square().sum(0)
        if not len(self.embed_sum):
            self.embed_sum = largest.new_zeros(embeds.shape[1])
            self.act_embed_sum = largest.new_zeros(self.d_sae, embeds.shape[1])
        self.embed_sum += embeds.double().sum(0)
        self.act_embed_sum += largest.T @ embeds.double()
        numbers = torch.arange(first, len(self.keys), device=acts.device).expand(self.d_sae, -1)
        self._keep_top(largest.T.float(), numbers)
        for row, example in enumerate(chunk):
            if example.label is not None:
                sofar = self.by_class.setdefault(example.label, torch.zeros_like(self.total))
                sofar += largest[row]

    def _add_histogram(self, acts: Tensor) -> None:
        latent = torch.arange(self.d_sae, device=acts.device)
        for part in acts.flatten(0, 1).split(max(1, _NUMBERS_AT_ONCE // self.d_sae)):
            fires = part > 0
            bins = torch.bucketize(part[fires], torch.tensor(BIN_EDGES[1:-1], device=acts.device), right=True)
            flat = latent.expand_as(part)[fires] * self.n_bins + bins
            self.histogram += torch.bincount(flat, minlength=self.histogram.numel()).view_as(self.histogram)

    def _keep_top(self, largest: Tensor, numbers: Tensor) -> None:
        """Merge activations [d_sae, batch] of pictures into the best so far.

        Of equal ones the first stays: a picture without activation never takes the place of a -1.
        """
        activation = torch.cat([self.top_activation, largest], 1)
        picture = torch.cat([self.top, numbers], 1)
        order = activation.argsort(dim=1, descending=True, stable=True)[:, : self.top.shape[1]]
        self.top_activation, self.top = activation.gather(1, order), picture.gather(1, order)

    @property
    def fires(self) -> Tensor:
        """Which latents fired at all, bool [d_sae]."""
        return self.n_fired > 0

    def columns(self) -> dict[str, np.ndarray]:
        """Return the columns that follow from the sums, float64 [d_sae]; NaN where they mean nothing."""
        found = {
            "frequency": self.n_fired / self.n_tokens,
            "mean_activation": self.total / self.n_fired,
            "largest_activation": self.top_activation[:, 0],
            "monosemanticity": self.monosemanticity(),
        }
        if self.by_class:
            by_class = torch.stack(list(self.by_class.values()))
            share = by_class / by_class.sum(0)
            found["class_entropy"] = torch.special.entr(share).sum(0)
            found["n_classes"] = (by_class > 0).sum(0)
        return {name: column.double().cpu().numpy() for name, column in found.items()}

    def monosemanticity(self) -> Tensor:
        """Return the mean cosine of pairs of pictures, weighted by how strongly both make a latent fire, [d_sae].

        In closed form from sums over pictures, the activation a less its minimum, e the normalised embeddings:

            (|| sum a e ||^2 - sum a^2) / ((sum a)^2 - sum a^2)

        The score's definition divides a by its range too, which cancels here, and takes e from an independent encoder,
        where these are the CLIP's own. NaN where one picture alone makes the latent fire.

        Source: Pach et al. 2025, arXiv:2504.02821; the closed form is ours.
        """
        n, least = len(self.keys), self.least
        total = self.picture_sum - n * least
        square = self.picture_square - 2 * least * self.picture_sum + n * least.square()
        moment = self.act_embed_sum - least[:, None] * self.embed_sum
        pairs = total.square() - square
        score = (moment.square().sum(1) - square) / pairs
        return torch.where(pairs > _CANCELLED * total.square(), score, torch.nan)


# --- what a latent does -----------------------------------------------------------------------------------------------


def _directions(tail: Tail, resid: Tensor, sae: SparseAutoencoder, sums: _Sums, shared: Tensor) -> np.ndarray:
    """Return where in embedding space each latent pushes, of length 1, float32 [d_sae, d_embed].

    Args:
        tail: The rest of the network.
        resid: Residuals to linearise it at, [n, pos, d_model].
        sae: The SAE.
        sums: Says how much a latent writes to CLS and to patches.
        shared: Direction that all words share, which tells nothing apart, [d_embed].
    """
    to_cls, to_patch = mean_jacobians(tail, resid)
    written = (sums.written / sums.written.sum(1, keepdim=True).clamp(min=1e-12)).float()
    directions = written[:, :1] * (sae.W_dec @ to_cls.T) + written[:, 1:] * (sae.W_dec @ to_patch.T)
    directions -= (directions @ shared)[:, None] * shared
    return functional.normalize(directions, dim=1).cpu().numpy()


def mean_jacobians(tail: Tail, resid: Tensor, batch: int = 8) -> tuple[Tensor, Tensor]:
    """Return the Jacobian of image_embeds by one CLS token and by one patch, [d_embed, d_model] each.

    The mean over pictures and over tokens of the kind; by no token of a kind it is 0.

    Args:
        tail: The rest of the network.
        resid: Where to linearise it, [n, pos, d_model].
        batch: Pictures at once.
    """
    n_prefix = tail.host.n_prefix
    sums: list[list[Tensor]] = []
    for part in resid.split(batch):
        leaf = part.clone().requires_grad_()
        embeds = tail.embeds(leaf).sum(0)
        slopes = [torch.autograd.grad(each, leaf, retain_graph=True)[0].sum(0) for each in embeds]  # [pos, d_model]
        sums.append([torch.stack([slope[tokens].sum(0) for slope in slopes]) for tokens in _kinds(n_prefix)])
    n_patches = resid.shape[1] - n_prefix
    to_cls, to_patch = (torch.stack(kind).sum(0) / len(resid) for kind in zip(*sums, strict=True))
    return to_cls / max(1, n_prefix), to_patch / n_patches


def _kinds(n_prefix: int) -> tuple[slice, slice]:
    return slice(0, n_prefix), slice(n_prefix, None)


@torch.inference_mode()
def steerability(
    tail: Tail, resid: Tensor, sae: SparseAutoencoder, text_embeds: Tensor, which: Tensor, steer: float = STEER
) -> np.ndarray:
    """Return how far the answer moves when a latent is set to a high value on every token, float64 [d_sae].

        S = sum over words c of (mean over pictures of (p_steered,c - p_default,c))^2

    The published notebooks take 192 pictures and steer to fixed values that suit one model. Here the value is a
    multiple of the norm of what the encoder sees, and S is estimated without bias from few pictures: the products of a
    picture's change with itself, which are large wherever steering just destroys the picture, are left out.

    Args:
        tail: The rest of the network.
        resid: Pictures to steer on, at least two, [n, pos, d_model].
        sae: The SAE.
        text_embeds: Of the words, [n_words, d_embed], normalised.
        which: Latents to steer, bool [d_sae]; the others get NaN.
        steer: That multiple.

    Source: Joseph et al. 2025, arXiv:2504.08729, as its notebooks compute it.
    """
    tokens = token_slice(tail.host.effective_scope(f"blocks.{tail.last}.hook_resid_post", "all"), tail.host.n_prefix)
    read = resid[:, tokens]
    z, scale, _ = normalise(read, sae.config.norm)
    target = steer * float(z.norm(dim=-1).mean())
    acts = sae.encode(read)
    logit_scale = float(tail.model.logit_scale.exp())

    def answers(edited: Tensor) -> Tensor:
        return (logit_scale * tail.embeds(edited) @ text_embeds.T).softmax(-1)

    default = answers(resid)
    found = torch.full((sae.config.d_sae,), torch.nan, dtype=torch.float64)
    latents = which.nonzero()[:, 0].tolist()
    at_once = max(1, tail.batch // len(resid))
    for first in range(0, len(latents), at_once):
        some = latents[first : first + at_once]
        edited = resid.repeat(len(some), 1, 1, 1)  # [latent, n, pos, d_model]
        for row, latent in enumerate(some):
            push = (target - acts[..., latent, None]) * sae.W_dec[latent]
            edited[row, :, tokens] += push if scale is None else push * scale
        moved = answers(edited.flatten(0, 1)).unflatten(0, (len(some), -1)) - default  # [latent, n, n_words]
        products = moved.sum(1).square().sum(-1) - moved.square().sum((1, 2))
        found[some] = (products / (len(resid) * (len(resid) - 1))).double().cpu()
    return found.numpy()


# --- names ------------------------------------------------------------------------------------------------------------


def _names(
    directions: np.ndarray, text_embeds: Tensor, words: Sequence[str], n_names: int
) -> tuple[tuple[tuple[str, float], ...], ...]:
    """Return each direction's words with their weights."""
    shared = functional.normalize(text_embeds.mean(0), dim=0)
    apart = functional.normalize(text_embeds - (text_embeds @ shared)[:, None] * shared, dim=1).cpu().numpy()
    index, weight = sparse_words(directions, apart, n_names)
    return tuple(
        tuple((words[i], float(value)) for i, value in zip(row, values, strict=True) if i >= 0)
        for row, values in zip(index.tolist(), weight, strict=True)
    )


def sparse_words(targets: np.ndarray, words: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Write each target as a sum of at most n words with positive weights: orthogonal matching pursuit.

    The word nearest to what is left joins; then all weights are fitted anew. It ends early where no word is near, or
    a weight would turn negative.

    Args:
        targets: float32 [n_targets, d_embed].
        words: Unit vectors, float32 [n_words, d_embed].
        n: Words per target.

    Returns:
        Indices int64 [n_targets, n], -1 for none, and weights float32 [n_targets, n]; by falling weight.
    """
    index = np.full((len(targets), n), -1, np.int64)
    weight = np.zeros((len(targets), n), np.float32)
    at_once = max(1, _NUMBERS_AT_ONCE // len(words))
    is_open = np.linalg.norm(targets, axis=1) > 0
    residue = targets.copy()
    for place in range(n):
        for rows in np.split(np.flatnonzero(is_open), range(at_once, int(is_open.sum()), at_once)):
            nearness = residue[rows] @ words.T
            best = nearness.argmax(1)
            for row, word, cosine in zip(rows, best, nearness.max(1), strict=True):
                chosen = [*index[row, :place], word]
                fitted = np.linalg.lstsq(words[chosen].T, targets[row], rcond=None)[0]
                if cosine <= 1e-6 or word in index[row] or (fitted <= 0).any():
                    is_open[row] = False
                    continue
                index[row, : place + 1], weight[row, : place + 1] = chosen, fitted
                residue[row] = targets[row] - fitted @ words[chosen]
    order = np.argsort(-weight, axis=1, kind="stable")
    return np.take_along_axis(index, order, 1), np.take_along_axis(weight, order, 1)
