"""Teach the tower to read: lessons drawn on the fly, four losses, and a state on disk from which it goes on.

    no word:   KEEP_WEIGHT * (1 - cosine to the picture's first embedding)
    a word:    cross entropy among the thousand names, and the cosine to what a caption of the picture says
    all:       the letter at each patch, read from a block in the middle
    letters:   which letters are written, read from the CLS token one block later

The stem and what makes the CLS token of its features are frozen, and the rows of names are fixed: what is no photograph
of the classes at hand stays where it was. Two things make a tower of six blocks read within 20,000 pictures, where
AdamW on the first three losses needed ten times as many: the blocks' matrices follow Muon, and a word reaches the CLS
token as its letters first.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from defense.embedded.train_clip import load_state, save_state
from defense.errors import ConfigError
from defense.hosts.photo_tower import PhotoTransformer

from .grounds import NO_CLASS, Sources
from .lessons import KEEP, Batch, batches
from .names import Words
from .start import WRITTEN, Start, first_embeds

log = logging.getLogger(__name__)
LETTER_BLOCK = 2
"""The block (0-based) whose output the letter head reads."""
SPELL_BLOCK = 3
"""The block whose CLS token tells which letters are written."""
LETTERS_IN_A_WORD = 5.0
"""Letters that are written in a picture, usually: the loss of 26 letters counts for so many."""
KEEP_WEIGHT = 20.0
CAPTION_WEIGHT = 5.0
WRITTEN_WEIGHT = 0.75
"""How much a caption says that something is written, against what is written."""
OBJECT_WEIGHT = 0.35
"""How much a caption says of the object under the word."""


@dataclass(frozen=True)
class Recipe:
    """How long and how to train the tower. The defaults made the shipped weights.

    Attributes:
        steps: In all.
        batch: Lessons a step.
        lr: Peak of AdamW's learning rate, reached after `warmup` steps; the head has a tenth of it.
        matrix_lr: Peak of Muon's, which trains the matrices of the blocks and of the patches; scaled so that its
            updates are as large as AdamW's usually are.
        warmup: In steps.
        decay: Part of the steps, at the end, in which the rate falls to 2 % of its peak.
        weight_decay: Of matrices.
        letter_weight: Of the loss of letters at patches.
        spell_weight: Of the loss of letters in the picture.
        climb: Steps over which lessons go from easy to difficult.
        n_crops: Sharp crops of large pictures.
        seed: Of weights and lessons.
    """

    steps: int = 7_000
    batch: int = 32
    lr: float = 1e-3
    matrix_lr: float = 3e-3
    warmup: int = 100
    decay: float = 0.3
    weight_decay: float = 0.05
    letter_weight: float = 3.0
    spell_weight: float = 1.0
    climb: int = 5_000
    n_crops: int = 4_000
    seed: int = 2026


class Reading(NamedTuple):
    """What the reader makes of pictures.

    Attributes:
        image_embeds: Normalized [n, D_EMBED].
        letters: Logits of the letter at each patch, [n, patches, 27].
        spelled: Logits of each letter's being written, [n, 26].
        pooled: Features of the stem, [n, D_POOLED].
    """

    image_embeds: Tensor
    letters: Tensor
    spelled: Tensor
    pooled: Tensor


def trunk_of(visual: nn.Module) -> PhotoTransformer:
    """Return the vision transformer inside open_clip's `TimmModel`."""
    trunk = visual.get_submodule("trunk")
    assert isinstance(trunk, PhotoTransformer)  # the configuration names it
    return trunk


