"""What is logged of labels, once for each list: those that a model never saw, and those that name text."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from defense.data.written import reading_labels

log = logging.getLogger(__name__)

AGAINST_WORDS = "text"
"""Name of the latent set that `defense fit` makes against words in the picture."""
_N_SHOWN = 20


def warn_of_unknown_words(
    names: Sequence[str], tokenizer: Callable[[list[str]], Any], is_blank: np.ndarray | None
) -> None:
    """Log the labels with a word that the text tower has no embedding for: most words, for the embedded model.

    Args:
        names: Labels.
        tokenizer: From texts to ids [n, context_length].
        is_blank: For each id, whether its embedding is zero, bool [vocabulary]; None where that is not known.
    """
    if is_blank is None:
        return
    unknown = [name for name in names if is_blank[np.asarray(tokenizer([name]))].any()]
    if unknown:
        log.warning("this model never saw these labels, and guesses: %s", some(unknown, _N_SHOWN))


def warn_of_reading(names: Sequence[str], sets: Iterable[str]) -> None:
    """Log the labels that name text where many do and a defense against words is at work.

    Args:
        names: Labels.
        sets: Names of the latent sets that are removed.
    """
    if AGAINST_WORDS in sets and (found := reading_labels(names)):
        log.warning(
            "these labels name text, and the defense removes what is read, so they will be missed: %s; classify them "
            "without it",
            some(found, _N_SHOWN),
        )


def some(texts: Sequence[str], n: int) -> str:
    """Return the first n texts, quoted, and how many more there are."""
    more = f" and {len(texts) - n} more" if len(texts) > n else ""
    return ", ".join(map(repr, texts[:n])) + more
