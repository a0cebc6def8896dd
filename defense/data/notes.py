"""What there is to say about pictures that can be read and whose answer is doubtful all the same."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Iterable

log = logging.getLogger(__name__)

NOTES = {
    "animated": "only its first frame is read",
    "exif_ignored": "its EXIF data is damaged, so it may lie on its side",
    "tiny": "it is fewer than 16 pixels wide or high",
    "invisible": "nothing in it can be seen: it is transparent, or of the color of the background",
    "dark": "its 16-bit samples use less than a quarter of their range: 8 to 14 bits, perhaps, which want scaling",
    "zeros": "the last part of its file is zeros: one flat color, or never downloaded",
    "uneven": "its compressed data are more than its pixels take, or lack scans; a part of it may be garbage",
}
"""Warnings of `images.decode`, in words."""


class NoteLog:
    """Logs each kind of note once, with the first picture that it is about, and counts the others.

    Attributes:
        counts: How many pictures each kind is about.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def add(self, name: object, notes: Iterable[str]) -> None:
        """Take in the notes on a picture; `name` is what to call it, shortened."""
        for note in notes:
            with self._lock:
                self.counts[note] += 1
                is_first = self.counts[note] == 1
            if is_first:
                log.warning("%.100s: %s (%s); said once, more of this kind are only counted", name, NOTES[note], note)
