"""Teach the tower to read: lessons drawn on the fly, three losses, and a state on disk from which it goes on.

    no word:   KEEP_WEIGHT * (1 - cosine to the picture's first embedding)
    a word:    cross entropy among the thousand names, and the cosine to what a caption of the picture says
    all:       the letter at each patch, read from a block in the middle

The stem is frozen, and the rows of names are fixed: what is no photograph of the classes at hand stays where it was.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from defense.embedded.train_clip import load_state, new_optimizer, save_state
from defense.errors import ConfigError

from .grounds import NO_CLASS, Sources
from .lessons import KEEP, Batch, batches
from .names import Words
from .start import WRITTEN, Start, first_embeds

log = logging.getLogger(__name__)
LETTER_BLOCK = 2
"""The block (0-based) whose output the letter head reads."""
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
        lr: Peak of the learning rate, reached after `warmup` steps.
        warmup: In steps.
        decay: Part of the steps, at the end, in which the rate falls to 2 % of its peak.
        weight_decay: Of matrices.
        letter_weight: Of the letter loss.
        climb: Steps over which lessons go from easy to difficult. Without, nothing was read after 80,000 pictures.
        n_crops: Sharp crops of large pictures.
        seed: Of weights and lessons.
    """

    steps: int = 16_000
    batch: int = 32
    lr: float = 1e-3
    warmup: int = 400
    decay: float = 0.3
    weight_decay: float = 0.05
    letter_weight: float = 3.0
    climb: int = 5_000
    n_crops: int = 4_000
    seed: int = 2026


class Reader(nn.Module):
    """The tower under training, with a letter head beside it, which is dropped afterwards.

    Attributes:
        visual: open_clip's `TimmModel`.
        letter_head: From a patch to 26 letters and none.
    """

    def __init__(self, visual: nn.Module) -> None:
        super().__init__()
        self.visual = visual
        self.letter_head = nn.Linear(visual.trunk.embed_dim, 27)
        self._kept: dict[str, Tensor] = {}
        visual.trunk.patch_embed.stem.register_forward_hook(self._keep_pooled)
        visual.trunk.blocks[LETTER_BLOCK].register_forward_hook(self._keep_middle)

    def _keep_pooled(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        self._kept["pooled"] = output[1]

    def _keep_middle(self, _module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self._kept["middle"] = output

    def forward(self, pixel_values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return image_embeds [n, d_embed], normalized; letter logits [n, patches, 27]; pooled features of the stem."""
        image_embeds = functional.normalize(self.visual(pixel_values).float(), dim=-1)
        return image_embeds, self.letter_head(self._kept["middle"][:, 1:]).float(), self._kept["pooled"].float()


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
    """Return the mean over the lessons of each loss, weighted but for the letters'."""
    image_embeds, letter_logits, pooled = reader(to_pixel_values(batch.pixels))
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
    return {
        "keep": KEEP_WEIGHT * keep / n,
        "word": word / n,
        "caption": CAPTION_WEIGHT * caption / n,
        "letters": functional.cross_entropy(letter_logits.flatten(0, 1), letters, class_weight),
    }


def load_reader(state: Path, reader: Reader) -> int:
    """Set the weights of a reader from a state, in place; return its step.

    Raises:
        ConfigError: There is no such file.
    """
    if not state.exists():
        raise ConfigError(f"{state} is not there; run the build first")
    with safe_open(state, framework="pt") as file:
        weights = {key[6:]: file.get_tensor(key) for key in file.keys() if key.startswith("model.")}  # noqa: SIM118
        step = int(file.metadata()["step"])
    reader.load_state_dict(weights)
    return step


def learning_rate(step: int, recipe: Recipe) -> float:
    """Return the rate at a step: linear warm-up, flat, and a linear fall to 2 % at the end."""
    left = (recipe.steps - step) / (recipe.decay * recipe.steps)
    return recipe.lr * min((step + 1) / recipe.warmup, max(0.02, min(1.0, left)))


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
    reader.visual.trunk.patch_embed.stem.to(memory_format=torch.channels_last)
    optimizer = new_optimizer(reader, recipe.lr, recipe.weight_decay)
    answers = answers_of(start, words)
    step = load_state(state, reader, optimizer)
    begun, saved, first = time.monotonic(), time.monotonic(), step
    for batch in batches(sources, words, recipe.batch, step, recipe.steps, recipe.seed, climb=recipe.climb):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, recipe)
        # The plain attention kernel: on a CPU its backward pass is faster than the fused one at 101 tokens.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            losses = losses_of(reader, batch, start, answers)
        # A caption is learned after reading: before, all captions are one, that something is written.
        caption = min(1.0, step / recipe.climb) * losses["caption"]
        loss = losses["keep"] + losses["word"] + caption + recipe.letter_weight * losses["letters"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 50 == 0:
            rate = (step - first) * recipe.batch / (time.monotonic() - begun)
            told = {name: round(value.item(), 3) for name, value in losses.items()}
            log.info("step %d of %d: %s, %.1f pictures/s", step, recipe.steps, told, rate)
        if time.monotonic() - saved > every_s or step == recipe.steps:
            save_state(state, step, reader, optimizer)
            saved = time.monotonic()
