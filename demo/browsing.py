"""The second tab: all latents of the SAEs, their pictures, and what happens to the answer when one is set."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

from defense.demo import cards, limits, views
from defense.demo.engine import Engine
from defense.demo.trying import LISTEN, PRIVATE, Form, Handler, Trying, friendly

_STEER_MAX = 40.0
_STEERED = "Choose a latent, then move this: the plain network, with that one latent set to a value on every token."


class Browsing:
    """The tab's handlers."""

    def __init__(self, engine: Engine, gallery: cards.Gallery) -> None:
        self.engine, self.gallery = engine, gallery
        self.trying = Trying(engine, gallery)

    def search(self, hook_point: str, query: str, sort: str) -> tuple[str]:
        """Return the list of latents."""
        return (cards.listed(self.engine, self.gallery, hook_point, query[: limits.MAX_QUERY_LENGTH], sort),)

    def open(self, key: str, form: Form) -> tuple[Any, ...]:
        """Return the latent's key, the slider for it, no answers yet, and its card."""
        latent_key = views.key_of(key)
        columns = self.engine.catalogues[latent_key[0]].columns
        largest = float(columns["largest_activation"][latent_key[1]]) if "largest_activation" in columns else 0.0
        can_steer = self.engine.can_map(*latent_key)
        slider = gr.update(value=0.0, maximum=round(1.5 * largest, 1) or _STEER_MAX, interactive=can_steer)
        return key, slider, "", cards.card(self.engine, self.gallery, latent_key, form.picture)

    def steer(self, key: str, value: float, form: Form) -> tuple[str]:
        """Return the plain answer for the visitor's picture, and the one with a latent set."""
        picture = form.picture
        if not key or picture is None:
            return (views.message(_STEERED),)
        from defense.hosts.controls import Controls

        latent_key = views.key_of(key)
        question = self.trying.question(form)
        unsteered = self.engine.classify(picture, _with(question, Controls(strength=0.0)))
        steered = self.engine.classify(picture, _with(question, Controls(strength=0.0, steer={latent_key: value})))
        return (views.answers(unsteered, steered, names=("plain CLIP", f"latent {latent_key[1]} at {value:g}")),)


def _with(question: Any, controls: Any) -> Any:
    from dataclasses import replace

    return replace(question, controls=controls)


def build(engine: Engine, gallery: cards.Gallery, form: list[Any]) -> None:
    """Put the tab together.

    Args:
        engine: The model.
        gallery: For the pictures.
        form: The components of the first tab, whose picture and labels are steered on.
    """
    if not engine.catalogues:
        gr.HTML(f'<p class="empty">{cards.NO_CATALOGUE}</p>')
        return
    browsing = Browsing(engine, gallery)
    hook_points = list(engine.catalogues)
    sorts = [name for name in cards.SORTS if name in engine.catalogues[hook_points[0]].columns]
    with gr.Row(elem_classes="search"):
        query = gr.Textbox(
            "", label="Search", placeholder="a name, a number, or a phrase: its nearest latents",
            max_length=limits.MAX_QUERY_LENGTH, scale=3, elem_id="query",
        )  # fmt: skip
        sort = gr.Radio(
            [(name.replace("_", " "), name) for name in sorts], value=sorts[0], label="by", scale=4, elem_id="sort"
        )
        where = gr.Radio(
            [(views.block_of(point), point) for point in hook_points], value=hook_points[0], label="at", scale=1
        )
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=7, min_width=300):
            tiles = gr.HTML(browsing.search(hook_points[0], "", sorts[0])[0], elem_id="tiles", js_on_load=LISTEN)
        with gr.Column(scale=5, min_width=300):
            slider = gr.Slider(
                0, _STEER_MAX, 0, step=0.1, label="set it to", interactive=False, elem_id="steer", info=_STEERED
            )
            steered = gr.HTML("", elem_id="steered")
            card = gr.HTML("", elem_id="browser-card")
    chosen = gr.State("")

    def on(trigger: Any, handler: Handler, inputs: list[Any], outputs: list[Any]) -> None:
        trigger(friendly(handler, len(outputs)), inputs, outputs, **PRIVATE)

    def open_card(event: gr.EventData, *values: Any) -> tuple[Any, ...]:
        return browsing.open(event.place, Form(*values))

    on(functools.partial(gr.on, [query.change, sort.input, where.input]), browsing.search,
       [where, query, sort], [tiles])  # fmt: skip
    on(tiles.select, open_card, form, [chosen, slider, steered, card])
    on(slider.input, lambda key, value, *values: browsing.steer(key, value, Form(*values)),
       [chosen, slider, *form], [steered])  # fmt: skip
