"""The registry: the file that ships, files of users, and what the hub says of every row."""

from __future__ import annotations

import copy
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

pytest.importorskip("torch")
from typer.testing import CliRunner

from defense.cli import app
from defense.errors import CheckpointError
from defense.importers import FORMATS
from defense.store import registry
from defense.store.hub import Hub

from ..hub_server import FakeHub

STORE = resources.files("defense.store")
SHIPPED = json.loads(STORE.joinpath("registry.json").read_text(encoding="utf-8"))
SCHEMA = json.loads(STORE.joinpath("registry.schema.json").read_text(encoding="utf-8"))
POINT = "blocks.1.hook_resid_post"
SAE = {"repo": "org/sae", "file": "weights.pt", "format": "prisma", "hook_point": POINT, "tokens": "cls"}
WEIGHTS = bytes(5000)


def written(tmp_path: Path, *hosts: dict[str, Any]) -> Path:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"schema": 1, "hosts": list(hosts)}))
    return path


def is_valid(value: Any) -> bool:
    return jsonschema.Draft202012Validator(SCHEMA).is_valid(value)


def test_what_ships_has_the_form_of_its_schema_and_can_be_read() -> None:
    jsonschema.validate(SHIPPED, SCHEMA)
    rows = registry.rows()
    assert {sae.format for row in rows for sae in row.saes} <= set(FORMATS)
    assert len({(row.model, row.pretrained) for row in rows}) == len(rows)
    datacomp = registry.row_of(rows, "ViT-B-32", "datacomp_xl_s13b_b90k")
    assert datacomp is not None
    assert len(datacomp.candidates()) == 4
    openai = registry.row_of(rows, "ViT-B-32-quickgelu", "openai")
    assert openai is not None
    assert openai.candidates() == ()


def test_no_fact_that_nobody_checked_passes_for_checked() -> None:
    """Nobody has seen these files: a name is either unverified or not known, and so is every hash and commit."""
    for row in registry.rows():
        for sae in row.saes:
            assert sae.sha256 is None
            assert sae.revision is None
            assert sae.file is None or "file" in sae.unverified
            assert sae.hook_point is None or "hook_point" in sae.unverified


def _places(value: Any) -> list[tuple[Any, Any]]:
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *_places(value[key])]]


WHOLE = {
    "schema": 1,
    "hosts": [
        {
            "model": "ViT-B-32", "pretrained": "openai", "sha256": "ab" * 32, "quick_gelu": True, "note": "n",
            "unverified": ["fit"],
            "defense": {
                "repo": "org/d", "file": "f", "revision": "0" * 40, "sha256": "ab" * 32, "license": "MIT",
                "figures": {"n": 1}, "unverified": ["figures"], "note": "n",
            },
            "saes": [
                {**SAE, "revision": "0" * 40, "sha256": "cd" * 32, "license": "MIT", "unverified": [], "note": "n"}
            ],
            "fit": {"hook_points": [POINT], "n_pictures": 3, "clean_budget": 0.1, "steps": 5},
            "train": {
                "block": 3, "d_sae": 8, "k": 2, "variant": "topk", "tokens": "cls", "n_tokens": 9, "batch": 3,
                "text_rate": 0.5,
            },
        }
    ],
}  # fmt: skip


@pytest.mark.parametrize("wrong", [0.25, {"x": 1}, [1.5], True], ids=str)
def test_a_value_of_another_type_is_refused_by_the_schema_and_by_the_reader(tmp_path: Path, wrong: Any) -> None:
    assert is_valid(WHOLE)
    path = tmp_path / "mine.json"
    n_refused = 0
    for number in range(len(_places(WHOLE))):
        changed = copy.deepcopy(WHOLE)
        container, key = _places(changed)[number]
        container[key] = wrong
        path.write_text(json.dumps(changed))
        if not is_valid(changed):
            n_refused += 1
            with pytest.raises(CheckpointError):
                registry.read(path)
    assert n_refused > 20


def test_what_is_left_out_is_not_known_and_what_is_too_much_is_refused(tmp_path: Path) -> None:
    rows = registry.read(written(tmp_path, {"model": "ViT-X"}))
    assert rows[0].sha256 is rows[0].defense is rows[0].quick_gelu is None
    assert rows[0].candidates() == ()
    for host, message in (
        ({"pretrained": "x"}, "host 1 is no object with 'model'"),
        ({"model": "ViT-X", "licence": "MIT"}, r"host 1 has the keys .*'licence'"),
        ({"model": "ViT-X", "saes": [{"file": "x"}]}, r"host 1 \(ViT-X\): SAE 1 is no object with 'repo'"),
        ({"model": "ViT-X", "unverified": ["all"]}, "unverified names 'all'"),
        ({"model": "ViT-X", "fit": {"hook_points": [], "folds": 2}}, "fit has the keys"),
    ):
        with pytest.raises(CheckpointError, match=message):
            registry.read(written(tmp_path, host))
        assert not is_valid({"schema": 1, "hosts": [host]}) or "unverified" in host


