"""The benchmark of units: every kind at every block, and tables that say what was found."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("open_clip")

from defense.benchmarks import units


def test_every_kind_is_measured_at_every_block_and_shown(tmp_path, capsys):
    assert units.main(["--out", str(tmp_path / "u.json"), "--n", "8", "--n-sampled", "2", "--n-steered", "2"]) == 0
    shown = capsys.readouterr().out
    result = json.loads((tmp_path / "u.json").read_text(encoding="utf-8"))
    assert len(result["blocks"]) == 3
    for block in result["blocks"]:
        assert block["steerability"]["kinds"].keys() == {"latents", "neurons", "channels", "random"}
        assert all(kind["n"] == 2 for kind in block["steerability"]["kinds"].values())
        assert block["monosemanticity"]["kinds"]["neurons"]["n"] == 768
    assert shown.count("| MLP neurons | 2 |") == 3
    assert "of 112 words" in shown


def test_what_does_not_separate_is_said():
    kind = {"n": 10, "share": [0.5], "low": [0.2], "high": [0.8], "n_words_reached": [3]}
    swept = {"strengths": [1.0], "kinds": {"latents": kind}, "strength": 1.0, "n_words": 9}
    likeness = {"all_pairs": 0.1, "kinds": {"latents": {"n": 0}}}
    block = {"hook_point": "blocks.2.hook_resid_post", "d_sae": 10, "monosemanticity": likeness}
    for separates, said in ((True, "intervals do not overlap"), (False, "intervals overlap")):
        text = units.table({"blocks": [{**block, "steerability": {**swept, "separates": separates}}]})
        assert said in text
        assert "50 (20-80), 3" in text
