"""The benchmarks that are drawn: deterministic, apart from all that was trained on, and measured by one command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from defense.benchmarks.datasets import READERS, SUITES, Dataset, Options, mini
from defense.cli import app
from defense.errors import CheckpointError, ConfigError
from defense.hosts.shipped import ShippedClip
from defense.world import draws, files, scenes
from defense.world.files import world_sha256


def read(name: str, seed: int = 0):
    return READERS[name].read(Path("nowhere"), Options(seed=seed))


def pixels(dataset: Dataset, n: int = 10) -> list[np.ndarray]:
    return [np.asarray(example.picture.load()) for example in dataset.examples[:n]]


def splits_of(task) -> list[Dataset]:
    return [split for split in (*task.tests, task.train, task.val, task.train_clean) if split is not None]


@pytest.mark.usefixtures("small_minis")
@pytest.mark.parametrize("name", SUITES["mini"])
def test_the_same_pictures_are_drawn_each_time_and_others_for_another_seed(name):
    first, again, other = (read(name, seed) for seed in (0, 0, 1))
    for a, b, c in zip(splits_of(first), splits_of(again), splits_of(other), strict=True):
        assert a == b
        for x, y, z in zip(pixels(a), pixels(b), pixels(c), strict=True):
            assert x.shape == (scenes.SIZE, scenes.SIZE, 3)
            assert np.array_equal(x, y)
            assert not np.array_equal(x, z)


@pytest.mark.usefixtures("small_minis")
@pytest.mark.parametrize("name", SUITES["mini"])
def test_pictures_that_differ_have_digests_that_differ(name):
    examples = [example for split in splits_of(read(name)) for example in split.examples]
    by_digest = {example.picture.digest(): np.asarray(example.picture.load()).tobytes() for example in examples}
    for example in examples:
        assert by_digest[example.picture.digest()] == np.asarray(example.picture.load()).tobytes()


def test_the_digest_changes_with_the_world(monkeypatch):
    (scene,) = (case.scene for case in draws.typographic(1, 0))
    before = mini.Drawn(scene).digest()
    world_sha256.cache_clear()
    monkeypatch.setattr(files, "version", lambda _package: "another")
    assert mini.Drawn(scene).digest() != before
    world_sha256.cache_clear()


def test_a_picture_that_was_drawn_can_be_changed_without_changing_the_next():
    (scene,) = (case.scene for case in draws.typographic(1, 0))
    first = mini.Drawn(scene).load()
    want = np.asarray(first).copy()
    first.paste((0, 0, 0), (0, 0, 80, 80))
    assert np.array_equal(np.asarray(mini.Drawn(scene).load()), want)


@pytest.mark.usefixtures("small_minis")
def test_clean_neutral_and_attacked_are_twins():
    task = read("mini-typographic")
    assert [test.variant for test in task.tests] == ["clean", "neutral", "attacked", "own-name", "word-only"]
    assert [test.is_attacked for test in task.tests] == [False, False, True, False, False]
    for clean, neutral, attacked in zip(*(test.examples for test in task.tests[:3]), strict=True):
        assert (clean.key, clean.label) == (neutral.key, neutral.label) == (attacked.key, attacked.label)
        writing = attacked.picture.scene.writing
        assert writing.text == task.tests[2].class_names[attacked.word]
        assert writing.style == attacked.kind
        assert clean.picture.scene == attacked.picture.scene.clean()
        assert neutral.picture.scene == attacked.picture.scene.neutral()
        assert not np.array_equal(*(np.asarray(each.picture.load()) for each in (neutral, attacked)))
    for clean, attacked in zip(task.train_clean.examples, task.train.examples, strict=True):
        assert (clean.key, clean.label, clean.word) == (attacked.key, attacked.label, None)
        assert clean.picture.scene == attacked.picture.scene.clean()


@pytest.mark.usefixtures("small_minis")
def test_a_word_is_evidence_on_its_own_object_and_alone(monkeypatch):
    monkeypatch.setattr(mini, "N_READ", 30)
    task = read("mini-typographic")
    names = task.tests[0].class_names
    _, _, attacked, own, alone = (test.examples for test in task.tests)
    assert len(own) == len(alone) == 30
    for example, named, word in zip(attacked, own, alone, strict=False):
        assert named.picture.scene.writing.text == names[named.label] == names[example.label]
        assert named.picture.scene.writing.font in scenes.TEST_FONTS
        assert named.picture.scene.clean() == example.picture.scene.clean()
        assert (word.picture.scene.writing.text, word.picture.scene.subject) == (names[word.label], None)
        assert word.label == example.word
        assert named.word is word.word is None


def test_a_quick_look_draws_fewer_pictures_and_says_so():
    from defense.benchmarks.publishing import problems

    whole = READERS["mini-typographic"].read(Path("nowhere"), Options())
    for name in SUITES["mini"]:
        task = READERS[name].read(Path("nowhere"), Options(n=50))
        assert {len(split.examples) for split in splits_of(task)} == {50}
        for test in task.tests:
            assert test.shortfall == "a quick look at 50 pictures of each split"
            assert problems(dict(test.facts)) == ["it is a quick look at 50 pictures (--n)"]
    assert whole.tests[0].shortfall is None
    assert problems(dict(whole.tests[0].facts)) == []
    with pytest.raises(ConfigError, match="got n = 801; a test of the miniatures has 800"):
        READERS["mini-celeba"].read(Path("nowhere"), Options(n=801))


@pytest.mark.usefixtures("small_minis")
def test_typefaces_and_seeds_of_tests_are_their_own():
    pytest.importorskip("open_clip")
    from defense.benchmarks import latents
    from defense.embedded.build import SEEDS

    task = read("mini-typographic")
    fonts = [{e.picture.scene.writing.font for e in split.examples} for split in (task.tests[2], task.train)]
    assert fonts[0] <= set(scenes.TEST_FONTS)
    assert fonts[1] <= set(scenes.TRAIN_FONTS)
    for name in SUITES["mini"]:
        used = [set(read(name, seed).tests[0].facts["seeds"].values()) for seed in range(20)]
        others = {*SEEDS.values(), *(10_000 + seed for seed in SEEDS.values())}
        others |= set(range(latents.SEED_FIT, latents.SEED_TEST + 1))
        assert not set.union(*used) & others
        assert len(set.union(*used)) == 40
        train, test = ({e.picture.scene for e in split.examples} for split in (read(name).train, read(name).tests[-1]))
        assert not train & test


@pytest.mark.parametrize("name", ["waterbirds", "celeba"])
def test_groups_are_alike_and_weighed_as_the_clip_was_trained(name):
    pytest.importorskip("open_clip")
    from defense.world.draws import GROUPINGS

    task = read(f"mini-{name}")
    (test,) = task.tests
    assert (test.class_names, test.templates) == (GROUPINGS[name].classes, (GROUPINGS[name].template,))
    for split in (test, task.train):
        assert min(split.group_counts()) > len(split.examples) / 5
    # The rare groups of the training data: birds out of place; women with dark hair and blond men.
    rare = {"waterbirds": (1, 2), "celeba": (0, 3)}[name]
    assert [test.train_counts[group] for group in rare] == [50, 50]
    assert sum(test.train_counts) == mini.N_TRAIN
    words = {"waterbirds": ("land", "water"), "celeba": ("woman", "man")}[name]
    for group, group_name in enumerate(test.group_names):
        assert group_name.endswith(words[group % 2])


# --- the command ------------------------------------------------------------------------------------------------------


def bench(*arguments) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["bench", *map(str, arguments)])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout, result.stderr


def stored(out: Path) -> dict[str, dict]:
    """File name -> result, without what differs from run to run."""
    results = {path.name: json.loads(path.read_text()) for path in sorted(out.glob("*.json"))}
    assert all(result["robust"].pop("run") for result in results.values())
    return results


@pytest.fixture
def no_shipped_groups(monkeypatch):
    """As if the embedded model had a defense against words only."""
    monkeypatch.setattr(ShippedClip, "defenses", ("text",))


@pytest.mark.usefixtures("small_minis", "no_shipped_groups")
def test_the_minis_are_measured_without_a_folder_or_a_model(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    pytest.importorskip("matplotlib")
    monkeypatch.chdir(tmp_path)
    code, out, err = bench("all", "--out", tmp_path / "a", "--device", "cpu")
    assert code == 0, err
    assert "not in data, left out: rta100" in err
    results = stored(tmp_path / "a")
    by_place = {(result["dataset"], result["method"]): result["robust"] for result in results.values()}
    attacked = [by_place["mini-typographic-attacked", method] for method in ("zero-shot", "defense")]
    accuracies = [each["figures"]["accuracy"]["value"] for each in attacked]
    assert accuracies[1] >= accuracies[0] + 0.4
    assert sum(n for n, _ in attacked[0]["kinds"].values()) == 40
    right = sum(n * accuracy for n, accuracy in attacked[0]["kinds"].values())
    assert right == pytest.approx(40 * accuracies[0])
    assert set(attacked[0]["kinds"]) == {"bare", "plate", "strip"}
    for name in ("mini-waterbirds", "mini-celeba"):
        robust = by_place[f"{name}-test", "zero-shot"]
        assert "needs a defense" in robust["not_applicable"]["defense"]
        assert {"worst_group", "gap", "accuracy_adjusted"} <= set(robust["figures"])
        assert (f"{name}-test", "defense") not in by_place
    assert "Not applicable: defense: " in out
    assert (tmp_path / "a" / "results.md").read_text() == out
    assert bench("mini", "--out", tmp_path / "b", "--device", "cpu")[0] == 0
    assert stored(tmp_path / "b") == {name: each for name, each in results.items() if "semantic" not in name}


@pytest.mark.usefixtures("small_minis")
def test_each_mini_takes_the_defense_that_ships_for_it(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    from defense.store import defenses
    from defense.world import draws

    asked = []

    def find_defense(source):
        asked.append(source)
        raise CheckpointError("enough")

    monkeypatch.setattr(defenses, "find_defense", find_defense)
    monkeypatch.setattr(ShippedClip, "defenses", ("celeba", "text", "waterbirds"))
    for name in SUITES["mini"]:
        assert bench(name, "--out", tmp_path / "out")[0] == 5
    assert asked == ["embedded:text", "embedded:waterbirds", "embedded:celeba"]
    assert set(mini.DEFENSES) == {*SUITES["mini"], "mini-semantic"}
    assert {f"mini-{name}" for name in draws.GROUPINGS} < set(mini.DEFENSES)


@pytest.mark.usefixtures("small_minis")
def test_photographs_need_a_model_that_was_named(tmp_path):
    (tmp_path / "synthetic" / "cat").mkdir(parents=True)
    (tmp_path / "synthetic" / "dog").mkdir(parents=True)
    from PIL import Image

    for name in ("cat", "dog"):
        Image.new("RGB", (30, 30)).save(tmp_path / "synthetic" / name / "a.png")
    code, _, err = bench("typographic", "--data", tmp_path, "--out", tmp_path / "out")
    assert code == 2
    assert "--model is missing" in err


@pytest.mark.usefixtures("small_minis", "no_shipped_groups")
def test_all_methods_are_those_that_there_are(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    pytest.importorskip("matplotlib")
    from defense.benchmarks import methods

    monkeypatch.setattr(methods, "FACTORIES", {name: methods.FACTORIES[name] for name in ("zero-shot", "defense")})
    assert bench("mini-celeba", "--methods", "all", "--out", tmp_path)[0] == 0
    (result,) = stored(tmp_path).values()
    assert result["method"] == "zero-shot"
    assert set(result["robust"]["not_applicable"]) == {"defense"}


def test_a_quick_look_takes_few_pictures_and_marks_its_results(tmp_path):
    pytest.importorskip("open_clip")
    pytest.importorskip("matplotlib")
    code, out, err = bench("mini-celeba", "--n", 30, "--methods", "zero-shot", "--out", tmp_path)
    assert code == 0, err
    (result,) = stored(tmp_path).values()
    assert result["robust"]["n"] == 30
    assert "Not the published data: a quick look at 30 pictures of each split." in out
    assert result["robust"]["facts"]["n_asked"] == 30


def test_cost_is_measured_by_its_own_benchmark(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    from defense.benchmarks import speed

    seen = []
    monkeypatch.setattr(speed, "main", lambda argv: seen.append(argv) or 1)
    assert bench("speed", "--model", "ViT-B-16", "--out", tmp_path / "out")[0] == 1
    assert seen == [["--model", "ViT-B-16", "--out", str(tmp_path / "out" / "speed-cpu.json")]]
    code, _, err = bench("speed", "--methods", "defense")
    assert code == 2
    assert "not --methods" in err


def test_ways_of_choosing_latents_are_compared_by_their_own_benchmark(tmp_path, monkeypatch):
    pytest.importorskip("open_clip")
    from defense.benchmarks import latents, latents_report

    seen = []
    monkeypatch.setattr(latents, "run", lambda out, **_: seen.append(out) or {"rows": 1})
    monkeypatch.setattr(latents_report, "table", lambda result: f"a table of {result['rows']} row")
    assert bench("latents", "--out", tmp_path / "out")[:2] == (0, "a table of 1 row\n")
    assert seen == [tmp_path / "out" / "latents.json"]
    code, _, err = bench("latents", "--model", "ViT-B-32")
    assert code == 2
    assert "latents takes --out only, not --model" in err
