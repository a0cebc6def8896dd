"""Texts for the tokenizer and the labels, and what ids they have."""

from __future__ import annotations

import numpy as np

from defense.data.labels import Prompts, resolve_templates
from defense.data.tokenizer import ClipTokenizer

START, END = 49406, 49407
LONG_LABEL = " ".join(f"w{n}" for n in range(60))  # 120 tokens


def text_ids(text: str) -> list[int]:
    (row,) = ClipTokenizer()([text])
    return row[1 : int(np.argmax(row == END))].tolist()


def prompts(*labels: str, templates: str | list[str] = "simple") -> Prompts:
    return Prompts(tuple(labels), resolve_templates(templates))
