"""Heat lies on the patches that it belongs to."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

pytest.importorskip("open_clip")

from defense.explain.heat import heat, overlay

from .explained import attacked_scene


def test_heat_is_see_through_where_nothing_is_and_strongest_at_the_peak():
    energies = np.zeros((4, 6), np.float32)
    energies[1, 4] = 9
    image = heat(energies, (60, 40))
    assert (image.mode, image.size) == ("RGBA", (60, 40))
    pixels = np.asarray(image).astype(int)
    assert pixels[15, 45, 3] == pixels[..., 3].max() > 150
    assert (pixels[:, :30, 3] == 0).all()
    assert (pixels[30:, :, 3] == 0).all()
    light = pixels[..., :3].sum(-1)
    assert light[15, 45] == light.max()


def test_heat_of_nothing_is_see_through_and_a_common_peak_compares_maps():
    assert not np.asarray(heat(np.zeros((3, 3)), (9, 9)))[..., 3].any()
    energies = np.full((2, 2), 1.0)
    faint, full = heat(energies, (4, 4), peak=4.0), heat(energies, (4, 4))
    assert np.asarray(faint).astype(int)[..., :3].sum() < np.asarray(full).astype(int)[..., :3].sum()
    np.testing.assert_array_equal(np.asarray(heat(4 * energies, (4, 4), peak=16.0)), np.asarray(faint))


def test_an_overlay_covers_the_box_and_darkens_what_the_model_did_not_see():
    image = Image.fromarray(np.full((40, 80, 3), 200, np.uint8))
    before = image.tobytes()
    energies = np.zeros((4, 4))
    energies[0, 0] = 1
    result = np.asarray(overlay(image, energies, box=(20, 0, 60, 40))).astype(int)
    assert image.tobytes() == before
    assert result.shape == (40, 80, 3)
    assert (result[:, :20] < 120).all()
    assert (result[:, 60:] < 120).all()
    assert (result[20:, 20:60] == 200).all()
    assert (result[2, 22] != 200).any()
    padded = overlay(image, energies, box=(0, -20, 80, 60))
    assert padded.size == image.size


def test_a_map_lies_on_the_patches_that_it_belongs_to(embedded):
    """The same attacked picture, once as it is and once between gray bars, has its peak at the same place."""
    scene = attacked_scene(424_242)
    wide = Image.new("RGB", (3 * scene.width, scene.height), "gray")
    wide.paste(scene, (scene.width, 0))
    explanation = embedded.explain(wide)
    assert explanation.box == (scene.width, 0, 2 * scene.width, scene.height)
    np.testing.assert_allclose(explanation.heatmap, embedded.explain(scene).heatmap, rtol=1e-3, atol=1e-3)
