"""What makes a graph's answers pass: every gate by itself, without a graph."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from defense.export import verify
from defense.export.verify import BATCHES, N_ROWS, Batch, Expected, Parity, ParityError, Tolerance

Answers = dict[str, np.ndarray]

STRICT = Tolerance(atol=1e-5, cosine=0.99999, agreement=1.0)
LOOSE = Tolerance(atol=10.0, cosine=-10.0, agreement=0.0)
"""Refuses nothing that is finite: what a gate refuses, it refuses alone."""


@pytest.fixture
def expected() -> Expected:
    """Normalized embeddings of `N_ROWS` rows, and logits of three labels that are far from a tie."""
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(N_ROWS, 8)).astype(np.float32)
    logits = np.eye(3, dtype=np.float32)[np.arange(N_ROWS) % 3] * 10
    return Expected(
        inputs={"pixel_values": np.zeros((N_ROWS, 3, 4, 4), np.float32)},
        input_axes={"pixel_values": ["batch", 3, 4, 4]},
        outputs={"image_embeds": embeds / np.linalg.norm(embeds, axis=1, keepdims=True), "logits_per_image": logits},
        output_axes={"image_embeds": ["batch", 8], "logits_per_image": ["batch", "n_labels"]},
        logits="logits_per_image",
    )


def answers_of(expected: Expected) -> Answers:
    """The answers of a graph that does just what is expected."""
    return {
        f"{name}.{start}.{stop}": rows[start:stop].copy()
        for name, rows in expected.outputs.items()
        for start, stop in verify.batches(expected.n_rows)
    }


def test_a_graph_that_does_what_is_expected_passes(expected):
    parity = verify._compare_values(answers_of(expected), expected, STRICT)
    assert parity == Parity(N_ROWS, BATCHES, 0.0, pytest.approx(1.0), 1.0, 0.0)


def shorter(answers: Answers) -> None:
    answers["image_embeds.1.3"] = answers["image_embeds.1.3"][:, :7]


def not_a_number(answers: Answers) -> None:
    answers["image_embeds.8.40"][3, 2] = np.nan


def infinite(answers: Answers) -> None:
    answers["logits_per_image.0.1"][0, 1] = np.inf


def not_a_number_alone(answers: Answers) -> None:
    answers["image_embeds.5.6"][0, 2] = np.nan


def off_in_one_entry(answers: Answers) -> None:
    answers["image_embeds.8.40"][31, 7] += 0.001


def shrunk(answers: Answers) -> None:
    answers["image_embeds.3.8"][2] *= 0.99


def flipped(answers: Answers) -> None:
    for row in (0, 4):
        answers["logits_per_image.8.40"][row] = -answers["logits_per_image.8.40"][row]


def other_alone(answers: Answers) -> None:
    answers["image_embeds.5.6"] += 0.001


@pytest.mark.parametrize(
    ("damage", "tolerance", "failure"),
    [
        (shorter, LOOSE, "image_embeds is [2, 7] at batch 2, want [2, 8]"),
        (not_a_number, LOOSE, "image_embeds holds NaN or infinity at batch 32"),
        (infinite, LOOSE, "logits_per_image holds NaN or infinity at batch 1"),
        (not_a_number_alone, LOOSE, "image_embeds holds NaN or infinity at batch 1"),
        (off_in_one_entry, replace(LOOSE, atol=0.0005), "image_embeds differs by 0.001, allowed are 0.0005"),
        (shrunk, replace(LOOSE, cosine=0.995), "image_embeds has a cosine of 0.990000 with torch's, want 0.995"),
        (flipped, replace(LOOSE, agreement=0.96), "2 of 40 rows get another label; 96.0% must be the same"),
        (other_alone, replace(LOOSE, atol=0.0005), "a row alone and in a batch differ by 0.001, allowed are 0.0005"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_each_gate_refuses_by_itself(expected, damage: Callable[[Answers], None], tolerance, failure):
    answers = answers_of(expected)
    damage(answers)
    with pytest.raises(ParityError) as caught:
        verify._compare_values(answers, expected, tolerance)
    assert caught.value.failures == (failure,)
    assert caught.value.output == "image_embeds"
    again = pickle.loads(pickle.dumps(caught.value))
    assert (str(again), again.failures) == (str(caught.value), caught.value.failures)


@pytest.mark.parametrize("damage", [off_in_one_entry, shrunk, flipped, other_alone], ids=lambda each: each.__name__)
def test_what_is_allowed_passes(expected, damage: Callable[[Answers], None]):
    answers = answers_of(expected)
    damage(answers)
    verify._compare_values(answers, expected, Tolerance(atol=0.02, cosine=0.98, agreement=0.95))


def test_all_failures_are_told_at_once_and_the_largest_difference(expected):
    answers = answers_of(expected)
    for damage in (off_in_one_entry, shrunk, flipped, other_alone):
        damage(answers)
    with pytest.raises(ParityError) as caught:
        verify._compare_values(answers, expected, STRICT)
    assert len(caught.value.failures) == 4
    want = max(0.001, 0.01 * float(np.abs(expected.outputs["image_embeds"][5]).max()))
    assert caught.value.max_abs_diff == pytest.approx(want, rel=0.01)


@pytest.fixture
def with_more(expected) -> Expected:
    """The same with a batch of none, and one at strength 0."""
    empty = {name: rows[:0] for name, rows in expected.outputs.items()}
    plain = {name: -rows[:4] for name, rows in expected.outputs.items()}
    return replace(expected, further={"empty": Batch({}, empty), "plain": Batch({}, plain)})


def more_answers_of(expected: Expected) -> Answers:
    further = {
        f"{name}.{kind}": rows.copy()
        for kind, batch in expected.further.items()
        for name, rows in batch.outputs.items()
    }
    return answers_of(expected) | further


def test_further_batches_that_are_right_pass_and_tell_how_near_strength_0_is(with_more):
    answers = more_answers_of(with_more)
    assert verify._compare_values(answers, with_more, STRICT).plain_diff == 0.0
    answers["image_embeds.plain"][3, 2] += 5e-6
    assert verify._compare_values(answers, with_more, STRICT).plain_diff == pytest.approx(5e-6, rel=0.1)


def plain_is_off(answers: Answers) -> None:
    answers["image_embeds.plain"][0, 3] += 0.001


def empty_is_not(answers: Answers) -> None:
    answers["image_embeds.empty"] = np.zeros((1, 8), np.float32)


def plain_is_no_number(answers: Answers) -> None:
    answers["logits_per_image.plain"][0, 0] = np.nan


@pytest.mark.parametrize(
    ("damage", "failure"),
    [
        (plain_is_off, "image_embeds differs by 0.001 at the plain batch, allowed are 1e-05"),
        (empty_is_not, "image_embeds is [1, 8] at the empty batch, want [0, 8]"),
        (plain_is_no_number, "logits_per_image holds NaN or infinity at the plain batch"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_further_batches_that_are_wrong_are_refused(with_more, damage: Callable[[Answers], None], failure):
    answers = more_answers_of(with_more)
    damage(answers)
    with pytest.raises(ParityError) as caught:
        verify._compare_values(answers, with_more, STRICT)
    assert caught.value.failures == (failure,)


def test_labels_whose_cosines_are_as_close_as_a_tie_are_no_flips(expected):
    expected = replace(expected, logit_scale=100.0)
    answers = answers_of(expected)
    flipped(answers)  # logits of 10 and 0: cosines that are 0.1 apart
    assert verify._compare_values(answers, expected, replace(STRICT, tie=0.11)).agreement == 1.0
    with pytest.raises(ParityError, match="2 of 40 rows get another label"):
        verify._compare_values(answers, expected, replace(STRICT, tie=0.09))


@pytest.mark.parametrize(
    ("inputs", "outputs", "failures"),
    [
        ({"pixel_values": ["batch", 3, 4, 4]}, {"image_embeds": ["batch", 8]}, []),
        ({"pixels": ["batch", 3, 4, 4]}, {"image_embeds": ["batch", 8]}, ["its inputs are ['pixels'], want"]),
        ({"pixel_values": [1, 3, 4, 4]}, {"image_embeds": ["batch", 8]}, ["pixel_values has the axes [1, 3, 4, 4], "]),
        ({"pixel_values": ["batch", 3, 4, 4]}, {"logits": ["batch", 8]}, ["its outputs are ['logits'], want"]),
        (
            {"pixel_values": ["batch", 3, 5, 4]},
            {"image_embeds": ["batch", 9]},
            ["pixel_values has the axes", "image_embeds has the axes ['batch', 9], want ['batch', 8]"],
        ),
    ],
    ids=["same", "name of an input", "fixed batch", "name of an output", "several"],
)
def test_names_and_axes_are_compared(expected, inputs, outputs, failures):
    expected = replace(expected, output_axes={"image_embeds": ["batch", 8]})
    found = verify._compare_signature({"inputs": inputs, "outputs": outputs}, expected)
    assert len(found) == len(failures)
    assert all(got.startswith(want) for got, want in zip(found, failures, strict=True))


@pytest.mark.parametrize("n_rows", [N_ROWS, 41, 200])
def test_every_row_is_compared_once_and_five_of_them_alone(n_rows):
    ranges = list(verify.batches(n_rows))
    assert [row for start, stop in ranges[:-5] for row in range(start, stop)] == list(range(n_rows))
    assert ranges[-5:] == [(row, row + 1) for row in range(3, 8)]


def test_rows_that_tie_are_no_flips():
    logits = np.array([[1.0, 1.0005, 0.0], [1.0, 2.0, 0.0]], np.float32)
    swapped = logits[:, [1, 0, 2]]
    expected = Expected({}, {}, {"logits": logits}, {}, "logits")
    assert verify._agreement({"logits": swapped}, expected, 1e-3) == 0.5
    assert verify._agreement({"logits": swapped}, expected, 1e-4) == 0.0
    assert verify._agreement({"logits": swapped}, expected, 2.0) == 1.0
