"""An `Explanation` to hand on: one HTML file that needs nothing else, or one picture.

Everything that a user or a file supplied (labels, names of files and sets, words of a catalogue) is escaped. The HTML
holds no script, and its content security policy allows none, nor anything to be fetched.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, NamedTuple

from PIL import Image, ImageDraw, ImageFont

from .artefact import package_version
from .heat import Box, overlay, scale_bar

if TYPE_CHECKING:
    from .artefact import Defense
    from .catalogue import Catalogue
    from .classifier import Prediction
    from .explain import Counterfactual, Explanation, Removed

_SIDES = 360, 640
"""Least and most pixels along the longer side of the picture in an HTML report."""
_MAP = 120
"""Of a latent's own map there."""
_LABELS = 6
"""Labels of either side that are drawn as bars."""
_HTML_LATENTS, _PNG_LATENTS = 40, 7
_WORDS = 3
"""Of a latent's names that are shown."""

_READING = (
    "CLIP's vision transformer carries a picture as one vector per patch, the residual stream. A sparse autoencoder "
    "(SAE) reads each of these vectors as a sum of a few latents. The defense subtracts what chosen latents wrote, "
    "and the network goes on from there. Both answers are a softmax over the same labels: one without the "
    "subtraction, one with it.",
    "The large map shows, at each patch, the length of all that was subtracted; the small maps show what one latent "
    "wrote. A latent that was removed need not have mattered for the answer, and a name, where there is one, is a "
    "computed guess.",
    "Energy is the squared length of what a latent wrote, times what the edit takes of it, summed over tokens; "
    "share is its part of the sum over all latents. Latents overlap, so energies do not add up to what was "
    "subtracted in all. The edit project subtracts more than they wrote: all that lies in the span of those that "
    "fire.",
)


class _Bar(NamedTuple):
    """One label's scores on both sides, from 0 to 1; None where it is not among the labels that were kept."""

    label: str
    plain: float | None
    robust: float | None

    @property
    def change(self) -> str:
        """In percentage points, with its sign."""
        if self.plain is None or self.robust is None:
            return "-"
        points = round(100 * (self.robust - self.plain), 1)
        return f"{points:+.1f}".replace("-", "\N{MINUS SIGN}") if points else "0.0"


def _bars(plain: Prediction, robust: Prediction) -> list[_Bar]:
    """Return the best labels of either side, those with the highest score first."""
    sides = [{entry["label"]: entry["score"] for entry in answer} for answer in (plain, robust)]
    kept = {entry["label"] for answer in (plain, robust) for entry in answer[:_LABELS]}
    bars = [_Bar(label, sides[0].get(label), sides[1].get(label)) for label in kept]
    return sorted(bars, key=lambda bar: (-max(bar.plain or 0, bar.robust or 0), bar.label))


def _percent(score: float | None) -> str:
    return "-" if score is None else f"{100 * score:.1f} %"


