"""The page as a whole, as Gradio's components."""

from __future__ import annotations

from html import escape
from pathlib import Path

import gradio as gr

from defense.demo import browsing, cards, endpoints, limits, measured, trying
from defense.demo.engine import Engine

_HERE = Path(__file__).parent
STYLE = _HERE / "page.css"
_CLEANING_S = (60, 120)
"""How often Gradio looks for uploads that nobody asked about, and how old they may be, in seconds."""


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
                told = (_HERE / "README.md").read_text(encoding="utf-8").partition("\n## ")[2]
                gr.Markdown(f"## {told}", elem_classes="told")
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


def head() -> str:
    """Return what the page's head holds beside Gradio's own: our script."""
    return f"<script>{(_HERE / 'page.js').read_text(encoding='utf-8')}</script>"
