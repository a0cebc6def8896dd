"""Methods that leave the towers alone and work on what they give: image or text embeddings."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from defense.benchmarks.methods.base import Stock
from defense.data.labels import Prompts
from defense.hosts.clip import Clip

Map = Callable[[np.ndarray], np.ndarray]
"""From embeddings [n, d_embed] to embeddings [n, d_embed]."""


class EditedImages(Stock):
    """The stock CLIP with its image embeddings edited.

    Args:
        clip: The CLIP.
        edit: What is done to normalized embeddings; the result is normalized again.
    """

    def __init__(self, clip: Clip, edit: Map) -> None:
        super().__init__(clip)
        self.edit = edit

    def edited(self, image_embeds: np.ndarray) -> np.ndarray:
        """Return edited embeddings, float32 [n, d_embed], normalized."""
        return unit(self.edit(image_embeds))


class EditedTexts(Stock):
    """The stock CLIP with its text embeddings edited.

    Args:
        clip: The CLIP.
        edit: What is done to normalized embeddings; the result is normalized again.
    """

    edits_text = True

    def __init__(self, clip: Clip, edit: Map) -> None:
        super().__init__(clip)
        self.edit = edit

    def text_embeds(self, prompts: Prompts, *, normalize_each: bool = True) -> np.ndarray:
        """Return edited embeddings, float32 [n_labels, d_embed], normalized."""
        return unit(self.edit(super().text_embeds(prompts, normalize_each=normalize_each)))


def unit(embeds: np.ndarray) -> np.ndarray:
    """Return the rows at length 1, float32; a row of zeros stays one: it has the same cosine with every label."""
    norms = np.linalg.norm(embeds, axis=1, keepdims=True)
    return (embeds / np.where(norms > 0, norms, 1)).astype(np.float32)
