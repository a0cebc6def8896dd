"""Masks of drawn scenes lie where the things are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from defense.world import draws, scenes
from defense.world.masks import letters_mask, subject_mask
from defense.world.scenes import Background, Finish, Scene, Subject, Writing


def scene(subject: Subject | None = None, writing: Writing | None = None) -> Scene:
    return Scene(Background("plain", 3), subject, writing, Finish(5, noise=9.0, brightness=1.2), oversample=2)


LEMON = Subject(scenes.OBJECTS["lemon"], (0.25, 0.5), 0.4)
WORD = Writing("pear", "carlito", "plate", (0.25, 0.5), 0.2, 0.0, (0, 0, 0), (255, 255, 255))


def test_a_subject_lies_where_it_was_put_and_nowhere_without_one():
    mask = subject_mask(scene(LEMON), 64)
    assert mask.shape == (64, 64)
    rows, columns = np.nonzero(mask)
    assert abs(columns.mean() / 64 - 0.25) < 0.05
    assert abs(rows.mean() / 64 - 0.5) < 0.05
    assert 0.05 < mask.mean() < 0.16, "a lemon 0.4 of the picture high"
    assert not subject_mask(scene(None, WORD)).any()


def test_writing_covers_a_subject():
    covered = subject_mask(scene(LEMON, WORD))
    alone = subject_mask(scene(LEMON))
    assert (covered & ~alone).sum() == 0
    assert covered.sum() < 0.7 * alone.sum()


def test_letters_lie_in_a_row_around_their_center_and_a_blank_plate_has_none():
    mask = letters_mask(scene(None, WORD), 100)
    rows, columns = np.nonzero(mask)
    assert 38 <= rows.min() <= rows.max() <= 61
    assert abs(columns.mean() - 24.5) < 2
    assert not letters_mask(scene(None, replace(WORD, blank=True))).any()


def test_masks_do_not_depend_on_the_finish():
    (case,) = draws.typographic(1, 5)
    plain = replace(case.scene, finish=Finish(0))
    assert np.array_equal(subject_mask(case.scene), subject_mask(plain))
