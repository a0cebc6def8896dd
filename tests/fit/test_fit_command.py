"""`defense fit`, from a folder of pictures to a defense that can be used."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
from PIL import Image
from typer.testing import CliRunner

from defense.cli import app
from defense.errors import MissingDependencyError
from defense.fit import report
from defense.hosts.shipped import EMBEDDED, MODELS
from defense.store import checkpoint, defenses
from defense.store.checkpoint import Checkpoint

from .. import command
from ..conftest import D_SAE, random_sae
from .plans import EASY, POINT


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(14):
        Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saes") / "sae"
    return checkpoint.save(Checkpoint(random_sae(act="topk", k=8), POINT.format(1), "tiny", False), folder)


@pytest.fixture
def run(tiny_folder, sae_folder, monkeypatch, open_gates):
    """Run the command on the tiny CLIP, with a quick fit that gains something on noise."""
    monkeypatch.setattr(
        "defense.fit.config.FitConfig", lambda **fields: replace(EASY, **{**fields, "clean_budget": 1.0})
    )

    def run(*arguments) -> tuple[int, str, str]:
        base = ["fit", "--model", f"local-dir:{tiny_folder}", "--folds", "2"]
        return command.run(*base, *arguments)

    return run


LABELS = ("--labels", "dog,cat,red fish,apple")


def test_a_folder_of_pictures_becomes_a_defense_that_can_be_used(run, pictures, sae_folder, tmp_path):
    mixed = Path(shutil.copytree(pictures, tmp_path / "pictures"))
    (mixed / "broken.png").write_bytes(b"<html>not found</html>")
    out = tmp_path / "defense"
    code, text, talk = run(out, mixed, "--sae", sae_folder, *LABELS, "--seed", "1", "--name", "words")
    assert code == 4, talk
    assert "broken.png" in talk
    assert "latents, edit scale, tokens all" in text
    assert "attacked" in text
    defense = defenses.load(out)
    assert defense.golden is not None
    assert defense.sets == ("words",)
    assert defense.provenance["pictures"]["n_unreadable"] == 1
    checks = CliRunner().invoke(app, ["info", str(out), "--check"])
    assert checks.exit_code == 0, checks.stderr
    assert "golden      reproduced" in checks.stdout
    answer = CliRunner().invoke(app, ["classify", str(pictures / "00.png"), *LABELS, "--defense", str(out)])
    assert answer.exit_code == 0
    assert "defended" in answer.stdout
    code, again, _ = run(out, mixed, "--sae", sae_folder, *LABELS, "--seed", "1", "--name", "words")
    assert defenses.load(out).sites[0].sets == defense.sites[0].sets, "the same seed gives the same S, over the old one"
    assert again == text


def test_how_stable_the_latents_are_is_printed_reported_and_kept(run, pictures, sae_folder, tmp_path):
    out, told = tmp_path / "defense", tmp_path / "report"
    arguments = (out, pictures, "--sae", sae_folder, *LABELS, "--no-calibrate")
    code, text, talk = run(*arguments, "--bootstraps", "2", "--report", told)
    assert code == 0, talk
    (line,) = [line for line in text.splitlines() if line.startswith("stability")]
    assert "of 2 runs on pictures drawn anew" in line
    (latent_set,) = defenses.load(out).sites[0].sets
    page = (told / "report.md").read_text(encoding="utf-8")
    assert "| latent | gain | contrast | effect | stability |" in page
    assert line.removeprefix("stability").strip() in page
    assert set(latent_set.scores["stability"]) <= {0, 0.5, 1}
    n_stable = sum(share >= 0.8 for share in latent_set.scores["stability"])
    assert f" {n_stable} of {len(latent_set.latents)} latents" in line
    code, text, _ = run(*arguments)
    assert code == 0
    assert "stability" not in text
    code, _, err = run(*arguments, "--bootstraps", "1")
    assert code == 2
    assert "two or more" in err


def test_patches_of_high_norm_are_spared_where_that_is_asked_for(run, pictures, sae_folder, tmp_path):
    out = tmp_path / "defense"
    code, text, talk = run(out, pictures, "--sae", sae_folder, *LABELS, "--folds", "0", "--spare-high-norm")
    assert code == 0, talk
    assert "tokens all, but for patches of high norm" in text
    assert defenses.load(out).sites[0].sets[0].spares_high_norm
    told = CliRunner().invoke(app, ["info", str(out), "--check"])
    assert told.exit_code == 0, told.stderr
    assert "tokens all, but for patches of high norm" in told.stdout


def test_groups_come_from_a_csv_file(run, pictures, sae_folder, tmp_path):
    rows = [f"{i:02d}.png,{'ab'[i % 2]},{i // 2 % 2}" for i in range(14)]
    (tmp_path / "rows.csv").write_text("path,label,place\n" + "\n".join(rows))
    arguments = ("--task", "group", "--classes", "a,b", "--metadata", tmp_path / "rows.csv", "--sae", sae_folder)
    out = tmp_path / "defense"
    code, text, talk = run(out, pictures, *arguments, "--attribute-column", "place")
    assert code == 0, talk
    assert "worst" in text
    assert "rows.csv has no column 'split'" in " ".join(talk.split())
    assert defenses.load(out).provenance["pictures"]["groups"] == {"a, 0": 4, "a, 1": 3, "b, 0": 4, "b, 1": 3}
    code, _, talk = run(tmp_path / "other", pictures, *arguments, "--attribute-column", "background")
    assert code == 2
    assert "no column 'background'; it has 'path', 'label', 'place'" in talk
    assert not (tmp_path / "other").exists()


def test_a_topk_rule_is_calibrated_and_stored_slim_by_default(run, pictures, sae_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("defense.fit.shipping.LEAST_AGREEMENT", 0.0)
    out = tmp_path / "defense"
    code, text, talk = run(out, pictures, "--sae", sae_folder, *LABELS)
    assert code == 0, talk
    assert "calibrated" in text
    defense = defenses.load(out)
    assert defense.sites[0].sae_config.act == "batchtopk"
    assert defense.sites[0].part.latents == tuple(sorted(defense.sites[0].sets[0].latents))
    assert f"of {D_SAE} latents are stored" in text
    assert defense.golden is not None
    assert defense.provenance["calibration"]["n_held_out"] == 14
    code, text, _ = run(out, pictures, "--sae", sae_folder, *LABELS, "--no-calibrate")
    assert code == 0
    assert defenses.load(out).sites[0].sae_config.act == "topk"
    assert defenses.load(out).sites[0].part is None


def test_nothing_that_helps_leaves_no_artifact(run, pictures, sae_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("defense.fit.config.FitConfig", lambda **fields: replace(EASY, **{**fields, "sparsity": 100.0}))
    code, _, talk = run(tmp_path / "defense", pictures, "--sae", sae_folder, *LABELS)
    assert code == 2
    assert "nothing helps" in talk
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--sae is missing"),
        (["--sae", "SAE"], "no pictures"),
        (["PICTURES", "--sae", "SAE", "--classes", "a,b"], "--task group"),
        (["PICTURES", "--sae", "SAE", "--spurious", "a,b"], "--task group"),
        (["PICTURES", "--sae", "SAE", "--task", "group"], "--classes"),
        (["PICTURES", "--sae", "SAE", "--task", "group", "--classes", "a,b"], "needs either --metadata"),
        (["PICTURES", "--sae", "SAE", "--labels", "dog,dog"], "dog"),
        (["PICTURES", "--sae", "SAE", "--labels", "a,b", "--folds", "40"], "40 folds"),
        (["PICTURES", "--sae", "PICTURES", "--labels", "a,b"], "sae.json is missing"),
        (["PICTURES", "--sae", "SAE", "--sae", "SAE", "--labels", "a,b"], "one SAE per block"),
        (["PICTURES", "--sae", "SAE", "--labels", "a,b", "--sweep", "--scope", "cls"], "leave out --scope"),
        (["PICTURES", "--sae", "SAE", "--labels", "a,b", "--attribute-column", "place"], "a column of --metadata"),
        (
            ["PICTURES", "--sae", "SAE", "--task", "group", "--classes", "a", "--spurious", "b,c"],
            "give two or more",
        ),
    ],
    ids=[
        "sae", "pictures", "classes", "spurious", "group", "sourceless", "labels", "folds", "no-sae", "twice", "scope",
        "column", "one-class",
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_and_nothing_is_written(run, pictures, sae_folder, tmp_path, arguments, message):
    named = {"SAE": sae_folder, "PICTURES": pictures}
    code, _, talk = run(tmp_path / "defense", *(named.get(argument, argument) for argument in arguments))
    assert code in (2, 5)
    assert message in " ".join(talk.replace("│", " ").split())
    assert list(tmp_path.iterdir()) == []


def test_a_calibration_that_fails_leaves_the_exact_defense(run, pictures, sae_folder, tmp_path, monkeypatch):
    from defense.errors import CalibrationError

    def refuse(*_arguments, **_options):
        raise CalibrationError(0.5, 0.99, 14)

    monkeypatch.setattr("defense.fit.shipping.calibrated", refuse)
    out, report = tmp_path / "defense", tmp_path / "report"
    code, _, talk = run(out, pictures, "--sae", sae_folder, *LABELS, "--calibrate", "--report", report)
    assert code == 2
    assert "holds the defense with its exact rule" in talk
    assert defenses.load(out).sites[0].sae_config.act == "topk"
    assert (report / "report.md").is_file()
    code, text, talk = run(out, pictures, "--sae", sae_folder, *LABELS)
    assert code == 0, "by default what cannot be calibrated is stored whole"
    assert "calibrated" not in text
    assert "stored whole, with its TopK rule: thresholds give 50.00% of 14 held-out pictures" in talk
    assert "stored whole" in defenses.load(out).provenance["stored_whole"]


def test_calibration_without_a_topk_rule_is_refused_before_anything_is_read(run, tmp_path):
    folder = checkpoint.save(Checkpoint(random_sae(), POINT.format(1), "tiny", False), tmp_path / "sae")
    code, _, talk = run(tmp_path / "defense", "nowhere", "--sae", folder, *LABELS, "--calibrate")
    assert code == 2
    assert "--calibrate is for SAEs with a topk rule" in " ".join(talk.replace("│", " ").split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["PICTURES", "--sae", "SAE", "--sae", "SAE"], "one SAE per block"),
        (["PICTURES", "--sae", "SAE", "--template", "no braces"], "a literal {}"),
        (["nowhere", "--sae", "SAE"], "nowhere is not there"),
        (["PICTURES", "--sae", "SAE", "--labels", "dog"], "give two or more"),
        (["PICTURES", "--sae", "SAE", "--task", "group", "--classes", "a,b", "--spurious", "c"], "give two or more"),
        (
            ["PICTURES", "--sae", "SAE", "--task", "group", "--classes", "a,b", "--metadata", "nowhere.csv"],
            "cannot be read as a csv file",
        ),
    ],
    ids=["twice", "template", "pictures", "one-label", "one-prompt", "metadata"],
)
def test_what_cannot_work_is_refused_before_the_clip_is_loaded(
    run, pictures, sae_folder, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.setattr("defense.hosts.clip.load_clip", lambda *_, **__: pytest.fail("it was loaded"))
    named = {"SAE": sae_folder, "PICTURES": pictures}
    code, _, talk = run(tmp_path / "defense", *(named.get(argument, argument) for argument in arguments))
    assert code == 2
    assert message in " ".join(talk.replace("│", " ").split())


def test_a_report_is_not_written_into_the_defense(run, pictures, sae_folder, tmp_path):
    (tmp_path / "defense").mkdir()
    for target in (tmp_path / "defense", tmp_path / "defense" / "report"):
        code, _, talk = run(tmp_path / "defense", pictures, "--sae", sae_folder, *LABELS, "--report", target)
        assert code == 2
        assert "which holds nothing else" in " ".join(talk.replace("│", " ").split())
        assert list((tmp_path / "defense").iterdir()) == []


def test_a_target_that_cannot_be_replaced_is_refused_before_anything_is_read(run, sae_folder, tmp_path):
    (tmp_path / "defense").mkdir()
    (tmp_path / "defense" / "notes.txt").write_text("mine")
    code, _, talk = run(tmp_path / "defense", "nowhere", "--sae", "nowhere", *LABELS)
    assert code == 2
    assert "no defense" in talk
    code, _, talk = run(tmp_path / "a" / "b", "nowhere", "--sae", "nowhere", *LABELS)
    assert code == 2
    assert "make it first" in talk


def test_matplotlib_is_asked_for_only_with_a_report(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[bench\]"):
        report.check_target(tmp_path / "report")


def test_info_describes_an_sae_and_notices_a_changed_byte(sae_folder, tmp_path):
    result = CliRunner().invoke(app, ["info", str(sae_folder)])
    assert result.exit_code == 0
    assert f"d_sae       {D_SAE}" in result.stdout
    assert "hook point  blocks.1.hook_resid_post" in result.stdout
    pinned = CliRunner().invoke(app, ["info", str(sae_folder), "--expect", "0" * 64])
    assert pinned.exit_code == 5
    damaged = Path(shutil.copytree(sae_folder, tmp_path / "sae"))
    data = bytearray((damaged / "sae.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "sae.safetensors").write_bytes(data)
    result = CliRunner().invoke(app, ["info", str(damaged)])
    assert result.exit_code == 5
    assert "sae.safetensors" in result.stderr


def test_labels_that_nobody_gave_are_those_of_the_model():
    from defense.cli.fit import _answers
    from defense.data.labels import common_nouns
    from defense.world.scenes import OBJECTS

    assert _answers("text", None, None, None, "simple", own=MODELS[EMBEDDED]) == tuple(OBJECTS)
    assert _answers("text", None, None, None, "simple", own=None) == common_nouns()
    assert _answers("text", "a,b", None, None, "simple", own=None) == ("a", "b")
