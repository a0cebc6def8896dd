"""What stands between the network and Gradio: names, sizes and headers. No server, no Gradio."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

import pytest

pytest.importorskip("httpx", reason='needs the extra "demo"')

import httpx

from defense.demo import app, guard, limits
from defense.errors import ConfigError


async def echo(scope, receive, send) -> None:
    """Read the whole body, and answer with its length."""
    n_bytes, more = 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise RuntimeError("the visitor went away")
        n_bytes, more = n_bytes + len(message.get("body", b"")), message.get("more_body", False)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": str(n_bytes).encode()})


def ask(middleware, method: str = "GET", path: str = "/", **options) -> httpx.Response:
    async def asked() -> httpx.Response:
        transport = httpx.ASGITransport(middleware, raise_app_exceptions=True)
        async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1:7860") as client:
            return await client.request(method, path, **options)

    return asyncio.run(asked())


# --- fault 91: a page elsewhere under whose name this machine answers -------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1:7860",
        "127.0.0.1",
        "[::1]:7860",
        "[::1]",
        "::1",
        "localhost:7860",
        "LocalHost",
        "192.168.7.9:80",
        "demo.lan",
    ],
)
def test_fault_91_addresses_and_own_names_are_answered(host: str) -> None:
    guarded = guard.KnownHosts(echo, guard.hosts_of("0.0.0.0", "Demo.LAN"))
    assert ask(guarded, headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "localhost.evil.example:80", "",
     "127.0.0.1@evil.example", "[evil.example]:80", "0x7f.1", "demo.lan.evil.example"],
)  # fmt: skip
def test_fault_91_other_names_are_refused_in_words(host: str) -> None:
    said = ask(guard.KnownHosts(echo, guard.hosts_of("127.0.0.1", "demo.lan")), headers={"host": host})
    assert said.status_code == 421
    assert "--root-path" in said.text


def test_fault_91_a_socket_under_another_name_is_closed() -> None:
    sent = []

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "websocket", "headers": [(b"host", b"evil.example")]}
    asyncio.run(guard.KnownHosts(echo, guard.hosts_of("127.0.0.1"))(scope, None, send))
    assert [message["type"] for message in sent] == ["websocket.close"]


def test_fault_91_two_names_are_none() -> None:
    headers = [(b"host", b"127.0.0.1"), (b"host", b"evil.example")]
    sent = []

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(guard.KnownHosts(echo, guard.hosts_of("127.0.0.1"))({"type": "http", "headers": headers}, None, send))
    assert sent[0]["status"] == 421


def test_fault_91_answers_are_not_sniffed_and_bring_the_policy() -> None:
    headers = ask(guard.Headers(echo)).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'self'" in headers["content-security-policy"]
    assert headers["referrer-policy"] == "no-referrer"


@pytest.mark.parametrize(
    ("host", "is_open"),
    [("127.0.0.1", False), ("127.9.9.9", False), ("::1", False), ("localhost", False), ("0.0.0.0", True), ("::", True),
     ("192.168.1.5", True), ("demo.lan", True)],
)  # fmt: skip
def test_fault_91_what_others_can_reach_is_known(host: str, is_open: bool) -> None:
    assert guard.is_open(host) is is_open


# --- fault 92: bodies without end -------------------------------------------------------------------------------------

SIZES = [("/gradio_api/upload", limits.MAX_UPLOAD_BYTES), ("/gradio_api/queue/join", limits.MAX_BODY_BYTES)]


def pieces(n_bytes: int):
    """A body that does not say how long it is."""

    async def body():
        for start in range(0, n_bytes, 100_000):
            yield bytes(min(100_000, n_bytes - start))

    return body()


@pytest.mark.parametrize(("path", "most"), SIZES)
@pytest.mark.parametrize("is_announced", [True, False], ids=["announced", "in-pieces"])
def test_fault_92_a_body_up_to_the_bound_is_read_and_one_beyond_is_refused(path, most, is_announced) -> None:
    for n_bytes, status in ((most, 200), (most + 1, 413), (3 * most, 413)):
        body = bytes(n_bytes) if is_announced else pieces(n_bytes)
        answer = ask(guard.BoundedBodies(echo), "POST", path, content=body)
        assert answer.status_code == status
        assert answer.text == str(n_bytes) if status == 200 else str(limits.MAX_FILE_BYTES) in answer.text


@pytest.mark.parametrize(("path", "most"), SIZES)
def test_fault_92_neither_the_application_nor_the_guard_reads_on_beyond_the_bound(path, most) -> None:
    sent = received = 0

    async def body():
        nonlocal sent
        async for piece in pieces(3 * most):
            sent += len(piece)
            yield piece

    async def counting(scope, receive, send) -> None:
        nonlocal received
        while (message := await receive())["type"] == "http.request":
            received += len(message["body"])
            if not message["more_body"]:
                break

    assert ask(guard.BoundedBodies(counting), "POST", path, content=body()).status_code == 413
    assert most - 100_000 < received <= most
    assert sent <= most + 100_000


@pytest.mark.parametrize("length", ["-1", "1e9", "99999999999999999999", "abc"])
def test_fault_92_a_length_that_is_none_is_refused(length: str) -> None:
    answer = ask(guard.BoundedBodies(echo), "POST", "/x", headers={"content-length": length}, content=pieces(10))
    assert answer.status_code == 413


def test_fault_92_errors_of_the_application_stay_what_they_are() -> None:
    async def broken(scope, receive, send) -> None:
        raise KeyError("ours")

    with pytest.raises(KeyError, match="ours"):
        ask(guard.BoundedBodies(broken), "POST", "/x", content=b"1")


def test_the_largest_question_that_the_page_takes_fits() -> None:
    labels = "\\u00e9" * limits.MAX_LABEL_LENGTH + "\\n"
    assert len(labels) * limits.MAX_LABELS + 100_000 < limits.MAX_BODY_BYTES


# --- fault 93: behind a proxy -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "root_path", ["clip", "//evil.example/x", "ftp://a/b", "https://", "https:///x", "example.org/clip"]
)
def test_fault_93_a_root_path_that_is_none_is_refused(root_path: str) -> None:
    with (
        pytest.raises(ConfigError, match=r"want a path such as /clip, or https://HOST/PATH"),
        app.serving(None, root_path=root_path),
    ):
        pass


def test_fault_90_the_private_folder_is_set_before_gradio_is_imported() -> None:
    code = "import sys; from defense.demo import app, guard; assert 'gradio' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True, env=os.environ)
