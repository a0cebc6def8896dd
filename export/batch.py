"""One callable for every engine that hands out batches: Ray Data, HF datasets, Spark.

    ray_dataset.map_batches(BatchPredictor, fn_constructor_args=("bundle",), batch_format="numpy", concurrency=4)
    hf_dataset.map(BatchPredictor("bundle"), batched=True)
    spark_frame.mapInPandas(lambda frames: (pandas.DataFrame(predictor(f.to_dict("list"))) for f in frames), schema)

It is small until it is used: the session is built in the process that calls it, and never pickled.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from defense.errors import ConfigError, InvalidImageError
from defense.export.runtime import OnnxClassifier

__all__ = ["BatchPredictor"]


class BatchPredictor:
    """From a batch of pictures to labels, scores, embeddings and errors, row by row.

    Args:
        source: The bundle's folder, as the workers see it.
        candidate_labels: What to classify into; by default what is baked in.
        column: Where a batch holds its pictures: encoded bytes, paths, or uint8 arrays of shape (height, width, 3).
        options: For `OnnxClassifier`.
    """

    def __init__(
        self,
        source: str | os.PathLike[str],
        candidate_labels: Sequence[str] | None = None,
        *,
        column: str = "bytes",
        **options: Any,
    ) -> None:
        self.source = os.fspath(source)
        self.candidate_labels = None if candidate_labels is None else tuple(candidate_labels)
        self.column = column
        self.options = options
        self._clf: OnnxClassifier | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_clf": None}

    def classifier(self) -> OnnxClassifier:
        """Return the classifier of this process, built on first use."""
        if self._clf is None:
            self._clf = OnnxClassifier(self.source, **self.options)
            if self.candidate_labels is not None:
                self._clf.set_labels(self.candidate_labels)
        return self._clf

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return the batch without its pictures and with four columns more.

        A picture that cannot be read has the label "", a score and an embedding of NaN, and its error's code.

        Args:
            batch: Column -> one value per row.

        Returns:
            The other columns as they are; "label" [n], "score" float32 [n], "embedding" float32 [n, d_embed], "error"
            [n], "" where there is none.

        Raises:
            ConfigError: There is no such column.
        """
        if self.column not in batch:
            raise ConfigError(f"the batch has the columns {sorted(batch)}; the pictures should be in {self.column!r}")
        clf = self.classifier()
        n = len(batch[self.column])
        labels = np.full(n, "", dtype=object)
        errors = np.full(n, "", dtype=object)
        scores = np.full(n, np.nan, np.float32)
        embeds = np.full((n, clf.bundle.text_embeds.shape[1]), np.nan, np.float32)
        classes, text_embeds = clf.classes_, clf.text_embeds()
        start = 0
        for chunk_errors, pixel_values in clf.chunks(batch[self.column], "return"):
            rows = np.arange(start, start := start + len(chunk_errors))
            good = rows[[error is None for error in chunk_errors]]
            for row, error in zip(rows, chunk_errors, strict=True):
                if error is not None:
                    errors[row] = error.code if isinstance(error, InvalidImageError) else type(error).__name__
            if len(good):
                embeds[good] = clf.encode_pixels(pixel_values)
                chunk_scores = clf.scores(embeds[good], text_embeds)
                labels[good] = classes[chunk_scores.argmax(1)]
                scores[good] = chunk_scores.max(1)
        others = {name: values for name, values in batch.items() if name != self.column}
        return {**others, "label": labels, "score": scores, "embedding": embeds, "error": errors}
