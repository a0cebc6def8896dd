"""How words are written on photographs in tests: kinds of typefaces, capitals, turned, repeated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from defense.data.hands import Case, Hand, sample_hand

_HEIGHTS = (0.12, 0.30)
"""Of capitals, as fractions of the picture."""


@dataclass(frozen=True)
class Style:
    """How words are written.

    Attributes:
        kind: Of typeface.
        cases: To choose from.
        turn: In degrees, either way.
        n_times: How often the word is there.
    """

    kind: str
    cases: tuple[Case, ...] = ("lower", "title")
    turn: float = 0.0
    n_times: int = 1


STYLES = {
    "print": Style("print"),
    "display": Style("display"),
    "handwriting": Style("handwriting"),
    "capitals": Style("print", cases=("upper",)),
    "turned": Style("print", turn=20.0),
    "repeated": Style("print", n_times=3),
}


def sample_writing(
    rng: np.random.Generator, word: str, style: Style, fonts: Mapping[str, tuple[str, ...]]
) -> tuple[Hand, ...]:
    """Return how a word is written in a style, with typefaces by kind."""
    hands = []
    for _ in range(style.n_times):
        hand = sample_hand(rng, word, fonts[style.kind], cases=style.cases, max_angle=4.0, heights=_HEIGHTS)
        hands.append(hand if not style.turn else _turned(rng, hand, style.turn))
    return tuple(hands)


def _turned(rng: np.random.Generator, hand: Hand, turn: float) -> Hand:
    return hand.turned(turn if rng.random() < 0.5 else -turn, (0.5, float(rng.uniform(0.3, 0.7))))
