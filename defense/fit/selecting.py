"""Choose S: the latents through which a cue that should not count reaches the answer.

The cue is a word written on the picture (`TextFit`) or an attribute that goes with the answer, such as a background
(`GroupFit`). Four steps, on pictures made or kept for it and never on a test set:

1. contrast     what fires more where the cue is, or differs with it
2. causal       of those, what moves the answer to where the cue points: gradient of the margin times activation
3. joint        gains of the best of them, learned together by gradient descent on pictures with and without the cue
4. budget       of these, most removed first, as many as pictures without the cue bear

Steps 1 and 2 look at one latent at a time and at first order, so they only name candidates. Step 3 sees that latents
share a task and that later blocks undo part of an edit (arXiv:2406.04341, section 5); it leaves latents alone that
also carry what should count. Step 4 measures the finished network and decides. `benchmarks/latents.py` takes each step
out in turn.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from defense.core.latents import LatentSet, Scope
from defense.core.ops import reference
from defense.core.sae import SparseAutoencoder, normalize
from defense.errors import ConfigError
from defense.hosts.clip import Clip
from defense.hosts.tower import BATCH

from .config import FitConfig
from .material import Groups, Pairs

log = logging.getLogger(__name__)

RULE = "contrast, causal, joint, budget"

LEAST_REMOVAL = 0.05
"""A candidate that gradient descent removes by less than this is dropped; it starts close to it."""


@dataclass(frozen=True)
class Ranking:
    """Scores of all latents of an SAE, float64 [d_sae] each.

    Attributes:
        contrast: Difference in activation (summed over tokens, mean over pictures) that the cue makes.
        effect: Mean fall of the rival answer's margin over the right one when the latent is removed from fooled
            pictures (first order).
    """

    contrast: np.ndarray
    effect: np.ndarray

    def order(self) -> np.ndarray:
        """Return the latents that follow the cue and act on the answer, the largest effect first."""
        ranked = np.argsort(-self.effect, kind="stable")
        return ranked[(self.contrast[ranked] > 0) & (self.effect[ranked] > 0)]


@dataclass(frozen=True)
class _Group:
    """Pictures of one kind at the hook point: resid [n, pos, d_model], right answer and its rival, int64 [n]."""

    resid: Tensor
    answer: Tensor
    rival: Tensor


class _SiteFit:
    """What both tasks share: one site's material, and steps 2 to 4.

    Attributes:
        groups: Pictures by kind.
        fooled: Names of the groups whose loss is to fall.
        kept: Names of the groups whose accuracy must not.
    """

    fooled: tuple[str, ...]
    kept: tuple[str, ...]

    def __init__(self, clip: Clip, hook_point: str, sae: SparseAutoencoder, text_embeds: Tensor) -> None:
        self.tower = clip.tower
        self.tower.check_width(sae.config.d_model, "the SAE")
        self.device = clip.device
        self.hook_point, self.sae = hook_point, sae.to(self.device)
        self.text_embeds = text_embeds.to(self.device)
        self.logit_scale = clip.logit_scale
        self.groups: dict[str, _Group] = {}

    def add_group(self, name: str, resid: Tensor, answer: Tensor, rival: Tensor | None = None) -> None:
        """Take pictures in, by their residuals; without a `rival`, it is the likeliest wrong answer of each."""
        answer = answer.to(self.device)
        if rival is None:
            with torch.no_grad():
                rival = self.logits(resid).scatter(1, answer[:, None], -torch.inf).argmax(1)
        self.groups[name] = _Group(resid, answer, rival.to(self.device))

    def logits(self, resid: Tensor) -> Tensor:
        """Return logits_per_image [n, n_labels] of residuals at the hook point."""
        return self.logit_scale * self.tower.embeds_from(resid, self.hook_point) @ self.text_embeds.T

    def rank(self, scope: Scope = "all") -> Ranking:
        """Score every latent by what it does at the tokens of a scope: steps 1 and 2.

        An SAE of CLS tokens means nothing at the others, of which there are many more.
        """
        positions = self.positions(scope)
        contrast = self._contrast(positions)
        effect = torch.stack([self._attribution(self.groups[name], positions) for name in self.fooled]).mean(0)
        return Ranking(contrast.cpu().numpy(), effect.cpu().numpy())

    def positions(self, scope: Scope) -> slice:
        """Return the tokens that an edit of a scope touches here."""
        return self.tower.positions(self.hook_point, scope)

    def _contrast(self, positions: slice) -> Tensor:
        """Return the difference that the cue makes to each latent, float64 [d_sae]."""
        raise NotImplementedError

    @torch.no_grad()
    def _activity(self, group: str, positions: slice = slice(None)) -> Tensor:
        """Return each latent's activation, summed over tokens, mean over pictures, float64 [d_sae]."""
        resid = self.groups[group].resid[:, positions]
        total = torch.zeros(self.sae.config.d_sae, dtype=torch.float64, device=self.device)
        for part in resid.split(50):
            total += self.sae.encode(part).sum((0, 1)).double()
        return total / len(resid)

    def _attribution(self, group: _Group, positions: slice) -> Tensor:
        """Return mean over pictures of sum over tokens of f_i * (gradient of the margin along decoder row i)."""
        total = torch.zeros(self.sae.config.d_sae, dtype=torch.float64, device=self.device)
        for rows in torch.arange(len(group.answer), device=self.device).split(50):
            leaf = group.resid[rows].clone().requires_grad_()
            logits = self.logits(leaf)
            margins = logits.gather(1, group.rival[rows, None]) - logits.gather(1, group.answer[rows, None])
            (gradient,) = torch.autograd.grad(margins.sum(), leaf)
            with torch.no_grad():
                resid = group.resid[rows][:, positions]
                scale = normalize(resid, self.sae.config.norm).scale
                written = self.sae.encode(resid) * (gradient[:, positions] @ self.sae.W_dec.T)
                total += (written if scale is None else written * scale).sum((0, 1)).double()
        return total / len(group.answer)

    def choose(self, order: np.ndarray, config: FitConfig) -> Selection:
        """Pick latents from a ranking: steps 3 and 4."""
        trial = Trial(self, order[: config.n_candidates], config)
        removal = self.learn_removal(trial, config)
        ranked = np.argsort(-removal, kind="stable")
        return within_budget(trial, ranked[removal[ranked] >= LEAST_REMOVAL], removal, config.clean_budget)

    def learn_removal(self, trial: Trial, config: FitConfig) -> np.ndarray:
        """Return how much of each candidate's writing is best removed, float64 [n_candidates] in [0, 1]: step 3.

        Minimizes the loss of the right answer on all groups, plus `sparsity` times the sum of what is removed. So a
        latent stays out where what should count speaks through it too. Weight moves step by step to the groups with the
        larger loss (group DRO, arXiv:1911.08731, algorithm 1).
        """
        weights = dict.fromkeys(self.groups, 1 / len(self.groups))
        start = math.log(LEAST_REMOVAL / (1 - LEAST_REMOVAL))
        logits_of_removal = torch.full((len(trial.latents),), start, device=self.device, requires_grad=True)
        optimizer = torch.optim.Adam([logits_of_removal], lr=config.lr)
        generator = torch.Generator().manual_seed(config.seed)
        for step in range(config.steps if len(trial.latents) else 0):
            removal = logits_of_removal.sigmoid()
            loss = config.sparsity * removal.sum()
            losses = {}
            for name, group in self.groups.items():
                n = len(group.answer)
                rows = torch.randint(n, (min(config.batch, n),), generator=generator).to(self.device)
                losses[name] = functional.cross_entropy(trial.logits(name, removal, rows), group.answer[rows])
                loss = loss + losses[name] * weights[name]
            (logits_of_removal.grad,) = torch.autograd.grad(loss, logits_of_removal)
            optimizer.step()
            grown = {name: weights[name] * math.exp(config.worst_rate * losses[name].item()) for name in weights}
            weights = {name: weight / sum(grown.values()) for name, weight in grown.items()}
            if (step + 1) % 50 == 0:
                n_removed = removal.sum().item()
                log.info("joint step %d of %d: loss %.3f, %.1f removed", step + 1, config.steps, loss.item(), n_removed)
        return logits_of_removal.detach().sigmoid().double().cpu().numpy()

    def latent_set(self, selection: Selection, ranking: Ranking, config: FitConfig, name: str) -> LatentSet:
        """Return the chosen latents with their scores, and how they were chosen."""
        chosen = np.array(selection.latents, dtype=int)
        scores = {key: tuple(float(v) for v in column[chosen]) for key, column in vars(ranking).items()}
        n_pictures = {group: len(material.answer) for group, material in self.groups.items()}
        return LatentSet(
            name, tuple(selection.latents), tuple(selection.gains), edit=config.edit, scope=config.scope, scores=scores,
            provenance={
                "n_pictures": n_pictures, "fooled": list(self.fooled), "rule": RULE, "config": asdict(config),
                "tried": [asdict(step) for step in selection.tried],
            },
        )  # fmt: skip


