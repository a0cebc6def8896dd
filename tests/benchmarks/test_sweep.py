"""The published sweep: every placement is measured once, a run goes on, and the words say what is so."""

from __future__ import annotations

import json

import numpy as np
import pytest

pytest.importorskip("open_clip")
pytest.importorskip("matplotlib")
import torch

from defense.benchmarks import sweep
from defense.benchmarks.sweep import Settings, best_words, caption, figures_of, table
from defense.errors import ConfigError
from defense.fit.material import Groups, Pairs

SMALL = Settings(n_fit=12, n_test=10, steps=2, n_candidates=16)


@pytest.fixture
def one_block(monkeypatch):
    """The SAE of block 4 alone, the smallest one."""
    from defense.store import checkpoint

    saes = checkpoint.shipped_saes(sweep.MODELS[sweep.EMBEDDED])
    monkeypatch.setattr(sweep.checkpoint, "shipped_saes", lambda _: saes[-1:])


def test_every_placement_is_measured_once_and_a_run_goes_on(one_block, tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "s.json"), "--n-fit", "12", "--n-test", "10", "--steps", "2"]
    arguments += ["--n-candidates", "16"]
    lines: list[str] = []

    def stop(line: str) -> None:
        lines.append(line)
        if len(lines) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep.run(tmp_path / "s.json", SMALL, command="typed", report=stop)
    assert len(json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))["rows"]) == 3
    assert sweep.main(arguments) == 0
    captured = capsys.readouterr()
    result = json.loads((tmp_path / "s.json").read_text(encoding="utf-8"))
    places = [(row["task"], row["block"], row["scope"]) for row in result["rows"]]
    scopes = [(None, None), (4, "cls"), (4, "patch"), (4, "all")]
    assert places == [(task, *place) for task in ("text", "waterbirds") for place in scopes]
    assert len(captured.err.strip().splitlines()) == 5, "what was done is not done again"
    assert "| 4 | patch |" in captured.out
    assert "Percent of 10 drawn pictures" in captured.out
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="other settings"):
        sweep.run(tmp_path / "s.json", Settings(), command="typed")


def test_a_defense_is_measured_with_its_edit_and_none_without(one_block, monkeypatch, tmp_path):
    clip = sweep.load_clip(sweep.EMBEDDED)
    plain, *fitted = sweep.rows_of(clip, "text", SMALL, [])
    assert plain["n_latents"] == 0
    seen = []
    original = clip.edited.__func__
    monkeypatch.setattr(type(clip), "edited", lambda self, sites: seen.append(len(sites)) or original(self, sites))
    again = list(sweep.rows_of(clip, "text", SMALL, [("text", None, None), ("text", 4, "cls"), ("text", 4, "patch")]))
    assert again == fitted[-1:]
    assert seen[-1] == bool(fitted[-1]["n_latents"])


def test_figures_are_shares_of_what_is_right():
    pairs = Pairs(*(torch.zeros(4, 3, 1, 1),) * 3, torch.tensor([0, 1, 2, 3]), torch.tensor([1, 2, 3, 0]))
    answers = {"clean": np.array([0, 1, 2, 0]), "attacked": np.array([1, 2, 3, 3]), "neutral": np.zeros(4)}
    found = figures_of(pairs, answers)
    assert (found["clean"][0], found["attacked"][0]) == (0.75, 0.25)
    assert 0 < found["attacked"][1] < 0.25 < found["attacked"][2] < 1
    groups = Groups(torch.zeros(8, 3, 1, 1), torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]), torch.tensor([0, 0, 1, 1] * 2))
    found = figures_of(groups, {"picture": np.array([0, 0, 0, 1, 1, 1, 0, 0])})
    assert (found["average"][0], found["worst group"][0]) == (0.625, 0)


def row(task: str, block: int | None, scope: str | None, rises: list[float]) -> dict:
    kept, gained = sweep.TASKS[task]
    return {"task": task, "block": block, "scope": scope, "n_latents": 7, kept: [0.9, 0.8, 0.95], gained: rises}


def test_the_words_name_the_best_placement_and_those_that_cannot_be_told_from_it():
    rows = [
        row("text", None, None, [0.2, 0.15, 0.25]),
        row("text", 2, "all", [0.8, 0.75, 0.85]),
        row("text", 3, "all", [0.78, 0.72, 0.83]),
        row("text", 4, "cls", [0.3, 0.25, 0.35]),
        row("waterbirds", 4, "cls", [0.6, 0.55, 0.65]),
    ]
    result = {"rows": rows, "settings": vars(SMALL), "saes": {"2": 3072, "4": 1024}}
    said = best_words(result)
    assert "Best by attacked: block 2, all; its interval overlaps with that of block 3, all." in said
    assert "Best by worst group: block 4, cls." in said
    assert "3,072 at block 2" in caption(result)
    text = table(result)
    assert "| no defense | - | 20.0 (15.0-25.0), 7 | 90.0 (80.0-95.0) | - | - |" in text
    assert "| 4 | cls | 30.0 (25.0-35.0), 7 | 90.0 (80.0-95.0) | 60.0 (55.0-65.0), 7 | 90.0 (80.0-95.0) |" in text
