"""The text tower, for bundles with an open vocabulary.

input_ids int64 [n_texts, context_length] --text tower--> text_embeds [n_texts, d_embed], normalized

A graph of its own: pictures and texts come at different times and in different numbers.
"""

from __future__ import annotations

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from defense.classify.classifier import RobustClassifier
from defense.data.tokenizer import ClipTokenizer
from defense.errors import ConfigError
from defense.export.vision import trace

_TRACED_TEXTS = 3


class TextGraph(nn.Module):
    """From input_ids to text_embeds.

    Raises:
        ConfigError: The host does not use CLIP's own tokenizer, which is the one that bundles bring.
    """

    def __init__(self, clf: RobustClassifier) -> None:
        super().__init__()
        if not isinstance(clf.clip.tokenizer, ClipTokenizer):
            raise ConfigError(
                f"this host's tokenizer is {type(clf.clip.tokenizer).__name__}; a bundle can bring CLIP's own alone. "
                "Leave --text out: labels are baked in, and embeddings of others can be handed over"
            )
        self.model = clf.clip.model  # its weights are the graph's
        self.tower = clf.clip.text_tower
        self.context_length = clf.clip.tokenizer.context_length

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return text_embeds [n_texts, d_embed], normalized."""
        return F.normalize(self.tower.encode(input_ids), dim=-1)


def trace_text(graph: TextGraph) -> ir.Model:
    """Return the graph in ONNX, from input_ids to text_embeds for any number of texts."""
    input_ids = torch.from_numpy(ClipTokenizer(graph.context_length)(["a", "b", "c"][:_TRACED_TEXTS]))
    return trace(graph, {"input_ids": input_ids}, {"input_ids": "n_texts"}, ("text_embeds",))
