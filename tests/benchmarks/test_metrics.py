"""Figures of the benchmarks: hand-made answers, textbook values, and intervals that mean what they say."""

from __future__ import annotations

import sys
from dataclasses import replace
from math import comb, erfc

import numpy as np
import pytest

pytest.importorskip("scipy")

from defense.benchmarks import metrics
from defense.errors import ConfigError, MissingDependencyError, ShapeError


def answers(label, prediction, word=None, group=None) -> metrics.Answers:
    label, prediction = np.array(label), np.array(prediction)
    none = np.full(len(label), -1)
    word = none if word is None else np.array(word)
    margin = np.where(word >= 0, np.where(prediction == label, 1.5, -0.5), 0.0)
    group = none if group is None else np.array(group)
    return metrics.Answers(label, prediction, prediction == label, word, margin, group)


# --- from logits to answers -------------------------------------------------------------------------------------------


def test_the_largest_logit_is_the_answer():
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 4.0, 0.0]], np.float32)
    found = metrics.answers_of(logits, np.array([2, 0]), np.array([1, -1]), np.array([-1, -1]))
    assert found.prediction.tolist() == [1, 0]
    assert found.is_correct.tolist() == [False, True]
    assert found.margin.tolist() == [-1, 0]


def test_a_pair_is_decided_between_label_and_word_and_a_tie_is_lost():
    logits = np.array([[9.0, 2.0, 1.0], [9.0, 1.0, 1.0], [9.0, 1.0, 2.0]])
    label, word = np.array([1, 1, 1]), np.array([2, 2, 2])
    found = metrics.answers_of(logits, label, word, np.full(3, -1), is_pair=True)
    assert found.prediction.tolist() == [1, 2, 2]
    assert found.margin.tolist() == [1, 0, -1]


def test_the_right_answer_is_among_the_five_best():
    logits = np.tile(np.arange(7.0, 0, -1), (7, 1))
    found = metrics.answers_of(logits, np.arange(7), np.full(7, -1), np.full(7, -1))
    assert found.in_top5.tolist() == [True] * 5 + [False] * 2


def test_parts_join_in_order():
    whole = answers([0, 1, 2], [0, 0, 2])
    parts = [answers([0], [0]), answers([1, 2], [0, 2])]
    for name, column in vars(metrics.joined(parts)).items():
        np.testing.assert_array_equal(column, vars(whole)[name])


def test_no_answers_are_refused():
    with pytest.raises(ConfigError, match="nothing to measure"):
        metrics.joined([])
    with pytest.raises(ConfigError, match="nothing to measure"):
        answers([], [])


def test_columns_of_different_length_are_refused():
    with pytest.raises(ShapeError, match="want the same"):
        replace(answers([0, 1], [0, 1]), margin=np.zeros(3))


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_an_attack():
    found = metrics.figures(answers([0, 0, 0, 0, 0], [0, 1, 2, 0, 1], word=[1, 1, 1, 1, -1]), seed=0)
    assert {name: (figure.value, figure.n) for name, figure in found.items()} == {
        "accuracy": (0.4, 5),
        "attack_success": (0.25, 4),  # the fifth has no word to succeed with
        "object_over_word": (0.5, 4),
        "margin": (0.5, 4),
    }


