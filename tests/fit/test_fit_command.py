"""`defense fit`, from a folder of pictures to an artifact: sites in turn, cross-validation, sweep, report, command."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("open_clip")
import torch
from PIL import Image
from typer.testing import CliRunner

from defense.cli import app
from defense.errors import ConfigError, HookPointError, MissingDependencyError
from defense.fit import report
from defense.fit.config import FitConfig
from defense.fit.encoded import Encoded
from defense.fit.material import Groups, Material, Pairs
from defense.fit.placing import Fitted, Option, best, fit_defense, placements, sweep
from defense.fit.selecting import TextFit
from defense.fit.sites import SitePlan, fit_sites, plan_sites
from defense.fit.validation import CrossValidation, cross_validate, measure
from defense.hosts.clip import Clip, load_clip
from defense.hosts.families import tower_of
from defense.hosts.tower import VisionTower
from defense.store import checkpoint, defenses
from defense.store.checkpoint import Checkpoint

from ..conftest import D_SAE, random_sae

POINT = "blocks.{}.hook_resid_post"
EASY = FitConfig(n_candidates=40, steps=8, batch=8, clean_budget=1.0, sparsity=0.0)


@pytest.fixture
def clip(tiny_folder):
    return load_clip(f"local-dir:{tiny_folder}")


@pytest.fixture
def spec(clip, tiny_folder):
    return clip.id_as(f"local-dir:{tiny_folder}")


def plan(block: int = 1, config: FitConfig = EASY, **sae) -> SitePlan:
    return SitePlan(POINT.format(block), random_sae(block, **{"act": "topk", "k": 8, **sae}), config)


def noise(n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


TEXT_EMBEDS = torch.nn.functional.normalize(torch.randn(5, 32, generator=torch.Generator().manual_seed(9)), dim=1)


@pytest.fixture
def material(clip) -> Material:
    """Noise whose right answer is plain CLIP's."""
    clean = noise(18, 0)
    with torch.inference_mode():
        label = (clip.model.encode_image(clean) @ TEXT_EMBEDS.T).argmax(1).clone()
    pairs = Pairs(clean, noise(18, 1), noise(18, 2), label, (label + 1) % 5)
    return Material(pairs, np.zeros(18, dtype=np.int64), (), {"kind": "text", "n": 18})


# --- sites in turn ------------------------------------------------------------------------------------------------


def test_a_block_is_fitted_with_those_before_it_at_work(clip, material):
    plans = [plan(0), plan(1)]
    with torch.inference_mode():
        before = clip.model.encode_image(material.data.clean)
    first, second = fit_sites(Encoded(clip, material.data), plans, TEXT_EMBEDS, name="text")
    with torch.inference_mode():
        assert torch.equal(clip.model.encode_image(material.data.clean), before), "the host must be as it was"
    with clip.edited([first.site]):
        alone = TextFit(clip, POINT.format(1), plans[1].sae, material.data, TEXT_EMBEDS)
        ranking = alone.rank()
        assert alone.choose(ranking.order(), EASY).latents == second.selection.latents
    assert first.selection.latents
    np.testing.assert_array_equal(ranking.effect, second.ranking.effect)
    unaware = TextFit(clip, POINT.format(1), plans[1].sae, material.data, TEXT_EMBEDS).rank()
    assert not np.array_equal(unaware.effect, second.ranking.effect)


@pytest.mark.parametrize(("scope", "tokens"), [("cls", slice(0, 1)), ("patch", slice(1, None))])
def test_latents_are_ranked_by_the_tokens_that_are_edited(clip, material, scope, tokens):
    only = plan(1, replace(EASY, scope=scope), tokens=scope)
    (fitted,) = fit_sites(Encoded(clip, material.data), [only], TEXT_EMBEDS, name="text")
    fit = TextFit(clip, POINT.format(1), only.sae, material.data, TEXT_EMBEDS)
    acts = {
        name: only.sae.encode(fit.groups[name].resid[:, tokens]).sum((0, 1)) / 18 for name in ("attacked", "neutral")
    }
    want = (acts["attacked"] - acts["neutral"]).numpy()
    np.testing.assert_allclose(fitted.ranking.contrast, want, atol=1e-4)
    both = fit.rank("cls").effect + fit.rank("patch").effect
    np.testing.assert_allclose(both, fit.rank("all").effect, atol=1e-6)
    np.testing.assert_array_equal(fitted.ranking.effect, fit.rank(scope).effect)


