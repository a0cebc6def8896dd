"""Files from visitors: their untouched bytes reach our decoder, and nothing of them stays on disk.

Gradio's own image component opens a file before we do, and fetches one whose "path" is an address. A component that
went through `untouched` does neither. What was uploaded lies in a private folder (see `app.serving`) until it is read
here, once.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import gradio as gr
from gradio.data_classes import FileData
from gradio.utils import get_upload_folder
from gradio_client import utils as client_utils

from defense.demo import limits
from defense.errors import InvalidImageError

Component = TypeVar("Component", bound=gr.components.Component)


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
    if not path.resolve().is_relative_to(Path(get_upload_folder()).resolve()):
        raise _refused("not_found")
    try:
        with path.open("rb") as file:
            return file.read(limits.MAX_FILE_BYTES + 1)
    except OSError:
        raise _refused("not_found") from None
    finally:
        path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: somebody else's, of the same content, is being read
            path.parent.rmdir()


def _refused(code: str) -> gr.Error:
    return gr.Error(limits.friendly(InvalidImageError(code, "an upload")), print_exception=False)
