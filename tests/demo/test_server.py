"""The demo's server through `gradio_client` and raw HTTP: endpoints, refusals, the queue, what stays on disk."""

from __future__ import annotations

import http.server
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

if find_spec("gradio") is None or find_spec("open_clip") is None:
    pytest.skip('needs the extras "demo" and "torch"', allow_module_level=True)

import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

import defense.demo
from defense.demo import limits
from defense.hosts.clip import embedded_folder

from .files import BAD_FILES, file_of
from .serving import served

APPLE = embedded_folder("examples") / "apple-pizza.png"


@pytest.fixture(scope="module")
def client(address) -> Client:
    return Client(address, verbose=False)


def test_classify_round_trip(client):
    answer = client.predict(image=handle_file(APPLE), labels="apple, pizza", api_name="/classify")
    assert [row["label"] for row in answer] == ["apple", "pizza"]
    assert sum(row["score"] for row in answer) == pytest.approx(1, abs=1e-5)


def test_compare_round_trip(client):
    answer = client.predict(image=handle_file(APPLE), top_k=3, api_name="/compare")
    assert answer["plain"][0]["label"] == "pizza"
    assert answer["robust"][0]["label"] == "apple"
    assert answer["changed"] is True
    assert len(answer["plain"]) == 3
    assert answer["plain_ms"] > 0


def test_explain_round_trip(client):
    answer = client.predict(image=handle_file(APPLE), edit="project", tasks="text", api_name="/explain")
    assert answer["controls"]["edit"] == "project"
    assert answer["removed"][0]["share"] > 0
    assert np.shape(answer["heatmap"]) == np.shape(answer["removed"][0]["map"])
    none = client.predict(image=handle_file(APPLE), strength=0, api_name="/explain")
    assert none["plain"] == none["robust"]
    assert none["removed"] == []


def test_embed_round_trip(client):
    robust, plain = (client.predict(image=handle_file(APPLE), plain=p, api_name="/embed") for p in (False, True))
    assert np.linalg.norm(robust) == pytest.approx(1, abs=1e-5)
    assert not np.allclose(robust, plain)


def test_the_endpoints_are_these_and_no_other(client):
    named = client.view_api(return_format="dict", print_info=False)["named_endpoints"]
    assert set(named) == {"/classify", "/compare", "/explain", "/embed"}
    readme = (Path(defense.demo.__path__[0]) / "README.md").read_text(encoding="utf-8")
    for name, endpoint in named.items():
        assert f"| `{name}` |" in readme
        assert all(parameter["parameter_name"] in readme for parameter in endpoint["parameters"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "dog,dog"}, "repeats"),
        ({"labels": "a" * 300}, "at most 200"),
        ({"template": "no slot"}, "literal"),
        ({"top_k": -1}, "at least 1"),
    ],
    ids=["twice", "long", "template", "top_k"],
)
def test_a_wrong_argument_is_one_sentence(client, arguments, message):
    with pytest.raises(AppError, match=message) as caught:
        client.predict(image=handle_file(APPLE), **arguments, api_name="/classify")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("code", ["not_an_image", "truncated", "unsupported_mode"])
def test_fault_78_a_bad_file_is_one_sentence(client, tmp_path, code):
    (tmp_path / "bad.png").write_bytes(BAD_FILES[code])
    with pytest.raises(AppError, match=code):
        client.predict(image=handle_file(tmp_path / "bad.png"), api_name="/classify")


def test_fault_19_a_palette_gif_is_seen_in_its_colors(client, tmp_path):
    with Image.open(APPLE) as image:
        image.quantize(64).save(tmp_path / "apple.gif")
        image.quantize(64).convert("RGB").save(tmp_path / "apple.png")
    answers = [
        client.predict(image=handle_file(tmp_path / name), labels="apple, pizza", api_name="/classify")
        for name in ("apple.gif", "apple.png")
    ]
    assert answers[0] == answers[1]


def test_fault_78_an_upload_of_11_mb_is_refused(address):
    done = httpx.post(f"{address}gradio_api/upload", files={"files": ("large.png", b"\0" * 11_000_000)})
    assert done.status_code == 413
    assert "10000000" in done.text


def call(address: str, name: str, data: list) -> str:
    """Call an endpoint by raw HTTP and return the last message of its stream."""
    begun = httpx.post(f"{address}gradio_api/call/{name}", json={"data": data})
    if begun.status_code != 200:
        return begun.text
    return httpx.get(f"{address}gradio_api/call/{name}/{begun.json()['event_id']}", timeout=60).text


def uploaded(address: str, data: bytes = b"") -> str:
    files = {"files": ("apple.png", data or APPLE.read_bytes())}
    return httpx.post(f"{address}gradio_api/upload", files=files).json()[0]


META = {"meta": {"_type": "gradio.FileData"}}


@pytest.mark.parametrize(
    "image",
    [
        {"path": "/etc/passwd", **META},
        {"path": "/etc/passwd"},
        {"path": "../../../../etc/passwd", **META},
        {"path": "http://127.0.0.1:1/x.png", **META},
        {"path": "file:///etc/passwd", **META},
        {"path": "data:image/png;base64,AAAA", **META},
        "/etc/passwd",
    ],
    ids=["absolute", "no-meta", "dots", "http", "file", "data", "text"],
)
def test_fault_79_only_an_uploaded_file_is_read(address, image):
    said = call(address, "classify", [image, "apple,pizza", "", 5])
    assert "event: error" in said
    assert "event: complete" not in said
    assert "root:" not in said