def test_later_blocks_see_what_earlier_ones_do_as_stored(clip, material):
    fitted = fit_sites(Encoded(clip, material.data), [plan(0)], TEXT_EMBEDS, name="text", dtype=np.float16)
    stored = fitted[0].site.parameters["W_dec"]
    np.testing.assert_array_equal(stored, plan(0).sae.W_dec.numpy().astype(np.float16).astype(np.float32))


def test_two_saes_of_one_block_are_refused(clip, material):
    with pytest.raises(ConfigError, match="one SAE per block"):
        fit_sites(Encoded(clip, material.data), [plan(1), plan(1)], TEXT_EMBEDS, name="text")


def test_an_sae_is_held_against_the_host_and_the_scope(clip):
    def made(block: int = 1, provenance: dict | None = None, **sae) -> Checkpoint:
        return Checkpoint(random_sae(**sae), POINT.format(block), "tiny", provenance=provenance or {})

    assert plan_sites(clip, [made(tokens="cls")], EASY)[0].config.scope == "cls"
    assert plan_sites(clip, [made()], EASY, "patch")[0].config.scope == "patch"
    with pytest.raises(ConfigError, match="trained on cls tokens"):
        plan_sites(clip, [made(tokens="cls")], EASY, "all")
    with pytest.raises(HookPointError, match="only the CLS token"):
        plan_sites(clip, [made(2)], EASY, "patch")
    with pytest.raises(ConfigError, match=r"trained on the weights of tiny .*; this tower's are"):
        plan_sites(clip, [made(provenance={"host": {"sha256": "0" * 64}})], EASY)
    own = tower_of(clip.model).fingerprint()
    assert plan_sites(clip, [made(provenance={"host": {"sha256": own}})], EASY)


# --- measuring ----------------------------------------------------------------------------------------------------


def test_measures_are_fractions_of_the_pictures(clip, material):
    measured = measure(clip, material.data, TEXT_EMBEDS)
    with torch.inference_mode():
        attacked = (clip.model.encode_image(material.data.attacked) @ TEXT_EMBEDS.T).argmax(1)
    assert measured["clean"] == 1.0
    assert measured["attacked"] == pytest.approx(float((attacked == material.data.label).double().mean()))
    assert measured["attack_success"] == pytest.approx(float((attacked == material.data.word).double().mean()))


def test_group_measures_weigh_groups_alike(clip):
    pixel_values = noise(8, 3)
    with torch.inference_mode():
        answers = (clip.model.encode_image(pixel_values) @ TEXT_EMBEDS[:2].T).argmax(1)
    y = answers.clone()
    y[0] = 1 - y[0]
    a = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    measured = measure(clip, Groups(pixel_values, y, a), TEXT_EMBEDS[:2])
    groups = {key: value for key, value in measured.items() if "-" in key}
    assert measured["worst"] == min(groups.values()) < 1
    assert measured["average"] == pytest.approx(np.mean(list(groups.values())))


def test_cross_validation_measures_on_pictures_that_were_not_fitted_on(clip, material, monkeypatch):
    from defense.fit import sites, validation

    fitted_on, measured_on = [], []
    fit, measured = sites.fit_sites, validation.accuracies
    monkeypatch.setattr(
        validation, "fit_sites", lambda *args, **options: fitted_on.append(args[0].data) or fit(*args, **options)
    )
    monkeypatch.setattr(validation, "accuracies", lambda *args: measured_on.append(args[0]) or measured(*args))
    encoded = Encoded(clip, material.data)
    result = cross_validate(encoded, [plan()], material, TEXT_EMBEDS, folds=2, seed=0)
    for index, data in enumerate(fitted_on):
        seen = {tuple(picture.flatten()[:5].tolist()) for picture in data.clean}
        for held_out in measured_on[2 * index : 2 * index + 2]:
            assert len(held_out.label) == 9
            assert not seen & {tuple(picture.flatten()[:5].tolist()) for picture in held_out.clean}
    assert len(result.n_latents) == 2
    assert min(result.n_latents) > 0
    row = result.summary()["attacked"]
    assert row["change"] == pytest.approx(row["defended"] - row["plain"])
    assert result.gain == row["change"]
    assert result.loss == -result.summary()["clean"]["change"]
    with pytest.raises(ConfigError, match="two or more"):
        cross_validate(encoded, [plan()], material, TEXT_EMBEDS, folds=1, seed=0)


def folds(gain: float, loss: float) -> CrossValidation:
    plain = {"clean": 0.9, "neutral": 0.9, "attacked": 0.4, "attack_success": 0.5}
    defended = {**plain, "clean": 0.9 - loss, "attacked": 0.4 + gain}
    return CrossValidation((plain, plain), (defended, defended), (3, 4), (gain - 0.05, gain + 0.05))


