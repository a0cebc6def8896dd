"""How far a long command is: a bar per stage on a terminal, plain lines elsewhere, the time left on both."""

from __future__ import annotations

import io
import time

import pytest
from rich.console import Console

from defense.cli import progress


@pytest.fixture
def on(monkeypatch):
    """Return what gives stderr's text after a stage of `total` steps, of which half are taken."""

    def run(*, is_terminal: bool, total: int = 200, after=lambda: None) -> str:
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, highlight=False)
        monkeypatch.setattr(progress, "stderr", console)
        monkeypatch.setattr("defense.cli.common.stderr", console)
        with progress.stages() as shown:
            with shown.within("fold 1 of 3, ").stage("joint step", total) as advance:
                for _ in range(total // 2):
                    after()
                    advance(1)
                if is_terminal:
                    shown.bars.refresh()
            shown.line("blocks.9: 12 latents")
        return console.file.getvalue()

    return run


def test_a_terminal_shows_a_bar_with_steps_and_time(on):
    text = on(is_terminal=True)
    assert "fold 1 of 3, joint step" in text
    assert "100/200" in text
    assert "left" in text
    assert "blocks.9: 12 latents" in text


def test_elsewhere_lines_say_how_much_is_left_and_not_too_often(on, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def after() -> None:
        now[0] += 4

    lines = on(is_terminal=False, after=after).splitlines()
    assert lines[0] == "fold 1 of 3, joint step: 200"
    assert lines[-1] == "blocks.9: 12 latents"
    told = lines[1:-1]
    assert 10 <= len(told) <= 14, "every half minute of 400 seconds"
    assert told[0] == "fold 1 of 3, joint step: 8 of 200, about 13 min left"
    assert all("\r" not in line and "\x1b" not in line for line in lines)
