"""How right a method was, how sure that is, and whether another one was better.

All of it is computed from `Answers`, one entry per picture. Shares lie in 0 to 1. Every figure comes with its n and
a 95 % bootstrap interval over pictures (within groups, for the figures of groups), from a seed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from defense.core import intervals
from defense.errors import ConfigError, MissingDependencyError, ShapeError

N_RESAMPLES = 2000
_INTERVAL = (2.5, 97.5)
_CHUNK = 2_000_000


@dataclass(frozen=True)
class Figure:
    """A number with its interval.

    Attributes:
        value: The number.
        low: Lower end of the 95 % interval.
        high: Upper end.
        n: Number of pictures it was computed from.
    """

    value: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class Answers:
    """What a method answered, picture by picture.

    Attributes:
        label: The right answer, int [n].
        prediction: The given one, int [n].
        in_top5: Whether the right answer is among the five best, bool [n].
        word: The written name, int [n]; -1 where there is none.
        margin: Logit of the label less that of the word, float [n]; 0 where there is no word.
        group: 2 label + attribute, int [n]; -1 where there is none.
    """

    label: np.ndarray
    prediction: np.ndarray
    in_top5: np.ndarray
    word: np.ndarray
    margin: np.ndarray
    group: np.ndarray

    def __post_init__(self) -> None:
        shapes = {name: column.shape for name, column in vars(self).items()}
        if len(set(shapes.values())) != 1 or self.label.ndim != 1:
            raise ShapeError(f"answers have columns of shapes {shapes}; want the same [n] for all")
        if not len(self.label):
            raise ConfigError("no picture could be read, so there is nothing to measure")

    @property
    def is_correct(self) -> np.ndarray:
        """Whether each answer is right, bool [n]."""
        return self.prediction == self.label


def object_wins(to_object: np.ndarray, to_word: np.ndarray) -> np.ndarray:
    """Return where the object beats the word, bool [n]; a tie is lost (SCAM's rule)."""
    return to_object > to_word


def answers_of(
    logits: np.ndarray, label: np.ndarray, word: np.ndarray, group: np.ndarray, *, is_pair: bool = False
) -> Answers:
    """Return the answers that logits give: the label with the largest, or the larger of label and word.

    Args:
        logits: float [n, n_classes].
        label: See `Answers`.
        word: See `Answers`.
        group: See `Answers`.
        is_pair: Choose between label and word only, not among all classes.
    """
    rows = np.arange(len(logits))
    to_object = logits[rows, label]
    has_word = word >= 0
    to_word = np.where(has_word, logits[rows, word], to_object)
    if is_pair:
        prediction = np.where(object_wins(to_object, to_word), label, word)
        in_top5 = np.ones(len(logits), bool)
    else:
        prediction = logits.argmax(1)
        in_top5 = (logits > to_object[:, None]).sum(1) < 5
    return Answers(label, prediction, in_top5, word, to_object - to_word, group)


def joined(parts: Sequence[Answers]) -> Answers:
    """Return the answers of several parts as one.

    Raises:
        ConfigError: There are none.
    """
    if not parts:
        raise ConfigError("no picture could be read, so there is nothing to measure")
    return Answers(**{name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])})


# --- figures with intervals -------------------------------------------------------------------------------------------


