"""The first tab: a picture, a word on it, both answers, and what was removed."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from defense.core.latents import Edit
from defense.demo import cards, draw, limits, views
from defense.demo.engine import Engine, Question
from defense.demo.examples import ExamplePicture, examples
from defense.demo.uploads import untouched
from defense.errors import DefenseError

EDITS: dict[str, Edit | None] = {"each set's own": None, "scale": "scale", "project": "project"}
EVENT: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": limits.MAX_AT_ONCE, "show_progress": "hidden"}
"""What all of the page's events share. The latest of several moves of one control wins: Gradio drops the others."""
PRIVATE = {"api_visibility": "private", "trigger_mode": "always_last", **EVENT}
LISTEN = (Path(__file__).parent / "listen.js").read_text(encoding="utf-8")
"""Tells Python which of a component's own buttons was pressed."""

_HEIGHTS = (0.05, 0.5)
_ROWS = (0.2, 0.5, 0.8)
_SHOWN = 4
"""Outputs of `Trying.show`."""


@dataclass(frozen=True)
class Form:
    """What a visitor has set: the inputs of every event of the tab, in this order.

    Attributes:
        loaded: The picture; None before there is one.
        off: Keys of latents that are switched off.
        focus: Key of the latent whose map is shown; "" for all.
        word, font, style, height, x, y: See `draw.Note`.
        labels, template: See `Engine.question`.
        strength: Factor on what is removed, in [0, 1].
        edit: One of `EDITS`.
        tasks: Names of the tasks whose latents are removed.
    """

    loaded: limits.Loaded | None
    off: tuple[str, ...]
    focus: str
    word: str
    font: str
    style: draw.Style
    height: float
    x: float
    y: float
    labels: str
    template: str
    strength: float
    edit: str
    tasks: Sequence[str]

    @property
    def picture(self) -> Image.Image | None:
        """The picture with the word on it."""
        if self.loaded is None:
            return None
        note = draw.Note(self.word, self.font, self.style, self.x, self.y, self.height)
        return draw.write(self.loaded.image, note)