def test_figures_of_groups():
    correct = {0: (10, 9), 1: (10, 7), 2: (5, 2), 3: (5, 4)}
    label, prediction, group = [], [], []
    for index, (n, n_right) in correct.items():
        label += [index // 2] * n
        prediction += [index // 2] * n_right + [1 - index // 2] * (n - n_right)
        group += [index] * n
    found = metrics.figures(answers(label, prediction, group=group), seed=0, train_counts=(3498, 184, 56, 1057))
    assert found["worst_group"].value == pytest.approx(0.4)
    assert found["accuracy"].value == pytest.approx(22 / 30)
    assert found["gap"].value == pytest.approx(22 / 30 - 0.4)
    weighted = (3498 * 0.9 + 184 * 0.7 + 56 * 0.4 + 1057 * 0.8) / 4795
    assert found["accuracy_adjusted"].value == pytest.approx(weighted)
    assert metrics.group_accuracies(answers(label, prediction, group=group)) == {
        index: (n, n_right / n) for index, (n, n_right) in correct.items()
    }


def test_without_train_counts_there_is_no_adjusted_average():
    data = answers([0, 0, 1, 1], [0, 1, 1, 1], group=[0, 1, 2, 3])
    assert "accuracy_adjusted" not in metrics.figures(data, seed=0)
    with pytest.raises(ConfigError, match="4 groups were tested, 2 were trained on"):
        metrics.figures(data, seed=0, train_counts=(1, 2))


def test_accuracy_per_class_leaves_out_classes_that_are_not_shown():
    assert metrics.per_class(answers([0, 0, 3], [0, 1, 3])) == {0: (2, 0.5), 3: (1, 1.0)}


# --- intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "half_width"), [(110, 9.2), (180, 7.2), (1000, 3.0), (1162, 2.8)])
def test_half_widths_at_60_percent(n, half_width):
    """The half-widths of the normal approximation, in points."""
    figure = metrics.mean_figure(np.arange(n) < 0.6 * n, seed=0)
    assert 100 * (figure.high - figure.low) / 2 == pytest.approx(half_width, abs=0.45)


def test_intervals_hold_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(300):
        figure = metrics.mean_figure(rng.random(120) < 0.7, seed=trial)
        hits += figure.low <= 0.7 <= figure.high
    assert 0.90 <= hits / 300 <= 0.99


def test_intervals_follow_from_the_seed():
    values = np.random.default_rng(0).normal(size=500)
    first = metrics.mean_figure(values, seed=3)
    assert metrics.mean_figure(values, seed=3) == first
    assert metrics.mean_figure(values, seed=4) != first


def test_chunks_of_resamples_do_not_change_what_an_interval_means(monkeypatch):
    values = np.random.default_rng(0).random(400) < 0.5
    whole = metrics.mean_figure(values, seed=0)
    monkeypatch.setattr(metrics, "_CHUNK", 1000)
    parts = metrics.mean_figure(values, seed=0)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), abs=0.005)


@pytest.mark.parametrize("n", [1, 12, 1000])
def test_a_share_of_0_or_1_is_not_certain(n):
    """Wilson's bound for 0 of n is z2 / (n + z2)."""
    nothing, everything = metrics.mean_figure(np.zeros(n, bool), seed=0), metrics.mean_figure(np.ones(n, bool), seed=0)
    assert nothing.low == 0
    assert nothing.high == pytest.approx(3.8415 / (n + 3.8415), abs=1e-4)
    assert (everything.low, everything.high) == (pytest.approx(1 - nothing.high), 1)


def test_wilson_interval_equals_the_textbook():
    # Newcombe 1998, table I: 81 of 263.
    low, high = metrics.wilson(100 * 81 / 263, 263)
    assert low == pytest.approx(25.53, abs=0.01)
    assert high == pytest.approx(36.62, abs=0.01)


@pytest.mark.parametrize(
    ("percent", "n", "low", "high"),
    [
        (0.0, 12, 0.0, 24.249401),
        (100.0, 1, 20.654931, 100.0),
        (0.35, 2000, 0.169643, 0.720720),
        (23.15, 2000, 21.353981, 25.048964),
        (99.4, 2000, 98.954155, 99.656441),
        (50.0, 40, 35.199527, 64.800473),
    ],
)
def test_wilson_interval_equals_the_closed_form(percent, n, low, high):
    """(p + z2 / 2n +- z sqrt(p (1 - p) / n + z2 / 4n2)) / (1 + z2 / n), with z = 1.959964."""
    assert metrics.wilson(percent, n) == pytest.approx((low, high), abs=2e-6)


def test_wilson_interval_of_a_mean_of_draws_is_that_of_the_nearest_whole_picture():
    assert metrics.wilson(90 + 1 / 3, 2000) == metrics.wilson(100 * 1807 / 2000, 2000)


def test_groups_are_resampled_each_by_itself():
    """A tiny group cannot drop out of a resample, and its uncertainty is that of its own n."""
    label = np.array([0] * 1000 + [1] * 4)
    prediction = np.array([0] * 1000 + [1, 1, 0, 0])
    group = np.array([0] * 500 + [1] * 500 + [2, 3, 2, 3])
    found = metrics.figures(answers(label, prediction, group=group), seed=0)
    assert found["worst_group"].value == 0.5
    assert (found["worst_group"].low, found["worst_group"].high) == (0, 1)


