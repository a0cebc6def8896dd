"""Figures in README and docs are generated, and licenses of shipped artwork are stated."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks import mini_tables, plots, report, robust, speed_rows
from defense.benchmarks.blocks import filled
from defense.benchmarks.named_clip import load_named_clip
from defense.benchmarks.robust_results import collect, read_results
from defense.errors import ConfigError
from defense.store.defenses import find_defense

ROOT = Path(__file__).parents[2]


RESULTS = ROOT / "benchmarks" / "results"


@pytest.mark.parametrize("page", [*report.PAGES, ROOT / "benchmarks" / "RESULTS.md"], ids=lambda page: page.name)
def test_a_page_holds_exactly_the_measured_tables(page, made):
    assert page.read_text(encoding="utf-8") == made[page], "run: python -m defense.benchmarks.report"


@pytest.fixture(scope="module")
def made():
    return report.pages(RESULTS)


def test_the_costs_of_the_readme_are_those_of_the_rows():
    path = RESULTS / "speed-cpu.json"
    rows = {row["arm"]: row["x_plain"] for row in json.loads(path.read_text(encoding="utf-8"))}
    shown = [
        line.split("|")[2].strip()
        for line in speed_rows.short_table(speed_rows.load_rows(path)).splitlines()
        if line.startswith("|")
    ][2:]
    assert shown == [f"{rows[arm]:.2f}" for arm in speed_rows._SHORT.values()]
    assert len(set(shown)) == len(shown) == 4


def test_a_cost_that_was_not_measured_is_refused():
    rows = [row for row in speed_rows.load_rows(RESULTS / "speed-cpu.json") if row.arm != "naive splice"]
    with pytest.raises(ConfigError, match="'naive splice' was not measured"):
        speed_rows.short_table(rows)


def test_every_stored_result_has_a_section():
    assert {path.name for path in RESULTS.glob("*.json")} <= {section.file for section in report.SECTIONS}


def test_what_was_not_measured_is_said_to_be_missing(tmp_path):
    page = report.results_page(tmp_path)
    for section in report.SECTIONS:
        assert f"## {section.title}\n\nNot measured: `benchmarks/results/{section.file}` is missing." in page
        assert f"`{section.command}`" in page
    shutil.copy(RESULTS / "embedded.json", tmp_path)
    assert "Not measured: `benchmarks/results/mini.json` is missing." in report.robustness(tmp_path)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A folder of results in which the miniatures were measured, on few pictures."""
    from defense.benchmarks.datasets import SUITES, Options, mini, read_tasks
    from defense.benchmarks.methods import make_methods

    folder = tmp_path_factory.mktemp("results")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mini, "N_TEST", 40)
        patch.setattr(mini, "N_TRAIN", 40)
        tasks, _ = read_tasks("mini", None, Options())
        assert [task.name for task in tasks] == list(SUITES["mini"])
        text = make_methods(["zero-shot", "defense", "defense@0.5"], find_defense("embedded"))
        jobs = [(tasks[0], text), *((task, text[:1]) for task in tasks[1:])]
        robust.run(load_named_clip("embedded", None), jobs, folder / "out", command="defense bench typed")
    collect(folder / "out", folder / "mini.json")
    for name in ("embedded.json", "speed-cpu.json"):
        shutil.copy(RESULTS / name, folder)
    return folder


def test_a_main_table_of_nothing_is_refused(measured):
    results = read_results(measured / "mini.json")
    parts = [result for result in results if result["method"] == "defense@0.5"]
    elsewhere = [{**result, "dataset": "another"} for result in results]
    assert parts
    for none_left in ([], parts, elsewhere):
        with pytest.raises(ConfigError, match="no method was measured on the miniatures"):
            mini_tables.main_table(none_left)


def test_one_file_holds_what_a_folder_does(measured):
    assert read_results(measured / "mini.json") == read_results(measured / "out")


def test_the_main_table_has_a_row_per_method_and_the_jsons_figures(measured):
    results = read_results(measured / "mini.json")
    by_place = {(r["dataset"], r["method"]): r["robust"]["figures"] for r in results}
    rows = [line for line in report.robustness(measured).partition("Beside")[2].splitlines() if line.startswith("|")]
    headings = [cell.strip() for cell in rows[0].strip("|").split("|")]
    assert headings[:4] == ["method", "clean", "attacked", "attack success"]
    assert headings[4:] == ["worst group, mini-waterbirds", "worst group, mini-celeba"]
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows[2:]}
    assert list(cells) == ["defense", "zero-shot"]  # the best first; no part of a strength
    for method, (clean, attacked, success, birds, faces) in cells.items():
        assert clean == f"{100 * by_place['mini-typographic-clean', method]['accuracy']['value']:.1f}"
        assert attacked == f"{100 * by_place['mini-typographic-attacked', method]['accuracy']['value']:.1f}"
        assert success == f"{100 * by_place['mini-typographic-attacked', method]['attack_success']['value']:.1f}"
        for shown, name in ((birds, "mini-waterbirds-test"), (faces, "mini-celeba-test")):
            found = by_place.get((name, method))
            assert shown == ("-" if found is None else f"{100 * found['worst_group']['value']:.1f}")
    assert cells["defense"][3:5] == ["-", "-"]
    assert "`defense bench typed`" in report.robustness(measured)


def test_the_page_shows_tables_plots_and_commands(measured):
    pytest.importorskip("matplotlib")
    plots.draw(read_results(measured / "mini.json"), measured)
    page = report.results_page(measured)
    assert "### Mini-typographic" in page
    for path in measured.glob("*.png"):
        assert f"]({measured.name}/{path.name})" in page
    assert page.count("![") == len(list(measured.glob("*.png"))) == 5
    assert "`defense bench typed`" in page
    assert "`python -m defense.benchmarks.embedded --out benchmarks/results/embedded.json`" in page


def test_a_page_without_markers_is_refused():
    with pytest.raises(ValueError, match="begin photo"):
        filled("no markers", {"photo": "|"})


def test_every_shipped_font_is_in_the_notice():
    folder = ROOT / "defense" / "world"
    notice = (folder / "NOTICE.md").read_text(encoding="utf-8")
    listed = {line.split("`")[1] for line in notice.splitlines() if line.startswith("| `fonts/")}
    assert listed == {f"fonts/{path.name}" for path in (folder / "fonts").iterdir()}


def test_tables_that_the_demo_shows_load_neither_torch_nor_onnx():
    code = (
        "import sys; from pathlib import Path; from defense.benchmarks.report import embedded_table, speed_table; "
        "folder = Path(sys.argv[1]); embedded_table(folder / 'embedded.json'); speed_table(folder / 'speed-cpu.json'); "
        "sys.exit(', '.join({'torch', 'open_clip', 'onnx', 'onnxruntime'} & set(sys.modules)) or 0)"
    )
    subprocess.run([sys.executable, "-c", code, str(RESULTS)], check=True)