def test_the_best_placement_gains_most_within_the_budget():
    options = [
        Option((plan(0),), folds(0.1, 0.0)),
        Option((plan(1),), folds(0.2, 0.005)),
        Option((plan(0), plan(1)), folds(0.3, 0.02)),
    ]
    assert best(options, 0.01) is options[1]
    assert best(options, 0.03) is options[2]
    assert options[2].name == "blocks 0 + 1, all"
    with pytest.raises(ConfigError, match=r"blocks 0 \+ 1, all: \+30\.0 for 2\.0"):
        best(options[2:], 0.01)


def test_a_sweep_tries_each_block_and_scope_that_means_something(clip):
    def names(*plans: SitePlan) -> list[tuple[tuple[int, ...], str]]:
        found = placements(tower_of(clip.model), plans)
        return [(tuple(int(p.hook_point.split(".")[1]) for p in group), group[0].config.scope) for group in found]

    assert names(plan(1)) == [((1,), "cls"), ((1,), "patch"), ((1,), "all")]
    assert names(plan(2)) == [((2,), "cls")], "after the last block only the CLS token matters"
    assert names(plan(1, tokens="patch")) == [((1,), "patch")]
    both = names(plan(0), plan(1))
    assert both[-3:] == [((0, 1), "cls"), ((0, 1), "patch"), ((0, 1), "all")]
    halved = replace(EASY, clean_budget=0.005)
    budgets = [
        {p.config.clean_budget for p in group}
        for group in placements(tower_of(clip.model), [plan(0, halved), plan(1, halved)])
    ]
    assert budgets == [{0.01}] * 6 + [{0.005}] * 3


# --- the whole ----------------------------------------------------------------------------------------------------


def test_a_swept_fit_says_how_it_came_about_and_the_report_shows_it(
    clip, spec, material, tmp_path, monkeypatch, open_gates
):
    pytest.importorskip("matplotlib")
    cls, both = plan(1, replace(EASY, scope="cls")), (plan(0), plan(1))
    options = [Option((cls,), folds(0.2, 0.0)), Option(both, folds(0.1, 0.0))]
    monkeypatch.setattr("defense.fit.placing.sweep", lambda *_, **__: options)
    material = replace(material, provenance={"kind": "text", "n": 18, "n_unreadable": 0, "pictures_sha256": "ab" * 32})
    fitted = fit_defense(
        clip, spec, both, material, TEXT_EMBEDS, name="words", seed=3, is_swept=True, provenance={"task": "text"}
    )
    provenance = fitted.defense.provenance
    assert (provenance["task"], provenance["seed"]) == ("text", 3)
    assert provenance["pictures"]["pictures_sha256"] == "ab" * 32
    assert provenance["cross_validation"] == options[0].result.to_dict()
    assert [entry["gain"] for entry in provenance["sweep"]] == [pytest.approx(0.2), pytest.approx(0.1)]
    assert provenance["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    (site,) = fitted.defense.sites
    (latent_set,) = site.sets
    assert (site.hook_point, latent_set.scope, latent_set.name) == (POINT.format(1), "cls", "words")
    assert latent_set.provenance["config"]["scope"] == "cls"
    tried = latent_set.provenance["tried"]
    assert tried[0]["n"] == 0
    assert len(latent_set.latents) in [each["n"] for each in tried]
    assert defenses.load(defenses.save(fitted.defense, tmp_path / "defense")).provenance == dict(provenance)
    check_report(fitted, tmp_path / "report")


def check_report(fitted: Fitted, folder: Path) -> None:
    report.write(fitted, folder)
    files = {path.name for path in folder.iterdir()}
    assert files == {"report.md", "contrast-1.png", "budget-1.png", "sweep.png"}
    for name in files - {"report.md"}:
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("L")).std() > 5
    text = (folder / "report.md").read_text()
    assert "The place was chosen by these figures" in text
    row = fitted.validation.summary()["attacked"]
    assert f"| right with a wrong word on it | {100 * row['plain']:.1f} | {100 * row['defended']:.1f} ±" in text
    for latent in fitted.defense.sites[0].sets[0].latents:
        assert f"\n| {latent} |" in text
    report.write(fitted, folder)  # over the old one
    (folder / "holiday.png").write_text("mine")
    with pytest.raises(ConfigError, match="no report"):
        report.write(fitted, folder)
    (folder / "report.md").unlink()
    with pytest.raises(ConfigError, match="no report"):
        report.write(fitted, folder)
    assert (folder / "holiday.png").read_text() == "mine"


