"""What tables say of methods: where they come from, what they were tuned on and set to, and which cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks import findings, method_tables, mini_tables, photo_tables, tables
from defense.benchmarks.datasets import Task
from defense.benchmarks.methods import FACTORIES, CannotWorkError, all_names, make_methods, text_tower
from defense.benchmarks.robust_results import read_results
from defense.benchmarks.tables import CANNOT_WORK

from .runs import NAMES, Counting, dataset_of, run_all, task_of, write_pictures

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
OURS = ("defense", "random-latents", "ocr-blur", "before-reading")
"""What nobody published: what such a name begins with."""


def rows_of(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


# --- records ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["mini.json", "photo.json"])
def test_every_method_of_a_stored_result_has_a_record(file):
    methods = {result["method"].partition("@")[0] for result in read_results(RESULTS / file)}
    assert methods
    for name in methods:
        record = FACTORIES[name].record
        assert record.source
        is_own = name.startswith(OURS) and name != "defense-prefix"
        assert is_own or "arXiv:" in record.source or "NeurIPS" in record.source


def test_a_record_is_that_of_the_class_that_is_made():
    for name in all_names():
        (made,) = make_methods([name], None)
        base = name.partition("@")[0]
        assert type(made).__name__ == "Unmade" or made.record is FACTORIES[base].record


def test_the_table_of_sources_shows_each_record_once():
    shown = rows_of(method_tables.sources())[2:]
    assert [row[0] for row in shown] == list(FACTORIES)
    for name, source, differences in shown:
        assert source.startswith(FACTORIES[name].record.source)
        assert differences == (FACTORIES[name].record.differences or "-")


def test_all_methods_hold_the_control_in_several_draws():
    names = all_names()
    assert [name for name in names if tables.is_draw(name)] == [
        "random-latents",
        "random-latents@1",
        "random-latents@2",
    ]
    assert {name.partition("@")[0] for name in names} == set(FACTORIES)
    assert len(set(names)) == len(names)


# --- tuning pictures and settings -------------------------------------------------------------------------------------


class Looking(Counting):
    """A method that looks at some of the training pictures, at one of them twice."""

    def fit(self, clip, task):
        for example in (*task.train.examples[:3], task.train.examples[0], task.train_clean.examples[0]):
            example.load()


def test_tuning_pictures_are_those_that_were_looked_at(named, tmp_path, defense):
    paths = write_pictures(tmp_path / "pictures", 12)
    splits = {"train": dataset_of(paths[:6], "train"), "train_clean": dataset_of(paths[:6], "clean")}
    methods = [Counting(), Looking("looking"), *make_methods(["defense", "leace"], defense)]
    results = run_all(named, [task_of(dataset_of(paths[6:]), **splits)], methods, tmp_path / "out")
    counts = {result["method"]: result["robust"]["tuned_on"] for result in results}
    assert counts == {
        "zero-shot": {}, "looking": {"train": 3, "clean": 1}, "defense": {},
        "leace": {"train": 6, "clean": 6},
    }  # fmt: skip
    shown = {row[0]: row[1] for row in rows_of(method_tables.tuning(results))}
    assert shown["zero-shot"] == "nothing"
    assert shown["looking"] == "3 train, 1 clean"
    assert shown["leace"] == "6 train, 6 clean"


def test_what_a_defense_was_fitted_on_before_is_shown_beside_what_was_seen_here():
    robust = {
        "settings": {"strength": 1.0}, "tuned_on": {"attacked": 300},
        "fitted_before": {"n_pictures": {"clean": 2000, "attacked": 2000}, "agreement": 0.995},
    }  # fmt: skip
    assert method_tables.pictures_words(robust) == "before: 2,000 clean, 2,000 attacked; 300 attacked"
    groups = {**robust, "fitted_before": {"n_pictures": {"0-0": 530, "0-1": 470}, "agreement": None}, "tuned_on": {}}
    assert method_tables.pictures_words(groups) == "before: 1,000 in 2 groups"
    agreed = "thresholds agree with the exact rule on 99.5 % of answers"
    assert method_tables.settings_words(robust) == f"strength 1; {agreed}"


def test_the_shipped_defenses_say_what_they_were_fitted_on():
    from defense.store.defenses import find_defense

    for source, n, is_calibrated in (("embedded:text", 2000, True), ("photo", 600, False)):
        (method,) = make_methods(["defense"], find_defense(source))
        before = method.fitted_before()
        assert before["n_pictures"] == dict.fromkeys(("clean", "neutral", "attacked"), n)
        assert (before["agreement"] is not None) == is_calibrated
    for name in ("random-latents", "naive-splice"):  # they act by the exact rule
        (method,) = make_methods([name], find_defense("embedded:text"))
        assert method.fitted_before()["agreement"] is None


def test_a_result_from_before_pictures_were_counted_says_so(results):
    for key in ("tuned_on", "fitted_before", "cannot_work"):
        for result in results:
            del result["robust"][key]
    shown = rows_of(tables.markdown(results))
    assert [row[1] for row in shown[7:]] == ["not recorded"] * 3


def test_settings_are_those_of_the_result_less_hashes_and_long_lists():
    settings = {
        "lr": 0.01, "seed": 0, "token_sha256": "ab", "heads": [[5, 1], [4, 0]], "z": None, "few": [],
        "texts": [["a b", "c"], ["d", "e"]], "latents": {"blocks.2.hook_resid_post": [list(range(43))]},
    }  # fmt: skip
    assert method_tables.settings_words({"settings": settings}) == (
        "lr 0.01; seed 0; heads 5/1, 4/0; z none; few none; texts: 2 in number; latents at blocks.2: 43 in number"
    )
    assert method_tables.settings_words({"settings": {}}) == "-"


def test_rows_whose_thresholds_were_set_here_carry_the_agreement(results):
    for result in results:
        if result["method"] == "defense@0.5":
            result["method"] = "defense-delta"
            result["robust"]["settings"] |= {"agreement": 0.9733}
    assert [row[0] for row in rows_of(tables.markdown(results))[2:5]] == [
        "zero-shot", "defense", "defense-delta (agrees 97.3 %)"
    ]  # fmt: skip


# --- what a text tower lacks ------------------------------------------------------------------------------------------


def words_task(tmp_path) -> Task:
    paths = write_pictures(tmp_path / "pictures", 12)
    clean, attacked = dataset_of(paths, "clean"), dataset_of(paths)
    return task_of(clean, attacked, train=attacked, train_clean=clean)


def test_a_method_that_rests_on_context_is_marked_where_the_tower_reads_none(named, tmp_path, monkeypatch):
    monkeypatch.setattr(text_tower, "LARGEST_COSINE", -1.0)  # any tower is above
    methods = make_methods(["zero-shot", "defense-prefix"], None)
    results = run_all(named, [words_task(tmp_path)], methods, tmp_path / "out")
    assert {result["method"] for result in results} == {"zero-shot"}
    assert all(result["robust"]["cannot_work"] == ["defense-prefix"] for result in results)
    text = tables.markdown(results)
    row = next(row for row in rows_of(text) if row[0] == "defense-prefix")
    assert row[1] == CANNOT_WORK
    assert set(row[2:]) == {"-"}
    assert "Cannot work here: defense-prefix: " in text
    assert f'"{NAMES[0]}" and "{NAMES[0]} written on a sign"' in text
    assert "Not applicable: defense-prefix" not in text


def test_a_method_that_rests_on_context_is_measured_where_the_tower_reads_it(named, tmp_path, monkeypatch):
    monkeypatch.setattr(text_tower, "LARGEST_COSINE", 1.1)
    results = run_all(named, [words_task(tmp_path)], make_methods(["defense-prefix"], None), tmp_path / "out")
    assert {result["method"] for result in results} == {"defense-prefix"}
    assert CANNOT_WORK not in tables.markdown(results)


def test_the_embedded_tower_passes_over_words_around_a_name_and_that_for_photographs_does_not():
    from defense.benchmarks.datasets import Options, mini
    from defense.hosts.clip import load_clip

    task = mini.waterbirds(Path("nowhere"), Options(n=30))
    with pytest.raises(CannotWorkError, match=r"cosine 0\.999\d, mean over 2 names, above 0\.999"):
        text_tower.check_reads_context(load_clip("embedded"), task, "this")
    text_tower.check_reads_context(load_clip("photo"), task, "this")


def test_records_name_the_methods_that_ask_the_tower(named, tmp_path, monkeypatch):
    """The flag that tables read, and the check in the code, say the same."""
    from defense.benchmarks.datasets import Options, mini

    monkeypatch.setattr(text_tower, "LARGEST_COSINE", -1.0)
    tasks = mini.typographic(Path("nowhere"), Options(n=4)), mini.waterbirds(Path("nowhere"), Options(n=30))
    asking = set()
    for name, factory in FACTORIES.items():
        if factory.record.source.startswith(("this package", "a control")) or name in ("naive-splice", "ocr-blur"):
            continue
        for task in tasks:
            try:
                make_methods([name], None)[0].fit(named.clip, task)
            except CannotWorkError:
                asking.add(name)
            except Exception:  # another reason, which other tests look at
                continue
    assert asking == {name for name, factory in FACTORIES.items() if factory.record.needs_context}


# --- draws, in tables -------------------------------------------------------------------------------------------------


def figure(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05, "n": 800}


def mini_result(method: str, accuracy: float, **robust) -> dict:
    environment = {
        "cpu": "a", "cores": 2, "load": 0.0, "torch": "3", "open_clip": "4", "commit": None, "timestamp": "t",
    }  # fmt: skip
    figures = {"accuracy": figure(accuracy), "attack_success": figure(1 - accuracy)}
    block = {
        "figures": figures, "n": 800, "settings": {}, "not_applicable": {}, "groups": {}, "variant": "attacked",
        "versus": {}, "run": {"encode_ms": 2.0, "environment": environment}, **robust,
    }  # fmt: skip
    return {"dataset": "mini-typographic-attacked", "method": method, "robust": block}


def test_draws_of_the_control_share_a_row_of_mean_and_range():
    draws = [("random-latents", 0.10), ("random-latents@1", 0.20), ("random-latents@2", 0.33)]
    results = [mini_result("zero-shot", 0.2), *(mini_result(*each) for each in draws), mini_result("defense@0.5", 0.9)]
    text = mini_tables.main_table(results)
    rows = {row[0]: row for row in rows_of(text)}
    assert rows["random-latents"][2:4] == ["21.0 (10.0 to 33.0)", "79.0 (67.0 to 90.0)"]
    assert "mean and range of 3 draws" in text
    assert "defense@0.5" not in rows
    assert "a single draw" in mini_tables.main_table(results[:2])


def test_the_control_of_the_embedded_model_has_the_range_of_its_draws_where_it_was_kept():
    from defense.benchmarks import embedded

    row = dict.fromkeys(embedded.COLUMNS, 20.0)
    result = {"n": 100, "rows": {"plain": row, embedded.CONTROL: row}}
    assert rows_of(embedded.table(result))[-1] == [embedded.CONTROL, *["20.0"] * 4]
    result["draws"] = [dict.fromkeys(embedded.COLUMNS, value) for value in (10.0, 20.0, 30.0)]
    assert rows_of(embedded.table(result))[-1] == [embedded.CONTROL, *["20.0 (10.0 to 30.0)"] * 4]
    assert rows_of(embedded.table(result))[-2][1].startswith("20.0 (13.3 to")  # an interval


def test_the_table_of_the_miniatures_marks_what_cannot_work():
    unable = {"not_applicable": {"defense-prefix": "x"}, "cannot_work": ["defense-prefix"]}
    text = mini_tables.main_table([mini_result("zero-shot", 0.2, **unable)])
    rows = rows_of(text)
    assert rows[-1][:5] == ["defense-prefix", "-", CANNOT_WORK, CANNOT_WORK, "-"]
    assert rows[-1][-1] == "-"


def test_seeds_of_the_fit_stand_below_the_table_of_photographs():
    results = read_results(RESULTS / "photo.json")
    (sha256,) = {each["robust"]["settings"]["defense_sha256"] for each in results if each["method"] == "defense"}
    rows = [
        {"seed": 1, "attacked": 30.0, "success": 1.0, "sha256": "other"},
        {"seed": 2, "attacked": 33.0, "success": 2.0, "sha256": sha256},
    ]
    text = photo_tables.short_table(results, rows)
    shown = "attacked 31.5 (30.0 to 33.0), attack success 1.5 (1.0 to 2.0); the table shows seed 2."
    assert f"Over 2 seeds of the fit: {shown}" in text
    assert "seeds" not in photo_tables.short_table(results)


# --- what was found ---------------------------------------------------------------------------------------------------


def test_every_statement_names_the_run_that_it_lacks(tmp_path):
    statements = findings.as_list(tmp_path).splitlines()
    assert len(statements) == len(findings.ALL)
    for statement, function in zip(statements, findings.ALL, strict=True):
        assert statement.startswith("- **")
        assert "None" not in statement
        if function not in (findings.seeds, findings.unable):
            assert "`defense bench" in statement


def test_statements_hold_the_figures_of_the_results():
    found = findings.Found(RESULTS)
    by_place = {(each["dataset"], each["method"]): each["robust"] for each in [*found.mini, *found.photo]}
    versus = by_place["mini-typographic-attacked", "defense"]["versus"]["dyslexify"]
    assert tables.change_words(versus) in findings.dyslexify_on_drawings(found)
    for dataset in ("mini-waterbirds-test", "mini-celeba-test"):
        before, after = (
            by_place[dataset, method]["figures"]["accuracy_adjusted"]["value"] for method in ("zero-shot", "defense")
        )
        assert f"{100 * before:.1f} -> {100 * after:.1f} %" in findings.groups(found)
    n_ways = sum(name.startswith("photo-100-attacked-") and method == "defense" for name, method in by_place)
    assert findings.dyslexify_on_photographs(found).count("; p ") == n_ways > 1


def test_how_far_a_defense_can_lead_is_told_by_the_clip_before_it_could_read(tmp_path):
    values = {"zero-shot": (0.1, 0.3), "defense": (0.3, 0.4), "before-reading": (0.5, 0.4)}
    found = findings.Found(tmp_path)
    for name, accuracies in values.items():
        for way, value in zip(("print", "turned"), accuracies, strict=True):
            found.by_place[f"photo-100-attacked-{way}", name] = {"figures": {"accuracy": {"value": value}}}
    found.by_place["photo-100-neutral", "defense"] = {"figures": {"accuracy": {"value": 0.55}}}
    text = findings.reach(found)
    assert "plain 20.0 %, defended 35.0 %, the same CLIP before it learned to read 45.0 %" in text
    assert "takes back 15.0 of the 25.0 points" in text
    assert "an empty plate (55.0 %)" in text
    assert text.endswith("Most is left in print: 30.0 of 50.0 %.")


@pytest.mark.parametrize(("value", "p", "words"), [(0.1, 0.5, "level"), (0.1, 0.01, "ahead"), (-0.1, 0.01, "behind")])
def test_a_place_is_told_by_the_paired_test(value, p, words):
    assert findings._place({"difference": {"value": value}, "p": p}) == words
