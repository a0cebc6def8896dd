"""scikit-learn's own code with a classifier: clone, scorers, pipelines, cross-validation, joblib."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("sklearn")

from sklearn.base import clone, is_classifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import get_scorer, log_loss
from sklearn.model_selection import KFold, cross_val_score
from sklearn.pipeline import make_pipeline

from defense.errors import ConfigError


@pytest.fixture
def clf(tiny_classifier):
    """With labels in no alphabetical order."""
    return clone(tiny_classifier).set_labels(["dog", "red fish", "cat"])


@pytest.fixture
def answers(clf, seven_pictures):
    """Labels of the seven pictures: right for five."""
    found = list(clf.predict(seven_pictures))
    return [*found[:5], *("dog" if name == "cat" else "cat" for name in found[5:])]


def test_params_are_the_arguments(tiny_classifier):
    params = tiny_classifier.get_params()
    assert set(params) == {"clip", "defense", "allow_mismatch", "batch_size", "backend", "limits"}
    assert params["clip"] is tiny_classifier.clip


def test_a_clone_has_labels_of_its_own_and_the_same_model(tiny_classifier, seven_pictures):
    twin = clone(tiny_classifier)
    assert twin is not tiny_classifier
    assert twin.clip is tiny_classifier.clip
    assert twin._lock is tiny_classifier._lock  # the model is one, so only one of them may use it at a time
    before = tiny_classifier.predict_proba(seven_pictures)
    twin.set_labels(["a", "b"])
    twin.set_params(batch_size=3)
    np.testing.assert_array_equal(tiny_classifier.predict_proba(seven_pictures), before)
    assert tiny_classifier.batch_size == 32


def test_only_the_batch_size_can_be_set(clf):
    assert clf.set_params(batch_size=2).batch_size == 2
    with pytest.raises(ConfigError, match="batch_size"):
        clf.set_params(batch_size=0)
    with pytest.raises(ConfigError, match="backend cannot be set"):
        clf.set_params(backend="fused")


def test_scorers_take_it(clf, seven_pictures, answers):
    assert is_classifier(clf)
    assert get_scorer("accuracy")(clf, seven_pictures, answers) == pytest.approx(5 / 7)
    assert clf.score(seven_pictures, answers) == pytest.approx(5 / 7)


def test_scores_of_probabilities_are_right_once_it_is_fitted(clf, seven_pictures):
    answers = ["dog", "cat", "red fish", "dog", "cat", "red fish", "dog"]
    proba = clf.predict_proba(seven_pictures)
    want = -log_loss(answers, proba[:, [2, 0, 1]], labels=["cat", "dog", "red fish"])
    fitted = clf.fit(seven_pictures, answers)
    assert list(fitted.classes_) == ["cat", "dog", "red fish"]
    assert get_scorer("neg_log_loss")(fitted, seven_pictures, answers) == pytest.approx(want, rel=1e-5)


def test_fit_takes_labels_where_none_are_set(tiny_classifier, seven_pictures):
    clf = clone(tiny_classifier)
    clf.prompts = None
    assert list(clf.fit(seven_pictures, ["tree", "dog", "tree"]).classes_) == ["dog", "tree"]
    clf.prompts = None
    assert clf.fit(seven_pictures, [0, 1, 2]).prompts is None
    assert clf.fit(seven_pictures).prompts is None


def test_it_ends_a_pipeline_and_begins_one(clf, seven_pictures, answers):
    last = make_pipeline(clf)
    assert list(last.fit(seven_pictures, answers).predict(seven_pictures)) == list(clf.predict(seven_pictures))
    first = make_pipeline(clf, LogisticRegression()).fit(seven_pictures, [0, 1, 0, 1, 0, 1, 0])
    assert set(first.predict(seven_pictures)) <= {0, 1}


@pytest.mark.parametrize("scoring", [None, "accuracy"])
def test_it_is_cross_validated(clf, seven_pictures, scoring):
    answers = ["dog", "cat", "dog", "cat", "dog", "cat", "dog"]
    scores = cross_val_score(clf, seven_pictures, answers, cv=KFold(7), scoring=scoring)  # a picture in each fold
    assert list(scores) == [name == answer for name, answer in zip(clf.predict(seven_pictures), answers, strict=True)]


@pytest.mark.slow
def test_joblib_takes_it_to_other_processes(clf, seven_pictures):
    joblib = pytest.importorskip("joblib")
    want = clf.predict_proba(seven_pictures)
    (got,) = joblib.Parallel(n_jobs=2)(joblib.delayed(clf.predict_proba)(part) for part in [seven_pictures])
    np.testing.assert_allclose(got, want, atol=1e-6)
