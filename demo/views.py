"""The page's own HTML: answers, maps, tables, cards. Pure functions; every text from outside is escaped.

Pictures travel inside the page as data URIs, so that none is written to disk and none has an address of its own.
What can be pressed carries `data-event` and `data-...` values, which `page.js` hands to Python.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from PIL import Image

from defense.explain import report_words
from defense.explain.heat import overlay, scale_bar
from defense.explain.patch_pictures import COLORS, colored, label_map

if TYPE_CHECKING:
    from defense.classify.answers import Prediction
    from defense.classify.explanation import Explanation, Removed
    from defense.data.preprocess import Box
    from defense.explain.counterfactual import Counterfactual
    from defense.explain.patches import PatchLabels
    from defense.hosts.controls import LatentKey

_STAGE_SIDE = 440
_MAP_SIDE = 300
_LABELS_SIDE = 360
_N_LABELS = 5
_N_LATENTS = 12
_BAR_SIZE = (160, 6)


def data_uri(image: Image.Image, side: int) -> str:
    """Return a picture as a data URI, at most `side` pixels on the longer side; a small one is enlarged."""
    factor = side / max(image.size)
    if factor < 1 or factor >= 2:
        size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
        image = image.resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=88)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def text_of(latent_key: LatentKey) -> str:
    """Return a latent's key as the page has it: "blocks.2.hook_resid_post:17"."""
    return f"{latent_key[0]}:{latent_key[1]}"


def key_of(text: str) -> LatentKey:
    """Return the key of `text_of`; raise ValueError for any other text."""
    hook_point, _, latent = text.rpartition(":")
    return hook_point, int(latent)


def block_of(hook_point: str) -> str:
    """Return a hook point for people: "block 2"."""
    parts = hook_point.split(".")
    return f"block {parts[1]}" if len(parts) > 1 else hook_point


# --- the stage --------------------------------------------------------------------------------------------------------


def stage(picture: Image.Image, notes: Iterable[str] = ()) -> str:
    """Return the picture that is shown to the model; a press on it says where."""
    return (
        '<figure class="stage"><button type="button" class="canvas" data-event="put" data-key="canvas" '
        'aria-label="The picture. Press to put the word there; or use the sliders.">'
        f'<img src="{data_uri(picture, _STAGE_SIDE)}" alt="The picture with the word on it"></button>'
        f"<figcaption>{escape(f'{picture.width} x {picture.height} pixels')}"
        f"{''.join(f' · {escape(note)}' for note in notes)}</figcaption></figure>"
    )


def message(text: str = "", *, is_error: bool = False) -> str:
    """Return a line for the visitor, which screen readers read out; nothing for no text."""
    if not text:
        return ""
    kind, role = ("error", "alert") if is_error else ("note", "status")
    return f'<p class="message {kind}" role="{role}">{escape(text)}</p>'


# --- answers ----------------------------------------------------------------------------------------------------------


