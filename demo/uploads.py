"""Files from visitors: their untouched bytes reach our decoder, and nothing of them stays on disk.

Gradio's own image component opens a file before we do, and fetches one whose "path" is an address. A component that
went through `untouched` does neither. What was uploaded lies in a private folder (see `app.serving`) until it is read
here, once.

Gradio names an upload by its content, so that two visitors with the same file would share one, and the first to be
answered would take it from the other. Therefore every request has a folder of its own within the private one.
"""

from __future__ import annotations

import os
import secrets
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import TypeVar

import gradio as gr
from gradio.data_classes import FileData
from gradio.utils import get_upload_folder
from gradio_client import utils as client_utils

from defense.demo import limits
from defense.demo.guard import App, Receive, Scope, Send
from defense.errors import InvalidImageError

Component = TypeVar("Component", bound=gr.components.Component)
_request: ContextVar[str] = ContextVar("_request", default="")
"""Name of the folder of the request that is being answered; "" where it uploads nothing."""


class Apart:
    """ASGI middleware that gives each upload a folder of its own.

    Args:
        app: What answers.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"].endswith("/upload"):
            _request.set(secrets.token_hex(16))
        await self.app(scope, receive, send)


class Folder(os.PathLike[str]):
    """Where Gradio puts what the current request uploads.

    Args:
        root: The private folder.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def __fspath__(self) -> str:
        return os.path.join(self.root, _request.get())


def untouched(component: Component) -> Component:
    """Return a Gradio component that holds one file, made to hand over the file's bytes and to delete it.

    Its methods are replaced on the object: for a subclass, Gradio would write a `.pyi` file beside this one.
    """
    vars(component).update(async_move_resource_to_block_cache=_as_it_lies, preprocess=_bytes_of)
    return component


async def _as_it_lies(path: str | Path | None) -> str | None:
    """Return the path of an upload; Gradio would fetch an address."""
    if client_utils.is_http_url_like(str(path)):
        raise _refused("url_not_supported")
    return None if path is None else str(path)


def _bytes_of(payload: FileData | None) -> bytes | None:
    return None if payload is None else take(Path(payload.path))


def take(path: Path) -> bytes:
    """Return the bytes of an upload, at most one more than may be, and delete it with its folder.

    Raises:
        gr.Error: It is no upload, or is gone: it was read before.
    """
    root = Path(get_upload_folder()).resolve()
    if not path.resolve().is_relative_to(root):
        raise _refused("not_found")
    try:
        with path.open("rb") as file:
            return file.read(limits.MAX_FILE_BYTES + 1)
    except OSError:
        raise _refused("not_found") from None
    finally:
        path.unlink(missing_ok=True)
        for folder in path.parents[:2]:  # named by content and by request
            with suppress(OSError):  # not empty: other files of the same request
                if folder.resolve() != root:
                    folder.rmdir()


def _refused(code: str) -> gr.Error:
    return gr.Error(limits.friendly(InvalidImageError(code, "an upload")), print_exception=False)