def group_figures(n_right: dict[int, tuple[int, int]], **counts):
    """Figures of groups, each with (n, how many are right)."""
    group = [index for index, (n, _) in n_right.items() for _ in range(n)]
    is_right = [i < right for n, right in n_right.values() for i in range(n)]
    label = [index // 2 for index in group]
    prediction = [each if right else 1 - each for each, right in zip(label, is_right, strict=True)]
    return metrics.figures(answers(label, prediction, group=group), seed=0, **counts)


def test_groups_that_are_all_right_are_not_certain():
    """Wilson's bound for n of n is n / (n + z2); the group of which that is least may be the worst."""
    found = group_figures({0: (10, 10), 1: (50, 50), 2: (20, 20), 3: (20, 20)}, train_counts=(1, 7, 1, 1))
    doubt = {n: 3.8415 / (n + 3.8415) for n in (10, 20, 50)}
    worst, gap, adjusted = (found[name] for name in ("worst_group", "gap", "accuracy_adjusted"))
    assert (worst.value, worst.low, worst.high) == (1, pytest.approx(1 - doubt[10], abs=1e-4), 1)
    assert (gap.value, gap.low, gap.high) == (0, 0, pytest.approx(0.9 * doubt[10], abs=1e-4))
    assert (adjusted.value, adjusted.high) == pytest.approx((1, 1))
    assert adjusted.low == pytest.approx(1 - 0.7 * doubt[50], abs=1e-4)


def test_a_worst_group_that_is_all_wrong_is_not_certain():
    found = group_figures({0: (400, 200), 1: (400, 200), 2: (30, 0), 3: (400, 200)})["worst_group"]
    assert (found.value, found.low, found.high) == (0, 0, pytest.approx(3.8415 / 33.8415, abs=1e-4))


def test_a_lonely_group_has_no_gap():
    found = group_figures({0: (10, 10)})["gap"]
    assert (found.value, found.low, found.high) == (0, 0, 0)


# --- one against another ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n_better", "n_worse", "p"),
    [(10, 2, 0.03857421875), (0, 0, 1.0), (1, 0, 1.0), (6, 0, 0.03125), (5, 5, 1.0), (8, 2, 0.109375)],
)
def test_mcnemar_is_the_sign_test(n_better, n_worse, p):
    assert metrics.mcnemar(n_better, n_worse) == pytest.approx(p)
    assert metrics.mcnemar(n_worse, n_better) == pytest.approx(p)


def test_mcnemar_is_twice_a_tail_of_the_binomial():
    for n_better, n_worse in ((30, 13), (8, 77), (200, 901)):
        n, least = n_better + n_worse, min(n_better, n_worse)
        tail = sum(comb(n, i) for i in range(least + 1))
        assert metrics.mcnemar(n_better, n_worse) == pytest.approx(2 * tail / 2**n, rel=1e-9)


def test_without_scipy_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    assert metrics.mean_figure(np.array([True, False]), seed=0).value == 0.5
    assert metrics.mean_figure(np.array([True, True]), seed=0).low < 1
    with pytest.raises(MissingDependencyError, match=r"scipy is not installed; run: pip install .*\[bench\]"):
        metrics.mcnemar(1, 2)


def test_mcnemar_holds_for_large_counts():
    """Against the normal approximation with continuity correction: z = (|b - c| - 1) / sqrt(b + c)."""
    z = (abs(10_300 - 9_900) - 1) / np.sqrt(20_200)
    assert metrics.mcnemar(10_300, 9_900) == pytest.approx(erfc(z / 2**0.5), rel=1e-3)
    assert metrics.mcnemar(20_000, 0) == 0


def test_a_comparison_is_paired_and_antisymmetric():
    a = answers([0] * 10, [0] * 7 + [1] * 3)
    b = answers([0] * 10, [0] * 4 + [1] * 6)
    found, back = metrics.versus(a, b, seed=0), metrics.versus(b, a, seed=0)
    assert (found["n_better"], found["n_worse"]) == (3, 0)
    assert (back["n_better"], back["n_worse"]) == (0, 3)
    assert found["difference"]["value"] == pytest.approx(0.3)
    assert back["difference"]["value"] == pytest.approx(-0.3)
    assert found["p"] == back["p"] == pytest.approx(0.25)


def test_pairing_sees_what_two_accuracies_hide():
    a, b = answers([0, 0, 0, 0], [0, 0, 1, 1]), answers([0, 0, 0, 0], [1, 1, 0, 0])
    found = metrics.versus(a, b, seed=0)
    assert found["difference"]["value"] == 0
    assert (found["n_better"], found["n_worse"]) == (2, 2)
    assert found["difference"]["high"] > 0.5
    assert found["same"]["value"] == 0


def test_answers_count_as_the_same_also_where_both_are_wrong():
    a, b = answers([0, 0, 1, 1], [0, 2, 2, 1]), answers([0, 0, 1, 1], [0, 2, 1, 2])
    same = metrics.versus(a, b, seed=0)["same"]
    assert (same["value"], same["n"]) == (0.5, 4)
    assert metrics.changed_per_class(a, b) == {1: (2, 1.0)}
    assert metrics.changed_per_class(a, a) == {}


def test_answers_to_other_pictures_are_not_compared():
    with pytest.raises(ConfigError, match="same pictures"):
        metrics.versus(answers([0, 1], [0, 1]), answers([1, 0], [0, 1]), seed=0)
