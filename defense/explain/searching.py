"""Longer names by search: start from words, propose phrases, score them, keep the best, and again.

    a direction's names --propose--> phrases --text tower--> embeddings --cosine to each direction--> its names

What proposes is a list of templates, or any function from names to phrases, such as one that asks a language model. No
gradient is taken, as in MILS (arXiv:2501.18096), which lets a language model propose and a CLIP score. Whoever tries
more phrases finds nearer ones, also for a direction that means nothing; so the same search is made for random
directions, and what these gain stands beside what latents gain.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from defense.data.labels import fill
from defense.errors import ConfigError

Propose = Callable[[Sequence[str]], Iterable[str]]
"""From the names that a direction has so far to phrases that may be nearer."""
Embed = Callable[[Sequence[str]], np.ndarray]
"""From texts to embeddings, float32 [n, d_embed], of length 1."""
ROUNDS = 3
N_MOST = 4000
"""Phrases of a round that are scored, at most."""


def by_templates(templates: Sequence[str]) -> Propose:
    """Return what puts each name into each template, at its literal {}."""
    return lambda names: (fill(template, name) for name in names for template in templates)


@dataclass(frozen=True)
class Searched:
    """What was found for some directions.

    Attributes:
        names: Of each direction the best phrases with their cosines, the best first; words it began with among them.
        start: The cosine of the best word that each direction began with, float64 [n].
        n_scored: Phrases and words that were scored.
        n_left_out: Phrases that were proposed and not scored, as there were too many; those that most directions
            proposed were.
    """

    names: tuple[tuple[tuple[str, float], ...], ...]
    start: np.ndarray
    n_scored: int
    n_left_out: int

    @property
    def best(self) -> np.ndarray:
        """The cosine of each direction's best name, float64 [n]."""
        return np.array([names[0][1] for names in self.names], dtype=np.float64)


def search(
    directions: np.ndarray,
    words: Sequence[str],
    embed: Embed,
    propose: Propose,
    *,
    n_names: int = 3,
    rounds: int = ROUNDS,
    n_most: int = N_MOST,
) -> Searched:
    """Return the phrases nearest to each direction that a search from words comes to.

    It ends after so many rounds, or when a round changes no direction's names.

    Args:
        directions: Of length 1, float [n, d_embed].
        words: What every direction begins with.
        embed: The text tower, less what all words share: embeddings have to lie where directions do.
        propose: Given a direction's names, the best first.
        n_names: To keep of each direction.
        rounds: At most.
        n_most: Phrases of a round, at most.

    Raises:
        ConfigError: No words, or a number below 1.
    """
    if not words or min(n_names, rounds, n_most) < 1:
        raise ConfigError(
            f"{len(words)} words, n_names={n_names}, rounds={rounds}, n_most={n_most}; each must be at least 1"
        )
    known = list(dict.fromkeys(words))
    cosine = directions @ embed(known).T
    start = cosine.max(1).astype(np.float64)
    kept = _best(cosine, n_names)
    is_known, n_left_out = set(known), 0
    for _ in range(rounds):
        proposed = Counter(
            phrase
            for row in kept
            for phrase in dict.fromkeys(propose([known[i] for i in row]))
            if phrase not in is_known
        )
        new = [phrase for phrase, _ in proposed.most_common(n_most)]
        n_left_out += len(proposed) - len(new)
        if not new:
            break
        known += new
        is_known.update(new)
        cosine = np.concatenate([cosine, directions @ embed(new).T], 1)
        before, kept = kept, _best(cosine, n_names)
        if np.array_equal(before, kept):
            break
    names = tuple(
        tuple((known[i], round(float(cosine[row, i]), 4)) for i in best) for row, best in enumerate(kept.tolist())
    )
    return Searched(names, start, len(known), n_left_out)


def _best(cosine: np.ndarray, n: int) -> np.ndarray:
    """Return the columns of each row's n largest, the largest first, of equal ones the first one; int64 [n_rows, n]."""
    return np.argsort(-cosine, axis=1, kind="stable")[:, :n]


def search_beside_random(
    directions: np.ndarray, words: Sequence[str], embed: Embed, propose: Propose, *, seed: int, n_names: int = 3
) -> dict[str, Any]:
    """Return what a catalogue keeps of such a search, as JSON values, with that of as many random directions.

    Args:
        directions: Float [d_sae, d_embed]; rows of 0, of latents that never fire, are left out.
        words: See `search`.
        embed: See `search`.
        propose: See `search`.
        seed: Of the random directions, which lie in the span of the words as far as there are fewer than dimensions.
        n_names: To keep of each latent.
    """
    latents = np.flatnonzero(np.linalg.norm(directions, axis=1))
    found = search(directions[latents], words, embed, propose, n_names=n_names)
    drawn = np.random.default_rng(seed).normal(size=(len(latents), len(words))) @ embed(list(words))
    drawn /= np.linalg.norm(drawn, axis=1, keepdims=True)
    control = search(drawn, words, embed, propose, n_names=n_names)
    return {
        "n_scored": found.n_scored,
        "n_left_out": found.n_left_out,
        "latents": _gain(found),
        "random": _gain(control),
        "names": {
            int(latent): [list(each) for each in names] for latent, names in zip(latents, found.names, strict=True)
        },
    }


def _gain(found: Searched) -> dict[str, float]:
    """Return the median cosine of the best word and of the best phrase, and for how many a phrase is nearer."""
    return {
        "word": round(float(np.median(found.start)), 4),
        "phrase": round(float(np.median(found.best)), 4),
        "nearer": round(float((found.best > found.start + 1e-4).mean()), 4),
    }


def lines_of(found: dict[str, Any], n_shown: int = 10) -> list[str]:
    """Return lines on what `search_beside_random` found: what was gained, and the nearest names.

    Args:
        found: As a catalogue's provenance holds it under "phrases"; from JSON or not yet.
        n_shown: Latents whose name is shown.
    """
    lines = [
        f"names by search: the best word has a cosine of {gain['word']:.3f}, the best phrase {gain['phrase']:.3f} "
        f"(median), nearer for {100 * gain['nearer']:.0f} % of {kind}"
        for kind, gain in (("latents", found["latents"]), ("random directions", found["random"]))
    ]
    if found["n_left_out"]:
        lines.append(f"{found['n_left_out']} phrases were proposed by few and not scored")
    nearest = sorted(found["names"].items(), key=lambda item: -item[1][0][1])[:n_shown]
    return [*lines, *(f"{latent}: {names[0][0]} ({names[0][1]:.2f})" for latent, names in nearest)]
