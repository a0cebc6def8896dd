"""Choose S: the latents through which a written word reaches the answer.

Three steps, on pictures made for it and never on a test set:

1. contrast     what fires more on the picture with the word than on its twin with an empty plate
2. causal       of those, what moves the answer towards the word: gradient of the word's margin times activation
3. greedy       add latents while the attacked pictures get better and the clean ones do not get worse than the budget

Steps 1 and 2 rank; only step 3, which measures the finished network, decides (later blocks undo part of an edit:
arXiv:2406.04341, section 5).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from .errors import ConfigError
from .hosts import VisionHost, block_of
from .latents import Edit, LatentSet, Scope
from .ops import reference
from .sae import SparseAutoencoder, normalise
from .suppress import token_slice

log = logging.getLogger(__name__)

RULE = "contrast, causal, greedy"


@dataclass(frozen=True)
class Pairs:
    """Pictures with a word on them, and their twins. All pixel_values are float32 [n, 3, height, width].

    Attributes:
        clean: Without the writing.
        neutral: With the plate only.
        attacked: With the word.
        label: Index of the right answer, int64 [n].
        word: Index of the answer that is written, int64 [n].
    """

    clean: Tensor
    neutral: Tensor
    attacked: Tensor
    label: Tensor
    word: Tensor


@dataclass(frozen=True)
class FitConfig:
    """How to choose.

    Attributes:
        n_candidates: Latents that reach the greedy step.
        chunk: Latents tried at once; a chunk that does harm is tried again in halves.
        clean_budget: Clean accuracy that may be lost, as a fraction.
        min_gain: A chunk must lower the attacked pictures' loss by this much (nats).
        edit: "scale" or "project".
        scope: Tokens that are edited.
    """

    n_candidates: int = 256
    chunk: int = 8
    clean_budget: float = 0.005
    min_gain: float = 1e-3
    edit: Edit = "scale"
    scope: Scope = "all"

    def __post_init__(self) -> None:
        if self.edit not in ("scale", "project"):
            raise ConfigError(f"edit={self.edit!r}; only 'scale' and 'project' can be fitted")
        if self.n_candidates < 1 or self.chunk < 1:
            raise ConfigError(f"n_candidates={self.n_candidates}, chunk={self.chunk}; both must be at least 1")


class _Skip(nn.Module):
    """Stands in for a block: passes its input on, or answers with a residual of its own."""

    def __init__(self, resid: Tensor | None = None) -> None:
        super().__init__()
        self.resid = resid

    def forward(self, resid: Tensor, *_args: object, **_kwargs: object) -> Tensor:
        return resid if self.resid is None else self.resid


class Tail:
    """The network behind one hook point, so that trying an edit does not pay for the blocks before it.

    Args:
        model: An open_clip model in eval mode; edits at other blocks that are attached to it stay in force.
        hook_point: Where residuals are taken out and put in.
    """

    def __init__(self, model: Any, hook_point: str, *, batch: int = 200) -> None:
        self.model = model
        self.host = VisionHost.of(model)
        self.last = block_of(hook_point)
        self.block = self.host.block(hook_point)
        self.batch = batch

    @torch.inference_mode()
    def resid(self, pixel_values: Tensor) -> Tensor:
        """Return the residual at the hook point, [n, pos, d_model]."""
        kept: list[Tensor] = []
        handle = self.block.register_forward_hook(lambda _m, _i, out: kept.append(self.host.to_batch_first(out)))
        try:
            for part in pixel_values.split(self.batch):
                self.model.encode_image(part)
        finally:
            handle.remove()
        return torch.cat(kept)

    @contextmanager
    def _injected(self, resid: Tensor) -> Iterator[None]:
        blocks = self.host.blocks
        originals = list(blocks[: self.last + 1])
        try:
            for index in range(self.last):
                blocks[index] = _Skip()
            blocks[self.last] = _Skip(self.host.to_batch_first(resid))
            yield
        finally:
            for index, block in enumerate(originals):
                blocks[index] = block

    def embeds(self, resid: Tensor) -> Tensor:
        """Return image_embeds [n, d_embed], normalised, of residuals [n, pos, d_model]. Differentiable."""
        height, width = self.model.visual.image_size
        parts = []
        for part in resid.split(self.batch):
            blank = part.new_zeros(len(part), 3, height, width)
            with self._injected(part):
                parts.append(functional.normalize(self.model.encode_image(blank), dim=-1))
        return torch.cat(parts)


@dataclass
class Ranking:
    """Scores of all latents of an SAE, float64 [d_sae] each.

    Attributes:
        contrast: Mean over pictures of the activation summed over tokens, attacked minus neutral.
        specificity: That difference over the sum of both, in [-1, 1]: 1 fires on words alone.
        effect: Mean fall of the word's margin over the label when the latent is removed (first order).
        harm: Mean fall of the label's log-probability on clean pictures when it is removed (first order).
    """

    contrast: np.ndarray
    specificity: np.ndarray
    effect: np.ndarray
    harm: np.ndarray

    def order(self) -> np.ndarray:
        """Return the latents that read words and act on the answer, best first."""
        score = np.where((self.contrast > 0) & (self.effect > 0), self.effect * np.clip(self.specificity, 0, 1), 0.0)
        score = np.where(self.effect > self.harm, score, 0.0)
        ranked = np.argsort(-score, kind="stable")
        return ranked[score[ranked] > 0]


class TextFit:
    """The material that one site's selection works on.

    Args:
        model: The CLIP, in eval mode.
        hook_point: The block to edit after.
        sae: Trained on that block.
        pairs: Pictures for ranking and choosing.
        text_embeds: Of all answers, [n_labels, d_embed], normalised.
    """

    def __init__(self, model: Any, hook_point: str, sae: SparseAutoencoder, pairs: Pairs, text_embeds: Tensor) -> None:
        if len(pairs.label) == 0:
            raise ConfigError("no pairs to fit on; give at least one picture")
        self.tail = Tail(model, hook_point)
        self.hook_point, self.sae, self.pairs = hook_point, sae, pairs
        self.tail.host.check_width(sae.config.d_model, "the SAE")
        self.logit_scale = float(model.logit_scale.detach().exp())
        self.text_embeds = text_embeds
        self.resid = {name: self.tail.resid(getattr(pairs, name)).clone() for name in ("clean", "neutral", "attacked")}

    def logits(self, resid: Tensor) -> Tensor:
        """Return logits_per_image [n, n_labels] of residuals at the hook point."""
        return self.logit_scale * self.tail.embeds(resid) @ self.text_embeds.T

    def rank(self) -> Ranking:
        """Score every latent: steps 1 and 2."""
        d_sae = self.sae.config.d_sae
        sums = {name: torch.zeros(d_sae, dtype=torch.float64) for name in ("neutral", "attacked")}
        for name, total in sums.items():
            for part in self.resid[name].split(50):
                total += self.sae.encode(part).sum((0, 1)).double()
        rows = torch.arange(len(self.pairs.label))

        def margin(logits: Tensor, part: Tensor) -> Tensor:
            return logits[rows[: len(part)], self.pairs.word[part]] - logits[rows[: len(part)], self.pairs.label[part]]

        def log_prob(logits: Tensor, part: Tensor) -> Tensor:
            return logits.log_softmax(1)[rows[: len(part)], self.pairs.label[part]]

        n = len(rows)
        contrast = (sums["attacked"] - sums["neutral"]) / n
        specificity = contrast * n / (sums["attacked"] + sums["neutral"]).clamp(min=1e-9)
        effect = self._attribution("attacked", margin)
        harm = self._attribution("clean", log_prob)
        return Ranking(contrast.numpy(), specificity.numpy(), effect, harm)

    def _attribution(self, pictures: str, target: Callable[[Tensor, Tensor], Tensor]) -> np.ndarray:
        """Return mean over pictures of sum over tokens of f_i * (gradient of the target along decoder row i)."""
        total = torch.zeros(self.sae.config.d_sae, dtype=torch.float64)
        resid = self.resid[pictures]
        for part in torch.arange(len(resid)).split(50):
            leaf = resid[part].clone().requires_grad_()
            (gradient,) = torch.autograd.grad(target(self.logits(leaf), part).sum(), leaf)
            with torch.no_grad():
                scale = normalise(resid[part], self.sae.config.norm).scale
                written = self.sae.encode(resid[part]) * (gradient @ self.sae.W_dec.T)
                total += (written if scale is None else written * scale).sum((0, 1)).double()
        return (total / len(resid)).numpy()

    @torch.inference_mode()
    def choose(self, order: np.ndarray, config: FitConfig) -> Selection:
        """Pick latents greedily from a ranking: step 3."""
        candidates = [int(latent) for latent in order[: config.n_candidates]]
        trial = _Trial(self, candidates, config)
        selection = Selection(clean=[trial.clean_accuracy([])], loss=[trial.attacked_loss([])])
        floor = selection.clean[0] - config.clean_budget
        chunks = [candidates[i : i + config.chunk] for i in range(0, len(candidates), config.chunk)]
        while chunks:
            chunk = chunks.pop(0)
            latents = selection.latents + chunk
            loss = trial.attacked_loss(latents)
            helps = loss < selection.loss[-1] - config.min_gain
            clean = trial.clean_accuracy(latents) if helps else -1.0
            if clean >= floor:
                selection.latents.extend(chunk)
                selection.loss.append(loss)
                selection.clean.append(clean)
                log.info("%d latents: attacked loss %.3f, clean %.4f", len(selection.latents), loss, clean)
            elif len(chunk) > 1 and abs(loss - selection.loss[-1]) > config.min_gain:
                half = len(chunk) // 2  # it does something, but some of it does harm
                chunks[:0] = [chunk[:half], chunk[half:]]
        return selection

    def latent_set(self, selection: Selection, ranking: Ranking, config: FitConfig, name: str = "text") -> LatentSet:
        """Return the chosen latents with their scores."""
        chosen = np.array(selection.latents, dtype=int)
        scores = {key: tuple(float(v) for v in column[chosen]) for key, column in vars(ranking).items()}
        return LatentSet(
            name, tuple(selection.latents), edit=config.edit, scope=config.scope, scores=scores,
            provenance={"n_pairs": len(self.pairs.label), "clean_budget": config.clean_budget, "rule": RULE},
        )  # fmt: skip


@dataclass
class Selection:
    """What the greedy step chose, and the course of its measures, from before the first step on."""

    latents: list[int] = field(default_factory=list)
    clean: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)


class _Trial:
    """Measures edits. The candidates' activations are computed once; an edit then costs one pass through the tail."""

    def __init__(self, fit: TextFit, candidates: list[int], config: FitConfig) -> None:
        self.fit, self.config = fit, config
        self.column = {latent: index for index, latent in enumerate(candidates)}
        index = torch.tensor(candidates, dtype=torch.int64)
        self.acts = {
            name: torch.cat([fit.sae.encode(part)[..., index] for part in fit.resid[name].split(50)])
            for name in ("clean", "attacked")
        }
        self.W_dec_S = fit.sae.W_dec[index]

    def _logits(self, pictures: str, latents: list[int]) -> Tensor:
        resid = self.fit.resid[pictures]
        if not latents:
            return self.fit.logits(resid)
        columns = torch.tensor([self.column[latent] for latent in latents])
        host = self.fit.tail.host
        scope = host.effective_scope(self.fit.hook_point, self.config.scope)
        positions = token_slice(scope, host.n_prefix)
        tokens = resid[:, positions].flatten(0, 1)
        acts = self.acts[pictures][:, positions].flatten(0, 1)[:, columns]
        removal, rows = torch.ones(len(columns)), self.W_dec_S[columns]
        z, scale, _ = normalise(tokens, self.fit.sae.config.norm)
        if self.config.edit == "project":
            delta = reference.projected(acts, removal, rows, z - self.fit.sae.b_dec)
        else:
            delta = reference.scaled(acts, removal, rows)
        edited = resid.clone()
        edited[:, positions] -= (delta if scale is None else delta * scale).view_as(resid[:, positions])
        return self.fit.logits(edited)

    def attacked_loss(self, latents: list[int]) -> float:
        """Return the mean negative log-probability of the right answer on attacked pictures."""
        return float(functional.cross_entropy(self._logits("attacked", latents), self.fit.pairs.label))

    def clean_accuracy(self, latents: list[int]) -> float:
        """Return the accuracy on clean pictures."""
        return float((self._logits("clean", latents).argmax(1) == self.fit.pairs.label).double().mean())