class TextFit(_SiteFit):
    """Find the latents that read what is written on a picture.

    Args:
        clip: The CLIP; what is attached to other blocks is at work.
        hook_point: The block to edit after.
        sae: Trained on that block.
        pairs: Pictures for ranking and choosing.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
        resid: The residuals of `pairs` at the hook point by kind of picture, where they are known already.

    Raises:
        ConfigError: There are no pairs.
        ShapeError: The SAE is made for another width.
    """

    fooled = ("attacked",)
    kept = ("clean",)

    def __init__(
        self,
        clip: Clip,
        hook_point: str,
        sae: SparseAutoencoder,
        pairs: Pairs,
        text_embeds: Tensor,
        *,
        resid: Mapping[str, Tensor] | None = None,
    ) -> None:
        if len(pairs.label) == 0:
            raise ConfigError("no pairs to fit on; give at least one picture")
        super().__init__(clip, hook_point, sae, text_embeds)
        for name, pixel_values in pairs.pictures().items():
            known = self.tower.resid(pixel_values, hook_point) if resid is None else resid[name]
            self.add_group(name, known, pairs.label, pairs.word)

    def _contrast(self, positions: slice) -> Tensor:
        return self._activity("attacked", positions) - self._activity("neutral", positions)


class GroupFit(_SiteFit):
    """Find the latents that carry an attribute which goes with the answer and should not decide it.

    They are named "y-a". Within each class the group that the model gets wrong more often is the fooled one.

    Args:
        clip: The CLIP; what is attached to other blocks is at work.
        hook_point: The block to edit after.
        sae: Trained on that block.
        groups: Pictures for ranking and choosing; every class needs pictures with every value of the attribute.
        text_embeds: Of the classes, [n_classes, d_embed], normalized.
        resid: The residuals of `groups` at the hook point, where they are known already.

    Raises:
        ConfigError: A group is empty, or there are fewer than two classes or values.
        ShapeError: The SAE is made for another width.
    """

    def __init__(
        self,
        clip: Clip,
        hook_point: str,
        sae: SparseAutoencoder,
        groups: Groups,
        text_embeds: Tensor,
        *,
        resid: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.classes, self.values = sorted(set(groups.y.tolist())), sorted(set(groups.a.tolist()))
        if len(self.classes) < 2 or len(self.values) < 2:
            raise ConfigError(f"classes {self.classes}, attributes {self.values}; it takes at least two of each")
        super().__init__(clip, hook_point, sae, text_embeds)
        known = self.tower.resid(groups.pixel_values, hook_point) if resid is None else resid["picture"]
        for y in self.classes:
            for a in self.values:
                rows = (groups.y == y) & (groups.a == a)
                if not rows.any():
                    raise ConfigError(f"no picture of class {y} has attribute {a}; every group needs some")
                self.add_group(f"{y}-{a}", known[rows.to(known.device)], groups.y[rows])
        self.kept = tuple(self.groups)
        self.fooled = tuple(min((f"{y}-{a}" for a in self.values), key=self._accuracy) for y in self.classes)

    @torch.no_grad()
    def _accuracy(self, name: str) -> float:
        group = self.groups[name]
        return float((self.logits(group.resid).argmax(1) == group.answer).double().mean())

    def _contrast(self, positions: slice) -> Tensor:
        """The range over values of the attribute, averaged over classes: a latent may stand for either value."""
        by_class = [torch.stack([self._activity(f"{y}-{a}", positions) for a in self.values]) for y in self.classes]
        by_value = torch.stack(by_class).mean(0)
        return by_value.amax(0) - by_value.amin(0)


@dataclass(frozen=True)
class Tried:
    """What the network does with the first `n` of the candidates removed.

    Attributes:
        n: How many.
        kept_accuracy: Of the kept groups, as a fraction.
        fooled_loss: Of the right answer on the fooled groups, in nats.
    """

    n: int
    kept_accuracy: float
    fooled_loss: float


@dataclass(frozen=True)
class Selection:
    """What is chosen.

    Attributes:
        latents: S, most removed first.
        gains: The part of each that is kept.
        tried: What was measured on the way, from no latents on.
    """

    latents: tuple[int, ...]
    gains: tuple[float, ...]
    tried: tuple[Tried, ...]

    @property
    def before(self) -> Tried:
        """The network as it was."""
        return self.tried[0]

    @property
    def after(self) -> Tried:
        """The network with S removed."""
        return next(each for each in self.tried if each.n == len(self.latents))


def within_budget(trial: Trial, ranked: np.ndarray, removal: np.ndarray, clean_budget: float) -> Selection:
    """Remove as many candidates (columns of `trial`, best first) as the budget allows: step 4.

    The more is removed, the less is kept, so that halving finds the number; where that is not quite so, what it finds
    still holds to the budget. Nothing is removed where the fooled pictures do not gain by it.
    """
    quarters = {len(ranked) * quarter // 4 for quarter in range(5)}  # for the report's curve
    tried = {n: trial.measure(ranked[:n], removal) for n in quarters}
    floor = tried[0].kept_accuracy - clean_budget
    best, n, excess = 0, len(ranked), len(ranked) + 1
    while best < n:
        if n not in tried:
            tried[n] = trial.measure(ranked[:n], removal)
        best, excess = (n, excess) if tried[n].kept_accuracy >= floor else (best, n)
        n = (best + excess) // 2
    if tried[best].fooled_loss >= tried[0].fooled_loss:
        best = 0
    log.info("%d latents: accuracy kept %.4f, loss where fooled %.3f", *asdict(tried[best]).values())
    chosen = ranked[:best]
    return Selection(
        tuple(trial.latents[chosen].tolist()),
        tuple((1 - removal[chosen]).tolist()),
        tuple(tried[n] for n in sorted(tried)),
    )


class Trial:
    """Measures edits. The candidates' activations are computed once; an edit then costs one pass from the block on."""

    def __init__(self, fit: _SiteFit, latents: np.ndarray, config: FitConfig) -> None:
        self.fit, self.edit, self.latents = fit, config.edit, np.asarray(latents, dtype=np.int64)
        index = torch.from_numpy(self.latents).to(fit.device)
        self.positions = fit.positions(config.scope)
        with torch.no_grad():
            self.acts = {
                name: torch.cat([fit.sae.encode(part[:, self.positions])[..., index] for part in group.resid.split(50)])
                for name, group in fit.groups.items()
            }
        self.W_dec_S = fit.sae.W_dec[index]

    def logits(self, group: str, removal: Tensor, rows: Tensor | slice = slice(None)) -> Tensor:
        """Return logits_per_image of some pictures with `removal` [n_candidates] of each candidate scaled away."""
        return self._edited(group, rows, lambda acts, _: reference.scaled(acts, removal, self.W_dec_S))

    def _edited(self, group: str, rows: Tensor | slice, delta_of: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        resid = self.fit.groups[group].resid[rows]
        tokens = resid[:, self.positions]
        z, scale, _ = normalize(tokens.flatten(0, 1), self.fit.sae.config.norm)
        delta = delta_of(self.acts[group][rows].flatten(0, 1), z)
        edited = resid.clone()
        edited[:, self.positions] = tokens - (delta if scale is None else delta * scale).view_as(tokens)
        return self.fit.logits(edited)

    def _removed(self, group: str, columns: np.ndarray, removal: np.ndarray) -> Tensor:
        """Return logits_per_image with the candidates of some columns removed as what will ship removes them."""
        if not len(columns):
            return self.fit.logits(self.fit.groups[group].resid)
        part = torch.from_numpy(removal[columns]).float().to(self.fit.device)
        W_dec_S = self.W_dec_S[columns]

        def delta_of(acts: Tensor, z: Tensor) -> Tensor:
            if self.edit == "project":
                return reference.projected(acts[:, columns], part, W_dec_S, z - self.fit.sae.b_dec)
            return reference.scaled(acts[:, columns], part, W_dec_S)

        n, chunk = len(self.fit.groups[group].answer), BATCH
        return torch.cat([self._edited(group, slice(i, i + chunk), delta_of) for i in range(0, n, chunk)])

    @torch.no_grad()
    def measure(self, columns: np.ndarray, removal: np.ndarray) -> Tried:
        """Return what removing the candidates of some columns does; `removal` [n_candidates] is the part of each.

        Accuracy and loss are means over the groups, whatever their sizes.
        """
        accuracies, losses = [], []
        for name in dict.fromkeys((*self.fit.kept, *self.fit.fooled)):
            logits, answer = self._removed(name, columns, removal), self.fit.groups[name].answer
            if name in self.fit.kept:
                accuracies.append(float((logits.argmax(1) == answer).double().mean()))
            if name in self.fit.fooled:
                losses.append(float(functional.cross_entropy(logits, answer)))
        return Tried(len(columns), float(np.mean(accuracies)), float(np.mean(losses)))
