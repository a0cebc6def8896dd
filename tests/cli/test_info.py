"""`defense info`: what it says of what is on disk."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("open_clip")

from ..command import run
from ..conftest import random_sae


def test_info_shows_what_a_defense_was_made_with_in_lines_that_can_be_read(tmp_path, defense_folder):
    from defense.store import defenses

    deep: dict = {}
    for _ in range(40):
        deep = {"in": deep}
    made_with = {
        "labels": [f"label {i}" for i in range(1000)], "cross_validation": {"clean": {"plain": 1 / 3}}, "sweep": [],
        "saes": [{"seed": 1}, {"seed": 2}], "said": "x\nlicense     MIT", "none": None, "deep": deep,
    }  # fmt: skip
    made = replace(defenses.load(defense_folder), provenance=made_with)
    code, out, _ = run("info", defenses.save(made, tmp_path / "made"))
    assert code == 0
    lines = out.splitlines()
    assert f"labels      {', '.join(f'label {i}' for i in range(8))}, ... (1,000 in all)" in lines
    assert lines[lines.index("cross_validation") + 1 :][:2] == ["  clean", "    plain   0.3333"]
    assert [line for line in lines if line.startswith("  seed")] == ["  seed      1", "  seed      2"]
    assert "none        -" in lines
    assert sum(line.startswith("license") for line in lines) == 1, "a line break is no line of ours"
    assert max(map(len, lines)) < 400


def test_info_check_of_an_sae_is_its_golden_activations_and_needs_no_host(tmp_path):
    from defense.store.checkpoint import Checkpoint, save

    folder = save(Checkpoint(random_sae(), "blocks.1.hook_resid_post"), tmp_path / "sae")
    code, out, _ = run("info", folder, "--check")
    assert code == 0
    assert "golden      acts and reconstructions reproduced" in out
    code, out, err = run("info", folder, "--check", "--model", "ViT-B-32")
    assert (code, out) == (2, "")
    assert "are for a defense" in err


def test_info_of_a_folder_that_is_none_of_the_three_names_all(tmp_path, monkeypatch):
    (tmp_path / "photo").mkdir()
    code, out, err = run("info", tmp_path / "photo")
    assert (code, out) == (5, "")
    assert all(f"`defense {command}`" in err for command in ("fit", "export", "train"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("info", "photo")
    assert code == 0, "a name that ships comes before a folder that is called so"
    assert out.startswith("host        photo")
