"""The model behind the page: one for all visitors, each of whom brings labels and controls of their own.

A `DemoTask` is something that may be removed, with the labels and the pictures that show it. The tasks of the embedded
model stand here; any other defense is one task, with the labels that the command line gave.
"""

from __future__ import annotations

import copy
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from defense.classify.answers import Prediction
from defense.classify.classifier import RobustClassifier
from defense.data import labels
from defense.embedded.labels import own_labels
from defense.errors import ConfigError
from defense.hosts import shipped
from defense.hosts.shipped import DEFAULT, EMBEDDED, ShippedClip

if TYPE_CHECKING:
    from PIL import Image

    from defense.classify.explanation import Explanation
    from defense.core.latents import LatentSet
    from defense.explain.catalogue import Catalogue
    from defense.explain.counterfactual import Counterfactual
    from defense.explain.patches import PatchLabels
    from defense.export.runtime import OnnxClassifier
    from defense.hosts.controls import Controls

_MAX_VOCABULARIES = 32
"""Sets of labels whose embeddings are kept."""


@dataclass(frozen=True)
class DemoTask:
    """Something that may be removed.

    Attributes:
        name: Of its latent sets.
        title: What the page calls it.
        labels: What to classify into where a visitor gives nothing.
        template: The prompt, with a literal {}.
    """

    name: str
    title: str
    labels: tuple[str, ...]
    template: str = "a photo of a {}."


GROUP_TASKS = (
    DemoTask("waterbirds", "background behind birds", ("landbird", "waterbird")),
    DemoTask("celeba", "gender behind hair color", ("dark hair", "blond hair"), "a photo of a person with {}."),
)


def own_tasks(model: ShippedClip) -> tuple[DemoTask, ...]:
    """Return what may be removed by the defenses of a shipped model."""
    text = DemoTask("text", "text in the picture", own_labels(model))
    return (text, *GROUP_TASKS) if model.name == EMBEDDED else (text,)


@dataclass(frozen=True)
class Question:
    """What a visitor asks about a picture.

    Attributes:
        labels: What to classify into, as `limits.check_labels` gives them.
        template: The prompt, with a literal {}.
        controls: What of the defense is active; None for all of it.
    """

    labels: tuple[str, ...]
    template: str
    controls: Controls | None = None


