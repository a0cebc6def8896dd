"""Two things in one scene: both there, apart, and nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from defense.world import scenes
from defense.world.composed import render_beside, sample_beside
from defense.world.scenes import Finish


def drawn(index: int, name: str = "lemon", other: str = "robot", quiet: bool = True):
    scene, beside = sample_beside(np.random.default_rng([5, index]), name, other)
    return (replace(scene, finish=Finish(0), oversample=1) if quiet else scene), beside


def test_both_things_are_there_each_on_its_side_and_the_first_is_as_it_is_alone():
    sides = set()
    for index in range(20):
        scene, beside = drawn(index)
        alone, bare = (np.asarray(scenes.render(each), int) for each in (scene, replace(scene, subject=None)))
        both = np.asarray(render_beside(scene, beside), int)
        own, added = (np.abs(a - b).max(-1) >= 12 for a, b in ((alone, bare), (both, alone)))
        centers = [np.nonzero(mask)[1].mean() / scenes.SIZE for mask in (own, added)]
        for center, subject in zip(centers, (scene.subject, beside), strict=True):
            assert abs(center - subject.center[0]) < 0.08
        assert abs(centers[0] - centers[1]) > 0.3
        assert (own & added).sum() < 0.1 * own.sum(), "neither covers the other"
        sides.add(centers[0] < 0.5)
    assert sides == {True, False}


def test_places_do_not_depend_on_the_names_and_a_scene_is_drawn_as_without_a_second_thing():
    scene, beside = drawn(3, quiet=False)
    again, other = drawn(3, name="fox", other="bell", quiet=False)
    assert replace(other, emoji=beside.emoji) == beside
    assert replace(again, subject=replace(again.subject, emoji=scene.subject.emoji)) == scene
    tiny = replace(beside, center=(-3.0, -3.0))
    for index in range(8):  # with and without oversampling, each with its finish
        scene, _ = drawn(index, quiet=False)
        assert np.array_equal(np.asarray(render_beside(scene, tiny, 50)), np.asarray(scenes.render(scene, 50)))