def _number(value: float) -> str:
    """Return three digits or more, without an exponent for what is commonly met."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _verdict(explanation: Explanation) -> str:
    """Return the answer in a sentence or two."""
    plain, robust = explanation.plain[0], explanation.robust[0]
    if explanation.changed:
        return (
            f"Plain CLIP says {plain['label']} ({_percent(plain['score'])}). "
            f"Defended, it says {robust['label']} ({_percent(robust['score'])})."
        )
    return (
        f"Plain and defended CLIP agree: {plain['label']} ({_percent(plain['score'])} and {_percent(robust['score'])})."
    )


def _summary(explanation: Explanation) -> str:
    """Return how much was removed, and what it cost."""
    times = f"Image tower: {explanation.plain_ms:.0f} ms plain, {explanation.robust_ms:.0f} ms defended."
    if not explanation.removed:
        return f"Nothing was removed: the answer is that of stock CLIP, bit for bit. {times}"
    n_patches = int((explanation.heatmap > 0).sum())
    count = f"{len(explanation.removed)} latent{'s' * (len(explanation.removed) != 1)}"
    return (
        f"{count} removed, on {n_patches} of {explanation.heatmap.size} patches: {100 * explanation.fraction:.1f} % of "
        f"the residual's length at the edited blocks. {times}"
    )


def _minimum(counterfactual: Counterfactual, catalogues: Mapping[str, Catalogue]) -> str:
    """Return what a counterfactual says."""
    if counterfactual.flipped is None:
        return "No set of these latents was found whose removal changes the answer of plain CLIP."
    listed = []
    for point, latent in counterfactual.latents:
        names = _names(catalogues, point, latent)
        listed.append(f"{latent} at {point} ({names})" if names else f"{latent} at {point}")
    which = "this one latent" if len(listed) == 1 else f"these {len(listed)} latents"
    flipped = counterfactual.flipped[0]
    return (
        f"Removing just {which} turns {counterfactual.plain[0]['label']} into {flipped['label']} "
        f"({_percent(flipped['score'])}): {'; '.join(listed)}."
    )


def _names(catalogues: Mapping[str, Catalogue], hook_point: str, latent: int) -> str:
    """Return the best words for a latent, or nothing."""
    found = catalogues.get(hook_point)
    return ", ".join(word for word, _ in found.names_of(latent)[:_WORDS]) if found is not None else ""


def _facts(explanation: Explanation, defense: Defense | None) -> list[tuple[str, str]]:
    """Return what it takes to get the same answer again."""
    facts = [("clip-defense", package_version())]
    for package in ("torch", "open_clip_torch"):
        try:
            facts.append((package, version(package)))
        except PackageNotFoundError:
            continue
    if defense is not None:
        host = defense.host
        facts += [
            ("CLIP", host.model if host.pretrained is None else f"{host.model}, {host.pretrained}"),
            ("its vision tower, sha256", host.sha256),
            ("defense, sha256 of the manifest", defense.manifest_sha256 or "not read from disk"),
        ]
    controls = explanation.controls
    facts.append(
        ("latent sets", ", ".join(dict.fromkeys(item.set_name for item in explanation.removed)) or "none fired")
    )
    if controls.sets is not None:
        facts.append(("only the sets", ", ".join(controls.sets) or "none"))
    facts.append(("strength", f"{controls.strength:g}"))
    facts.append(("edit", controls.edit or "each set's own"))
    if controls.off:
        facts.append(("left alone", ", ".join(f"{latent} at {point}" for point, latent in sorted(controls.off))))
    if controls.steer:
        steered = (f"{latent} at {point} to {value:g}" for (point, latent), value in controls.steer.items())
        facts.append(("steered", ", ".join(steered)))
    return facts


def _sized(picture: Image.Image, box: Box, least: int, most: int) -> tuple[Image.Image, Box]:
    """Return a picture whose longer side has `least` to `most` pixels, and the box of the same part of it."""
    longest = max(picture.size)
    factor = min(max(longest, least), most) / longest
    size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
    left, upper, right, lower = (round(edge * factor) for edge in box)
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), (left, upper, right, lower)


def _seen(picture: Image.Image, box: Box, side: int) -> Image.Image:
    """Return the part of a picture that the model saw, `side` pixels wide."""
    left, upper, right, lower = box
    return picture.crop(box).resize((side, max(1, round(side * (lower - upper) / (right - left)))))


# --- HTML -------------------------------------------------------------------------------------------------------------

_STYLE = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1c1c1a; --quiet: #5a5a54; --line: #d6d6d0;
  --plain: #8b8b84; --robust: #0f7a58; --up: #0b6a4b; --down: #a3341d; --track: #e7e7e2; }
@media (prefers-color-scheme: dark) { :root { --page: #151514; --ink: #ecece8; --quiet: #a8a8a1;
  --line: #3a3a37; --plain: #8f8f88; --robust: #3fbf90; --up: #56cf9f; --down: #ff9c80; --track: #2e2e2b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1040px; margin: 0 auto; padding: 28px 20px 40px; }
h1 { font-size: 24px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 32px 0 8px; }
p { margin: 0 0 8px; max-width: 76ch; overflow-wrap: anywhere; }
.name, .quiet, figcaption, caption { color: var(--quiet); }
.name { margin: 0; font-size: 13px; overflow-wrap: anywhere; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(260px, 1fr)); gap: 20px; margin: 20px 0 0; }
figure { margin: 0; } figure img { display: block; width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: 13px; margin-top: 6px; }
.scale { display: inline-block; width: 96px; height: 9px; border-radius: 2px; margin: 0 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-size: 13px; padding-bottom: 6px; max-width: 92ch; }
th, td { text-align: left; padding: 6px 14px 6px 0; border-top: 1px solid var(--line); vertical-align: middle; }
thead th { border-top: 0; font-size: 13px; font-weight: 600; color: var(--quiet); white-space: nowrap; }
tbody th { font-weight: 600; min-width: 6.5em; max-width: 24em; overflow-wrap: anywhere; }
.number { text-align: right; white-space: nowrap; }
.bar { display: flex; align-items: center; gap: 10px; } .bar b { font-weight: 400; min-width: 58px; text-align: right; }
.bar span { flex: 1; min-width: 60px; height: 10px; border-radius: 2px; background: var(--track); }
.bar i { display: block; height: 100%; border-radius: 2px; background: var(--plain); }
.bar .robust { background: var(--robust); }
.up { color: var(--up); } .down { color: var(--down); }
td img { display: block; width: 80px; height: auto; border-radius: 3px; }
tbody th .quiet { font-weight: 400; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 18px; margin: 0; font-size: 13px; }
dt { color: var(--quiet); } dd { margin: 0; overflow-wrap: anywhere; font-family: ui-monospace, monospace; }
@media (max-width: 560px) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } th, td { padding-right: 10px; } }
"""