class Trying:
    """The tab's handlers: from what a visitor has set to what the page shows."""

    def __init__(self, engine: Engine, gallery: cards.Gallery) -> None:
        self.engine, self.gallery = engine, gallery
        self.examples = examples(engine.tasks)

    # --- from the form to the model ---

    def question(self, form: Form) -> Question:
        """Return what is asked of the model."""
        names = [task.name for task in self.engine.tasks]
        first = names.index(form.tasks[0]) if form.tasks else 0
        return self.engine.question(form.labels, form.template, self._controls(form), first)

    def _controls(self, form: Form) -> Any:
        if not self.engine.can_explain:
            return None
        from defense.hosts.controls import Controls

        off = frozenset(views.key_of(key) for key in form.off)
        return Controls(form.strength, EDITS[form.edit], tuple(form.tasks), off)

    # --- what is shown ---

    def show(self, form: Form) -> tuple[str, ...]:
        """Return stage, answers, what was removed, and a line of notes."""
        picture = form.picture
        if form.loaded is None or picture is None:
            return "", "", "", views.message("Choose a picture to begin.")
        question = self.question(form)
        stage = views.stage(picture, form.loaded.notes)
        if not self.engine.can_explain:
            started = time.perf_counter()
            answer = self.engine.classify(picture, question)
            ms = 1000 * (time.perf_counter() - started)
            return stage, views.single_answer(answer, "defended", ms), "", self._notes(question)
        found = self.engine.explain(picture, question)
        answers = views.answers(
            found.plain, found.robust, names=("plain CLIP", "defended"), ms=(found.plain_ms, found.robust_ms)
        )
        return stage, answers, self._removed(picture, found, form), self._notes(question)

    def _removed(self, picture: Image.Image, found: Any, form: Form) -> str:
        off = [views.key_of(key) for key in form.off]
        focus = views.key_of(form.focus) if form.focus else None
        return views.removed(picture, found, name_of=self.engine.name_of, off=off, focus=focus)

    def _notes(self, question: Question) -> str:
        said = list(self.engine.notes(question))
        if len(question.labels) == 1:
            said.append("There is one label only, so its score is 100 % for every picture.")
        return views.message(" ".join(said))

    # --- what happens ---

    def upload(self, data: bytes | None, form: Form) -> tuple[Any, ...]:
        """Return the form's new picture and word, and what is shown."""
        if data is None:
            return (gr.skip(),) * (5 + _SHOWN)
        form = replace(form, loaded=limits.load(data), off=(), focus="", word="")
        return form.loaded, (), "", "", "", *self.show(form)

    def choose(self, index: int, form: Form) -> tuple[Any, ...]:
        """Return what an example sets in the form, and what is shown."""
        example = self.examples[index]
        task = next(task for task in self.engine.tasks if task.name == example.task)
        form = replace(
            form, loaded=limits.Loaded(example.picture), off=(), focus="", word=example.word,
            labels="", template=task.template, tasks=[task.name],
        )  # fmt: skip
        # The boxes come last, since setting one asks for an answer to what stands there by then.
        return form.loaded, (), "", "", form.tasks, "", form.template, form.word, *self.show(form)

    def put(self, x: str, y: str, form: Form) -> tuple[Any, ...]:
        """Return the word's new place, and what is shown; without a place the word moves to the next row."""
        if x:
            at = round(min(1.0, max(0.0, float(x))), 2), round(min(1.0, max(0.0, float(y))), 2)
        else:
            at = form.x, next((row for row in _ROWS if row > form.y + 0.01), _ROWS[0])
        return *at, *self.show(replace(form, x=at[0], y=at[1]))

    def latent(self, event: str, key: str, is_on: bool, form: Form) -> tuple[Any, ...]:
        """Return the form's latents after a press in the table, the card, and what is shown."""
        if event == "switch":
            off = tuple(each for each in form.off if each != key) + (() if is_on else (key,))
            form = replace(form, off=off)
            return form.off, form.focus, gr.skip(), *self.show(form)
        form = replace(form, focus=key)
        card = cards.card(self.engine, self.gallery, views.key_of(key), form.picture) if key else ""
        return form.off, key, card, *self.show(form)

    def counterfactual(self, form: Form) -> str:
        """Return a sentence, as HTML, that names a few latents whose removal is enough to change the answer."""
        picture = form.picture
        if picture is None:
            return ""
        question = self.question(replace(form, strength=1.0, off=()))
        return views.counterfactual(self.engine.counterfactual(picture, question), self.engine.name_of)

    def patches(self, form: Form) -> str:
        """Return what each patch of the picture says before and after the defense, as HTML."""
        picture = form.picture
        if picture is None:
            return ""
        found = self.engine.patches(picture, self.question(form))
        return views.patches(picture, self.engine.seen_box(picture), found)


Handler = Callable[..., tuple[Any, ...]]


def friendly(handler: Handler, n_outputs: int) -> Handler:
    """Return a handler whose errors become the last of its outputs, a message; the others stay as they are."""

    @functools.wraps(handler)
    def guarded(*values: Any) -> tuple[Any, ...]:
        try:
            return handler(*values)
        except DefenseError as error:
            said = views.message(limits.friendly(error), is_error=True)
            return (*(gr.skip() for _ in range(n_outputs - 1)), said)

    return guarded


def build(engine: Engine, gallery: cards.Gallery) -> list[Any]:
    """Put the tab together; return the components that hold the form, in the order of `Form`."""
    trying = Trying(engine, gallery)
    first = _first_form(trying)
    stage, answers, removed, message = trying.show(first)
    with gr.Row(elem_classes="columns"):
        with gr.Column(scale=5, min_width=280, elem_classes="left"):
            shown = {"message": gr.HTML(message, elem_id="message")}
            shown["stage"] = gr.HTML(stage, elem_id="stage", js_on_load=LISTEN)
            upload, chooser = _source(trying)
            inputs = {**_note_inputs(first), **_label_inputs(engine, first)}
        with gr.Column(scale=7, min_width=280, elem_classes="right"):
            shown["answers"] = gr.HTML(answers, elem_id="answers")
            inputs |= _defense_inputs(engine, first)
            shown["removed"] = gr.HTML(removed, elem_id="removed", js_on_load=LISTEN, visible=engine.can_explain)
            why, shown["because"] = _counterfactual(engine)
            says, shown["patches"] = _patches(engine)
            shown["card"] = gr.HTML("", elem_id="card")
            if not engine.can_explain:
                gr.HTML(_NO_EXPLANATIONS, elem_id="no-explanations")
    inputs["loaded"] = gr.State(first.loaded, time_to_live=limits.MAX_IDLE_S)
    inputs |= {"off": gr.State(()), "focus": gr.State("")}
    _connect(trying, inputs, shown, upload=upload, chooser=chooser, why=why, says=says)
    return _in_order(inputs)