@dataclass
class Engine:
    """A classifier for many visitors at once.

    Args:
        clf: A CLIP with its defense, or a bundle's defended tower.
        tasks: What may be removed, at least one.
        catalogues: What is known of the latents, by hook point.
        title: What the page calls the model.
    """

    clf: RobustClassifier | OnnxClassifier
    tasks: tuple[DemoTask, ...]
    catalogues: Mapping[str, Catalogue] = field(default_factory=dict)
    title: str = DEFAULT

    def __post_init__(self) -> None:
        self._lock = threading.Lock()
        self._notes: OrderedDict[tuple[tuple[str, ...], str], tuple[str, ...]] = OrderedDict()

    @property
    def can_explain(self) -> bool:
        """Whether plain answers and what was removed are known: a bundle holds the defended tower alone."""
        return isinstance(self.clf, RobustClassifier)

    @property
    def can_relabel(self) -> bool:
        """Whether labels may be chosen: a bundle may hold some and no text tower."""
        return isinstance(self.clf, RobustClassifier) or self.clf.bundle.text_model is not None

    def question(self, text: str, template: str, controls: Controls | None = None, task: int = 0) -> Question:
        """Return a visitor's question, checked.

        Args:
            text: Labels; where there are none, those of the task.
            template: The prompt; where it is blank, that of the task.
            controls: What of the defense is active; None for all of it.
            task: Which of `tasks`.

        Raises:
            ConfigError: See `limits.check_labels` and `labels.resolve_templates`.
        """
        from defense.demo import limits

        chosen = limits.check_labels(text, self.tasks[task].labels)
        if len(template) > limits.MAX_LABEL_LENGTH:
            raise ConfigError(f"the prompt is {len(template):,} characters long; at most {limits.MAX_LABEL_LENGTH}")
        (prompt,) = labels.resolve_templates([template.strip() or self.tasks[task].template])
        return Question(chosen, prompt, controls)

    def notes(self, question: Question) -> tuple[str, ...]:
        """Return what was logged when a question's labels were first encoded, e.g. which the model never saw."""
        return self._notes.get((question.labels, question.template), ())

    def classify(self, image: Any, question: Question, top_k: int | None = None) -> Prediction:
        """Return the defended answer."""
        if not isinstance(self.clf, RobustClassifier):
            with self._encoding(question):
                return self.clf(
                    image, candidate_labels=question.labels, hypothesis_template=question.template, top_k=top_k
                )
        clf = self._asked(question)
        if question.controls is None:
            (found,) = clf.stream([image], top_k=top_k)
            return found
        return clf.classify_with(image, question.controls, top_k=top_k)

    def explain(self, image: Any, question: Question, top_k: int | None = None) -> Explanation:
        """Return both answers and what was removed."""
        return self._asked(question).explain(image, top_k=top_k, controls=question.controls)

    def counterfactual(self, image: Any, question: Question) -> Counterfactual:
        """Return the few latents whose removal changes the plain answer."""
        from defense.explain.counterfactual import counterfactual

        return counterfactual(self._asked(question), image, controls=question.controls)

    def patches(self, image: Any, question: Question) -> PatchLabels:
        """Return what each patch says, without and with the defense; see `patches.patch_labels` for what is refused."""
        from defense.explain.patches import patch_labels

        return patch_labels(self._asked(question), image, controls=question.controls)

    def embed(self, image: Any, *, plain: bool = False) -> np.ndarray:
        """Return the image embedding, float32 [d_embed], normalized."""
        if not plain:
            return self.clf.transform([image])[0]
        from defense.data.images import decode

        clf = self._explaining()
        return clf.encode_pixels(clf.preprocess(decode(image).image)[None], plain=True)[0]

    def phrase(self, text: str, template: str) -> np.ndarray:
        """Return the embedding of a phrase, float32 [d_embed], normalized."""
        return self._asked(Question((text,), template)).text_embeds()[0]

    def activation_map(self, image: Image.Image, hook_point: str, latent: int) -> np.ndarray:
        """Return a latent's activation at each patch in the plain network, float32 [rows, columns]."""
        return self._explaining().latent_map(image, hook_point, latent)

    def can_map(self, hook_point: str, latent: int) -> bool:
        """Whether the defense holds a latent: of a slim one it holds just those that it edits."""
        defense = self._explaining().defense
        parts = [site.part for site in defense.sites if site.hook_point == hook_point] if defense is not None else []
        return any(part is None or latent in part.latents for part in parts)

    def seen_box(self, image: Image.Image) -> tuple[int, int, int, int]:
        """Return the part of a picture that the model sees."""
        return self.clf.preprocess.seen_box(*image.size)

    def set_of(self, hook_point: str, latent: int) -> LatentSet | None:
        """Return the latent set that names a latent, or None: the defense leaves it alone."""
        defense = self.clf.defense if isinstance(self.clf, RobustClassifier) else None
        for site in () if defense is None else defense.sites:
            for latent_set in site.sets:
                if site.hook_point == hook_point and latent in latent_set.latents:
                    return latent_set
        return None

    def name_of(self, hook_point: str, latent: int) -> str:
        """Return a latent's best name, or "" where nothing is known of it."""
        catalogue = self.catalogues.get(hook_point)
        names = catalogue.names_of(latent) if catalogue is not None else ()
        return names[0][0] if names else ""

    def _explaining(self) -> RobustClassifier:
        """Return the classifier, which knows the plain answer too.

        Raises:
            ConfigError: It is a bundle's.
        """
        if isinstance(self.clf, RobustClassifier):
            return self.clf
        raise ConfigError("a bundle holds the defended tower alone: it has no plain answer, embedding or latents")

    def _asked(self, question: Question) -> RobustClassifier:
        """Return the same model with a visitor's labels; other visitors' stay as they are."""
        with self._encoding(question):
            asked = copy.copy(self._explaining()).set_labels(question.labels, [question.template])
            asked.text_embeds()
        return asked

    @contextmanager
    def _encoding(self, question: Question) -> Iterator[None]:
        """Keep as notes what is logged in this context, and drop notes and embeddings of all but the latest labels."""
        key = (question.labels, question.template)
        with _said() as said:
            yield
        with self._lock:
            self._notes[key] = tuple(said) or self._notes.get(key, ())
            self._notes.move_to_end(key)
            while len(self._notes) > _MAX_VOCABULARIES:
                self._notes.popitem(last=False)
        self.clf.forget_labels(_MAX_VOCABULARIES)


class _Collector(logging.Handler):
    """Keeps the warnings of one thread."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.thread = threading.get_ident()
        self.said: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        if record.thread == self.thread:
            self.said.append(record.getMessage())


@contextmanager
def _said() -> Iterator[list[str]]:
    """Yield the list that collects what the package logs in this thread."""
    collector, logger = _Collector(), logging.getLogger("defense")
    logger.addHandler(collector)
    try:
        yield collector.said
    finally:
        logger.removeHandler(collector)


def tasks_of(
    names: Sequence[str], model: str, default: Sequence[str] | None, template: str | None
) -> tuple[DemoTask, ...]:
    """Return the tasks for the latent sets of a defense.

    Args:
        names: Of the sets.
        model: Name of the CLIP.
        default: Labels where a visitor gives none; a shipped model's own where None.
        template: The prompt; a shipped model's own where None.
    """
    own = own_tasks(shipped.find_model(model) or shipped.MODELS[DEFAULT])
    chosen = tuple(default or own[0].labels)
    fallback = template or own[0].template
    known = {task.name: task for task in own} if default is None else {}
    return tuple(known.get(name) or DemoTask(name, name, chosen, fallback) for name in names)