def report_html(
    picture: Image.Image,
    explanation: Explanation,
    *,
    name: str = "",
    defense: Defense | None = None,
    catalogues: Mapping[str, Catalogue] | None = None,
    counterfactual: Counterfactual | None = None,
) -> str:
    """Return an explanation as one HTML file, which needs no other file, script or network.

    Args:
        picture: Upright, as `images.decode` returns it.
        explanation: Of this picture.
        name: What to call the picture, e.g. its file name.
        defense: Says which defense it was, by its hashes.
        catalogues: Names of latents, by hook point; a latent without one is called by its number.
        counterfactual: Of the same picture.
    """
    small, box = _sized(picture, explanation.box, *_SIDES)
    catalogues = catalogues or {}
    parts = [
        f"<p class='name'>{escape(name)}</p>" if name else "",
        f"<h1>{escape(_verdict(explanation))}</h1>",
        f"<p>{escape(_summary(explanation))}</p>",
        *(f"<p>Note on the file: {escape(warning)}.</p>" for warning in explanation.warnings),
        _html_pictures(small, box, explanation),
        _html_answers(explanation),
        "<h2>The least that changes the answer</h2>" if counterfactual is not None else "",
        f"<p>{escape(_minimum(counterfactual, catalogues))}</p>" if counterfactual is not None else "",
        _html_latents(small, box, explanation, catalogues) if explanation.removed else "",
        "<h2>How to read this</h2>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in _READING),
        "<h2>Which defense</h2><dl>",
        *(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in _facts(explanation, defense)),
        "</dl>",
    ]
    title = f"{name}: what the defense removed" if name else "What the defense removed"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
        "style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def _html_pictures(picture: Image.Image, box: Box, explanation: Explanation) -> str:
    peak = float(explanation.heatmap.max(initial=0))
    covered = "" if box == (0, 0, *picture.size) else " The model sees only the part that is not darkened."
    return (
        "<div class='pictures'>"
        f"<figure>{_img(picture, 'The picture.')}<figcaption>The picture.</figcaption></figure>"
        f"<figure>{_img(overlay(picture, explanation.heatmap, box=box), 'Map of what was removed, over the picture.')}"
        f"<figcaption>What was removed, by patch: 0{_img(scale_bar((96, 9)), 'colour scale', 'scale')}"
        f"{_number(peak**0.5)} (length of the difference).{covered}</figcaption></figure></div>"
    )