# --- the components of the tab, by their names in `Form` --------------------------------------------------------------


def _in_order(inputs: Mapping[str, Any]) -> list[Any]:
    return [inputs[field.name] for field in fields(Form)]


def _source(trying: Trying) -> tuple[Any, Any]:
    """Return what a picture comes from: the button for an upload, and the row of examples."""
    with gr.Row(elem_id="source"):
        upload = untouched(gr.UploadButton("Choose a picture", size="sm", elem_id="upload", scale=0, min_width=130))
        gr.HTML(_HINT)
    return upload, gr.HTML(_strip(trying.examples), elem_id="examples", js_on_load=LISTEN)


def _note_inputs(first: Form) -> dict[str, Any]:
    """Return what says which word is written, and how."""
    inputs: dict[str, Any] = {}
    with gr.Group(elem_id="note"):
        inputs["word"] = gr.Textbox(
            first.word, label="Write on it", placeholder="a word, e.g. pizza",
            max_length=limits.MAX_WORD_LENGTH, elem_id="word",
        )  # fmt: skip
        with gr.Row():
            inputs["height"] = _slider(*_HEIGHTS, first.height, "size")
            inputs["x"] = _slider(0, 1, first.x, "across")
            inputs["y"] = _slider(0, 1, first.y, "down")
        with gr.Row():
            inputs["font"] = gr.Dropdown(
                list(draw.FONTS), value=first.font, label="typeface", elem_id="font", min_width=120
            )
            inputs["style"] = gr.Radio(
                list(draw.STYLES), value=first.style, label="on a", elem_id="style", scale=2, min_width=190
            )
    return inputs


def _label_inputs(engine: Engine, first: Form) -> dict[str, Any]:
    """Return what says what the picture may be."""
    with gr.Accordion("Labels", open=False, elem_id="vocabulary"):
        labels = gr.Textbox(
            "", lines=3, max_lines=6, label="What it may be: one a line, or separated by commas",
            placeholder=_some(engine.tasks[0].labels), max_length=limits.MAX_LABELS_TEXT, elem_id="labels",
            interactive=engine.can_relabel,
        )  # fmt: skip
        template = gr.Textbox(
            first.template, label="prompt", max_length=limits.MAX_LABEL_LENGTH, elem_id="template",
            interactive=engine.can_relabel,
        )  # fmt: skip
    return {"labels": labels, "template": template}


def _defense_inputs(engine: Engine, first: Form) -> dict[str, Any]:
    """Return what says how much of the defense acts."""
    with gr.Group(elem_id="defense", visible=engine.can_explain):
        with gr.Row():
            strength = _slider(0, 1, 1.0, "strength", label="strength of the defense")
            edit = gr.Radio(list(EDITS), value=first.edit, label="edit", elem_id="edit", min_width=260)
        tasks = gr.CheckboxGroup(
            [(task.title, task.name) for task in engine.tasks], value=list(first.tasks), label="remove",
            visible=len(engine.tasks) > 1, elem_id="tasks",
        )  # fmt: skip
    return {"strength": strength, "edit": edit, "tasks": tasks}


def _counterfactual(engine: Engine) -> tuple[Any, Any]:
    """Return the button that asks which latents are enough, and where the answer goes."""
    with gr.Row(visible=engine.can_explain, elem_id="enough"):
        why = gr.Button("Which few latents are enough?", size="sm", elem_id="counterfactual", scale=0, min_width=210)
        return why, gr.HTML("", elem_id="because")


def _patches(engine: Engine) -> tuple[Any, Any]:
    """Return the button that asks what each patch says, and where the answer goes."""
    says = gr.Button(
        "What does each patch say?", size="sm", elem_id="says", scale=0, min_width=210, visible=engine.can_explain
    )
    return says, gr.HTML("", elem_id="patches")


