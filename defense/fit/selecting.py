"""Choose S: the latents through which a cue that should not count reaches the answer.

The cue is a word written on the picture (`TextFit`) or an attribute that goes with the answer, such as a background
(`GroupFit`). Four steps, on pictures made or kept for it and never on a test set:

1. contrast     what fires more where the cue is, or differs with it
2. causal       of those, what moves the answer to where the cue points: gradient of the margin times activation
3. joint        gains of the best of them, learned together on pictures with and without the cue (joint.py)
4. budget       of these, most removed first, as many as pictures without the cue bear (trial.py)

Steps 1 and 2 look at one latent at a time and at first order, so they only name candidates. Step 3 sees that latents
share a task and that later blocks undo part of an edit (arXiv:2406.04341, section 5); it leaves latents alone that
also carry what should count. Step 4 measures the finished network and decides. `benchmarks/latents.py` takes each step
out in turn.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor

from defense.core.latents import LatentSet, Scope
from defense.core.sae import SparseAutoencoder
from defense.data.progress import SILENT, Progress
from defense.errors import ConfigError
from defense.hosts.clip import Clip

from .config import FitConfig
from .joint import LEAST_REMOVAL, JointState, learn_removal
from .material import Groups, Pairs
from .seen import Seen
from .trial import Group, Selection, Trial, Tried, within_budget

__all__ = ["LEAST_REMOVAL", "RULE", "GroupFit", "Ranking", "Selection", "TextFit", "Trial", "Tried", "within_budget"]

log = logging.getLogger(__name__)

RULE = "contrast, causal, joint, budget"


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


class _SiteFit:
    """What both tasks share: one site's material, and steps 2 to 4.

    Attributes:
        seen: What the SAE's latents do on the pictures, and on others where the fit is of a fold.
        groups: Pictures by kind.
        fooled: Names of the groups whose loss is to fall.
        kept: Names of the groups whose accuracy must not; by the share of each.
    """

    fooled: tuple[str, ...]
    kept: tuple[str, ...]

    def __init__(
        self,
        clip: Clip,
        hook_point: str,
        sae: SparseAutoencoder,
        text_embeds: Tensor,
        data: Pairs | Groups,
        seen: tuple[Seen, Tensor] | None,
        progress: Progress,
    ) -> None:
        self.tower = clip.tower
        self.tower.check_width(sae.config.d_model, "the SAE")
        self.device, self.hook_point, self.progress = clip.device, hook_point, progress
        if seen is None:
            resid = {kind: self.tower.resid(pixels, hook_point) for kind, pixels in data.pictures().items()}
            whole = Seen(clip, hook_point, sae.to(self.device), text_embeds, data, resid, progress)
            seen = whole, torch.arange(data.n)
        self.seen, self.rows = seen
        self.sae = self.seen.sae
        self.groups: dict[str, Group] = {}

    def add_group(self, name: str, kind: str, rows: Tensor, share: float) -> None:
        """Take in some of these pictures, by their index, int64 [n].

        Args:
            name: Of the group.
            kind: Of picture.
            rows: Which of the pictures of that kind.
            share: See `Group`.
        """
        at = self.rows[rows]
        resid, answer, rival = (
            column[at.to(column.device)] for column in (self.seen.resid[kind], self.seen.answer, self.seen.rival(kind))
        )
        self.groups[name] = Group(kind, at, resid, answer, rival, share)

    def logits(self, resid: Tensor) -> Tensor:
        """Return logits_per_image [n, n_labels] of residuals at the hook point."""
        return self.seen.logits(resid)

    def rank(self, scope: Scope = "all") -> Ranking:
        """Score every latent by what it does at the tokens of a scope: steps 1 and 2.

        An SAE of CLS tokens means nothing at the others, of which there are many more.
        """
        positions = self.positions(scope)
        contrast = self._contrast(positions)
        effect = torch.stack([self._mean(self.seen.effects, name, positions) for name in self.fooled]).mean(0)
        return Ranking(contrast.cpu().numpy(), effect.cpu().numpy())

    def positions(self, scope: Scope) -> slice:
        """Return the tokens that an edit of a scope touches here."""
        return self.tower.positions(self.hook_point, scope)

    def _contrast(self, positions: slice) -> Tensor:
        """Return the difference that the cue makes to each latent, float64 [d_sae]."""
        raise NotImplementedError

    def _activity(self, group: str, positions: slice = slice(None)) -> Tensor:
        """Return each latent's activation, summed over tokens, mean over pictures, float64 [d_sae]."""
        return self._mean(self.seen.activity, group, positions)

    def _mean(self, of_pictures: Callable[[str, slice], Tensor], name: str, positions: slice) -> Tensor:
        """Return the mean over a group's pictures of numbers that are known of each, float64 [d_sae]."""
        group = self.groups[name]
        numbers = of_pictures(group.kind, positions)
        total = torch.zeros(numbers.shape[1], dtype=torch.float64, device=numbers.device)
        for row in group.rows.tolist():  # one by one: in float64, all of them at once would take twice their memory
            total += numbers[row]
        return total / len(group.rows)

    def choose(self, order: np.ndarray, config: FitConfig) -> Selection:
        """Pick latents from a ranking: steps 3 and 4."""
        trial = Trial(self, order[: config.n_candidates], config)
        return self.within_budget(trial, self.learn_removal(trial, config), config)

    def learn_removal(self, trial: Trial, config: FitConfig, state: JointState | None = None) -> np.ndarray:
        """Return how much of each candidate's writing is best removed, float64 [n_candidates] in [0, 1]: step 3."""
        return learn_removal(trial, config, state or JointState(), self.progress)

    def within_budget(self, trial: Trial, removal: np.ndarray, config: FitConfig) -> Selection:
        """Return as many of the candidates, most removed first, as the budget allows: step 4."""
        ranked = np.argsort(-removal, kind="stable")
        return within_budget(trial, ranked[removal[ranked] >= LEAST_REMOVAL], removal, config.clean_budget)

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
            spares_high_norm=config.spares_high_norm,
        )  # fmt: skip


