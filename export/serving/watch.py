"""What a defense does to the pictures that are served: how often the answer changes, and how much goes.

On a share of the pictures the graph is asked again at strength 0. An attack shows as a rise of what is changed; a
runtime that no longer computes what was exported, as a difference to the golden embeddings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import numpy as np

from defense.errors import ConfigError, cannot_import
from defense.export.runtime import OnnxClassifier

GOLDEN_EVERY_S = 3600.0
"""How often golden embeddings are computed again."""
_ROUNDING = {"fp32": 1e-9, "fp16": 1e-5, "int8": 1e-3}
"""Removed energy up to which two runs of a graph of this dtype may differ without a defense."""


class Figure(NamedTuple):
    """A metric.

    Attributes:
        kind: "counter" or "gauge".
        help: What it says.
    """

    kind: str
    help: str


FIGURES: Mapping[str, Figure] = {
    "clip_defense_pictures": Figure("counter", "Pictures that were answered or refused"),
    "clip_defense_errors": Figure("counter", "Pictures that have an error in place of an answer"),
    "clip_defense_watched": Figure("counter", "Pictures that were asked about again without the defense"),
    "clip_defense_changed": Figure("counter", "Watched pictures whose label the defense changed"),
    "clip_defense_fired": Figure("counter", "Watched pictures from which the defense took anything"),
    "clip_defense_removed_energy": Figure("counter", "Squared length of what was taken, of watched unit embeddings"),
    "clip_defense_golden_difference": Figure("gauge", "Largest difference to the golden embeddings"),
    "clip_defense_golden_tolerance": Figure("gauge", "What the bundle allows for it"),
    "clip_defense_golden_removed_energy": Figure("gauge", "Mean removed energy on the golden pictures"),
}
"""Name -> metric. Prometheus' clients write _total behind the names of counters; Triton does not."""


class Meter(Protocol):
    """Where figures go: Triton's metrics, or a Prometheus client's."""

    def add(self, name: str, amount: float) -> None:
        """Raise a counter of `FIGURES`."""

    def set(self, name: str, value: float) -> None:
        """Set a gauge of `FIGURES`."""


class PrometheusMeter:
    """Metrics of the package prometheus_client, in a registry of it.

    Args:
        registry: None means its global one, which frameworks serve.

    Raises:
        MissingDependencyError: prometheus_client is not installed.
    """

    def __init__(self, registry: Any = None) -> None:
        try:
            import prometheus_client
        except ImportError as error:
            raise cannot_import("prometheus_client", error) from error
        kinds = {"counter": prometheus_client.Counter, "gauge": prometheus_client.Gauge}
        chosen = prometheus_client.REGISTRY if registry is None else registry
        self._metrics: dict[str, Any] = {
            name: kinds[figure.kind](name, figure.help, registry=chosen) for name, figure in FIGURES.items()
        }

    def add(self, name: str, amount: float) -> None:
        """Raise a counter."""
        self._metrics[name].inc(amount)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._metrics[name].set(value)


def removed_energy(plain: np.ndarray, defended: np.ndarray) -> np.ndarray:
    """Return the squared length of what the defense took from each unit embedding, float32 [n], 0 to 4.

    Args:
        plain: image_embeds at strength 0, [n, d_embed].
        defended: The same pictures' as they were served.
    """
    energy: np.ndarray = np.square(defended - plain).sum(1)
    return energy


class Watch:
    """Counts what is served; safe to use from several threads.

    Args:
        clf: The classifier that answers.
        meter: Where the figures go.
        share: Of the pictures to ask about again, in [0, 1]; every 1 / share-th of them.
        golden_every_s: Seconds between two checks of the golden embeddings.

    Raises:
        ConfigError: The share lies outside [0, 1].
    """

    def __init__(
        self, clf: OnnxClassifier, meter: Meter, share: float, *, golden_every_s: float = GOLDEN_EVERY_S
    ) -> None:
        if not 0 <= share <= 1:
            raise ConfigError(f"the share of pictures to watch is {share}; want 0 (none) to 1 (all)")
        self.clf, self.meter, self.share, self.golden_every_s = clf, meter, share, golden_every_s
        self._seen = 0
        self._golden_at = -np.inf
        self._lock = threading.Lock()
        meter.set("clip_defense_golden_tolerance", clf.bundle.tolerance["atol"])

    def chosen(self, is_candidate: np.ndarray) -> np.ndarray:
        """Return which pictures to ask about again, as rows, of those that are candidates, bool [n]."""
        rows = np.flatnonzero(is_candidate)
        with self._lock:
            order = self._seen + np.arange(1, len(rows) + 1)
            self._seen += len(rows)
        # The n-th picture is watched where n shares pass a whole number.
        chosen: np.ndarray = rows[np.floor(order * self.share) > np.floor((order - 1) * self.share)]
        return chosen

    def add(
        self,
        pixel_values: np.ndarray,
        strengths: np.ndarray,
        image_embeds: np.ndarray,
        errors: np.ndarray,
        text_embeds: np.ndarray,
    ) -> None:
        """Count the pictures of a request, and ask about some of them again.

        Args:
            pixel_values: float32 [n, 3, height, width].
            strengths: With which they were answered, float32 [n]; those at 0 are not watched.
            image_embeds: The graph's answers, [n, d_embed].
            errors: "" or an error, object [n]; pictures with one are not watched.
            text_embeds: Of the labels that were chosen from, [n_labels, d_embed].
        """
        is_good = errors == ""
        self.meter.add("clip_defense_pictures", len(errors))
        self.meter.add("clip_defense_errors", float((~is_good).sum()))
        rows = self.chosen(is_good & (strengths > 0))
        if not len(rows):
            return
        plain, _ = self.clf.outputs(pixel_values[rows], np.zeros(len(rows), np.float32))
        defended = image_embeds[rows]
        energy = removed_energy(plain, defended)
        is_changed = (plain @ text_embeds.T).argmax(1) != (defended @ text_embeds.T).argmax(1)
        self.meter.add("clip_defense_watched", len(rows))
        self.meter.add("clip_defense_changed", float(is_changed.sum()))
        self.meter.add("clip_defense_fired", float((energy > _ROUNDING[self.clf.bundle.dtype]).sum()))
        self.meter.add("clip_defense_removed_energy", float(energy.sum()))

    def check_golden(self) -> bool:
        """Compute the golden embeddings again where it is time, and return whether that was done."""
        now = time.monotonic()
        with self._lock:
            if now - self._golden_at < self.golden_every_s:
                return False
            self._golden_at = now
        clf = self.clf
        pixel_values = np.concatenate(
            [chunk.pixel_values for chunk in clf.prepared_chunks(clf.bundle.golden["pictures"])]
        )
        n = len(pixel_values)
        defended, _ = clf.outputs(pixel_values, np.ones(n, np.float32))
        difference = float(np.abs(defended - clf.bundle.golden["image_embeds"]).max())
        self.meter.set("clip_defense_golden_difference", difference)
        if clf.has_strength:
            plain, _ = clf.outputs(pixel_values, np.zeros(n, np.float32))
            self.meter.set("clip_defense_golden_removed_energy", float(removed_energy(plain, defended).mean()))
        return True
