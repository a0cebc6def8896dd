"""Tables and plots are functions of the results' JSON, and say what they rest on."""

from __future__ import annotations

import json
import sys

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks import plots, robust, tables
from defense.benchmarks.methods import make_methods
from defense.benchmarks.robust_results import write_result
from defense.errors import ConfigError, MissingDependencyError

from .runs import dataset_of, run_all, task_of, write_pictures


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_the_table_has_a_row_per_method_and_the_jsons_figures(results):
    text = tables.markdown(results)
    lines = [cells(line) for line in text.splitlines() if line.startswith("|")]
    lines, tuning = lines[:5], lines[5:]
    assert [line[0] for line in tuning] == ["method", "---", "zero-shot", "defense", "defense@0.5"]
    assert [line[0] for line in lines] == ["method", "---", "zero-shot", "defense", "defense@0.5"]
    assert lines[0][1:5] == ["clean accuracy", "against zero-shot", "same answers", "attacked accuracy"]
    by_place = {(r["dataset"], r["method"]): r["robust"] for r in results}
    row = dict(zip(lines[0], lines[3], strict=True))
    accuracy = by_place["set-attacked", "defense"]["figures"]["accuracy"]
    assert row["attacked accuracy"].startswith(f"{100 * accuracy['value']:.1f} ({100 * accuracy['low']:.1f} to")
    change = by_place["set-clean", "defense"]["versus"]["zero-shot"]["difference"]["value"]
    assert lines[3][2].startswith(f"{100 * change:+.1f} (")
    same = by_place["set-clean", "defense"]["versus"]["zero-shot"]["same"]["value"]
    assert lines[3][3].startswith(f"{100 * same:.1f} (")
    assert lines[2][2:4] == ["-", "-"]
    for expected in ("6 classes", '"a photo of a {}."', "clean 24, attacked 24", "McNemar", "bootstrap"):
        assert expected in text
    assert results[2]["robust"]["settings"]["defense_sha256"][:16] in text
    difference = by_place["set-attacked", "defense@0.5"]["versus"]["defense"]["difference"]["value"]
    assert lines[0][4:7] == ["attacked accuracy", "against zero-shot", "against defense"]
    assert lines[4][6].startswith(f"{100 * difference:+.1f} (")
    assert lines[3][6] == "-"


def test_the_table_does_not_depend_on_the_order_of_the_files(results):
    assert tables.markdown(list(reversed(results))) == tables.markdown(results)


def test_the_table_of_groups_names_the_worst(named, tmp_path):
    dataset = dataset_of(
        write_pictures(tmp_path / "pictures", 40),
        "test",
        group_names=("one", "two", "three", "four"),
        train_counts=(9, 1, 1, 9),
    )
    (result,) = run_all(named, [task_of(dataset)], make_methods(["zero-shot"], None), tmp_path / "out")
    head, _, row, *_ = (cells(line) for line in tables.markdown([result]).splitlines() if line.startswith("|"))
    assert head[1:7] == [
        "worst group", "of", "average", "train-weighted average", "gap", "against zero-shot"
    ]  # fmt: skip
    groups = result["robust"]["groups"]
    assert row[2] == min(groups, key=lambda name: groups[name][1])
    assert "Groups: one 10, two 10, three 10, four 10." in tables.markdown([result])


@pytest.mark.parametrize("name", ["class_names", "templates", "data_sha256", "host_sha256", "n", "shortfall"])
def test_results_of_different_questions_share_no_table(results, name):
    other = json.loads(json.dumps(results[1]))
    other["robust"][name] = "other"
    with pytest.raises(ConfigError, match=f"differ in {name}"):
        tables.markdown([results[0], other])


def test_a_method_is_not_shown_twice(results):
    with pytest.raises(ConfigError, match="two results of zero-shot"):
        tables.markdown([results[0], results[0]])


def test_random_weights_and_partial_data_are_said_so(results):
    changed = json.loads(json.dumps(results))
    for result in changed:
        result["robust"] |= {"has_random_weights": True, "shortfall": "24 of 1,000 pictures", "is_complete": False}
    text = tables.markdown(changed)
    assert "**random weights: a rehearsal, no figure means anything**" in text
    assert "**Not the published data: 24 of 1,000 pictures.**" in text
    title = plots.trade_off(changed).axes[0].get_title()
    assert "random weights" in title
    assert "data incomplete" in title
    assert "random weights" not in tables.markdown(results)


def test_plots_are_functions_of_the_json(results, tmp_path):
    pytest.importorskip("matplotlib")
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        paths = plots.draw(json.loads(json.dumps(results)), tmp_path / folder)
        assert [path.name for path in paths] == ["set-strength.png", "set-trade-off.png", "set-classes.png"]
    for path in paths:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.read_bytes() == (tmp_path / "a" / path.name).read_bytes()


def test_points_of_the_plots_are_the_jsons_figures(results):
    pytest.importorskip("matplotlib")
    by_place = {(r["dataset"], r["method"]): 100 * r["metrics"]["acc1"] for r in results}
    lines = [container.lines[0] for container in plots.strength(results).axes[0].containers]
    assert [line.get_xdata().tolist() for line in lines] == [[0, 0.5, 1]] * 2
    for line, dataset in zip(lines, ("set-clean", "set-attacked"), strict=True):
        expected = [by_place[dataset, method] for method in ("zero-shot", "defense@0.5", "defense")]
        assert line.get_ydata().tolist() == pytest.approx(expected)
    lost = {r["method"]: r["robust"]["versus"].get("zero-shot") for r in results if r["robust"]["variant"] == "clean"}
    for container, method in zip(
        plots.trade_off(results).axes[0].containers, ("zero-shot", "defense@0.5", "defense"), strict=True
    ):
        point = container.lines[0]
        expected = 0 if method == "zero-shot" else -100 * lost[method]["difference"]["value"]
        assert point.get_xdata().tolist() == pytest.approx([expected])
        assert point.get_ydata().tolist() == pytest.approx([by_place["set-attacked", method]])


