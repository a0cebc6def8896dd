"""What every request passes before Gradio sees it, and what every answer carries. ASGI middleware, without Gradio."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

from defense.demo import limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

# Enforced by the browser, whatever Gradio's next version would like to load.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: data: blob:; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)
_HEADERS = (
    (b"content-security-policy", _POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
)
_NO_SPLIT = 2
"""Colons in an IPv6 address without brackets: at least so many."""


def hosts_of(host: str, public_host: str | None = None) -> frozenset[str]:
    """Return the names under which a server may be asked, beside addresses of digits.

    Args:
        host: What it listens on.
        public_host: The name of a proxy in front of it.
    """
    names = {"localhost", socket.gethostname(), host, public_host or "localhost"}
    return frozenset(name.lower() for name in names)


def is_open(host: str) -> bool:
    """Return whether a server that listens on an address can be reached from other machines."""
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() != "localhost"


class Headers:
    """Adds to every answer what the browser is to refuse.

    Args:
        app: What answers.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", []), *_HEADERS]
            await send(message)

        await self.app(scope, receive, with_headers if scope["type"] == "http" else send)


class KnownHosts:
    """Refuses requests for a host that is not this one.

    A page elsewhere can let its own name lead to this machine and then read what the demo answers, since to the browser
    both are one site. It cannot do so with an address of digits.

    Args:
        app: What answers.
        hosts: See `hosts_of`.
    """

    def __init__(self, app: App, hosts: Collection[str]) -> None:
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or self._is_known(_header(scope, b"host")):
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            said = "this demo is not known under that name; start it with --root-path https://NAME/PATH"
            await _refuse(send, 421, said)

    def _is_known(self, host: str) -> bool:
        name = host.lower()
        if name.startswith("["):  # [IPv6]:port
            name = name[1:].partition("]")[0]
        elif name.count(":") < _NO_SPLIT:
            name = name.partition(":")[0]
        if name in self.hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True


class BoundedBodies:
    """Refuses requests with more bytes than a visitor has reason to send, however they are announced.

    Args:
        app: What answers.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        most = limits.MAX_UPLOAD_BYTES if scope["path"].endswith("/upload") else limits.MAX_BODY_BYTES
        announced = _header(scope, b"content-length")
        if announced and not (announced.isdecimal() and int(announced) <= most):
            await _refuse_body(send, most)
            return
        n_bytes, is_answered = 0, False

        async def counted() -> Message:
            nonlocal n_bytes
            message = await receive()
            n_bytes += len(message.get("body", b""))
            return message if n_bytes <= most else {"type": "http.disconnect"}

        async def unless_too_large(message: Message) -> None:
            nonlocal is_answered
            if n_bytes <= most or is_answered:
                is_answered = True
                await send(message)

        try:
            await self.app(scope, counted, unless_too_large)
        except Exception:  # a body that ends early makes Gradio raise all kinds of errors
            if n_bytes <= most:
                raise
        if n_bytes > most and not is_answered:
            await _refuse_body(send, most)


async def _refuse_body(send: Send, most: int) -> None:
    await _refuse(
        send, 413, f"the request has more than {most} bytes; a file may have {limits.MAX_FILE_BYTES}, one per request"
    )


async def _refuse(send: Send, status: int, said: str) -> None:
    """Answer with one sentence, and hang up: nobody reads what else is sent."""
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": said.encode()})


def _header(scope: Scope, name: bytes) -> str:
    """Return the value of a request's header, or "" where it has none, or several."""
    values = [value for key, value in scope.get("headers", []) if key == name]
    return values[0].decode("latin-1") if len(values) == 1 else ""
