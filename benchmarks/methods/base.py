"""What a method is to the benchmarks.

    method.fit(host, task)              once per task; may look at task.train and task.val, never at task.tests
    with method.apply(host) as encoder:
        encoder.image_embeds(pictures)  [n, d_embed]
        encoder.text_embeds(prompts)    [n_labels, d_embed]

An answer is the label whose embedding has the largest cosine with the picture's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
from PIL import Image

from defense.benchmarks.datasets import Task
from defense.classifier import Host, RobustClassifier
from defense.labels import Prompts, encode_prompts


class Encoder:
    """Embeddings of a classifier; a method overrides what it changes.

    Attributes:
        edits_text: Whether `text_embeds` differ from the stock CLIP's, which are then not shared between methods.
    """

    edits_text = False

    def __init__(self, clf: RobustClassifier) -> None:
        self.clf = clf

    def image_embeds(self, pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return normalised embeddings, float32 [n, d_embed], of RGB pictures."""
        return self.clf.encode_pixels(np.stack([self.clf.host.preprocess(picture) for picture in pictures]))

    def text_embeds(self, prompts: Prompts, *, normalise_each: bool = True) -> np.ndarray:
        """Return normalised embeddings, float32 [n_labels, d_embed]; see `labels.average_templates`."""
        import torch

        model = self.clf.host.model
        device = next(model.parameters()).device

        def encode_text(input_ids: np.ndarray) -> np.ndarray:
            with torch.inference_mode():
                return model.encode_text(torch.from_numpy(input_ids).to(device)).float().cpu().numpy()

        return encode_prompts(prompts, self.clf.host.tokenizer, encode_text, normalise_each=normalise_each)


class Method(Protocol):
    """One way to classify."""

    @property
    def name(self) -> str:
        """What tables and file names call it."""
        ...

    def settings(self) -> Mapping[str, Any]:
        """Return, as JSON values, all that decides the embeddings beside the host: another setting, another row.

        Asked for after `fit`; what was learnt there belongs to it, as a hash where it is large.
        """
        ...

    def fit(self, host: Host, task: Task) -> None:
        """Learn from `task.train` and `task.val`.

        Raises:
            ConfigError: The task has no such split, and the method needs it.
        """
        ...

    def apply(self, host: Host) -> AbstractContextManager[Encoder]:
        """Put the method into a host; at the end of the context the host is as it was."""
        ...
