"""Many visitors at once, and the server's surroundings: folders, names, a proxy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("gradio") is None or find_spec("open_clip") is None:
    pytest.skip('needs the extras "demo" and "torch"', allow_module_level=True)

import httpx

from defense.cli import app
from defense.hosts.clip import embedded_folder

from .serving import served
from .test_server import META, call, uploaded

APPLE = embedded_folder("examples") / "apple-pizza.png"
N_VISITORS = 20


def test_fault_89_twenty_visitors_with_the_same_file_are_all_answered(address):
    together = threading.Barrier(N_VISITORS)
    paths, answers = set(), []

    def visit() -> None:
        together.wait()
        path = uploaded(address)
        paths.add(path)
        answers.append(call(address, "classify", [{"path": path, **META}, "apple,pizza", "", 5]))

    threads = [threading.Thread(target=visit) for _ in range(N_VISITORS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(paths) == N_VISITORS
    assert ["event: complete" in answer for answer in answers] == [True] * N_VISITORS
    assert not [path for path in paths if Path(path).exists() or Path(path).parents[1].exists()]


def test_fault_89_a_file_that_is_being_uploaded_again_is_not_taken_away(address):
    first, second = uploaded(address), uploaded(address)
    assert "event: complete" in call(address, "classify", [{"path": first, **META}, "apple,pizza", "", 5])
    assert "event: complete" in call(address, "classify", [{"path": second, **META}, "apple,pizza", "", 5])


def test_fault_92_a_request_with_many_files_is_refused(address):
    data = b"\0" * 6_000_000
    answer = httpx.post(f"{address}gradio_api/upload", files=[("files", ("a.png", data)), ("files", ("b.png", data))])
    assert answer.status_code == 413


def test_fault_91_the_server_knows_its_names_and_sends_nosniff(address):
    assert httpx.get(address).headers["x-content-type-options"] == "nosniff"
    assert httpx.get(address, headers={"host": "evil.example"}).status_code == 421
    answer = httpx.post(
        f"{address}gradio_api/upload", files={"files": ("a.png", b"1")}, headers={"host": "evil.example"}
    )
    assert answer.status_code == 421


@pytest.fixture(scope="module")
def surrounded(tiny_bundle, tmp_path_factory) -> Iterator[tuple[str, Path]]:
    """A demo whose surroundings hold what is meant for others: its address, and the folder for temporary files."""
    folder = tmp_path_factory.mktemp("shared")
    (folder / "gradio").write_text("somebody's")  # whose folder it is, root could not tell
    with served(tiny_bundle, {"TMPDIR": str(folder), "GRADIO_ROOT_PATH": "/elsewhere"}) as address:
        yield address, folder


def test_fault_90_a_folder_of_somebody_else_under_gradios_name_is_not_touched(surrounded):
    address, folder = surrounded
    path = uploaded(address)
    assert "event: complete" in call(address, "classify", [{"path": path, **META}, "", "", 5])
    assert [private for private in folder.glob("defense-demo-*") if private in Path(path).parents]
    assert (folder / "gradio").read_text() == "somebody's"


def test_fault_93_a_root_path_of_the_surroundings_is_not_taken_over(surrounded):
    address, _ = surrounded
    assert httpx.get(f"{address}config").json()["root"] == address.rstrip("/")


def test_fault_93_behind_a_proxy_the_page_asks_under_its_path(tiny_bundle):
    with served(tiny_bundle, root_path="https://demo.example/clip") as address:
        seen = httpx.get(f"{address}config", headers={"host": "demo.example"})
        assert seen.status_code == 200
        assert seen.json()["root"] == "https://demo.example/clip"
        assert httpx.get(f"{address}config", headers={"host": "evil.example"}).status_code == 421
        path = uploaded(address)
        assert "event: complete" in call(address, "classify", [{"path": path, **META}, "", "", 5])


@pytest.mark.parametrize(("host", "is_warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_fault_91_the_command_warns_where_others_can_reach_it(monkeypatch, host, is_warned):
    from typer.testing import CliRunner

    from defense.demo import app as server

    def serving(engine, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "serving", serving)
    result = CliRunner().invoke(app, ["demo", "--host", host])
    assert ("without a login" in result.stderr) is is_warned


@pytest.mark.slow
def test_fault_89_twenty_visitors_who_upload_and_write_see_no_error(address):
    """How long they wait is for `defense.benchmarks.demo` to say: that depends on the machine."""
    from defense.benchmarks.demo import visit

    result = visit(address, N_VISITORS, n_letters=3, pause_s=0.5)
    assert (result["errors"], result["n_updates"]) == ([], 3 * N_VISITORS)
    assert result["upload_max_ms"] > 0
