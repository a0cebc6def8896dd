"""Notes on pictures: logged once a kind, counted."""

from __future__ import annotations

import logging

from defense.data.notes import NOTES, NoteLog


def test_every_kind_of_note_is_logged_once_and_counted(caplog):
    notes = NoteLog()
    with caplog.at_level(logging.WARNING):
        for name in ("a.png", "b.png"):
            notes.add(name, ("tiny", "dark"))
    assert [record.getMessage().split(":")[0] for record in caplog.records] == ["a.png", "a.png"]
    assert notes.counts == {"tiny": 2, "dark": 2}
    assert set(NOTES) >= {"animated", "exif_ignored", "tiny", "invisible", "dark", "zeros"}