def bootstrap(
    strata: Sequence[np.ndarray], combine: Callable[[np.ndarray], np.ndarray], *, seed: int
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic that is computed from means.

    Args:
        strata: Values, float or bool [n_i]; each stratum is resampled by itself.
        combine: From means [n_resamples, n_strata] to the statistic [n_resamples].
        seed: Of the resampling.
    """
    rng = np.random.default_rng(seed)
    means = np.empty((N_RESAMPLES, len(strata)))
    for column, values in enumerate(strata):
        step = max(1, _CHUNK // len(values))  # bounds the memory for the indices
        for first in range(0, N_RESAMPLES, step):
            n = min(step, N_RESAMPLES - first)
            means[first : first + n, column] = values[rng.integers(len(values), size=(n, len(values)))].mean(1)
    low, high = np.percentile(combine(means), _INTERVAL)
    return float(low), float(high)


def mean_figure(values: np.ndarray, *, seed: int) -> Figure:
    """Return the mean of values, float or bool [n]; of bools, a share in 0 to 1.

    Where all bools are equal, resampling shows no spread, and the far end is that of Wilson's interval.
    """
    low, high = bootstrap([values], lambda means: means[:, 0], seed=seed)
    if values.dtype == bool:
        low, high = min(low, _far_end(values)), max(high, _far_end(values))
    return Figure(float(values.mean()), low, high, len(values))


def _far_end(values: np.ndarray) -> float:
    """Return the end of Wilson's interval away from a share, bool [n], of 0 or 1; any other share as it is."""
    n, share = len(values), float(values.mean())
    if share == 0:
        return wilson(0, n)[1] / 100
    return wilson(100, n)[0] / 100 if share == 1 else share


def wilson(percent: float, n: int) -> tuple[float, float]:
    """Return the 95 % interval of a share of n pictures, in percent; see `core.intervals.wilson`.

    Args:
        percent: The share, 0 to 100; rounded to whole pictures, as the mean of several draws need not be one.
        n: Pictures, at least 1.
    """
    _, low, high = intervals.wilson(round(percent / 100 * n), n)
    return 100 * low, 100 * high


def _binomial(k: int, n: int) -> Any:
    """Return scipy's result of testing k of n against a share of one half."""
    try:
        from scipy.stats import binomtest
    except ImportError as error:
        raise MissingDependencyError("scipy", "bench") from error
    return binomtest(k, n)


def figures(answers: Answers, *, seed: int, train_counts: Sequence[int] = ()) -> dict[str, Figure]:
    """Return the figures that apply: by name. Where resampling shows no spread, see `mean_figure`.

    | name | what | where |
    |---|---|---|
    | accuracy | share of right answers: the test average | always |
    | attack_success | share of pictures answered with the written word | words |
    | object_over_word | share of pictures where the object's logit beats the word's | words |
    | margin | mean of that difference, in logits | words |
    | worst_group | the lowest accuracy of a group | groups |
    | gap | accuracy less worst_group | groups |
    | accuracy_adjusted | group accuracies weighted by `train_counts` | groups, with counts |

    Args:
        answers: Of one method on one data set.
        seed: Of the intervals.
        train_counts: Pictures per group in the training split.
    """
    found = {"accuracy": mean_figure(answers.is_correct, seed=seed)}
    if (has_word := answers.word >= 0).any():
        margin = answers.margin[has_word]
        found["attack_success"] = mean_figure((answers.prediction == answers.word)[has_word], seed=seed)
        found["object_over_word"] = mean_figure(margin > 0, seed=seed)
        found["margin"] = mean_figure(margin, seed=seed)
    if (answers.group >= 0).all():
        found |= _group_figures(answers, seed, np.asarray(train_counts, float))
    return found


def group_accuracies(answers: Answers) -> dict[int, tuple[int, float]]:
    """Return group -> (n, accuracy)."""
    found = {}
    for group in np.unique(answers.group).tolist():
        members = answers.is_correct[answers.group == group]
        found[group] = (len(members), float(members.mean()))
    return found


def _group_figures(answers: Answers, seed: int, train_counts: np.ndarray) -> dict[str, Figure]:
    strata = [answers.is_correct[answers.group == group] for group in np.unique(answers.group)]
    shares = np.array([len(values) for values in strata]) / len(answers.label)
    means = np.array([values.mean() for values in strata])
    # Row i: group i at the far end of Wilson's interval, the others as they are.
    in_doubt = np.where(np.eye(len(strata), dtype=bool), [_far_end(values) for values in strata], means)

    def figure(combine: Callable[[np.ndarray], np.ndarray]) -> Figure:
        low, high = bootstrap(strata, combine, seed=seed)
        if math.isclose(low, high, abs_tol=1e-12):  # every group that decides is all right or all wrong
            ends = combine(in_doubt)
            low, high = min(low, float(ends.min())), max(high, float(ends.max()))
        return Figure(float(combine(means[None])[0]), low, high, n=len(answers.label))

    found = {
        "worst_group": figure(lambda means: means.min(1)),
        "gap": figure(lambda means: means @ shares - means.min(1)),
    }
    if len(train_counts):
        if len(train_counts) != len(strata):
            raise ConfigError(f"{len(strata)} groups were tested, {len(train_counts)} were trained on; want the same")
        found["accuracy_adjusted"] = figure(lambda means: means @ (train_counts / train_counts.sum()))
    return found


def per_class(answers: Answers) -> dict[int, tuple[int, float]]:
    """Return class -> (n, accuracy), for the classes that are shown."""
    found = {}
    for label in np.unique(answers.label).tolist():
        members = answers.is_correct[answers.label == label]
        found[label] = (len(members), float(members.mean()))
    return found


def per_kind(answers: Answers, kinds: Sequence[str | None]) -> dict[str, tuple[int, float]]:
    """Return kind -> (n, accuracy), for the pictures that are of a kind; `kinds` has one entry per answer."""
    found = {}
    for kind in sorted({kind for kind in kinds if kind is not None}):
        members = answers.is_correct[[each == kind for each in kinds]]
        found[kind] = (len(members), float(members.mean()))
    return found


# --- one method against another ---------------------------------------------------------------------------------------


def mcnemar(n_better: int, n_worse: int) -> float:
    """Return the two-sided p of the exact McNemar test: are two methods equally often right?

    Args:
        n_better: Pictures that only the one method answers rightly.
        n_worse: Pictures that only the other does.

    Raises:
        MissingDependencyError: scipy is not installed.

    Source: McNemar 1947; the exact form is a sign test on the pictures where the two differ.
    """
    return _binomial(n_better, n_better + n_worse).pvalue if n_better + n_worse else 1.0


def versus(answers: Answers, other: Answers, *, seed: int) -> dict[str, Any]:
    """Compare two methods on the same pictures.

    Returns:
        `difference` of the accuracies and the share of answers that are the `same`, right or wrong (`Figure`s as JSON
        values), `n_better` and `n_worse` pictures that only this or only the other answers rightly, and `p` of
        McNemar's exact test.

    Raises:
        ConfigError: The pictures differ.
    """
    if not np.array_equal(answers.label, other.label):
        raise ConfigError("the two methods did not answer the same pictures, so they cannot be compared")
    change = answers.is_correct.astype(float) - other.is_correct
    n_better, n_worse = int((change > 0).sum()), int((change < 0).sum())
    return {
        "difference": mean_figure(change, seed=seed).to_dict(),
        "same": mean_figure(answers.prediction == other.prediction, seed=seed).to_dict(),
        "n_better": n_better,
        "n_worse": n_worse,
        "p": mcnemar(n_better, n_worse),
    }


def changed_per_class(answers: Answers, other: Answers) -> dict[int, tuple[int, float]]:
    """Return class -> (n, share of answers that differ from another method's), for classes where any does."""
    found = {}
    for label in np.unique(answers.label[answers.prediction != other.prediction]).tolist():
        is_shown = answers.label == label
        found[label] = (int(is_shown.sum()), float((answers.prediction != other.prediction)[is_shown].mean()))
    return found
