"""The text tower: it learns to give any caption its row, so that new captions of known words find theirs.

"a photo of a dog"                          the mean of the rows of all dogs
"the word pizza", "a sign that says pizza"  pizza's row, and that something is written
"a dog with the word pizza on it"           both, and a little of the dog
"a photo of some text"                      that something is written
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import open_clip
import torch
from torch import Tensor, nn
from torch.nn import functional

from defense.embedded.train_clip import load_state, save_state

from .names import Words
from .start import D_EMBED, WRITTEN
from .training import caption_rows

log = logging.getLogger(__name__)
PLAIN = (
    "{}",
    "{}.",
    "a {}",
    "the {}",
    "a photo of {}.",
    "This is a photo of {}.",
    "a picture of a {}.",
    "an image of a {}",
    *(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES),
)
WRITTEN_ALONE = (
    "the word {}",
    "the word {}.",
    'the word "{}"',
    'the text "{}"',
    "text that says {}",
    "a photo of the word {}.",
    "a sign that says {}",
    'a sign that says "{}"',
    "a note that says {}.",
    "a label that says {}.",
    "{} written on a sign",
    "{} written on paper.",
    "the written word {}",
    "a photo of a sign with the word {} on it.",
    "a picture of the text {}.",
    "handwriting that says {}",
)
WRITTEN_ON = (
    "a {} with the word {} on it",
    "a photo of a {} with the word {} on it.",
    'a photo of a {} with the word "{}" written on it.',
    "a {} with a sign that says {}",
    "a {} and a note that says {}.",
    "a picture of a {} with the text {}.",
    "{} with the word {} written over it",
)
WRITING = (
    "text",
    "some text",
    "writing",
    "letters",
    "words",
    "a photo of text.",
    "a photo of some text.",
    "a photo of letters",
    "a picture with words on it",
    "a photo of a sign.",
    "something is written",
    "a photo with a word on it",
    "handwriting",
    "written text",
)
_UNNAMED = ("thing", "object", "photo", "picture", "place")
"""What a caption calls an object that it does not name."""


@dataclass(frozen=True)
class Recipe:
    """How long and how the text tower learns. The defaults made the shipped weights."""

    steps: int = 5_000
    batch: int = 128
    lr: float = 2e-3
    warmup: int = 200
    seed: int = 2026


@dataclass(frozen=True)
class Captions:
    """Captions, and the row that each is to have, normalized [n, D_EMBED]."""

    texts: list[str]
    rows: Tensor


class Rows:
    """The rows of all words.

    Args:
        names: Rows of the thousand names, normalized [1000, D_EMBED].
        words: What classes are called.
    """

    def __init__(self, names: Tensor, words: Words) -> None:
        self.words = tuple(words.members)
        means = torch.stack([names[list(members)].mean(0) for members in words.members.values()])
        self.rows = functional.normalize(means, dim=-1)
        self.writing = functional.one_hot(torch.tensor(WRITTEN), D_EMBED).float()

    def sample(self, n: int, rng: np.random.Generator) -> Captions:
        """Return captions of random words: half plain, the others of writing."""
        texts, rows = [], []
        for kind in rng.choice(4, n, p=(0.5, 0.25, 0.23, 0.02)):
            word, other = rng.integers(len(self.words), size=2)
            text, row = self._caption(int(kind), int(word), int(other), rng)
            texts.append(text if rng.random() < 0.8 else text.capitalize())
            rows.append(row)
        return Captions(texts, torch.stack(rows))

    def _caption(self, kind: int, word: int, other: int, rng: np.random.Generator) -> tuple[str, Tensor]:
        said = self.words[word]
        row = self.rows[word][None]
        if kind == 0:
            return _one_of(PLAIN, rng).format(said), row[0]
        if kind == 1:
            return _one_of(WRITTEN_ALONE, rng).format(said), caption_rows(row)[0]
        if kind == 2:
            template = _one_of(WRITTEN_ON, rng)
            if rng.random() < 0.1:
                return template.format(_one_of(_UNNAMED, rng), said), caption_rows(row)[0]
            return template.format(self.words[other], said), caption_rows(row, self.rows[other][None])[0]
        return _one_of(WRITING, rng), self.writing


def _one_of(texts: Sequence[str], rng: np.random.Generator) -> str:
    return texts[int(rng.integers(len(texts)))]


def known_tokens(rows: Rows, vocab_size: int) -> Tensor:
    """Return which rows of the token embedding captions use, bool [vocab_size]. The others stay zero."""
    known = torch.zeros(vocab_size, dtype=torch.bool)
    templates = (*PLAIN, *WRITTEN_ALONE, *(template.replace("{}", "", 1) for template in WRITTEN_ON))
    texts = [*rows.words, *WRITING, *_UNNAMED, *(template.replace("{}", "") for template in templates)]
    texts += [f"{word}{end}" for word in rows.words for end in ('"', ".")]
    known[open_clip.tokenize(texts).flatten()] = True
    return known


def embed(text: nn.Module, texts: Sequence[str]) -> Tensor:
    """Return a text tower's text_embeds of captions, normalized [n, D_EMBED]."""
    return functional.normalize(text(open_clip.tokenize(list(texts), text.context_length)).float(), dim=-1)


