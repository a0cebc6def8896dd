"""The API: four endpoints with names that stay, for `gradio_client` and plain HTTP. README.md documents them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import gradio as gr

from defense.core.latents import Edit
from defense.demo import limits
from defense.demo.engine import Engine
from defense.demo.trying import EDITS, EVENT
from defense.demo.uploads import untouched
from defense.errors import ConfigError, DefenseError, InvalidImageError

_BUNDLE = "this demo serves an exported bundle, which holds the defended model alone; use /classify"


class Endpoints:
    """What the endpoints answer. Values are JSON; pictures are the bytes of an uploaded file."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def classify(self, image: bytes | None, labels: str, template: str, top_k: float) -> list[dict[str, Any]]:
        """Return the defended answer: [{"label": str, "score": float}, ...], best first."""
        return self.engine.classify(_picture(image), self.engine.question(labels, template), _count(top_k))

    def compare(self, image: bytes | None, labels: str, template: str, top_k: float) -> dict[str, Any]:
        """Return both answers, whether they differ, and the time of each in milliseconds."""
        found = self._explained(image, labels, template, top_k)
        kept = ("plain", "robust", "changed", "plain_ms", "robust_ms", "warnings")
        return {name: value for name, value in found.items() if name in kept}

    def explain(
        self, image: bytes | None, labels: str, template: str, top_k: float, strength: float, edit: str, tasks: str
    ) -> dict[str, Any]:
        """Return both answers and what was removed: `Explanation.to_dict`."""
        return self._explained(image, labels, template, top_k, strength=strength, edit=edit, tasks=tasks)

    def embed(self, image: bytes | None, plain: bool) -> list[float]:
        """Return the image embedding, [d_embed], of length 1; without the defense where `plain` is set."""
        return self.engine.embed(_picture(image), plain=plain).tolist()

    def _explained(
        self, image: bytes | None, labels: str, template: str, top_k: float, **controls: Any
    ) -> dict[str, Any]:
        if not self.engine.can_explain:
            raise ConfigError(_BUNDLE)
        question = self.engine.question(labels, template, _controls(**controls) if controls else None)
        return self.engine.explain(_picture(image), question, _count(top_k)).to_dict()


def _controls(strength: float, edit: str, tasks: str) -> Any:
    from defense.hosts.controls import Controls

    names: dict[str | None, Edit | None] = {None: None, "": None, **{name: name for name in EDITS.values()}}
    if edit not in names:
        raise ConfigError(f"edit={edit!r}; it must be 'scale', 'project', or empty for each set's own")
    return Controls(strength, names[edit], tuple(limits.split_labels(tasks)) or None)


def _picture(image: bytes | None) -> Any:
    if image is None:
        raise InvalidImageError("empty", "no picture was given")
    return limits.decode(image).image


def _count(top_k: float) -> int | None:
    return None if top_k == 0 else int(top_k)


def guarded(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return an endpoint whose errors reach the caller as one sentence."""

    @functools.wraps(function)
    def answered(*values: Any) -> Any:
        try:
            return function(*values)
        except DefenseError as error:
            raise gr.Error(limits.friendly(error), print_exception=False) from error

    return answered


def build(engine: Engine) -> None:
    """Add the endpoints to the page, out of sight."""
    endpoints = Endpoints(engine)
    with gr.Column(visible=False):
        image = untouched(gr.File(label="image"))
        labels = gr.Textbox("", label="labels")
        template = gr.Textbox("", label="template")
        top_k = gr.Number(5, label="top_k", precision=0)
        strength = gr.Number(1.0, label="strength")
        edit = gr.Textbox("", label="edit")
        tasks = gr.Textbox("", label="tasks")
        plain = gr.Checkbox(False, label="plain")
        result = gr.JSON()
        button = gr.Button()
    asked = [image, labels, template, top_k]
    for name, inputs in (
        ("classify", asked),
        ("compare", asked),
        ("explain", [*asked, strength, edit, tasks]),
        ("embed", [image, plain]),
    ):
        button.click(guarded(getattr(endpoints, name)), inputs, result, api_name=name, **EVENT)
