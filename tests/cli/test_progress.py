"""How far a long command is: a bar per stage on a terminal, plain lines elsewhere, the time left on both."""

from __future__ import annotations

import io
import itertools

import pytest
from rich.console import Console

pytest.importorskip("torch", reason="a fit takes torch")
from defense.cli import progress
from defense.cli.progress import shown_progress


@pytest.fixture
def on(monkeypatch):
    """Return what gives stderr's text after a stage of `total` steps, of which half are taken."""

    def run(*, is_terminal: bool, total: int = 200) -> str:
        console = Console(file=io.StringIO(), force_terminal=is_terminal, width=120, highlight=False)
        monkeypatch.setattr(progress, "stderr", console)
        monkeypatch.setattr("defense.cli.common.stderr", console)
        with shown_progress() as shown:
            with shown.within("fold 1 of 3, ").stage("joint step", total) as advance:
                for _ in range(total // 2):
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
    clock = itertools.count(step=4.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    lines = on(is_terminal=False).splitlines()
    assert lines[0] == "fold 1 of 3, joint step"
    assert lines[-1] == "blocks.9: 12 latents"
    told = lines[1:-1]
    assert 10 <= len(told) <= 14, "every half minute of 400 seconds"
    assert told[0] == "fold 1 of 3, joint step: 8 of 200, about 13 min left"
    assert all("\r" not in line and "\x1b" not in line for line in lines)


@pytest.mark.parametrize(
    ("seconds", "said"), [(4, "0 s"), (44, "40 s"), (89, "90 s"), (100, "2 min"), (4000, "67 min")]
)
def test_a_time_is_said_as_people_say_it(seconds, said):
    assert progress._lasting(seconds) == said
