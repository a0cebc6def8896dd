"""One callable for every engine that hands out batches: Ray Data, HF datasets, Spark.

    ray_dataset.map_batches(BatchPredictor, fn_constructor_args=("bundle",), batch_format="numpy", concurrency=4)
    hf_dataset.map(BatchPredictor("bundle"), batched=True)
    spark_frame.mapInPandas(lambda frames: (pandas.DataFrame(predictor(f.to_dict("list"))) for f in frames), schema)

It is small until it is used: the session is built in the process that calls it, and never pickled.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from defense.data.cells import picture_in
from defense.data.notes import NoteLog
from defense.data.shards import check_single
from defense.errors import ConfigError, InvalidImageError
from defense.export.runtime import OnnxClassifier
from defense.export.serving.watch import removed_energy

__all__ = ["BatchPredictor"]

ANSWERS = ("label", "score", "embedding", "error")
"""The columns of an answer, without prefix."""
WATCHED = ("plain_label", "removed_energy")
"""Those that say what the defense did; they come before the error."""


class BatchPredictor:
    """From a batch of pictures to labels, scores, embeddings and errors, row by row.

    Args:
        source: The bundle's folder, as the workers see it.
        candidate_labels: What to classify into; by default what is baked in.
        column: Where a batch holds its pictures: encoded bytes, paths, uint8 arrays of shape (height, width, 3), PIL
            images, or mappings of "bytes" and "path" as HF datasets store a picture.
        prefix: Stands before the names of the answer's columns, for batches that have columns of these names.
        watch: Ask about each picture again without the defense, and add what the defense did to its answer.
        options: For `OnnxClassifier`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        candidate_labels: Sequence[str] | None = None,
        *,
        column: str = "bytes",
        prefix: str = "",
        watch: bool = False,
        **options: Any,
    ) -> None:
        self.source = os.fspath(source)
        self.candidate_labels = None if candidate_labels is None else tuple(candidate_labels)
        self.column = column
        self.prefix = prefix
        self.watch = watch
        self.options = options
        self._clf: OnnxClassifier | None = None
        self._notes = NoteLog()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_clf", "_notes")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _clf=None, _notes=NoteLog())

    def classifier(self) -> OnnxClassifier:
        """Return the classifier of this process, built on first use."""
        if self._clf is None:
            self._clf = OnnxClassifier(self.source, **self.options)
            if self.candidate_labels is not None:
                self._clf.set_labels(self.candidate_labels)
        return self._clf

    def answer_columns(self) -> tuple[str, ...]:
        """Return the names of the columns of an answer in their order, of which the last is that of the errors."""
        watched = WATCHED if self.watch else ()
        return tuple(self.prefix + name for name in (*ANSWERS[:-1], *watched, ANSWERS[-1]))

    def check_columns(self, names: Iterable[str]) -> None:
        """Check the columns of a batch.

        Raises:
            ConfigError: The one with the pictures is missing or there twice, or the answer would replace one.
        """
        names = list(names)
        if self.column not in names:
            raise ConfigError(f"the batch has the columns {sorted(names)}; the pictures should be in {self.column!r}")
        check_single(names, self.column)
        lost = sorted(set(self.answer_columns()).intersection(names) - {self.column})
        if lost:
            raise ConfigError(
                f"the answer would replace the columns {', '.join(lost)} of the batch; pass a prefix for its own, e.g. "
                "prefix='clip_' (--prefix clip_), or rename those"
            )

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch without its pictures and with four columns more, or six with `watch`.

        A picture that cannot be read has the label "", a score and an embedding of NaN, and its error's code. Warnings
        about pictures are logged, each kind once.

        Args:
            batch: Column -> one value per row.

        Returns:
            The other columns as they are; "label" [n], "score" float32 [n], "embedding" float32 [n, d_embed], "error"
            [n], "" where there is none; each name with the prefix before it. With `watch` also "plain_label" [n], the
            answer without the defense, and "removed_energy" float32 [n], 0 to 4 (see `watch.removed_energy`).

        Raises:
            ConfigError: See `check_columns`; or to be watched, and the graph has no strength.
        """
        self.check_columns(batch)
        clf = self.classifier()
        n = len(batch[self.column])
        labels = np.full(n, "", dtype=object)
        errors = np.full(n, "", dtype=object)
        scores = np.full(n, np.nan, np.float32)
        embeds = np.full((n, clf.bundle.text_embeds.shape[1]), np.nan, np.float32)
        plain = clf.with_strength(0) if self.watch else None
        plain_labels, energy = labels.copy(), scores.copy()
        classes, text_embeds = clf.classes_, clf.text_embeds()
        start = 0
        for chunk in clf.prepared_chunks(map(picture_in, batch[self.column]), "return"):
            rows = np.arange(start, start := start + len(chunk.errors))
            good = rows[[error is None for error in chunk.errors]]
            for row, error in zip(rows, chunk.errors, strict=True):
                if error is not None:
                    errors[row] = error.code if isinstance(error, InvalidImageError) else type(error).__name__
            for row, notes in zip(good, chunk.warnings, strict=True):
                self._notes.add(f"row {row} of a batch", notes)
            if len(good):
                embeds[good] = clf.encode_pixels(chunk.pixel_values)
                chunk_scores = clf.scores(embeds[good], text_embeds)
                labels[good] = classes[chunk_scores.argmax(1)]
                scores[good] = chunk_scores.max(1)
                if plain is not None:
                    undefended = plain.encode_pixels(chunk.pixel_values)
                    plain_labels[good] = classes[(undefended @ text_embeds.T).argmax(1)]
                    energy[good] = removed_energy(undefended, embeds[good])
        others = {name: values for name, values in batch.items() if name != self.column}
        watched = (plain_labels, energy) if self.watch else ()
        columns = (labels, scores, embeds, *watched, errors)
        return {**others, **dict(zip(self.answer_columns(), columns, strict=True))}