def _html_answers(explanation: Explanation) -> str:
    rows = []
    for bar in _bars(explanation.plain, explanation.robust):
        direction = {"+": " up", "\N{MINUS SIGN}": " down"}.get(bar.change[0], "")
        rows.append(
            f"<tr><th scope='row'>{escape(bar.label)}</th><td>{_html_bar(bar.plain, 'plain')}</td>"
            f"<td>{_html_bar(bar.robust, 'robust')}</td><td class='number{direction}'>{bar.change}</td></tr>"
        )
    return (
        "<h2>Answers</h2><div class='scroll' tabindex='0' role='region' aria-label='Answers'><table>"
        "<thead><tr><th scope='col'>label</th><th scope='col'>plain CLIP</th><th scope='col'>defended</th>"
        "<th scope='col' class='number'>change, points</th></tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _html_bar(share: float | None, kind: str) -> str:
    filled = 0 if share is None else 100 * share
    return (
        f"<div class='bar'><b>{_percent(share)}</b>"
        f"<span aria-hidden='true'><i class='{kind}' style='width:{filled:.1f}%'></i></span></div>"
    )


def _html_latents(picture: Image.Image, box: Box, explanation: Explanation, catalogues: Mapping[str, Catalogue]) -> str:
    seen = _seen(picture, box, _MAP)
    shown, rest = explanation.removed[:_HTML_LATENTS], explanation.removed[_HTML_LATENTS:]
    rows = "".join(_html_latent(item, seen, catalogues) for item in shown)
    more = f" {len(rest)} more, with {_percent(sum(item.share for item in rest))}, are left out." if rest else ""
    return (
        "<h2>What was removed</h2><div class='scroll' tabindex='0' role='region' aria-label='Latents'><table>"
        f"<caption>Latents by energy. Each map has a scale of its own.{more}</caption><thead><tr>"
        "<th scope='col'>where</th><th scope='col'>latent</th><th scope='col'>set</th><th scope='col'>hook point</th>"
        "<th scope='col' class='number'>activation</th><th scope='col' class='number'>energy</th>"
        f"<th scope='col'>share</th></tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _html_latent(item: Removed, seen: Image.Image, catalogues: Mapping[str, Catalogue]) -> str:
    names = _names(catalogues, item.hook_point, item.latent)
    title = f"{escape(names)} <span class='quiet'>{item.latent}</span>" if names else f"latent {item.latent}"
    return (
        f"<tr><td>{_img(overlay(seen, item.map), f'Where latent {item.latent} was removed.')}</td>"
        f"<th scope='row'>{title}</th><td>{escape(item.set_name)}</td><td>{escape(item.hook_point)}</td>"
        f"<td class='number'>{_number(item.activation)}</td><td class='number'>{_number(item.energy)}</td>"
        f"<td>{_html_bar(item.share, 'robust')}</td></tr>"
    )


def _img(picture: Image.Image, alt: str, kind: str = "") -> str:
    """Return a picture as an element that holds its own bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    klass = f" class='{kind}'" if kind else ""
    return (
        f"<img{klass} width='{picture.width}' height='{picture.height}' alt='{escape(alt)}' "
        f"src='data:image/webp;base64,{data}'>"
    )


# --- PNG --------------------------------------------------------------------------------------------------------------

_WIDTH, _MARGIN, _GAP = 1200, 48, 24
_COLUMN = (_WIDTH - 2 * _MARGIN - 2 * _GAP) // 3
_PAGE, _INK, _QUIET, _TRACK = "#ffffff", "#1c1c1a", "#5a5a54", "#e7e7e2"
_PLAIN, _ROBUST = "#8b8b84", "#0f7a58"


class _Sheet:
    """A page that is filled downwards: what is drawn last ends at `y`."""

    def __init__(self) -> None:
        self.image = Image.new("RGB", (_WIDTH, 4000), _PAGE)
        self.draw = ImageDraw.Draw(self.image)
        self.y = _MARGIN

    def text(self, text: str, px: int, *, x: int = _MARGIN, width: int = _WIDTH - 2 * _MARGIN, ink: str = _INK) -> None:
        """Write a paragraph, broken into lines, and move below it."""
        font = _font(px)
        for line in _lines(text, font, width):
            self.draw.text((x, self.y), line, ink, font)
            self.y += round(1.4 * px)

    def finished(self) -> Image.Image:
        """Return the page, cut below what was drawn."""
        return self.image.crop((0, 0, _WIDTH, self.y + _MARGIN))


def report_png(
    picture: Image.Image,
    explanation: Explanation,
    *,
    name: str = "",
    defense: Defense | None = None,
    catalogues: Mapping[str, Catalogue] | None = None,
    counterfactual: Counterfactual | None = None,
) -> Image.Image:
    """Return an explanation as one picture, 1200 pixels wide, mode RGB. It holds less than the HTML.

    The typeface is Pillow's own, which has the letters of Western Europe; others become boxes.

    Args:
        picture: Upright, as `images.decode` returns it.
        explanation: Of this picture.
        name: What to call the picture, e.g. its file name.
        defense: Says which defense it was, by its hashes.
        catalogues: Names of latents, by hook point; a latent without one is called by its number.
        counterfactual: Of the same picture.
    """
    sheet, catalogues = _Sheet(), catalogues or {}
    if name:
        sheet.text(name, 15, ink=_QUIET)
    sheet.text(_verdict(explanation), 28)
    sheet.text(_summary(explanation), 16, ink=_QUIET)
    if counterfactual is not None:
        sheet.text(_minimum(counterfactual, catalogues), 16, ink=_QUIET)
    sheet.y += _GAP
    _draw_pictures(sheet, picture, explanation)
    if explanation.removed:
        _draw_latents(sheet, picture, explanation, catalogues)
    facts = "; ".join(f"{key}: {value}" for key, value in _facts(explanation, defense))
    sheet.text(facts, 13, ink=_QUIET)
    return sheet.finished()


def _draw_pictures(sheet: _Sheet, picture: Image.Image, explanation: Explanation) -> None:
    """Draw the picture, the map and the answers side by side."""
    small, box = _sized(picture, explanation.box, _COLUMN, _COLUMN)
    top, right = sheet.y, _MARGIN + 2 * (_COLUMN + _GAP)
    sheet.image.paste(small, (_MARGIN, top))
    sheet.image.paste(overlay(small, explanation.heatmap, box=box), (_MARGIN + _COLUMN + _GAP, top))
    sheet.text("plain CLIP (grey) and defended", 15, x=right, ink=_QUIET)
    for bar in _bars(explanation.plain, explanation.robust)[:_LABELS]:
        sheet.y += 8
        sheet.draw.text((right, sheet.y), _fitted(bar.label, _font(16), _COLUMN), _INK, _font(16))
        sheet.y += 24
        for share, colour in ((bar.plain, _PLAIN), (bar.robust, _ROBUST)):
            _draw_bar(sheet, right, share, colour)
            sheet.y += 16
    sheet.y = max(sheet.y, top + small.height) + _GAP


def _draw_bar(sheet: _Sheet, x: int, share: float | None, colour: str) -> None:
    length, y = _COLUMN - 72, sheet.y
    sheet.draw.rectangle((x, y + 2, x + length, y + 11), _TRACK)
    if share is not None and share * length >= 1:
        sheet.draw.rectangle((x, y + 2, x + round(share * length), y + 11), colour)
    sheet.draw.text((_WIDTH - _MARGIN, y + 7), _percent(share), _QUIET, _font(14), anchor="rm")


def _draw_latents(
    sheet: _Sheet, picture: Image.Image, explanation: Explanation, catalogues: Mapping[str, Catalogue]
) -> None:
    """Draw the maps of the first latents in a row, each with what it is called."""
    n = _PNG_LATENTS
    side = (_WIDTH - 2 * _MARGIN - (n - 1) * _GAP) // n
    seen = _seen(picture, explanation.box, side)
    shown = explanation.removed[:n]
    sheet.text(f"The first {len(shown)} latents by energy, each with a scale of its own", 16)
    sheet.y += 6
    for index, item in enumerate(shown):
        x, y = _MARGIN + index * (side + _GAP), sheet.y
        sheet.image.paste(overlay(seen, item.map), (x, y))
        lines = (
            (_names(catalogues, item.hook_point, item.latent) or f"latent {item.latent}", 15, _INK),
            (f"{item.set_name}, {_percent(item.share)} of energy", 13, _QUIET),
            (f"{item.latent} at {item.hook_point.removesuffix('.hook_resid_post')}", 13, _QUIET),
        )
        y += seen.height + 6
        for text, px, ink in lines:
            sheet.draw.text((x, y), _fitted(text, _font(px), side), ink, _font(px))
            y += 20
    sheet.y += seen.height + 6 + 60 + _GAP


@cache
def _font(px: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(px)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font


def _lines(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Return a text broken at spaces into lines that fit; a word that does not is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(_fitted(word, font, width))
    return [line for line in lines if line]


def _fitted(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Return a text of one line, cut with dots where it is too long."""
    text = " ".join(text.split())
    if font.getlength(text) <= width:
        return text
    kept = len(text)
    while kept and font.getlength(text[:kept] + "...") > width:
        kept -= 1
    return text[:kept] + "..."
