"""The server that shows the page.

    visitor's file --uploads--> bytes --limits.load--> picture --draw.write--> what the model sees
    labels, controls --engine.question--> Question --engine.explain--> Explanation --views--> HTML

Nothing of a visitor reaches the disk but the upload itself, which lies in a private folder until it is read, and
nothing is fetched from anywhere: the page is made of what Gradio and this folder ship.

Gradio is imported within `serving` only: it reads the environment while it is imported, and what is set here must be
there by then.
"""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from defense.demo import guard, limits
from defense.errors import ConfigError

if TYPE_CHECKING:
    from defense.demo.engine import Engine

_NEWER = {"run_history": False}


@contextmanager
def serving(engine: Engine, *, host: str = "127.0.0.1", port: int | None = None, root_path: str = "") -> Iterator[str]:
    """Serve the page and yield its address; on leaving the server is stopped and its folder deleted.

    One at a time in a process: Gradio looks up the folder in the environment, which all of a process share.

    Args:
        engine: The model.
        host: Address to listen on; "0.0.0.0" for all.
        port: The port; the first free one from 7860 on where None.
        root_path: Where visitors find the page behind a proxy: a path such as "/clip", or an address with one. Requests
            must name an address of digits, this machine or the host of that address.

    Raises:
        ConfigError: `root_path` is neither a path nor an address.
        OSError: The port is taken.
    """
    hosts = guard.hosts_of(host, _public_host(root_path))
    with tempfile.TemporaryDirectory(prefix="defense-demo-") as folder, _environment(GRADIO_TEMP_DIR=folder):
        from starlette.middleware import Middleware

        from defense.demo import page, uploads

        blocks = page.build(engine)
        middleware = [Middleware(guard.Headers), Middleware(guard.KnownHosts, hosts), Middleware(guard.BoundedBodies)]
        try:
            app, address, _ = blocks.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
                show_error=False, max_file_size=limits.MAX_FILE_BYTES, state_session_capacity=limits.MAX_SESSIONS,
                allowed_paths=[], enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
                footer_links=[], theme=page.theme(), css_paths=[page.STYLE], head=page.head(), **_newer(blocks.launch),
                root_path=root_path or None, app_kwargs={"middleware": [*middleware, Middleware(uploads.Apart)]},
            )  # fmt: skip
            app.uploaded_file_dir = uploads.Folder(folder)  # type: ignore[assignment]  # anything with a path will do
            yield address
        finally:
            blocks.close(verbose=False)


def _newer(launch: Callable[..., Any]) -> dict[str, Any]:
    """Return what switches off those features that only newer versions of Gradio have."""
    known = inspect.signature(launch).parameters
    return {name: value for name, value in _NEWER.items() if name in known}


def _public_host(root_path: str) -> str | None:
    """Return the host that a root path names, if it names one."""
    if not root_path or (root_path.startswith("/") and not root_path.startswith("//")):
        return None
    parts = urlsplit(root_path)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(f"root_path={root_path!r}; want a path such as /clip, or https://HOST/PATH")
    return parts.hostname


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for Gradio, which reads them when it is imported and when a page is built."""
    # Gradio would take these from the surroundings over what it was told, or beside it.
    wanted = {
        **values,
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_ALLOWED_PATHS": "",
        "GRADIO_NUM_WORKERS": "0",
        "GRADIO_ROOT_PATH": "",
    }
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