def answers(
    before: Prediction, after: Prediction, *, names: tuple[str, str], ms: tuple[float, float] | None = None
) -> str:
    """Return two answers side by side: the best label of each, and a row per label with scores and the change.

    Args:
        before: All labels, best first.
        after: The same with something changed.
        names: What the two are called.
        ms: Time that each took, in milliseconds.
    """
    first, second = ({row["label"]: row["score"] for row in answer} for answer in (before, after))
    shown = dict.fromkeys(row["label"] for pair in zip(before, after, strict=True) for row in pair)
    best = sorted(list(shown)[: 2 * _N_LABELS], key=lambda label: -max(first[label], second[label]))[: _N_LABELS + 1]
    took = ("", "") if ms is None else tuple(f"{each:.0f} ms" for each in ms)
    changed = before[0]["label"] != after[0]["label"]
    rows = "".join(_answer_row(label, first[label], second[label]) for label in best)
    return (
        '<section class="answers" aria-label="Answers"><div class="verdicts">'
        f"{_verdict('plain', names[0], before[0], took[0], changed)}"
        f"{_verdict('robust', names[1], after[0], took[1], changed)}</div>"
        '<table class="bars"><thead><tr><th scope="col">label</th><th scope="col"><span class="sr">scores</span></th>'
        f'<th scope="col" class="n">{escape(names[0])}</th><th scope="col" class="n">{escape(names[1])}</th>'
        f'<th scope="col" class="n">change</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _verdict(kind: str, name: str, row: Mapping[str, Any], took: str, changed: bool) -> str:
    return (
        f'<div class="verdict {kind}{" changed" if changed else ""}"><span class="who">{escape(name)}</span>'
        f'<strong data-answer="{kind}">{escape(row["label"])}</strong>'
        f'<span class="how">{_percent(row["score"])}{" · " + took if took else ""}</span></div>'
    )


def _answer_row(label: str, before: float, after: float) -> str:
    change = 100 * (after - before)
    sign = "up" if change >= 0.05 else "down" if change <= -0.05 else "same"
    return (
        f'<tr><th scope="row">{escape(label)}</th><td class="pair">'
        f'<span class="bar plain" style="width:{100 * before:.1f}%"></span>'
        f'<span class="bar robust" style="width:{100 * after:.1f}%"></span></td>'
        f'<td class="n">{_percent(before)}</td><td class="n">{_percent(after)}</td>'
        f'<td class="n {sign}">{change:+.1f}</td></tr>'
    )


def single_answer(answer: Prediction, name: str, ms: float) -> str:
    """Return one answer where there is no other to compare it with."""
    rows = "".join(
        f'<tr><th scope="row">{escape(row["label"])}</th><td class="pair">'
        f'<span class="bar robust" style="width:{100 * row["score"]:.1f}%"></span></td>'
        f'<td class="n">{_percent(row["score"])}</td></tr>'
        for row in answer[: _N_LABELS + 1]
    )
    return (
        '<section class="answers" aria-label="Answer"><div class="verdicts">'
        f"{_verdict('robust', name, answer[0], f'{ms:.0f} ms', False)}</div>"
        '<table class="bars"><thead><tr><th scope="col">label</th><th scope="col"><span class="sr">score</span></th>'
        f'<th scope="col" class="n">score</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )


def _percent(score: float) -> str:
    return f"{100 * score:.1f} %"


# --- what was removed -------------------------------------------------------------------------------------------------


def removed(
    picture: Image.Image,
    explanation: Explanation,
    *,
    name_of: Any,
    off: Iterable[LatentKey] = (),
    focus: LatentKey | None = None,
) -> str:
    """Return where something was removed, and the table of latents.

    Args:
        picture: What the model saw.
        explanation: Of that picture.
        name_of: From a hook point and a latent to a name, or "".
        off: Latents that are switched off.
        focus: The latent whose map is shown; that of all where None, or where it removed nothing here.
    """
    one = next((item for item in explanation.removed if (item.hook_point, item.latent) == focus), None)
    shown = explanation.heatmap if one is None else one.map
    what = "all latents" if one is None else f"latent {one.latent}"
    total = (
        '<button type="button" class="link" data-event="focus" data-place="" data-key="total">show all latents</button>'
        if one is not None
        else ""
    )
    return (
        '<section class="removed" aria-label="What was removed"><div class="where"><figure>'
        f'<img src="{data_uri(overlay(picture, shown, box=explanation.box), _MAP_SIDE)}" '
        f'alt="Patch map of what {escape(what)} wrote there: bright where most was removed">'
        f"<figcaption><span>where · {escape(what)}</span>{total}</figcaption>{_legend()}</figure>"
        f'<p class="sum">{_summary(explanation)}</p></div>{_latents(explanation.removed, name_of, off, one)}</section>'
    )


def _legend() -> str:
    return (
        f'<div class="legend" aria-hidden="true"><span>0</span><img src="{data_uri(scale_bar(_BAR_SIZE), 160)}" alt="">'
        "<span>most</span></div>"
    )


def _summary(explanation: Explanation) -> str:
    if not explanation.removed:
        return "Nothing was removed: the answer is plain CLIP's, bit for bit."
    n_patches = int((explanation.heatmap > 0).sum())
    return (
        f"{len(explanation.removed)} latents, on {n_patches} of {explanation.heatmap.size} patches; "
        f"{100 * explanation.fraction:.1f} % of the residual's norm."
    )


def _latents(items: Sequence[Removed], name_of: Any, off: Iterable[LatentKey], one: Removed | None) -> str:
    left = sorted(set(off))
    if not items and not left:
        return '<p class="empty">No latent of the defense fires on this picture.</p>'
    rows = "".join(_latent_row(item, name_of, item is one) for item in items[:_N_LATENTS])
    rows += "".join(_off_row(latent_key, name_of) for latent_key in left)
    rest = items[_N_LATENTS:]
    more = (
        f'<p class="more">and {len(rest)} more with {100 * sum(item.share for item in rest):.1f} % of the energy</p>'
        if rest
        else ""
    )
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Latents that were removed">'
        '<table class="latents"><thead><tr><th scope="col"><span class="sr">in force</span></th>'
        '<th scope="col">latent</th><th scope="col">set</th><th scope="col">at</th>'
        '<th scope="col" class="n">activation</th><th scope="col" class="n">energy</th>'
        f'<th scope="col">share</th></tr></thead><tbody>{rows}</tbody></table>{more}</div>'
    )


def _latent_row(item: Removed, name_of: Any, is_focus: bool) -> str:
    latent_key = (item.hook_point, item.latent)
    key = escape(text_of(latent_key), quote=True)
    return (
        f'<tr class="{"focus" if is_focus else ""}"><td>{_switch(latent_key, True)}</td>'
        f'<th scope="row"><button type="button" class="link" data-event="focus" data-place="{key}" '
        f'data-key="open-{key}">{latent_name(latent_key, name_of)}</button></th>'
        f"<td>{escape(item.set_name)}</td><td>{escape(block_of(item.hook_point))}</td>"
        f'<td class="n">{item.activation:.1f}</td><td class="n">{_short(item.energy)}</td>'
        f'<td class="share"><span class="bar robust" style="width:{100 * item.share:.1f}%"></span>'
        f"<span>{100 * item.share:.1f} %</span></td></tr>"
    )


def _off_row(latent_key: LatentKey, name_of: Any) -> str:
    return (
        f'<tr class="off"><td>{_switch(latent_key, False)}</td><th scope="row">{latent_name(latent_key, name_of)}</th>'
        f'<td colspan="5">left alone (at {escape(block_of(latent_key[0]))})</td></tr>'
    )


def _switch(latent_key: LatentKey, is_on: bool) -> str:
    # Not a checkbox: Gradio patches the page, and what a visitor ticked would stay ticked on whatever row comes next.
    key = escape(text_of(latent_key), quote=True)
    return (
        f'<button type="button" class="switch" role="switch" aria-checked="{str(is_on).lower()}" data-event="switch" '
        f'data-place="{key}" data-key="switch-{key}" data-on="{"" if is_on else "1"}" '
        f'aria-label="remove latent {latent_key[1]}"></button>'
    )


def latent_name(latent_key: LatentKey, name_of: Any) -> str:
    """Return a latent's number and, where it has one, its name, as HTML."""
    name = name_of(*latent_key)
    return f"{latent_key[1]}" + (f" <em>{escape(name)}</em>" if name else "")


def _short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def counterfactual(found: Counterfactual, name_of: Any) -> str:
    """Return a sentence: the few latents whose removal is enough."""
    said = escape(found.plain[0]["label"])
    if not found.found or found.flipped is None:
        return (
            f'<p class="message note" role="status">No latents of the defense change the answer "{said}" '
            f"({found.n_tried} subsets tried).</p>"
        )
    names = ", ".join(
        latent_name(latent_key, name_of) + f" at {escape(block_of(latent_key[0]))}" for latent_key in found.latents
    )
    n = len(found.latents)
    which = "this one latent" if n == 1 else f"these {n} latents"
    return (
        f'<p class="message note" role="status">Removing just {which} turns "{said}" into '
        f'"{escape(found.flipped[0]["label"])}": {names}. ({found.n_tried} subsets tried.)</p>'
    )


def patches(picture: Image.Image, box: Box, found: PatchLabels) -> str:
    """Return what each patch says before and after the defense: two maps, and a table of the labels on them.

    Args:
        picture: What the model saw.
        box: The part of it that the patches cover.
        found: Of that picture, with a defense.
    """
    small, seen = report_words.sized(picture, box, _LABELS_SIDE, _LABELS_SIDE)
    figures = "".join(
        f'<figure><img src="{data_uri(label_map(small, seen, found, robust=robust), _LABELS_SIDE)}" '
        f'alt="Map of what each patch says, {name}; the table counts it"><figcaption>{name}</figcaption></figure>'
        for name, robust in (("plain CLIP", False), ("defended", True))
    )
    rows = "".join(
        f'<tr><th scope="row"><span class="swatch" style="background:rgb{COLORS[number]}">{number + 1}</span>'
        f'{escape(label)}</th><td class="pair"><span class="bar plain" style="width:{100 * plain:.1f}%"></span>'
        f'<span class="bar robust" style="width:{100 * (robust or 0):.1f}%"></span></td>'
        f'<td class="n">{_percent(plain)}</td><td class="n">{_percent(robust or 0)}</td></tr>'
        for number, (label, plain, robust) in enumerate(colored(found))
    )
    note = report_words.PATCHES.format(block=block_of(found.hook_point))
    return (
        f'<section class="patches" aria-label="What each patch says"><p class="hint">{escape(note)}</p>'
        f'<div class="maps">{figures}</div><table class="bars"><thead><tr><th scope="col">patches say</th>'
        '<th scope="col"><span class="sr">shares</span></th><th scope="col" class="n">plain CLIP</th>'
        f'<th scope="col" class="n">defended</th></tr></thead><tbody>{rows}</tbody></table></section>'
    )
