"""The same SAE on two towers: which latents a fine-tuning changed, how far, and on the pictures of which classes.

    pictures --the SAE's tower--> resid, image_embeds --SAE--> acts   \
                                                                        token by token: rates, means, overlap
    pictures --the other tower--> resid, image_embeds --SAE--> acts   /

PatchSAE (arXiv:2412.05276) puts an adapted and a plain CLIP side by side by the latents of each class; here every
latent is compared on the same tokens. How far the SAE still codes the other tower, and how much of what changed in the
stream its latents account for, stand beside it: where that is little, the latents say little about the change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from defense.core.coding import CodingByKind
from defense.core.intervals import wilson
from defense.core.sae import SparseAutoencoder
from defense.data.labels import Prompts
from defense.errors import ConfigError
from defense.hosts.clip import Clip

from .steering import Steering, steerability
from .sums import Example, Reservoir

N_TOP = 20
"""Latents that a catalogue lists, those that changed most first."""
_N_CLASSES = 3
_LEAST_OVERLAP = 0.5
"""Below this a latent counts as changed: less than half of its activation is where and as strong as it was."""


class Against:
    """What one pass adds up about the latents of an SAE on another tower.

    Args:
        clip: The CLIP that the SAE belongs to.
        other: The other one, made of the first by training it on; undefended.
        hook_point: Where the SAE reads, in both.
        sae: The SAE, on the device of `clip`.
        answers: What both choose from: the classes of the pictures, or any words.
        n_kept: Pictures, drawn at random, to steer the other tower on; with the seed that of `Reservoir`.
        seed: Of their drawing.

    Raises:
        ConfigError: The towers are given other pictures, cut them into other patches, or differ in their blocks; or the
            other one has no texts.
        ShapeError: They have different widths.
    """

    def __init__(
        self, clip: Clip, other: Clip, hook_point: str, sae: SparseAutoencoder, answers: Prompts, n_kept: int, seed: int
    ) -> None:  # fmt: skip
        _check_alike(clip, other)
        self.other, self.hook_point, self.sae, self.names = other, hook_point, sae, answers.labels
        self.tokens = clip.tower.positions(hook_point, sae.config.tokens)
        device = clip.device
        self.text_embeds = [torch.from_numpy(each.text_embeds(answers)).to(device) for each in (clip, other)]
        self.coding = CodingByKind(sae, clip.tower.kinds(hook_point, sae.config.tokens), device)
        self.resid = Reservoir(n_kept, seed)
        d_sae = sae.config.d_sae
        self.fired, self.total, self.smaller, self.larger = torch.zeros(4, d_sae, dtype=torch.float64, device=device)
        self.n_tokens = 0
        self._number = {name: number for number, name in enumerate(self.names)}
        self.by_class: dict[int, Tensor] = {}  # of the classes that occur; what both choose from may be many words
        self.n_of_class: Counter[int] = Counter()
        self.n, self.n_differ, self.n_right = 0, 0, [0, 0]
        self.moved, self.unexplained, self.square = 0.0, 0.0, 0.0

    def add(self, chunk: Sequence[Example], read: Tensor, acts: Tensor, embeds: Tensor) -> None:
        """Take in pictures, and show them to the other tower.

        Args:
            chunk: The pictures.
            read: What the SAE reads of them in its own tower, [batch, n_tokens, d_model].
            acts: What it encodes that as, [batch, n_tokens, d_sae].
            embeds: The own tower's image embeddings, [batch, d_embed], normalized.
        """
        pixel_values = np.stack([example.pixel_values for example in chunk])
        resid, other_embeds = (
            each.to(read.device) for each in self.other.tower.resid_and_embeds(pixel_values, self.hook_point)
        )
        self.resid.add(resid)
        there = resid[:, self.tokens]
        other_acts = self.sae.encode(there)
        self.coding.add(there, other_acts)
        self._add_change(read, there, acts, other_acts)
        before, after = acts.clamp(min=0), other_acts.clamp(min=0)
        self.n_tokens += after.shape[0] * after.shape[1]
        self.fired += (after > 0).sum((0, 1))
        self.total += after.sum((0, 1), dtype=torch.float64)
        self.smaller += torch.minimum(before, after).sum((0, 1), dtype=torch.float64)
        self.larger += torch.maximum(before, after).sum((0, 1), dtype=torch.float64)
        numbers = [None if example.label is None else self._number.get(example.label) for example in chunk]
        more = (after.amax(1) - before.amax(1)).double()
        for row, number in enumerate(numbers):
            if number is not None:
                self.by_class[number] = self.by_class.get(number, 0) + more[row]
                self.n_of_class[number] += 1
        self._add_answers(numbers, embeds, other_embeds)

    def _add_change(self, read: Tensor, there: Tensor, acts: Tensor, other_acts: Tensor) -> None:
        change = there - read
        coded = self.sae.decode(other_acts, there) - self.sae.decode(acts, read)
        self.moved += float(change.square().sum(dtype=torch.float64))
        self.unexplained += float((change - coded).square().sum(dtype=torch.float64))
        self.square += float(read.square().sum(dtype=torch.float64))

    def _add_answers(self, numbers: Sequence[int | None], embeds: Tensor, other_embeds: Tensor) -> None:
        both = zip((embeds, other_embeds), self.text_embeds, strict=True)
        answers = [(each @ text_embeds.T).argmax(1).tolist() for each, text_embeds in both]
        self.n += len(numbers)
        self.n_differ += sum(one != two for one, two in zip(*answers, strict=True))
        for place, given in enumerate(answers):
            self.n_right[place] += sum(
                number == answer for number, answer in zip(numbers, given, strict=True) if number is not None
            )

    # --- what it comes to ---

    def columns(self, words: Prompts, n_steered: int, fires: Tensor, strength: float) -> dict[str, np.ndarray]:
        """Return columns of a catalogue, float64 [d_sae]; NaN where they mean nothing.

        | name | what |
        |---|---|
        | against_frequency | share of the other tower's tokens on which a latent fires |
        | against_mean_activation | mean where it fires there |
        | against_steerability | how far steering it there moves the answer |
        | change | how far its activation is from what it was, mean over tokens, in units of the stream |
        | overlap | sum over tokens of the smaller of its two activations, over that of the larger: 1 is unchanged |

        Costs a pass through the other tower's blocks behind the SAE for each latent that fires in either tower and each
        picture to steer on.

        Args:
            words: The answers that steering moves.
            n_steered: Of the kept pictures, the first so many are steered.
            fires: Which latents fire in the SAE's own tower, bool [d_sae].
            strength: See `steerability`.
        """
        tower, sae = self.other.tower, self.sae
        text_embeds = torch.from_numpy(self.other.text_embeds(words)).to(tower.device)
        resid = torch.stack(self.resid.kept[:n_steered]).to(tower.device)
        steering = Steering(self.other, self.hook_point, resid, text_embeds, sae.config.norm)
        steered = steerability(steering, sae.to(tower.device), fires | (self.fired > 0), strength)
        found = {
            "against_frequency": self.fired / self.n_tokens,
            "against_mean_activation": self.total / self.fired,
            "change": (self.larger - self.smaller) / self.n_tokens * sae.W_dec.to(self.fired).norm(dim=1),
            "overlap": self.smaller / self.larger,
        }
        return {"against_steerability": steered} | {name: column.cpu().numpy() for name, column in found.items()}

    def result(self, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return what a catalogue keeps of both towers as wholes, and of the latents that changed most, as JSON values.

        Args:
            columns: These, and the ones of the SAE's own tower.
        """
        overlap = columns["overlap"][~np.isnan(columns["overlap"])]
        first = np.argsort(-columns["change"], kind="stable")[:N_TOP]
        n_labeled = self.n_of_class.total()
        return {
            "host": self.other.tower.fingerprint(),
            "n": self.n,
            "differ": _figures(self.n_differ, self.n),
            "accuracy": [_figures(n_right, n_labeled) for n_right in self.n_right] if n_labeled else None,
            "tokens": {kind: asdict(found) for kind, found in self.coding.results().items()},
            "stream_change": round((self.moved / self.square) ** 0.5, 4),
            "explained_change": round(1 - self.unexplained / self.moved, 4) if self.moved else None,
            "n_fire": len(overlap),
            "n_changed": int((overlap < _LEAST_OVERLAP).sum()),
            "top": [self._row(int(latent), columns) for latent in first if columns["change"][latent] > 0],
        }

    def _row(self, latent: int, columns: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Return what changed about a latent; pairs are of the SAE's own tower and of the other."""
        means = {number: float(total[latent]) / self.n_of_class[number] for number, total in self.by_class.items()}
        moved = sorted((number for number in means if means[number]), key=lambda number: -abs(means[number]))

        def pair(name: str) -> list[float | None]:
            values = (float(columns[each][latent]) for each in (name, f"against_{name}"))
            return [None if np.isnan(value) else round(value, 5) for value in values]

        return {
            "latent": latent,
            **{name: round(float(columns[name][latent]), 5) for name in ("change", "overlap")},
            **{name: pair(name) for name in ("frequency", "mean_activation", "steerability")},
            "classes": [[self.names[number], round(means[number], 4)] for number in moved[:_N_CLASSES]],
        }


def _check_alike(clip: Clip, other: Clip) -> None:
    """Refuse two CLIPs whose tokens are not the same places of the same pictures."""
    if clip.preprocess != other.preprocess:
        raise ConfigError(
            f"the SAE's CLIP takes pictures prepared with {clip.preprocess}, the other one with {other.preprocess}; "
            "compare it with one that was made of it by training on"
        )
    one, two = clip.tower, other.tower
    other.tower.check_width(one.d_model, "this SAE")
    for what in ("n_prefix", "grid_size", "n_read"):
        if getattr(one, what) != getattr(two, what):
            raise ConfigError(
                f"the SAE's tower has {what}={getattr(one, what)}, the other one {getattr(two, what)}; compare it with "
                "one that was made of it by training on"
            )


def _figures(hits: int, n: int) -> list[float]:
    """Return a share with its 95 % interval."""
    return [round(each, 4) for each in wilson(hits, n)]


def lines_of(found: Mapping[str, Any], n_top: int = 10) -> list[str]:
    """Return lines on what a catalogue has under "against".

    Args:
        found: As its provenance holds it.
        n_top: Latents to name.
    """
    share, low, high = (100 * each for each in found["differ"])
    lines = [f"answers differ on {share:.1f} % [{low:.1f}-{high:.1f}] of {found['n']} pictures"]
    if found["accuracy"] is not None:
        before, after = (f"{100 * x:.1f} % [{100 * low:.1f}-{100 * high:.1f}]" for x, low, high in found["accuracy"])
        lines[0] += f"; accuracy {before} -> {after}"
    part = found["explained_change"]
    said = "nothing" if part is None else f"{100 * found['stream_change']:.3g} % of its norm"
    lines.append(
        f"the stream changed by {said}" + ("" if part is None else f"; latents account for {100 * part:.0f} %")
    )
    lines.append(
        f"{found['n_changed']} of {found['n_fire']} latents that fire have less than half of their activation where "
        "it was"
    )
    if found["top"]:
        lines.append("latent    change  overlap    % of tokens   mean activation     steerability  classes")
    for row in found["top"][:n_top]:
        share, mean, steered = (
            " -> ".join("-" if value is None else f"{factor * value:.3g}" for value in row[name])
            for name, factor in (("frequency", 100), ("mean_activation", 1), ("steerability", 1))
        )
        classes = ", ".join(f"{name} {more:+.2g}" for name, more in row["classes"])
        lines.append(
            f"{row['latent']:6}{row['change']:10.3g}{row['overlap']:9.2f}{share:>15}{mean:>18}{steered:>17}  {classes}"
        )
    return lines