def test_plots_that_mean_nothing_are_not_drawn(results):
    attacked = [r for r in results if r["dataset"] == "set-attacked" and r["method"] == "zero-shot"]
    assert plots.strength(attacked) is None
    assert plots.trade_off(attacked) is None
    assert plots.classes(attacked) is None


def test_without_matplotlib_the_error_names_the_extra(results, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(MissingDependencyError, match=r"pip install .*\[bench\]"):
        plots.draw(results, tmp_path)


def test_a_report_is_made_of_the_files_in_a_folder(results, tmp_path):
    pytest.importorskip("matplotlib")
    out = tmp_path / "out"
    (out / "something else.json").write_text("[1]")
    robust.lay_out(out)
    text = (out / "results.md").read_text()
    assert text.count("| zero-shot |") == 2  # its figures, and what it was tuned on
    assert (out / "set-strength.png").exists()
    newer = json.loads(json.dumps(results[0]))
    newer["robust"]["schema"] += 1
    write_result(newer, out)
    with pytest.raises(ConfigError, match="reads up to"):
        robust.lay_out(out)


def attacked_otherwise(attacked):
    """The same results of a second way to attack, of which a quarter is right."""
    figure = {"accuracy": {"value": 0.25, "low": 0.2, "high": 0.3, "n": 24}}
    return [
        {
            **each, "dataset": "set-turned",
            "robust": {**each["robust"], "variant": "turned", "figures": {**each["robust"]["figures"], **figure}},
        }
        for each in attacked
    ]  # fmt: skip


def test_of_several_ways_to_attack_a_method_has_one_point_their_mean(results):
    pytest.importorskip("matplotlib")
    attacked = [r for r in results if r["dataset"] == "set-attacked"]
    other = attacked_otherwise(attacked)
    (axes,) = plots.trade_off([*results, *other]).axes
    assert "range of 2 ways" in axes.get_ylabel()
    values = [container.lines[0].get_ydata().tolist() for container in axes.containers]
    assert values == [pytest.approx([50 * (r["metrics"]["acc1"] + 0.25)]) for r in attacked]


def test_a_method_at_one_strength_is_no_line(results):
    pytest.importorskip("matplotlib")
    alone = [{**r, "method": "defense-project"} for r in results if r["method"] == "defense"]
    assert len(plots.strength([*results, *alone]).axes[0].containers) == 2


def lines_of(figure) -> list[list[float]]:
    """What is joined by a line: the values across, of each line with more than one point."""
    lines = [line for line in figure.axes[0].get_lines() if line.get_linestyle() not in ("None", "")]
    return [line.get_xdata().tolist() for line in lines if len(line.get_xdata()) > 1]


def test_lines_run_through_strengths_of_one_method_only(results):
    pytest.importorskip("matplotlib")
    others = [{**r, "method": name} for r in results if r["method"] == "defense" for name in ("leace", "dyslexify")]
    figure = plots.trade_off([*results, *others])
    (line,) = lines_of(figure)
    assert len(line) == 3  # the baseline, half and full strength
    swept = {"zero-shot", "defense"}
    assert lines_of(plots.trade_off([r for r in [*results, *others] if r["method"] in swept | {"leace"}])) == []
    draws = [
        {**r, "method": name} for r in results if r["method"] == "defense@0.5" for name in ("random-latents@1",)
    ] + [{**r, "method": "random-latents"} for r in results if r["method"] == "defense"]
    plain = [r for r in results if r["method"] == "zero-shot"]
    assert lines_of(plots.trade_off([*plain, *draws])) == [], "draws are no strengths"


def test_a_method_has_one_color_whatever_else_is_drawn(results):
    pytest.importorskip("matplotlib")
    from defense.benchmarks.methods import FACTORIES

    colors = {name: plots.color_of(name) for name in FACTORIES}
    assert len(set(colors.values())) == len(FACTORIES)
    assert plots.color_of("defense@0.5") == colors["defense"]
    assert plots.color_of("another") == plots.color_of("another")
    leace = [{**r, "method": "leace"} for r in results if r["method"] == "defense"]
    few = [r for r in results if r["method"] == "zero-shot"] + leace
    for shown in (few, [*results, *leace]):
        containers = {c.get_label(): c.lines[0] for c in plots.trade_off(shown).axes[0].containers}
        assert containers["leace"].get_color() == colors["leace"]
    figure = plots.strength(results)
    assert {c.lines[0].get_color() for c in figure.axes[0].containers} == {colors["defense"]}


def test_strength_shows_the_mean_of_several_ways_to_attack(results):
    pytest.importorskip("matplotlib")
    attacked = [r for r in results if r["dataset"] == "set-attacked"]
    other = attacked_otherwise(attacked)
    lines = {c.get_label(): c.lines[0] for c in plots.strength([*results, *other]).axes[0].containers}
    assert set(lines) == {"clean accuracy", "accuracy, attacked, mean and range of 2 ways"}
    by_method = {r["method"]: 50 * (r["metrics"]["acc1"] + 0.25) for r in attacked}
    expected = [by_method[name] for name in ("zero-shot", "defense@0.5", "defense")]
    assert lines["accuracy, attacked, mean and range of 2 ways"].get_ydata().tolist() == pytest.approx(expected)