def test_fault_79_an_address_is_refused_in_words_and_not_fetched(address):
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            hits.append(self.path)

        def log_message(self, *_):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/x.png"
        said = call(address, "classify", [{"path": url, "url": url, **META}, "apple,pizza", "", 5])
        server.shutdown()
    assert "Addresses are not fetched" in said
    assert not hits


@pytest.mark.parametrize("path", ["/etc/passwd", "../../../../etc/passwd", str(APPLE), "http://127.0.0.1:1/x"])
def test_fault_79_the_server_serves_no_file_of_the_machine(address, path):
    assert httpx.get(f"{address}gradio_api/file={path}").status_code in (403, 404)


def test_nothing_of_an_upload_stays_on_disk(address, client):
    path = Path(uploaded(address))
    assert path.is_file()
    assert "event: complete" in call(address, "classify", [{"path": str(path), **META}, "apple,pizza", "", 5])
    assert not path.exists()
    assert not path.parent.exists()
    client.predict(image=handle_file(APPLE), api_name="/explain")
    assert not [each for each in path.parents[1].rglob("*") if each.is_file()]


def test_an_upload_is_read_once(address):
    path = uploaded(address)
    data = [{"path": path, **META}, "apple,pizza", "", 5]
    assert "event: complete" in call(address, "classify", data)
    assert "event: error" in call(address, "classify", data)


def test_the_folder_of_uploads_goes_with_the_server(tiny_bundle, tmp_path):
    with served(tiny_bundle, {"TMPDIR": str(tmp_path)}) as other:
        folder = Path(uploaded(other)).parents[1]
        assert folder.is_dir()
        assert tmp_path in folder.parents
    assert list(tmp_path.iterdir()) == []


def test_fault_78_the_33rd_in_the_queue_is_told_that_the_demo_is_busy(stuck):
    codes = []
    for i in range(limits.MAX_AT_ONCE):  # files of their own: each is read, and deleted, before the model is asked
        image = {"path": uploaded(stuck, file_of(Image.new("RGB", (20, 20 + i)))), **META}
        codes.append(begin(stuck, image).status_code)
        wait_until(lambda: in_queue(stuck) == 0)
    while codes[-1] == 200 and len(codes) < 99:
        last = begin(stuck, image)
        codes.append(last.status_code)
    assert codes == [200] * (limits.MAX_AT_ONCE + limits.MAX_QUEUE) + [503]
    assert f"Queue is full. Max size is {limits.MAX_QUEUE}" in last.text
    with pytest.raises(Exception, match=r"(?i)queue is full"):
        Client(stuck, verbose=False).predict(image=handle_file(APPLE), api_name="/classify")


def begin(url: str, image: dict) -> httpx.Response:
    return httpx.post(f"{url}gradio_api/call/classify", json={"data": [image, "apple,pizza", "", 5]})


def in_queue(url: str) -> int:
    return httpx.get(f"{url}gradio_api/queue/status").json()["queue_size"]


def wait_until(condition) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never happened")


def test_the_browser_is_told_to_fetch_nothing_from_elsewhere(address):
    page = httpx.get(address)
    policy = page.headers["content-security-policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy
    for attribute in ('src="http', 'href="http'):
        assert attribute not in page.text.replace(address.rstrip("/"), "").replace('rel="preconnect"', "")


def test_fault_70_a_bundle_is_served_without_torch(tiny_bundle):
    with served(tiny_bundle) as other:
        client = Client(other, verbose=False)
        answer = client.predict(image=handle_file(APPLE), api_name="/classify")
        assert {row["label"] for row in answer} == {"dog", "cat", "red fish"}
        assert len(client.predict(image=handle_file(APPLE), api_name="/embed")) == 32
        with pytest.raises(AppError, match="exported bundle"):
            client.predict(image=handle_file(APPLE), api_name="/explain")
        tabs = [each["props"]["label"] for each in client.config["components"] if each["type"] == "tabitem"]
        assert tabs == ["Try it", "Measured", "API and privacy"]
        said = "".join(str(each["props"].get("value")) for each in client.config["components"])
        assert "This is an exported bundle" in said


def test_fault_78_a_megabyte_of_labels_is_one_sentence(address):
    said = call(address, "classify", [{"path": uploaded(address), **META}, "a" * 1_000_000, "", 5])
    assert "event: error" in said
    assert "1,000,000 characters long" in said
    assert len(said) < 1_000


def test_fault_78_of_several_moves_of_one_control_the_latest_wins_and_all_wait_in_one_queue(address):
    """What the page does when many drag a slider: Gradio drops the moves between, and works on two at a time."""
    config = httpx.get(f"{address}config").json()
    names = {each["id"]: each["props"].get("elem_id") for each in config["components"]}
    moved = [
        event for event in config["dependencies"]
        if any(names.get(target) in ("strength", "word", "edit", "tasks") for target, _ in event["targets"])
    ]  # fmt: skip
    assert moved
    for event in config["dependencies"]:
        if event["targets"] and event["inputs"] and event["backend_fn"]:
            assert event["queue"] is not False
            if event["api_visibility"] == "private":
                assert event["trigger_mode"] == "always_last"
    assert config["max_file_size"] == limits.MAX_FILE_BYTES