class TextFit(_SiteFit):
    """Find the latents that read what is written on a picture.

    Args:
        clip: The CLIP; what is attached to other blocks is at work.
        hook_point: The block to edit after.
        sae: Trained on that block.
        pairs: Pictures for ranking and choosing.
        text_embeds: Of all answers, [n_labels, d_embed], normalized.
        seen: What the latents do on these pictures, and which of its own they are, where that is known already.
        progress: Told of steps and pictures.

    Raises:
        ConfigError: There are no pairs.
        ShapeError: The SAE is made for another width.
    """

    fooled: tuple[str, ...] = ("attacked",)
    kept: tuple[str, ...] = ("clean",)

    def __init__(
        self,
        clip: Clip,
        hook_point: str,
        sae: SparseAutoencoder,
        pairs: Pairs,
        text_embeds: Tensor,
        *,
        seen: tuple[Seen, Tensor] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        if pairs.n == 0:
            raise ConfigError("no pairs to fit on; give at least one picture")
        super().__init__(clip, hook_point, sae, text_embeds, pairs, seen, progress)
        for kind in pairs.pictures():
            self.add_group(kind, kind, torch.arange(pairs.n), 1.0)

    def _contrast(self, positions: slice) -> Tensor:
        return self._activity("attacked", positions) - self._activity("neutral", positions)


class GroupFit(_SiteFit):
    """Find the latents that carry an attribute which goes with the answer and should not decide it.

    They are named "y-a". Within each class the group that the model gets wrong more often is the fooled one. The clean
    budget is on the accuracy over all pictures, each group by its share of them (see `Groups`): the mean over groups
    rises with the worst one, whatever the many lose.

    Args:
        clip: The CLIP; what is attached to other blocks is at work.
        hook_point: The block to edit after.
        sae: Trained on that block.
        groups: Pictures for ranking and choosing; every class needs pictures with every value of the attribute.
        text_embeds: Of the classes, [n_classes, d_embed], normalized.
        seen: What the latents do on these pictures, and which of its own they are, where that is known already.
        progress: Told of steps and pictures.

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
        seen: tuple[Seen, Tensor] | None = None,
        progress: Progress = SILENT,
    ) -> None:
        self.classes, self.values = sorted(set(groups.y.tolist())), sorted(set(groups.a.tolist()))
        if len(self.classes) < 2 or len(self.values) < 2:
            raise ConfigError(f"classes {self.classes}, attributes {self.values}; it takes at least two of each")
        super().__init__(clip, hook_point, sae, text_embeds, groups, seen, progress)
        for y in self.classes:
            for a in self.values:
                rows = ((groups.y == y) & (groups.a == a)).nonzero()[:, 0]
                if not len(rows):
                    raise ConfigError(f"no picture of class {y} has attribute {a}; every group needs some")
                self.add_group(f"{y}-{a}", "picture", rows, groups.share(y, a))
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
