"""Labels that name text: with them reading is the task, which a defense against words takes away."""

from __future__ import annotations

import re
from collections.abc import Sequence

_HEADS = frozenset((
    "banner", "barcode", "billboard", "caption", "certificate", "digit", "document", "form", "graffiti", "headline",
    "invoice", "invitation", "letter", "lettering", "letterhead", "license", "logo", "manuscript", "menu", "newspaper",
    "note", "number", "page", "passport", "placard", "poster", "receipt", "screenshot", "sentence", "sign", "signage",
    "signature", "slogan", "subtitle", "text", "ticket", "trademark", "watermark", "word", "writing",
))  # fmt: skip
"""Nouns that name text where a label ends with one: "stop sign", "license number"."""
_ANYWHERE = frozenset((
    "handwriting", "handwritten", "inscription", "lettering", "logo", "signage", "spelled", "text", "watermark", "word",
    "written",
))  # fmt: skip
"""Words that do wherever they stand in a label."""
_SHARE = 0.1
"""Of the labels; in longer lists a few such names do not make reading the task."""


def names_text(label: str) -> bool:
    """Whether a label names what is recognized by reading it: "stop sign", "handwritten note", "the word no"."""
    words = [_singular(word) for word in re.findall(r"[^\W\d_]+", label.lower())]
    return bool(words) and (words[-1] in _HEADS or not _ANYWHERE.isdisjoint(words))


def _singular(word: str) -> str:
    return word if word.removesuffix("s") not in _HEADS | _ANYWHERE else word.removesuffix("s")


def reading_labels(labels: Sequence[str]) -> list[str]:
    """Return the labels that name text where they are a tenth of all or more, else none."""
    found = [label for label in labels if names_text(label)]
    return found if len(found) >= _SHARE * len(labels) else []