def test_nothing_that_helps_is_an_error(clip, spec, material, open_gates):
    strict = replace(EASY, sparsity=100.0)
    with pytest.raises(ConfigError, match=r"nothing helps: .* candidates at blocks\.1"):
        fit_defense(clip, spec, [plan(1, strict)], material, TEXT_EMBEDS, name="text", folds=2)


def test_an_edit_is_measured_alike_in_chunks_and_at_once(clip, material, monkeypatch):
    from defense.fit.selecting import Trial

    fit = TextFit(clip, POINT.format(1), plan().sae, material.data, TEXT_EMBEDS)
    for edit in ("scale", "project"):
        trial = Trial(fit, np.arange(30), replace(EASY, edit=edit))
        with torch.no_grad():
            at_once = trial.removed("attacked", np.arange(20), np.full(30, 0.7))
            monkeypatch.setattr("defense.fit.chunks.AT_ONCE", 5 * trial.bytes_each)
            in_chunks = trial.removed("attacked", np.arange(20), np.full(30, 0.7))
        torch.testing.assert_close(in_chunks, at_once, atol=1e-4, rtol=0)


# --- the command --------------------------------------------------------------------------------------------------


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
        result = CliRunner().invoke(app, [str(argument) for argument in [*base, *arguments]])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result.exit_code, result.stdout, result.stderr

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
    with pytest.raises(MissingDependencyError, match=r"clip-defense\[bench\]"):
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


# --- how often the network runs -----------------------------------------------------------------------------------


@pytest.fixture
def passes(monkeypatch) -> list[tuple[int, str]]:
    """(number of pictures, hook point) of each pass from pixels on; the rest of the network does not count."""
    seen: list[tuple[int, str]] = []
    resid = VisionTower.resid

    def counted(self, pixel_values, hook_point, *scope):
        seen.append((len(pixel_values), hook_point))
        return resid(self, pixel_values, hook_point, *scope)

    monkeypatch.setattr(VisionTower, "resid", counted)
    monkeypatch.setattr(VisionTower, "resid_and_embeds", lambda *_: pytest.fail("a whole pass"))
    monkeypatch.setattr(Clip, "image_embeds", lambda *_: pytest.fail("a whole pass"))
    return seen


def test_a_sweep_encodes_each_picture_once_per_block(clip, material, passes):
    plans, n_twins = [plan(0), plan(1)], 3
    options = sweep(Encoded(clip, material.data), plans, material, TEXT_EMBEDS, folds=3, seed=0)
    assert len(options) == 9
    assert sum(n for n, _ in passes) == n_twins * 18 * len(plans)
    assert {point for _, point in passes} == {POINT.format(0), POINT.format(1)}


def test_a_fit_of_several_blocks_encodes_each_picture_once(clip, spec, passes, open_gates):
    """From the first block on the second is reached, edited, without the blocks before it."""
    index = torch.arange(24)
    groups = Groups(noise(24, 5), index % 2, index // 2 % 2)
    material = Material(groups, (groups.y * 2 + groups.a).numpy(), (), {})
    fit_defense(clip, spec, [plan(0), plan(1)], material, TEXT_EMBEDS[:2], name="place", folds=2)
    assert passes == [(24, POINT.format(0))]


def test_what_is_kept_is_what_a_pass_would_give(clip, material):
    encoded, rows = Encoded(clip, material.data), torch.tensor([3, 1, 7])
    first, second = fit_sites(encoded, [plan(0), plan(1)], TEXT_EMBEDS, name="text")
    part = encoded.take(torch.arange(10)).take(rows)
    with clip.edited([first.site]):
        for kind, resid in part.resid(POINT.format(1), [POINT.format(0)]).items():
            fresh = clip.tower.resid(material.data.pictures()[kind][rows], POINT.format(1))
            torch.testing.assert_close(resid, fresh, atol=1e-5, rtol=0)
    with clip.edited([first.site, second.site]):
        embeds = part.image_embeds(POINT.format(0))["attacked"]
        torch.testing.assert_close(embeds, clip.image_embeds(material.data.attacked[rows]), atol=1e-5, rtol=0)


def test_labels_that_nobody_gave_are_those_of_the_model():
    from defense.cli.fit import _answers
    from defense.data.labels import common_nouns
    from defense.world.scenes import OBJECTS

    assert _answers("text", None, None, None, "simple", uses_embedded=True) == tuple(OBJECTS)
    assert _answers("text", None, None, None, "simple", uses_embedded=False) == common_nouns()
    assert _answers("text", "a,b", None, None, "simple", uses_embedded=False) == ("a", "b")
