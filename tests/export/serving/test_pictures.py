"""What every server does with the pictures and labels of a request."""

from __future__ import annotations

import base64

import numpy as np
import pytest

from defense.errors import ConfigError, NonFiniteError, ShapeError
from defense.export.serving import pictures

from .conftest import png


def test_pictures_are_prepared_in_order_and_bad_ones_leave_zeros_and_an_error(clf, seven_pictures):
    files = [png(picture) for picture in seven_pictures]
    url = b"data:image/png;base64," + base64.b64encode(files[2])
    prepared = pictures.prepare(clf, [files[0], b"", url, files[1][:200], files[6]])
    want = np.stack([np.asarray(clf._prepare(files[i])) for i in (0, 2, 6)])
    np.testing.assert_array_equal(prepared.pixel_values[[0, 2, 4]], want)
    assert not prepared.pixel_values[[1, 3]].any()
    assert [error != "" for error in prepared.errors] == [False, True, False, True, False]


def test_a_path_is_no_picture_of_a_request(clf, tmp_path, seven_pictures):
    """Bytes are contents, whatever they spell: a server reads no file that a client names."""
    (tmp_path / "a.png").write_bytes(png(seven_pictures[0]))
    prepared = pictures.prepare(clf, [str(tmp_path / "a.png").encode(), b"http://127.0.0.1/a.png"])
    assert all("not_an_image" in error for error in prepared.errors)


@pytest.mark.parametrize("given", [None, [[0], [0.5], [1]], [0, 0.5, 1]])
def test_strengths_are_one_for_each_picture(given):
    got = pictures.strengths_of(None if given is None else np.array(given, np.float32), 3)
    np.testing.assert_array_equal(got, [1, 1, 1] if given is None else [0, 0.5, 1])
    assert got.dtype == np.float32


@pytest.mark.parametrize(
    ("given", "error"),
    [([1, -0.1], ConfigError), ([1.1, 0], ConfigError), ([np.nan, 0], ConfigError), ([1], ShapeError)],
)
def test_strengths_that_cannot_be_are_refused(given, error):
    with pytest.raises(error, match="strength"):
        pictures.strengths_of(np.array(given, np.float32), 2)


def test_labels_of_a_request_are_not_set_for_others(clf):
    before = clf.prompts
    choice = pictures.choose(clf, ["a stone", "a tree"])
    assert choice.labels == ("a stone", "a tree")
    np.testing.assert_allclose(np.linalg.norm(choice.text_embeds, axis=1), 1, atol=1e-5)
    given = pictures.choose(clf, ["x", "y"], 3 * choice.text_embeds)
    np.testing.assert_allclose(given.text_embeds, choice.text_embeds, atol=1e-6)
    assert clf.prompts is before
    assert pictures.choose(clf, None).labels == before.labels


@pytest.mark.parametrize(
    ("labels", "rows", "message"),
    [
        (["a"] * (pictures.MAX_LABELS + 1), None, "send at most 1000"),
        (["x" * 501], None, "a label has 501 characters"),
        (["a", "a"], None, "repeats"),
        ([], None, "no label"),
        (None, 1, "text_embeds came without labels"),
        (["a", "b"], 1, "for these labels"),
    ],
)
def test_labels_that_cannot_be_are_refused(clf, labels, rows, message):
    embeds = None if rows is None else np.ones((rows, clf.bundle.text_embeds.shape[1]), np.float32)
    with pytest.raises(ConfigError, match=message):
        pictures.choose(clf, labels, embeds)


def test_rows_that_name_different_labels_are_refused(clf):
    rows = np.array([[b"a", b"b"], [b"a", b"c"]], dtype=object)
    with pytest.raises(ConfigError, match="labels differ between the pictures"):
        pictures.chosen_by(clf, rows, None)


def test_answers_are_those_of_the_classifier_and_rows_with_an_error_have_none(clf, seven_pictures):
    embeds = clf.transform(seven_pictures)
    embeds[3] = np.nan
    errors = np.array(["", "bad (corrupt)", "", "", "", "", ""], dtype=object)
    answers = pictures.answer(clf, embeds, errors, pictures.choose(clf, None))
    good = [0, 2, 4, 5, 6]
    want = clf.scores(embeds[good], clf.text_embeds())
    np.testing.assert_array_equal(answers.scores[good], want)
    np.testing.assert_array_equal(answers.score[good], want.max(1))
    assert list(answers.label[good]) == [clf.classes_[row] for row in want.argmax(1)]
    assert list(answers.error[[1, 3]]) == ["bad (corrupt)", str(NonFiniteError("image_embeds"))]
    assert np.isnan(answers.scores[[1, 3]]).all()
    assert list(answers.label[[1, 3]]) == ["", ""]
    assert errors[3] == ""


def test_pixels_that_are_no_numbers_are_refused():
    with pytest.raises(NonFiniteError):
        pictures.check_pixels(np.array([[1, np.inf]], np.float32))