def test_a_users_rows_come_first_and_a_fingerprint_before_a_name(hub: FakeHub, tmp_path: Path) -> None:
    mine = {"model": "ViT-B-32", "pretrained": "openai", "note": "mine"}
    rows = registry.rows(written(tmp_path, mine, {"model": "tuned", "sha256": "ab" * 32, "note": "tuned"}))
    assert registry.row_of(rows, "ViT-B-32", "openai").note == "mine"
    assert registry.row_of(rows, "ViT-B-32", "/home/me/tuned.pt", "ab" * 32).note == "tuned"
    assert registry.row_of(rows, "tuned", None, "cd" * 32) is None
    hub.add("org/registry", {"registry.json": written(tmp_path, mine).read_bytes()})
    assert registry.rows("hf://org/registry")[0].note == "mine"
    with pytest.raises(CheckpointError, match="is not there; a registry is a JSON file, or a hub id"):
        registry.rows(tmp_path / "nowhere.json")


def test_an_sae_is_tried_only_where_its_file_is_known(tmp_path: Path) -> None:
    saes = [{**SAE, "file": None}, {**SAE, "repo": None}, SAE, {**SAE, "hook_point": "blocks.2.hook_resid_post"}]
    (row,) = registry.read(written(tmp_path, {"model": "m", "saes": saes, "fit": {"hook_points": [POINT]}}))
    assert [sae.repo for sae in row.candidates()] == ["org/sae"]
    assert row.candidates()[0].file == "weights.pt"


def test_the_hub_is_asked_about_every_row_and_missing_hashes_are_printed(hub: FakeHub, tmp_path: Path) -> None:
    commit = hub.add("org/sae", {"weights.pt": WEIGHTS, "config.json": b"{}"})
    digest = hashlib.sha256(WEIGHTS).hexdigest()
    manifest = b'{"files": {}}'
    at = hub.add("org/defense", {"manifest.json": manifest})
    saes = [
        SAE,
        {**SAE, "revision": commit, "sha256": digest},
        {**SAE, "sha256": "ab" * 32},
        {**SAE, "file": "other.pt"},
        {**SAE, "file": None},
        {**SAE, "repo": "org/gone"},
        {**SAE, "repo": None, "note": "Somewhere."},
    ]
    host = {"model": "m", "saes": saes, "defense": {"repo": "org/defense"}}
    found = list(registry.verify(registry.read(written(tmp_path, host)), Hub()))
    assert [finding.is_wrong for finding in found] == [False, False, False, True, True, False, True, False]
    texts = [finding.text for finding in found]
    assert f"revision {at} (not in the row); sha256 {hashlib.sha256(manifest).hexdigest()} (not in the row)" in texts[0]
    assert (
        f"weights.pt, 5 kB is there; revision {commit} (not in the row); sha256 {digest} (not in the row)" in texts[1]
    )
    assert texts[2].endswith(f"weights.pt, 5 kB is there; sha256 {digest}")
    assert f"sha256 is {digest}, the row says abab" in texts[3]
    assert "other.pt is not there; it holds config.json, weights.pt" in texts[4]
    assert "which file is not known; it holds config.json, weights.pt" in texts[5]
    assert "there is no repository org/gone" in texts[6]
    assert texts[7] == "nobody knows its repository. Somewhere."
    assert not [line for line in hub.bodies() if "weights" in line or "large" in line]


def test_the_command_lists_rows_with_their_doubts_and_verifies_them(hub: FakeHub, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(registry, "FILE", "nothing.json")  # the rows that ship are not on this hub
    monkeypatch.setattr(registry.resources, "files", lambda _: tmp_path)
    (tmp_path / "nothing.json").write_text('{"schema": 1, "hosts": []}')
    sae = {**SAE, "unverified": ["file"]}
    mine = written(tmp_path, {"model": "ViT-X", "pretrained": "t", "saes": [sae], "unverified": ["pretrained"]})
    result = CliRunner().invoke(app, ["protect", "--list", "--registry", str(mine)])
    assert result.exit_code == 0
    assert "ViT-X, t  (unverified: pretrained)" in result.stdout
    assert "sha256 not known" in result.stdout
    assert "org/sae/weights.pt@not known  (unverified: file)" in result.stdout
    assert "not used: too little is known of it" in result.stdout
    assert hub.asked == []  # a list asks nobody
    hub.add("org/sae", {"weights.pt": WEIGHTS})
    result = CliRunner().invoke(app, ["protect", "--verify-registry", "--registry", str(mine)])
    assert result.exit_code == 0
    assert f"ok    ViT-X, t: SAE at {POINT}: hf://org/sae/weights.pt" in result.stdout
    hub.repos.clear()
    result = CliRunner().invoke(app, ["protect", "--verify-registry", "--registry", str(mine)])
    assert result.exit_code == 5
    assert "WRONG ViT-X, t" in result.stdout
    assert "1 rows are wrong, or could not be looked up" in result.stderr
