"""A classifier as scikit-learn knows them: its scorers, `clone`, pipelines and cross-validation take one.

Nothing here needs scikit-learn to be installed.
"""

from __future__ import annotations

import copy
import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Self

import numpy as np

from defense.errors import ConfigError


class Estimator(ABC):
    """What scikit-learn asks of an estimator beyond `transform`, `predict` and `predict_proba`."""

    _estimator_type = "classifier"  # for scikit-learn before 1.6, which knows no tags

    @property
    @abstractmethod
    def classes_(self) -> np.ndarray:
        """The labels, in the order of `predict_proba`'s columns."""

    @abstractmethod
    def predict(self, X: Iterable[Any]) -> np.ndarray:
        """Return the best label of each picture, [n]."""

    @abstractmethod
    def _sort_labels(self, names: Sequence[str] | None) -> None:
        """Put the labels that are set in alphabetical order; set `names` where none are."""

    def fit(self, X: Iterable[Any], y: Iterable[Any] | None = None) -> Self:
        """Return self, with labels in alphabetical order, as scikit-learn's scores of probabilities take them to be.

        Nothing is learned from the pictures. Without labels that were set, those of `y` are, where they are strings.

        Args:
            X: Pictures; they are not read.
            y: The label of each.
        """
        names = None if y is None else {str(name) if isinstance(name, str) else None for name in y}
        self._sort_labels(None if not names or None in names else sorted(filter(None, names)))
        return self

    def score(self, X: Iterable[Any], y: Iterable[Any]) -> float:
        """Return the accuracy: the share of pictures whose best label is that of `y`.

        Raises:
            ConfigError: There is not one label for each picture, or there are no pictures.
        """
        predicted, wanted = list(self.predict(X)), list(y)
        if len(predicted) != len(wanted) or not wanted:
            raise ConfigError(f"{len(predicted)} pictures and {len(wanted)} labels; give one label for each picture")
        n_right = sum(bool(a == b) for a, b in zip(predicted, wanted, strict=True))
        return n_right / len(wanted)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments that this was made with, by name; `deep` changes nothing."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params: Any) -> Self:
        """Set `batch_size`, and return self.

        Raises:
            ConfigError: Any other argument, which would make another classifier; or `batch_size` is below 1.
        """
        for name, value in params.items():
            if name != "batch_size":
                raise ConfigError(f"{name} cannot be set on a {type(self).__name__} that is there; make another one")
            self.batch_size = value
        return self

    def __sklearn_clone__(self) -> Self:
        # The weights are frozen and may be large: both use the same model, and the same lock around it.
        twin = copy.copy(self)
        twin.__dict__.update(vars(self))
        return twin

    def __sklearn_tags__(self) -> Any:
        from sklearn.utils import ClassifierTags, InputTags, Tags, TargetTags, TransformerTags

        return Tags(
            estimator_type="classifier",
            target_tags=TargetTags(required=False),
            transformer_tags=TransformerTags(preserves_dtype=[]),
            classifier_tags=ClassifierTags(),
            input_tags=InputTags(one_d_array=True, two_d_array=False, string=True),
            requires_fit=False,
        )
