"""The page as a whole, and the server that shows it.

    visitor's file --uploads--> bytes --limits.load--> picture --draw.write--> what the model sees
    labels, controls --engine.question--> Question --engine.explain--> Explanation --views--> HTML

Nothing of a visitor reaches the disk but the upload itself, which lies in a private folder until it is read, and
nothing is fetched from anywhere: the page is made of what Gradio and this folder ship.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from defense.demo import browsing, cards, endpoints, limits, measured, trying
from defense.demo.engine import Engine

_HERE = Path(__file__).parent
_CLEANING_S = (60, 120)
"""How often Gradio looks for uploads that nobody asked about, and how old they may be, in seconds."""

# Enforced by the browser, whatever Gradio's next version would like to load.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' ws: data: blob:; "
    "frame-ancestors 'self'; base-uri 'self'; form-action 'self'"
)


def build(engine: Engine) -> gr.Blocks:
    """Return the page for a model."""
    gallery = cards.Gallery(engine)
    with gr.Blocks(title="clip-defense", analytics_enabled=False, delete_cache=_CLEANING_S, fill_width=True) as blocks:
        gr.HTML(_header(engine))
        with gr.Tabs():
            with gr.Tab("Try it"):
                form = trying.build(engine, gallery)
            if engine.can_explain:
                with gr.Tab("Latents"):
                    browsing.build(engine, gallery, form)
            with gr.Tab("Measured"):
                measured.build()
            with gr.Tab("API and privacy"):
                gr.Markdown((_HERE / "README.md").read_text(encoding="utf-8").partition("\n## ")[2].join(("## ", "")))
        endpoints.build(engine)
    blocks.queue(max_size=limits.MAX_QUEUE)
    return blocks


def _header(engine: Engine) -> str:
    return (
        '<header class="top"><h1>clip-defense</h1><p>CLIP reads: write a word on a picture and it sees the word. Here '
        "the latents that read are taken out of its vision transformer, and everything else passes through.</p>"
        f'<p class="model">{escape(engine.title)}</p></header>'
    )


def theme() -> gr.Theme:
    """Return Gradio's plainest theme, with the system's own fonts."""
    fonts = ("system-ui", "-apple-system", "Segoe UI", "sans-serif")
    return gr.themes.Base(
        primary_hue="teal", neutral_hue="zinc", spacing_size="sm", radius_size="sm", text_size="sm", font=fonts,
        font_mono=("ui-monospace", "monospace"),
    )  # fmt: skip


class _Policy:
    """ASGI middleware that adds the content security policy to every page."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", []),
                    (b"content-security-policy", _POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                ]
            await send(message)

        await self.app(scope, receive, with_policy if scope["type"] == "http" else send)


@contextmanager
def serving(engine: Engine, *, host: str = "127.0.0.1", port: int | None = None) -> Iterator[str]:
    """Serve the page and yield its address; on leaving the server is stopped and its folder deleted.

    One at a time in a process: Gradio looks up the folder in the environment, which all of a process share.

    Args:
        engine: The model.
        host: Address to listen on; "0.0.0.0" for all.
        port: The port; the first free one from 7860 on where None.

    Raises:
        OSError: The port is taken.
    """
    with tempfile.TemporaryDirectory(prefix="defense-demo-") as folder, _environment(GRADIO_TEMP_DIR=folder):
        from starlette.middleware import Middleware

        blocks = build(engine)
        try:
            _, address, _ = blocks.launch(
                server_name=host, server_port=port, prevent_thread_lock=True, quiet=True, share=False, inbrowser=False,
                show_error=False, max_file_size=limits.MAX_FILE_BYTES, state_session_capacity=limits.MAX_SESSIONS,
                allowed_paths=[], enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False,
                run_history=False, footer_links=[], theme=theme(), css_paths=[_HERE / "page.css"],
                head=f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>",
                app_kwargs={"middleware": [Middleware(_Policy)]},
            )  # fmt: skip
            yield address
        finally:
            blocks.close(verbose=False)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Set environment variables for Gradio, which reads them when a page is built."""
    # Gradio would take these from the surroundings over what it was told, or beside it.
    wanted = {**values, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_ALLOWED_PATHS": "", "GRADIO_NUM_WORKERS": "0"}
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
