"""The benchmark of patches: its scores on maps whose answer is known, and its table."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")

from defense.benchmarks import patches

MASK = np.zeros((40, 40), bool)
MASK[:20, :20] = True
RIGHT = np.kron(np.array([[1.0, 0.0], [0.0, 0.0]]), np.ones((10, 10)))


def test_a_map_of_the_mask_is_right_and_its_opposite_is_wrong():
    assert patches.mean_iou(RIGHT, MASK) > 0.9
    assert patches.average_precision(RIGHT, MASK) > 0.99
    assert patches.mean_iou(-RIGHT, MASK) < 0.1
    assert patches.average_precision(-RIGHT, MASK) < 0.25


def test_a_flat_map_is_the_whole_picture_and_has_the_precision_of_chance():
    flat = np.zeros((4, 4))
    assert patches.mean_iou(flat, MASK) == pytest.approx((0.25 + 0) / 2)
    assert patches.average_precision(flat, MASK) == pytest.approx(0.25)


def test_ties_count_as_mixed_whatever_their_order():
    mask = np.zeros((2, 2), bool)
    mask[0, 0] = True
    assert patches.average_precision(np.zeros((2, 2)), mask) == patches.average_precision(np.zeros((2, 2)), mask[::-1])


def test_every_way_is_measured_on_every_question_and_shown(tmp_path, capsys):
    assert patches.main(["--out", str(tmp_path / "p.json"), "--n", "6"]) == 0
    shown = capsys.readouterr().out
    for expected in (
        "behind block 2 (default)",
        "behind block 2, defended",
        "logit lens",
        "attention",
        "everything",
        *patches.QUESTIONS,
    ):
        assert expected in shown
    plain, defended = (line.split("|")[2:] for line in shown.splitlines() if line.startswith("| behind block 2"))
    assert plain != defended
    (row,) = [line for line in shown.splitlines() if line.startswith("| everything")]
    assert float(row.split("|")[2].split("/")[0]) < 0.2