def _connect(
    trying: Trying,
    inputs: Mapping[str, Any],
    shown: Mapping[str, Any],
    *,
    upload: Any,
    chooser: Any,
    why: Any,
    says: Any,
) -> None:
    """Tie events to handlers.

    Args:
        trying: The handlers.
        inputs: The components that hold the form, by their names in `Form`.
        shown: Those that show something, by their names.
        upload: The button for an upload.
        chooser: The row of examples.
        why: The button that asks which latents are enough.
        says: The button that asks what each patch says.
    """
    components = {**inputs, **shown}
    answered = ("stage", "answers", "removed", "message")  # what `Trying.show` returns

    def on(trigger: Any, handler: Handler, *outputs: str, first: Sequence[Any] = ()) -> None:
        guarded = friendly(handler, len(outputs))
        trigger(guarded, [*first, *_in_order(inputs)], [components[name] for name in outputs], **PRIVATE)

    def press(event: gr.EventData, *values: Any) -> tuple[Any, ...]:
        return trying.latent(event.event, event.place, bool(getattr(event, "on", "")), Form(*values))

    def put(event: gr.EventData, *values: Any) -> tuple[Any, ...]:
        return trying.put(event.x, event.y, Form(*values))

    def choose(event: gr.EventData, *values: Any) -> tuple[Any, ...]:
        return trying.choose(int(event.index), Form(*values))

    # Gradio's "input" misses what is deleted from a box, or pasted into it.
    live = [inputs[name].change for name in ("word", "labels", "template")]
    live += [inputs[name].input for name in ("font", "style", "height", "x", "y", "strength", "edit", "tasks")]
    on(functools.partial(gr.on, live), lambda *values: trying.show(Form(*values)), *answered)
    on(
        upload.upload, lambda data, *values: trying.upload(data, Form(*values)),
        "loaded", "off", "focus", "card", "word", *answered, first=[upload],
    )  # fmt: skip
    on(chooser.select, choose, "loaded", "off", "focus", "card", "tasks", "labels", "template", "word", *answered)
    on(shown["stage"].select, put, "x", "y", *answered)
    if trying.engine.can_explain:
        on(shown["removed"].select, press, "off", "focus", "card", *answered)
        on(why.click, lambda *values: (trying.counterfactual(Form(*values)),), "because")
        on(says.click, lambda *values: (trying.patches(Form(*values)),), "patches")
        # What was asked about another picture, word or strength no longer holds.
        asked = [shown["because"], shown["patches"]]
        shown["answers"].change(lambda: ("", ""), None, asked, **PRIVATE)


_HINT = (
    f'<p class="hint" data-max-bytes="{limits.MAX_FILE_BYTES}">or drop or paste one anywhere. It is kept in memory '
    f"only, while this page is open. At most {limits.MAX_FILE_BYTES // 1_000_000} MB.</p>"
)
_NO_EXPLANATIONS = (
    '<p class="message note">This is an exported bundle: it holds the defended model alone, so there is no plain '
    "answer to compare with, and what was removed is not known. Start <code>defense demo</code> without "
    "<code>--bundle</code>, where torch is installed, to see both.</p>"
)


def _slider(low: float, high: float, value: float, name: str, label: str | None = None) -> gr.Slider:
    return gr.Slider(
        low, high, value, step=0.01, label=label or name, elem_id=name, min_width=160, buttons=[]
    )  # fmt: skip


def _first_form(trying: Trying) -> Form:
    """Return the form that the page opens with."""
    task = trying.engine.tasks[0]
    opening = trying.examples[0] if trying.examples else None
    return Form(
        loaded=None if opening is None else limits.Loaded(opening.picture), off=(), focus="",
        word="" if opening is None else opening.word, font=draw.FONTS[0], style="plate", height=0.26, x=0.5, y=0.8,
        labels="", template=task.template, strength=1.0, edit=next(iter(EDITS)), tasks=[task.name],
    )  # fmt: skip


def _strip(shown: Sequence[ExamplePicture]) -> str:
    """Return the examples as a row of buttons."""
    tiles = "".join(
        f'<button type="button" data-event="choose" data-index="{index}" data-key="example-{index}">'
        f'<img src="{views.data_uri(example.picture, 64)}" alt="{example.title}"></button>'
        for index, example in enumerate(shown)
    )
    return f'<div class="strip" role="group" aria-label="Examples">{tiles}</div>' if tiles else ""


def _some(labels: Sequence[str]) -> str:
    return ", ".join(labels[:6]) + (f", ... ({len(labels)} labels)" if len(labels) > 6 else "")