class Reader(nn.Module):
    """The tower under training, with two heads beside it, which are dropped afterwards.

    Attributes:
        visual: open_clip's `TimmModel`.
        letter_head: From a patch to 26 letters and none.
        spell_head: From the CLS token to 26 letters.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        trunk = trunk_of(visual)
        trunk.patch_embed.pooled.requires_grad_(False)
        self.letter_head = nn.Linear(trunk.embed_dim, 27)
        self.spell_head = nn.Sequential(nn.LayerNorm(trunk.embed_dim), nn.Linear(trunk.embed_dim, 26))
        self._kept: dict[str, Tensor] = {}
        trunk.patch_embed.stem.register_forward_hook(self._keep_pooled)
        trunk.blocks[LETTER_BLOCK].register_forward_hook(partial(self._keep, "letters"))
        trunk.blocks[SPELL_BLOCK].register_forward_hook(partial(self._keep, "spelled"))

    def _keep_pooled(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        self._kept["pooled"] = output[1]

    def _keep(self, name: str, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._kept[name] = output

    def forward(self, pixel_values: Tensor) -> Reading:
        image_embeds = functional.normalize(self.visual(pixel_values).float(), dim=-1)
        letters = self.letter_head(self._kept["letters"][:, 1:]).float()
        spelled = self.spell_head(self._kept["spelled"][:, 0]).float()
        return Reading(image_embeds, letters, spelled, self._kept["pooled"].float())


@dataclass(frozen=True)
class Answers:
    """What is to be learned of words and names.

    Attributes:
        names: Rows of the thousand names, normalized [1000, d_embed].
        words: Rows of the written words: the mean of their members' rows, normalized [n_words, d_embed].
        shares: For each word, the share of each name, [n_words, 1000].
        scale: Between cosines and logits.
    """

    names: Tensor
    words: Tensor
    shares: Tensor
    scale: float


def answers_of(start: Start, words: Words) -> Answers:
    """Return what is to be learned, from where the tower starts."""
    shares = torch.zeros(len(words.writable), len(words.names))
    for index, word in enumerate(words.writable):
        shares[index, list(words.members[word])] = 1 / len(words.members[word])
    return Answers(start.rows, functional.normalize(shares @ start.rows, dim=-1), shares, start.logit_scale)


def caption_rows(words: Tensor, objects: Tensor | None = None) -> Tensor:
    """Return text embeddings, normalized [n, d_embed], of "the word pizza" and "a dog with the word pizza on it".

    Args:
        words: Rows of the words [n, d_embed].
        objects: Rows of the objects [n, d_embed], 0 where none is named.
    """
    rows = words.clone() if objects is None else words + OBJECT_WEIGHT * objects
    rows[:, WRITTEN] += WRITTEN_WEIGHT
    return functional.normalize(rows, dim=-1)


def to_pixel_values(pixels: np.ndarray) -> Tensor:
    """Return pictures uint8 [n, height, width, 3] as the stem takes them, float32 [n, 3, height, width]."""
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() - 127) / 128


def losses_of(reader: Reader, batch: Batch, start: Start, answers: Answers) -> dict[str, Tensor]:
    """Return the mean over the lessons of each loss, weighted but for those of letters."""
    image_embeds, letter_logits, spell_logits, pooled = reader(to_pixel_values(batch.pixels))
    words, labels = torch.from_numpy(batch.words), torch.from_numpy(batch.labels)
    n, is_kept = len(words), words == KEEP
    first = first_embeds(start, pooled)
    keep = (1 - (image_embeds * first)[is_kept].sum(-1)).sum()
    read, words, labels = image_embeds[~is_kept], words[~is_kept], labels[~is_kept]
    logits = answers.scale * read @ answers.names.T
    word = functional.cross_entropy(logits, answers.shares[words], reduction="sum")
    objects = answers.names[labels] * (labels != NO_CLASS)[:, None]
    caption = (1 - (read * caption_rows(answers.words[words], objects)).sum(-1)).sum()
    class_weight = torch.ones(27)
    class_weight[0] = 0.1
    letters = torch.from_numpy(batch.letters).long().flatten()
    spelled = torch.from_numpy(batch.spelled)
    is_spelled = spelled.any(-1)
    return {
        "keep": KEEP_WEIGHT * keep / n,
        "word": word / n,
        "caption": CAPTION_WEIGHT * caption / n,
        "letters": functional.cross_entropy(letter_logits.flatten(0, 1), letters, class_weight),
        "spell": functional.binary_cross_entropy_with_logits(
            spell_logits[is_spelled], spelled[is_spelled].float(), reduction="sum"
        )
        / (LETTERS_IN_A_WORD * is_spelled.sum().clamp(min=1)),
    }


def load_reader(state: Path, reader: Reader) -> int:
    """Set the weights of a reader from a state, in place; return its step.

    Raises:
        ConfigError: There is no such file.
    """
    if not state.exists():
        raise ConfigError(f"{state} is not there; run the build first")
    return load_state(state, reader)


def new_optimizers(reader: Reader, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return Muon over the matrices of the blocks and of the patches, and AdamW over what else is trained."""
    trunk = trunk_of(reader.visual)
    matrices = [each for each in trunk.blocks.parameters() if each.ndim == 2] + [trunk.patch_embed.patches.weight]
    head = list(reader.visual.get_submodule("head").parameters())
    taken = {id(each) for each in (*matrices, *head)}
    others = [each for each in reader.parameters() if each.requires_grad and id(each) not in taken]
    groups = [{"params": others, "lr": recipe.lr}, {"params": head, "lr": 0.1 * recipe.lr}]
    muon = torch.optim.Muon(
        matrices, lr=recipe.matrix_lr, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return muon, torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


def pace(step: int, recipe: Recipe) -> float:
    """Return the part of the peak rates at a step: linear warm-up, flat, and a linear fall to 2 % at the end."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return min((step + 1) / recipe.warmup, max(0.02, min(1.0, left)))


def train(
    state: Path, reader: Reader, start: Start, sources: Sources, words: Words, recipe: Recipe, *, every_s: float = 200.0
) -> None:
    """Train the reader in place, or go on where a state says that training stopped.

    Ended at any time and started again, it comes to the same weights.

    Args:
        state: File of the state; written every `every_s` seconds, and at the end.
        reader: As `start_tower` left it; its weights are replaced by the state's.
        start: Where it started.
        sources: What pictures are made of.
        words: What classes are called.
        recipe: How long and how.
        every_s: Seconds between two states.
    """
    trunk_of(reader.visual).patch_embed.stem.to(memory_format=torch.channels_last)
    optimizers = new_optimizers(reader, recipe)
    peaks = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    answers = answers_of(start, words)
    step = load_state(state, reader, *optimizers)
    begun, saved, first = time.monotonic(), time.monotonic(), step
    for batch in batches(sources, words, recipe.batch, step, recipe.steps, recipe.seed, climb=recipe.climb):
        groups = (group for optimizer in optimizers for group in optimizer.param_groups)
        for group, peak in zip(groups, peaks, strict=True):
            group["lr"] = peak * pace(step, recipe)
        # The plain attention kernel: on a CPU its backward pass is faster than the fused one at 101 tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            losses = losses_of(reader, batch, start, answers)
        # A caption is learned after reading: before, all captions are one, that something is written. What is kept is
        # held the closer the further it goes: held closely from the start, nothing was read after 14,000 pictures.
        climbed = min(1.0, step / recipe.climb)
        loss = (1 + 2 * climbed) * losses["keep"] + losses["word"] + climbed * losses["caption"]
        loss = loss + recipe.letter_weight * losses["letters"] + recipe.spell_weight * losses["spell"]
        reader.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        step += 1
        if step % 50 == 0:
            rate = (step - first) * recipe.batch / (time.monotonic() - begun)
            told = {name: round(value.item(), 3) for name, value in losses.items()}
            log.info("step %d of %d: %s, %.1f pictures/s", step, recipe.steps, told, rate)
        if time.monotonic() - saved > every_s or step == recipe.steps:
            save_state(state, step, reader, *optimizers)
            saved = time.monotonic()
