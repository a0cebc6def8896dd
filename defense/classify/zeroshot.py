"""The calls of a zero-shot classifier, whatever computes its embeddings.

`RobustClassifier` (classifier.py) computes them with torch, `OnnxClassifier` (export/runtime.py) with ONNX Runtime.
What a caller sees of both is here: labels, pictures in many forms, batches, errors, scores.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self, get_args

import numpy as np

from defense.data import images, labels
from defense.data.labels import Prompts
from defense.data.locks import fork_safe_lock
from defense.data.notes import NoteLog
from defense.data.preprocess import Preprocess
from defense.errors import ConfigError, DefenseError, NonFiniteError

from .answers import Answer, Chunk, OnError, Pixels, logged, prediction_of
from .estimator import Estimator
from .inputs import check_count, check_top_k, checked_pixels, finite, is_one_picture, many

log = logging.getLogger(__name__)

_MAX_LABEL_BYTES = 256 * 2**20
"""Of the embeddings of labels that are kept; those that were used last stay."""


class ZeroShotClassifier(Estimator):
    """A zero-shot classifier without its towers: a subclass says how pictures and texts are embedded.

    It can be pickled and copied, and survives a fork, which waits until a batch that is being encoded is done.

    Args:
        batch_size: Pictures decoded and encoded at once.
        prompts: Labels set from the start.
        limits: What pictures are accepted.

    Raises:
        ConfigError: `batch_size` is no integer, or below 1.
    """

    def __init__(
        self, batch_size: int, prompts: Prompts | None = None, limits: images.Limits = images.DEFAULT_LIMITS
    ) -> None:
        self.batch_size = batch_size
        self.prompts = prompts
        self.limits = limits
        self._text_embeds: dict[str, np.ndarray] = {}
        self._lock = fork_safe_lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = fork_safe_lock()

    @property
    def batch_size(self) -> int:
        """Pictures decoded and encoded at once."""
        return self._batch_size

    @batch_size.setter
    def batch_size(self, value: int) -> None:
        self._batch_size = check_count("batch_size", value)

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
    def _encode_prompts(self, prompts: Prompts) -> np.ndarray:
        """Return text_embeds, float32 [n_labels, d_embed], normalized.

        Raises:
            ConfigError: Two labels are one to the text tower.
        """

    @abstractmethod
    def _encode_image(self, pixel_values: np.ndarray) -> np.ndarray:
        """Return image_embeds float32 [batch, d_embed], normalized, of pixel_values [batch, 3, height, width].

        A row may hold NaN or infinity.
        """

    @abstractmethod
    def prepared_chunks(
        self, inputs: Iterable[Any], on_error: OnError = "raise", batch_size: int | None = None
    ) -> Iterator[Chunk]:
        """Yield up to `batch_size` pictures at a time, prepared.

        Args:
            inputs: Pictures of any kind that `images.decode` takes.
            on_error: "raise" the first error; "skip" logs each, "return" does not, and both yield it.
            batch_size: By default the classifier's own.
        """

    # --- labels ---

    def set_labels(self, candidate_labels: Sequence[str], templates: str | Sequence[str] = "simple") -> Self:
        """Choose what to classify into, and return self. Labels are encoded once and cached.

        Args:
            candidate_labels: At least one, all different.
            templates: "simple", "hf", "openai", a template with a literal {}, or several.

        Raises:
            ConfigError: See `labels.check_labels` and `labels.resolve_templates`; or two labels are one to the text
                tower (`labels.check_distinct`), at the latest when they are used.
        """
        self.prompts = Prompts(labels.check_labels(candidate_labels), labels.resolve_templates(templates))
        return self

    def _sort_labels(self, names: Sequence[str] | None) -> None:
        if self.prompts is not None:
            self.set_labels(sorted(self.prompts.labels), self.prompts.templates)
        elif names is not None:
            self.set_labels(names)

    @property
    def classes_(self) -> np.ndarray:
        """The labels, in the order of `predict_proba`'s columns: as they were set, or in alphabetical order by `fit`.

        scikit-learn's scores of probabilities (log loss, ROC) take alphabetical order for granted.
        """
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

    def _embeds_of(self, prompts: Prompts) -> np.ndarray:
        """Return text_embeds, float32 [n_labels, d_embed], normalized; encoded on the first call, then kept a while."""
        key = prompts.sha256()
        with self._lock:
            embeds = self._text_embeds.pop(key, None)
            if embeds is None:
                embeds = self._encode_prompts(prompts)
            self._text_embeds[key] = embeds  # behind the others, as what was used last
            while len(self._text_embeds) > 1 and sum(e.nbytes for e in self._text_embeds.values()) > _MAX_LABEL_BYTES:
                self.forget_labels(len(self._text_embeds) - 1)
            return embeds

    def forget_labels(self, keep: int) -> None:
        """Drop the embeddings of all but the `keep` sets of labels that were used last."""
        with self._lock:
            while len(self._text_embeds) > keep:
                self._text_embeds.pop(next(iter(self._text_embeds)))

    # --- images ---

    def scores(self, image_embeds: np.ndarray, text_embeds: np.ndarray) -> np.ndarray:
        """Return the softmax over labels, float32 [batch, n_labels].

        Args:
            image_embeds: Normalized, [batch, d_embed].
            text_embeds: Normalized, [n_labels, d_embed].

        Raises:
            NonFiniteError: An embedding or the factor between cosines and logits is NaN or infinite.
        """
        with np.errstate(over="ignore", invalid="ignore"):  # refused below
            logits = self.logit_scale * image_embeds @ text_embeds.T
            weights = np.exp(logits - logits.max(1, keepdims=True))
            scores: np.ndarray = weights / weights.sum(1, keepdims=True)
        return finite(scores, "scores")

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
        self,
        inputs: Iterable[Any],
        prompts: Prompts,
        on_error: OnError,
        top_k: int | None,
        batch_size: int | None = None,
    ) -> Iterator[Answer]:
        if on_error not in get_args(OnError):
            raise ConfigError(f"on_error={on_error!r}; it must be one of {', '.join(get_args(OnError))}")
        check_top_k(top_k)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        return self._answers(inputs, prompts, on_error, top_k, batch_size)

    def _answers(
        self, inputs: Iterable[Any], prompts: Prompts, on_error: OnError, top_k: int | None, batch_size: int | None
    ) -> Iterator[Answer]:
        text_embeds = self._embeds_of(prompts)
        for errors, pixel_values, warnings in self.prepared_chunks(inputs, on_error, batch_size):
            scored = self._scored(pixel_values, text_embeds, on_error) if len(pixel_values) else ()
            readable = zip(scored, warnings, strict=True)
            for error in errors:
                if error is not None:
                    yield Answer(None, error=error)
                    continue
                row, found = next(readable)
                if isinstance(row, DefenseError):
                    yield Answer(None, found, row)
                else:
                    yield Answer(prediction_of(prompts.labels, row, top_k), found)

    def _scored(
        self, pixel_values: np.ndarray, text_embeds: np.ndarray, on_error: OnError
    ) -> Iterator[np.ndarray | NonFiniteError]:
        """Yield scores [n_labels] of each row, or the error of one that the model makes NaN or infinity of."""
        image_embeds = self._encode_image(pixel_values)
        is_finite = np.isfinite(image_embeds).all(1)
        scores = iter(self.scores(image_embeds[is_finite], text_embeds) if is_finite.any() else ())
        for is_sound in is_finite:
            if is_sound:
                yield next(scores)
                continue
            error = NonFiniteError("image_embeds")
            if on_error == "raise":
                raise error
            if on_error == "skip":
                log.warning("skipped a picture: %s", error)
            yield error

    def _stream(
        self,
        inputs: Iterable[Any],
        prompts: Prompts,
        on_error: OnError,
        top_k: int | None,
        batch_size: int | None = None,
    ) -> Iterator[Any]:
        return logged(self._checked_answers(inputs, prompts, on_error, top_k, batch_size), on_error)

    def __call__(
        self,
        images: Any = None,
        candidate_labels: Sequence[str] | None = None,
        *,
        image: Any = None,
        hypothesis_template: str | None = None,
        batch_size: int | None = None,
        on_error: OnError = "raise",
        top_k: int | None = None,
    ) -> Any:
        """Return predictions; called as Hugging Face's pipeline "zero-shot-image-classification" is.

        Args:
            images: One picture (path, bytes, file object, PIL image, HWC uint8 array); a list, an array or a pandas
                column of them; an iterator, or a data set whose rows are pictures or have them under "image".
            candidate_labels: What to classify into, for this call; by default what `set_labels` chose.
            image: The same as `images`, under the pipeline's name.
            hypothesis_template: A template with a literal {}, for this call; by default the one chosen before.
            batch_size: Pictures decoded and encoded at once, for this call.
            on_error: See `OnError`. A single picture always raises.
            top_k: Only the best so many labels.

        Returns:
            A `Prediction` for one picture, a list of them for what is in memory, an iterator of them for an iterator
            or a data set.

        Raises:
            ConfigError: `images` and `image` are both given, or neither; or an argument cannot work.
            NonFiniteError: The model makes NaN or infinity of a picture, and `on_error` is "raise".
        """
        if (images is None) == (image is None):
            raise ConfigError("give pictures once: as images, or under the pipeline's name image=")
        given = images if image is None else image
        if candidate_labels is None:
            prompts = self._chosen()
        else:
            before = self.prompts
            templates = "simple" if before is None else before.templates
            prompts = Prompts(labels.check_labels(candidate_labels), labels.resolve_templates(templates))
        if hypothesis_template is not None:
            prompts = replace(prompts, templates=labels.resolve_templates(hypothesis_template))
        if is_one_picture(given):
            (prediction,) = self._stream([given], prompts, "raise", top_k, batch_size)
            return prediction
        pictures = many(given)
        answers = self._stream(pictures, prompts, on_error, top_k, batch_size)
        return list(answers) if isinstance(pictures, list) else answers

    # --- in the shape of scikit-learn ---

    def transform(self, X: Iterable[Any]) -> np.ndarray:
        """Return image_embeds, float32 [n, d_embed], normalized.

        Raises:
            ConfigError: `X` is one picture, not several.
            InvalidImageError: A picture cannot be read.
            NonFiniteError: The model makes NaN or infinity of one.
        """
        if is_one_picture(X):
            raise ConfigError(f"X must be a list of pictures, not one: [{X!r:.80}]")
        parts = [self.encode_pixels(pixel_values) for _, pixel_values in self.chunks(many(X), "raise")]
        return np.concatenate(parts) if parts else self.encode_pixels(np.empty((0, 3, *self.preprocess.size), "f4"))

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

    def encode_pixels(self, pixel_values: Any) -> np.ndarray:
        """Return image_embeds, float32 [batch, d_embed], normalized, of pixel_values [batch, 3, height, width].

        Args:
            pixel_values: As `preprocess` makes them: an array or a tensor, floating point. There may be none.

        Raises:
            ShapeError: Another shape.
            ConfigError: Integers, as of pictures that are not prepared.
            NonFiniteError: A pixel is NaN, infinite or beyond float32, or the model makes one of that.
        """
        return self._embeds_of_pixels(pixel_values)

    def _embeds_of_pixels(self, pixel_values: Any, **how: Any) -> np.ndarray:
        """Do as `encode_pixels` says; `how` is handed on to `_encode_image`."""
        pixels = checked_pixels(pixel_values, self.preprocess.size)
        if len(pixels) == 0:  # a picture tells how wide an embedding is
            return self._encode_image(np.zeros((1, *pixels.shape[1:]), np.float32), **how)[:0]
        return finite(self._encode_image(pixels, **how), "image_embeds")
