"""Results of a changed checkout, or of few pictures, are not published."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("open_clip")
pytest.importorskip("scipy")

from defense.benchmarks import publishing, report, robust
from defense.errors import ConfigError


def environment(*, is_dirty: bool) -> dict:
    return {"commit": "0123456789abcdef", "is_dirty": is_dirty}


@pytest.mark.parametrize(
    "wrapped", [lambda e: e, lambda e: [{"robust": {"run": {"environment": e}}}], lambda e: {"a": [e]}]
)
def test_a_changed_checkout_is_found_wherever_it_stands(wrapped):
    assert publishing.problems(wrapped(environment(is_dirty=False))) == []
    assert publishing.problems(wrapped(environment(is_dirty=True))) == ["it was measured on 0123456789ab + changes"]


def test_a_quick_look_is_refused_by_name():
    result = [{"robust": {"facts": {"n_asked": 50}}}] * 2
    with pytest.raises(ConfigError, match=r"mini.json is not for publication: it is a quick look at 50 pictures"):
        publishing.check_publishable(result, "mini.json")


def test_results_go_into_one_file_for_publication_only_where_they_are_fit_for_it(results, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    into = tmp_path / "all.json"
    monkeypatch.setattr("sys.argv", ["robust", str(tmp_path / "out"), "--into", str(into)])
    paths = list((tmp_path / "out").glob("*.json"))

    def put(is_dirty: bool) -> None:
        for path in paths:
            result = json.loads(path.read_text())
            result["robust"]["run"]["environment"]["is_dirty"] = is_dirty
            path.write_text(json.dumps(result))

    put(True)
    with pytest.raises(ConfigError, match="not for publication"):
        robust.main()
    assert not into.exists()
    put(False)
    robust.main()
    assert len(json.loads(into.read_text())) == len(paths)


def test_pages_are_not_made_of_such_results(tmp_path):
    import shutil

    for path in report.ROOT.glob("benchmarks/results/*.json"):
        shutil.copy(path, tmp_path)
    path = tmp_path / "embedded.json"
    result = json.loads(path.read_text())
    result["environment"]["is_dirty"] = True
    path.write_text(json.dumps(result))
    with pytest.raises(ConfigError, match=r"embedded\.json is not for publication"):
        report.pages(tmp_path)
    assert "**Provisional: it was measured on " in report.results_page(tmp_path)
