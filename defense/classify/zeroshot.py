"""The calls of a zero-shot classifier, whatever computes its embeddings.

`RobustClassifier` (classifier.py) computes them with torch, `OnnxClassifier` (export/runtime.py) with ONNX Runtime.
What a caller sees of both is here: labels, pictures in many forms, batches, errors, scores.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self, get_args

import numpy as np

from defense.data import images, labels
from defense.data.labels import Prompts
from defense.data.notes import NoteLog
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError, DefenseError, NonFiniteError

log = logging.getLogger(__name__)

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
    """Some pictures, prepared.

    Attributes:
        errors: For each picture None or its error.
        pixel_values: Of those without one, float32 [n_readable, 3, height, width], in order.
        warnings: Of the same; see `images.Decoded`.
    """

    errors: list[DefenseError | None]
    pixel_values: np.ndarray
    warnings: list[tuple[str, ...]]


class Pixels(np.ndarray):
    """pixel_values [3, height, width] of one picture, and what there was to say about it.

    Attributes:
        warnings: See `images.Decoded`.
    """

    warnings: tuple[str, ...] = ()


class ZeroShotClassifier(ABC):
    """A zero-shot classifier without its towers: a subclass says how pictures and texts are embedded.

    Args:
        batch_size: Pictures decoded and encoded at once.
        prompts: Labels set from the start.
        limits: What pictures are accepted.

    Raises:
        ConfigError: `batch_size` is below 1.
    """

    def __init__(
        self, batch_size: int, prompts: Prompts | None = None, limits: images.Limits = images.DEFAULT_LIMITS
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"batch_size={batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.prompts = prompts
        self.limits = limits
        self._text_embeds: dict[str, np.ndarray] = {}
        self._lock = threading.RLock()

    # --- what a subclass says ---

    @property
    @abstractmethod
    def preprocess(self) -> Preprocess:
        """How pictures are prepared."""

    @property
    @abstractmethod
    def logit_scale(self) -> float:
        """Factor between cosines and logits."""

    @abstractmethod
    def encode_text(self, input_ids: np.ndarray) -> np.ndarray:
        """Return text embeddings, float32 [n, d_embed], not normalized, of ids int64 [n, context_length]."""

    @abstractmethod
    def _embeds_of(self, prompts: Prompts) -> np.ndarray:
        """Return text_embeds, float32 [n_labels, d_embed], normalized; encoded on the first call, then cached."""

    @abstractmethod
    def _encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image_embeds float32 [batch, d_embed], normalized, of pixel_values [batch, 3, height, width]."""

    @abstractmethod
    def prepared_chunks(self, inputs: Iterable[Any], on_error: OnError = "raise") -> Iterator[Chunk]:
        """Yield up to `batch_size` pictures at a time, prepared.

        Args:
            inputs: Pictures of any kind that `images.decode` takes.
            on_error: "raise" the first error; "skip" logs each, "return" does not, and both yield it.
        """

    # --- labels ---

    def set_labels(self, candidate_labels: Sequence[str], templates: str | Sequence[str] = "simple") -> Self:
        """Choose what to classify into, and return self. Labels are encoded once and cached.

        Args:
            candidate_labels: At least one, all different.
            templates: "simple", "hf", "openai", a template with a literal {}, or several.

        Raises:
            ConfigError: See `labels.check_labels` and `labels.resolve_templates`.
        """
        self.prompts = Prompts(labels.check_labels(candidate_labels), labels.resolve_templates(templates))
        return self

    @property
    def classes_(self) -> np.ndarray:
        """The labels, in the order of `predict_proba`'s columns."""
        return np.array(self._chosen().labels, dtype=object)

    def _chosen(self) -> Prompts:
        """Return an immutable snapshot; read it once per request, since another thread may set labels.

        Raises:
            ConfigError: No labels are set.
        """
        prompts = self.prompts
        if prompts is None:
            raise ConfigError("no labels are set; call set_labels([...]), or pass candidate_labels=[...]")
        return prompts

    def text_embeds(self) -> np.ndarray:
        """Return the labels' embeddings, float32 [n_labels, d_embed], normalized."""
        return self._embeds_of(self._chosen())

    def forget_labels(self, keep: int) -> None:
        """Drop the embeddings of all but the `keep` sets of labels that were encoded last."""
        with self._lock:
            while len(self._text_embeds) > keep:
                self._text_embeds.pop(next(iter(self._text_embeds)))

    # --- images ---

    def scores(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> np.ndarray:
        """Return the softmax over labels, float32 [batch, n_labels].

        Args:
            image_embeds: Normalized, [batch, d_embed].
            text_embeds: Normalized, [n_labels, d_embed].
        """
        logits = self.logit_scale * image_embeds @ text_embeds.T
        weights = np.exp(logits - logits.max(1, keepdims=True))
        scores: np.ndarray = weights / weights.sum(1, keepdims=True)
        return scores

    def chunks(
        self, inputs: Iterable[Any], on_error: OnError = "raise"
    ) -> Iterator[tuple[list[DefenseError | None], np.ndarray]]:
        """Yield errors and pixel_values as `prepared_chunks` does; warnings are logged, each kind once."""
        notes = NoteLog()
        start = 0
        for errors, pixel_values, warnings in self.prepared_chunks(inputs, on_error):
            rows = (row for row, error in enumerate(errors, start) if error is None)
            for row, found in zip(rows, warnings, strict=True):
                notes.add(f"picture {row}", found)
            start += len(errors)
            yield errors, pixel_values

    def _prepare(self, image: Any) -> Pixels:
        """Return one picture as the model reads it."""
        decoded = images.decode(image, limits=self.limits)
        pixels = self.preprocess(decoded.image).view(Pixels)
        pixels.warnings = decoded.warnings
        return pixels

    def _chunk(self, pictures: Iterable[Callable[[], Pixels]], on_error: OnError) -> Chunk:
        """Return one chunk of `prepared_chunks`.

        Args:
            pictures: Each returns the pixels of a picture, or raises its error.
            on_error: See `prepared_chunks`.
        """
        errors: list[DefenseError | None] = []
        prepared: list[Pixels] = []
        for picture in pictures:
            try:
                prepared.append(picture())
                errors.append(None)
            except DefenseError as error:
                if on_error == "raise":
                    raise
                if on_error == "skip":
                    log.warning("skipped a picture: %s", error)
                errors.append(error)
        pixel_values = np.empty((0, 3, *self.preprocess.size), np.float32)
        if prepared:
            pixel_values = np.stack([np.asarray(pixels) for pixels in prepared])
        return Chunk(errors, pixel_values, [pixels.warnings for pixels in prepared])

    def stream(self, inputs: Iterable[Any], *, on_error: OnError = "raise", top_k: int | None = None) -> Iterator[Any]:
        """Yield a `Prediction` for each picture, or its error where `on_error` is "return".

        One batch is in memory at a time. Warnings about pictures are logged, each kind once. The labels are those that
        are set when this is called, whatever is set while the stream runs.

        Args:
            inputs: Pictures of any kind that `images.decode` takes.
            on_error: See `OnError`.
            top_k: Only the best so many labels.
        """
        return self._stream(inputs, self._chosen(), on_error, top_k)

    def answers(
        self, inputs: Iterable[Any], *, on_error: OnError = "return", top_k: int | None = None
    ) -> Iterator[Answer]:
        """Yield an `Answer` for each picture: what `stream` yields, and each picture's warnings, which it only logs.

        Args:
            inputs: Pictures of any kind that `images.decode` takes.
            on_error: See `OnError`.
            top_k: Only the best so many labels.
        """
        answers = self._checked_answers(inputs, self._chosen(), on_error, top_k)
        return (answer for answer in answers if answer.error is None or on_error == "return")

    def _checked_answers(
        self, inputs: Iterable[Any], prompts: Prompts, on_error: OnError, top_k: int | None
    ) -> Iterator[Answer]:
        if on_error not in get_args(OnError):
            raise ConfigError(f"on_error={on_error!r}; it must be one of {', '.join(get_args(OnError))}")
        check_top_k(top_k)
        return self._answers(inputs, prompts, on_error, top_k)

    def _answers(
        self, inputs: Iterable[Any], prompts: Prompts, on_error: OnError, top_k: int | None
    ) -> Iterator[Answer]:
        text_embeds = self._embeds_of(prompts)
        for errors, pixel_values, warnings in self.prepared_chunks(inputs, on_error):
            scores = self.scores(self._encode_image(pixel_values), text_embeds) if len(pixel_values) else ()
            readable = zip(scores, warnings, strict=True)
            for error in errors:
                if error is None:
                    row, found = next(readable)
                    yield Answer(prediction_of(prompts.labels, row, top_k), found)
                else:
                    yield Answer(None, error=error)

    def _stream(self, inputs: Iterable[Any], prompts: Prompts, on_error: OnError, top_k: int | None) -> Iterator[Any]:
        return _logged(self._checked_answers(inputs, prompts, on_error, top_k), on_error)

    def __call__(
        self,
        images: Any,
        candidate_labels: Sequence[str] | None = None,
        *,
        hypothesis_template: str | None = None,
        on_error: OnError = "raise",
        top_k: int | None = None,
    ) -> Any:
        """Return predictions; called as Hugging Face's pipeline "zero-shot-image-classification" is.

        Args:
            images: One picture (path, bytes, file object, PIL image, HWC uint8 array), a list of them, or an iterator.
            candidate_labels: What to classify into, for this call; by default what `set_labels` chose.
            hypothesis_template: A template with a literal {}, for this call; by default the one chosen before.
            on_error: See `OnError`. A single picture always raises.
            top_k: Only the best so many labels.

        Returns:
            A `Prediction` for one picture, a list of them for a list, an iterator of them for an iterator.
        """
        if candidate_labels is None:
            prompts = self._chosen()
        else:
            before = self.prompts
            templates = "simple" if before is None else before.templates
            prompts = Prompts(labels.check_labels(candidate_labels), labels.resolve_templates(templates))
        if hypothesis_template is not None:
            prompts = replace(prompts, templates=labels.resolve_templates(hypothesis_template))
        if isinstance(images, (list, tuple)):
            return list(self._stream(images, prompts, on_error, top_k))
        if isinstance(images, Iterator) and not hasattr(images, "read"):
            return self._stream(images, prompts, on_error, top_k)
        (prediction,) = self._stream([images], prompts, "raise", top_k)
        return prediction

    # --- in the shape of scikit-learn ---

    def transform(self, X: Iterable[Any]) -> np.ndarray:
        """Return image_embeds, float32 [n, d_embed], normalized.

        Raises:
            ConfigError: `X` is one picture, not several.
            InvalidImageError: A picture cannot be read.
        """
        if isinstance(X, (str, bytes, os.PathLike)):
            raise ConfigError(f"X must be a list of pictures, not one: [{X!r}]")
        parts = [self._encode_image(pixel_values) for _, pixel_values in self.chunks(X, "raise")]
        if not parts:
            return self._encode_image(np.zeros((1, 3, *self.preprocess.size), np.float32))[:0]
        return np.concatenate(parts)

    def predict_proba(self, X: Iterable[Any]) -> np.ndarray:
        """Return scores, float32 [n, n_labels], columns in the order of `classes_`, rows summing to 1."""
        return self._proba(X, self._chosen())

    def predict(self, X: Iterable[Any]) -> np.ndarray:
        """Return the best label of each picture, [n]."""
        prompts = self._chosen()
        best: np.ndarray = np.array(prompts.labels, dtype=object)[self._proba(X, prompts).argmax(1)]
        return best

    def _proba(self, X: Iterable[Any], prompts: Prompts) -> np.ndarray:
        return self.scores(self.transform(X), self._embeds_of(prompts))

    def encode_pixels(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image_embeds, float32 [batch, d_embed], normalized, of pixel_values [batch, 3, height, width].

        Args:
            pixel_values: As `preprocess` makes them, float32.

        Raises:
            NonFiniteError: A pixel is NaN or infinite.
        """
        return self._encode_image(finite(pixel_values))


def _logged(answers: Iterable[Answer], on_error: OnError) -> Iterator[Any]:
    """Yield the prediction of each answer, its error where those are returned, and log each kind of warning once."""
    notes = NoteLog()
    for number, answer in enumerate(answers):
        notes.add(f"picture {number}", answer.warnings)
        if answer.error is None:
            yield answer.prediction
        elif on_error == "return":
            yield answer.error


def finite(pixel_values: np.ndarray) -> np.ndarray:
    """Return an array as contiguous float32.

    Raises:
        NonFiniteError: It holds NaN or infinity.
    """
    if not np.isfinite(pixel_values).all():
        raise NonFiniteError("input")
    return np.ascontiguousarray(pixel_values, np.float32)


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
        log.warning("this model never saw these labels, and guesses: %s", ", ".join(map(repr, unknown)))


def batched(inputs: Iterable[Any], size: int) -> Iterator[tuple[Any, ...]]:
    """Yield tuples of `size` items; the last one may be shorter."""
    iterator = iter(inputs)
    while chunk := tuple(itertools.islice(iterator, size)):
        yield chunk


def check_top_k(top_k: int | None) -> None:
    """Raise `ConfigError` unless it is None or at least 1."""
    if top_k is not None and top_k < 1:
        raise ConfigError(f"top_k={top_k}; it must be at least 1")


def prediction_of(names: Sequence[str], scores: np.ndarray, top_k: int | None) -> Prediction:
    """Return the labels with their scores [n_labels], best first."""
    order = np.argsort(-scores, kind="stable")[:top_k]
    return [{"label": names[i], "score": float(scores[i])} for i in order]
