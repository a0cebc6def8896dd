"""What comes in and goes out of a classifier, picture by picture: prepared pixels, errors, predictions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from defense.data.notes import NoteLog
from defense.errors import DefenseError

OnError = Literal["raise", "skip", "return"]
"""What becomes of a picture that cannot be read: its error is raised; or logged, and the picture left out; or returned
in its place."""
Prediction = list[dict[str, Any]]
"""[{"label": str, "score": float}, ...], best first; scores are a softmax over the given labels."""


class Answer(NamedTuple):
    """What there is to say about one picture.

    Attributes:
        prediction: The labels with their scores; None where the picture cannot be read.
        warnings: What makes the prediction doubtful; see `images.Decoded`.
        error: Why the picture cannot be read, or None.
    """

    prediction: Prediction | None
    warnings: tuple[str, ...] = ()
    error: DefenseError | None = None


class Chunk(NamedTuple):
    """Pictures that are encoded at once, prepared.

    Attributes:
        errors: For each picture None or its error.
        pixel_values: Of those without one, float32 [n_readable, 3, height, width], in order.
        warnings: Of the same; see `images.Decoded`.
    """

    errors: list[DefenseError | None]
    pixel_values: np.ndarray
    warnings: list[tuple[str, ...]]


class Pixels(np.ndarray):
    """pixel_values of one picture, float32 [3, height, width], with the warnings about it.

    Attributes:
        warnings: See `images.Decoded`.
    """

    warnings: tuple[str, ...] = ()


def prediction_of(names: Sequence[str], scores: np.ndarray, top_k: int | None) -> Prediction:
    """Return the labels with their scores [n_labels], best first."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": names[i], "score": float(scores[i])} for i in order]


def logged(answers: Iterable[Answer], on_error: OnError) -> Iterator[Any]:
    """Yield the prediction of each answer, its error where those are returned, and log each kind of warning once."""
    notes = NoteLog()
    for number, answer in enumerate(answers):
        notes.add(f"picture {number}", answer.warnings)
        if answer.error is None:
            yield answer.prediction
        elif on_error == "return":
            yield answer.error
