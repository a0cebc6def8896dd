"""What there is to see of a defense at work."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from defense.errors import ConfigError
from defense.export.batch import BatchPredictor
from defense.export.serving.watch import FIGURES, PrometheusMeter, Watch, removed_energy


class Kept:
    """A meter that keeps what it is told."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def add(self, name: str, amount: float) -> None:
        assert FIGURES[name].kind == "counter"
        assert amount >= 0
        self.values[name.removeprefix("clip_defense_")] += amount

    def set(self, name: str, value: float) -> None:
        assert FIGURES[name].kind == "gauge"
        self.values[name.removeprefix("clip_defense_")] = value


@pytest.fixture
def pixel_values(clf, seven_pictures) -> np.ndarray:
    return np.stack([np.asarray(clf._prepare(picture)) for picture in seven_pictures])


def add(watch: Watch, pixel_values: np.ndarray, strengths: np.ndarray, errors: list[str] | None = None) -> None:
    embeds, _ = watch.clf.outputs(pixel_values, strengths)
    texts = np.array(errors or [""] * len(strengths), dtype=object)
    watch.add(pixel_values, strengths, embeds, texts, watch.clf.text_embeds())


def test_watched_pictures_are_compared_with_the_clip_without_its_defense(clf, pixel_values):
    meter = Kept()
    ones = np.ones(7, np.float32)
    add(Watch(clf, meter, 1.0), pixel_values, ones)
    plain, plain_logits = clf.outputs(pixel_values, 0 * ones)
    defended, logits = clf.outputs(pixel_values, ones)
    assert meter.values["changed"] == (plain_logits.argmax(1) != logits.argmax(1)).sum()
    assert (meter.values["pictures"], meter.values["watched"], meter.values["errors"]) == (7, 7, 0)
    np.testing.assert_allclose(meter.values["removed_energy"], ((plain - defended) ** 2).sum(), rtol=1e-4)
    assert meter.values["fired"] == 7


def test_a_changed_answer_is_counted(clf, pixel_values):
    """The labels are the two embeddings of one picture, so the defense changes its answer."""
    meter = Kept()
    one = np.ones(1, np.float32)
    plain, _ = clf.outputs(pixel_values[:1], 0 * one)
    defended, _ = clf.outputs(pixel_values[:1], one)
    watch = Watch(clf, meter, 1.0)
    watch.add(pixel_values[:1], one, defended, np.array([""], dtype=object), np.concatenate([plain, defended]))
    assert (meter.values["changed"], meter.values["watched"]) == (1, 1)


def test_a_share_of_the_pictures_is_watched_whatever_the_requests_are(clf, pixel_values):
    meter = Kept()
    watch = Watch(clf, meter, 0.25)
    for n in (1, 1, 3, 5, 2, 4):
        add(watch, pixel_values[:n] if n <= 7 else pixel_values, np.ones(n, np.float32))
    assert (meter.values["pictures"], meter.values["watched"]) == (16, 4)


def test_pictures_with_an_error_or_without_the_defense_are_not_watched(clf, pixel_values):
    meter = Kept()
    strengths = np.array([0, 1, 1, 0, 1, 1, 1], np.float32)
    add(Watch(clf, meter, 1.0), pixel_values, strengths, ["", "bad", "", "", "", "", ""])
    assert (meter.values["pictures"], meter.values["errors"], meter.values["watched"]) == (7, 1, 4)


def test_nothing_is_asked_again_where_the_share_is_zero(clf, pixel_values, monkeypatch):
    meter = Kept()
    watch = Watch(clf, meter, 0.0)
    ones = np.ones(7, np.float32)
    embeds, _ = clf.outputs(pixel_values, ones)
    monkeypatch.setattr(clf, "outputs", None)
    watch.add(pixel_values, ones, embeds, np.full(7, "", dtype=object), clf.text_embeds())
    assert (meter.values["pictures"], meter.values["watched"]) == (7, 0)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_is_none_is_refused(clf, share):
    with pytest.raises(ConfigError, match="share of pictures to watch"):
        Watch(clf, Kept(), share)


def test_golden_embeddings_are_computed_again_when_it_is_time(clf):
    meter = Kept()
    watch = Watch(clf, meter, 0.0, golden_every_s=3600)
    assert watch.check_golden()
    assert not watch.check_golden()
    assert 0 <= meter.values["golden_difference"] <= meter.values["golden_tolerance"]
    assert meter.values["golden_removed_energy"] > 0


def test_prometheus_sees_every_figure(clf, pixel_values):
    prometheus_client = pytest.importorskip("prometheus_client")
    registry = prometheus_client.CollectorRegistry()
    watch = Watch(clf, PrometheusMeter(registry), 1.0)
    add(watch, pixel_values, np.ones(7, np.float32))
    watch.check_golden()
    text = prometheus_client.generate_latest(registry).decode()
    assert "clip_defense_watched_total 7.0" in text
    for name in FIGURES:
        assert f"# HELP {name}" in text


def test_batches_get_columns_of_what_the_defense_did(ready, clf, seven_pictures):
    batch = {"bytes": [*seven_pictures, b"<html>"], "id": list(range(8))}
    got = BatchPredictor(ready, watch=True)(batch)
    assert list(got) == ["id", "label", "score", "embedding", "plain_label", "removed_energy", "error"]
    plain = clf.with_strength(0)
    assert list(got["plain_label"]) == [*plain.predict(seven_pictures), ""]
    want = removed_energy(plain.transform(seven_pictures), clf.transform(seven_pictures))
    np.testing.assert_allclose(got["removed_energy"][:7], want, rtol=1e-4)
    assert np.isnan(got["removed_energy"][7])
