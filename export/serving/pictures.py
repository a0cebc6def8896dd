"""From encoded pictures to answers, row by row, the same behind every server.

A request of several pictures is answered as a whole only where the request itself is wrong; a picture that cannot be
read has its error in its row, and the others have their answers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from defense.errors import ConfigError, NonFiniteError, ShapeError
from defense.export.runtime import OnnxClassifier

MAX_LABELS = 1000
"""Labels that one request may choose."""
_MAX_LABEL_CHARACTERS = 500


class Prepared(NamedTuple):
    """The pictures of a request.

    Attributes:
        pixel_values: float32 [n, 3, height, width]; zeros where there is an error.
        errors: Of each picture why it cannot be read, "" where it can; object [n].
    """

    pixel_values: np.ndarray
    errors: np.ndarray


class Choice(NamedTuple):
    """What a request classifies into.

    Attributes:
        labels: Their names.
        text_embeds: Normalized, float32 [n_labels, d_embed].
    """

    labels: tuple[str, ...]
    text_embeds: np.ndarray


class Answers(NamedTuple):
    """What a request is answered, a row for each picture.

    Attributes:
        label: The best label, "" where there is an error; object [n].
        score: Of it, float32 [n]; NaN where there is an error.
        scores: Softmax over the labels, float32 [n, n_labels]; NaN where there is an error.
        error: "" where there is none; object [n].
    """

    label: np.ndarray
    score: np.ndarray
    scores: np.ndarray
    error: np.ndarray


def prepare(clf: OnnxClassifier, files: Sequence[bytes]) -> Prepared:
    """Return the pictures of a request as the graph reads them.

    Args:
        clf: Whose preprocessing and limits count.
        files: Encoded pictures, or `data:` URLs of them, for JSON holds no bytes.
    """
    pictures = [file.decode("ascii", "replace") if file[:5].lower() == b"data:" else file for file in files]
    pixel_values = np.zeros((len(pictures), 3, *clf.preprocess.size), np.float32)
    errors = np.full(len(pictures), "", dtype=object)
    start = 0
    for chunk in clf.prepared_chunks(pictures, "return"):
        rows = np.arange(start, start := start + len(chunk.errors))
        is_good = np.array([error is None for error in chunk.errors], bool)
        pixel_values[rows[is_good]] = chunk.pixel_values
        errors[rows] = ["" if error is None else str(error) for error in chunk.errors]
    return Prepared(pixel_values, errors)


def strengths_of(given: np.ndarray | None, n: int) -> np.ndarray:
    """Return a strength for each picture, float32 [n].

    Args:
        given: Of the request, as many numbers as pictures; None where it has none, which means 1.
        n: How many pictures there are.

    Raises:
        ConfigError: A number that lies outside [0, 1], or is none.
        ShapeError: Another number of them.
    """
    if given is None:
        return np.ones(n, np.float32)
    strengths = np.asarray(given, np.float32).reshape(-1)
    if len(strengths) != n:
        raise ShapeError(f"strength has {len(strengths)} numbers for {n} pictures; send one for each")
    wrong = strengths[~((strengths >= 0) & (strengths <= 1))]
    if len(wrong):
        raise ConfigError(f"strength is {wrong[0]:g}; want 0 (the CLIP without its defense) to 1 (all of it)")
    return strengths


def check_pixels(pixel_values: np.ndarray) -> None:
    """Raise `NonFiniteError` where a pixel is NaN or infinite."""
    if not np.isfinite(pixel_values).all():
        raise NonFiniteError("pixel_values")


def choose(clf: OnnxClassifier, labels: Sequence[str] | None, text_embeds: np.ndarray | None = None) -> Choice:
    """Return what a request classifies into.

    Args:
        clf: The classifier, whose labels are meant where the request names none.
        labels: At most `MAX_LABELS`, different, or None.
        text_embeds: Of these labels, from the text tower of the same CLIP, [n_labels, d_embed]; None where the bundle
            has them, or a text tower.

    Raises:
        ConfigError: Too many labels, an unknown one without a text tower, or embeddings without labels.
        ShapeError, NonFiniteError: Embeddings that cannot be used.
    """
    if labels is None:
        if text_embeds is not None:
            raise ConfigError("text_embeds came without labels; send the name of each row, as labels")
        return Choice(*clf.label_embeds())
    if len(labels) > MAX_LABELS:
        raise ConfigError(f"the request has {len(labels)} labels; send at most {MAX_LABELS}")
    if (longest := max(map(len, labels), default=0)) > _MAX_LABEL_CHARACTERS:
        raise ConfigError(f"a label has {longest} characters; send at most {_MAX_LABEL_CHARACTERS}")
    return Choice(*(clf.label_embeds(labels) if text_embeds is None else clf.checked_embeds(labels, text_embeds)))


def chosen_by(clf: OnnxClassifier, labels: np.ndarray | None, text_embeds: np.ndarray | None) -> Choice:
    """Do as `choose` says, with the tensors of a request.

    Args:
        clf: The classifier.
        labels: UTF-8, a row for each picture, [n, n_labels]; or None.
        text_embeds: [n, n_labels, d_embed], or None.

    Raises:
        ConfigError: Two rows differ, since labels are chosen for a request and not for a picture; or see `choose`.
        ShapeError, NonFiniteError: See `choose`.
    """
    for name, rows in (("labels", labels), ("text_embeds", text_embeds)):
        if rows is not None and (rows != rows[:1]).any():
            raise ConfigError(f"{name} differ between the pictures of a request; send them in requests of their own")
    names = None if labels is None else [label.decode("utf-8", "replace") for label in labels[0]]
    return choose(clf, names, None if text_embeds is None else text_embeds[0])


def outputs_of(answers: Answers) -> dict[str, np.ndarray]:
    """Return answers as the tensors of a response: label, score, scores and error; texts are UTF-8."""
    return {
        "label": encoded(answers.label),
        "score": answers.score[:, None],
        "scores": answers.scores,
        "error": encoded(answers.error),
    }


def encoded(texts: np.ndarray) -> np.ndarray:
    """Return texts [n] as bytes [n, 1]."""
    return np.array([text.encode() for text in texts], dtype=object)[:, None]


def answer(clf: OnnxClassifier, image_embeds: np.ndarray, errors: np.ndarray, choice: Choice) -> Answers:
    """Return the answers to the pictures of a request.

    Args:
        clf: Whose scale between cosines and logits counts.
        image_embeds: Normalized, [n, d_embed]; whatever it may be in the rows with an error.
        errors: As `prepare` returned them.
        choice: What to classify into.
    """
    errors = errors.copy()
    errors[(errors == "") & ~np.isfinite(image_embeds).all(1)] = str(NonFiniteError("image_embeds"))
    good = np.flatnonzero(errors == "")
    label = np.full(len(errors), "", dtype=object)
    scores = np.full((len(errors), len(choice.labels)), np.nan, np.float32)
    if len(good):
        scores[good] = clf.scores(image_embeds[good], choice.text_embeds)
        label[good] = np.array(choice.labels, dtype=object)[scores[good].argmax(1)]
    return Answers(label, scores.max(1), scores, errors)