def train(state: Path, text: nn.Module, rows: Rows, recipe: Recipe, *, every: int = 500) -> None:
    """Train a text tower in place, or go on where a state says that training stopped.

    Args:
        state: File of the state; written every `every` steps, and at the end.
        text: open_clip's `TextTransformer`; unknown tokens' embeddings become zero.
        rows: What is to be learned.
        recipe: How long and how.
        every: Steps between two states.
    """
    embedding = text.get_parameter("token_embedding.weight")
    known = known_tokens(rows, len(embedding))
    with torch.no_grad():
        embedding[~known] = 0
    muon, adam = _optimizers(text, recipe)
    step = load_state(state, text, muon, adam)
    while step < recipe.steps:
        captions = rows.sample(recipe.batch, np.random.default_rng([recipe.seed, step]))
        pace = min((step + 1) / recipe.warmup, max(0.01, min(1.0, 2 * (1 - step / recipe.steps))))
        for optimizer in (muon, adam):
            for group in optimizer.param_groups:
                group["lr"] = recipe.lr * pace
        with torch.autocast("cpu", torch.bfloat16):
            text_embeds = embed(text, captions.texts)
        distance = 1 - (text_embeds * captions.rows).sum(-1)
        text.zero_grad()
        # The square root keeps the last errors worth mending, where names lie close to each other.
        (distance.clamp(min=1e-6).sqrt().mean()).backward()
        nn.utils.clip_grad_norm_(text.parameters(), 1.0)
        muon.step()
        adam.step()
        step += 1
        if step % every == 0 or step == recipe.steps:
            log.info("step %d of %d: mean cosine %.4f", step, recipe.steps, 1 - distance.mean().item())
            save_state(state, step, text, muon, adam)


def _optimizers(text: nn.Module, recipe: Recipe) -> tuple[torch.optim.Optimizer, torch.optim.Optimizer]:
    """Return Muon over the matrices of the blocks, and AdamW over the rest; untouched embeddings stay zero in both."""
    matrices = [each for each in text.get_submodule("transformer").parameters() if each.ndim == 2]
    taken = {id(each) for each in matrices}
    others = [each for each in text.parameters() if id(each) not in taken]
    muon = torch.optim.Muon(matrices, lr=recipe.lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, lr=recipe.lr, betas=(0.9, 0.98), weight_decay=0.0, fused=True)


@torch.inference_mode()
def report(text: nn.Module, names: Tensor, words: Words, n: int = 1000) -> dict[str, float]:
    """Return what a text tower learned, in percent and as cosines.

    Args:
        text: The tower.
        names: Rows of the thousand names.
        words: What classes are called.
        n: Names that are asked for.
    """
    said = [name.lower() for name in words.names[:n]]
    own = torch.arange(len(said))
    plain, written = (
        embed(text, [template.format(each) for each in said]) for template in (PLAIN[4], WRITTEN_ALONE[6])
    )
    return {
        "names found by their own row": round(100 * ((plain @ names.T).argmax(1) == own).double().mean().item(), 1),
        "cosine to the row": round((plain * names[: len(said)]).sum(-1).mean().item(), 4),
        "cosine of a thing and a sign that says it": round((plain * written).sum(-1).mean().item(), 4),
    }
