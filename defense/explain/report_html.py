"""An `Explanation` to hand on: one HTML file that needs nothing else, or one picture.

Everything that a user or a file supplied (labels, names of files and sets, words of a catalogue) is escaped. The HTML
holds no script, and its content security policy allows none, nor anything to be fetched.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from typing import TYPE_CHECKING

from PIL import Image

from defense.data.notes import NOTES
from defense.data.preprocess import Box

from . import report_words as words
from .heat import overlay, scale_bar
from .patch_pictures import COLORS, colored, label_map, region_picture

if TYPE_CHECKING:
    from defense.classify.explanation import Explanation, Removed
    from defense.hosts.defense import Defense

    from .catalogue import Catalogue
    from .counterfactual import Counterfactual
    from .nearest import Nearest
    from .patches import PatchLabels
    from .strengths import LeastStrengths


_SIDES = 360, 640
"""Least and most pixels along the longer side of the picture in an HTML report."""
_MAP = 120
"""Of a latent's own map there."""


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
.swatch { display: inline-block; min-width: 1.6em; margin-right: 8px; border-radius: 3px; text-align: center;
  color: #141414; font-size: 13px; }
.pictures + .scroll { margin-top: 16px; }
.near { display: grid; grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); gap: 12px; margin: 0 0 16px; }
.near figure { max-width: 160px; } .near figcaption { overflow-wrap: anywhere; }
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
    strengths: LeastStrengths | None = None,
    patches: PatchLabels | None = None,
    nearest: Nearest | None = None,
) -> str:
    """Return an explanation as one HTML file, which needs no other file, script or network.

    Args:
        picture: Upright, as `images.decode` returns it.
        explanation: Of this picture.
        name: What to call the picture, e.g. its file name.
        defense: Says which defense it was, by its hashes.
        catalogues: Names of latents, by hook point; a latent without one is called by its number.
        counterfactual: Of the same picture.
        strengths: The least that change the answer, of the same picture.
        patches: Of the same picture, with a defense.
        nearest: To the same picture.
    """
    small, box = words.sized(picture, explanation.box, *_SIDES)
    catalogues = catalogues or {}
    parts = [
        f"<p class='name'>{escape(name)}</p>" if name else "",
        f"<h1>{escape(words.verdict(explanation))}</h1>",
        f"<p>{escape(words.summary(explanation))}</p>",
        *(
            f"<p>Note on the file: {escape(NOTES.get(note, note))} ({escape(note)}).</p>"
            for note in explanation.warnings
        ),
        _html_pictures(small, box, explanation),
        _html_answers(explanation),
        "<h2>The least that changes the answer</h2>" if (counterfactual or strengths) is not None else "",
        f"<p>{escape(words.minimum(counterfactual, catalogues))}</p>" if counterfactual is not None else "",
        f"<p>{escape(words.least(strengths, catalogues))}</p>" if strengths is not None else "",
        _html_patches(small, box, patches) if patches is not None else "",
        _html_latents(small, box, explanation, catalogues) if explanation.removed else "",
        _html_nearest(nearest, catalogues) if nearest is not None else "",
        "<h2>How to read this</h2>",
        *(f"<p>{escape(paragraph)}</p>" for paragraph in words.READING),
        "<h2>Which defense</h2><dl>",
        *(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in words.facts(explanation, defense)),
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
        f"<figcaption>What was removed, by patch: 0{_img(scale_bar((96, 9)), 'color scale', 'scale')}"
        f"{words.number(peak**0.5)} (length of the difference).{covered}</figcaption></figure></div>"
    )


def _html_answers(explanation: Explanation) -> str:
    rows = []
    for bar in words.bars(explanation.plain, explanation.robust):
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
        f"<div class='bar'><b>{words.percent(share)}</b>"
        f"<span aria-hidden='true'><i class='{kind}' style='width:{filled:.1f}%'></i></span></div>"
    )


def _html_patches(picture: Image.Image, box: Box, patches: PatchLabels) -> str:
    sides = (("plain CLIP", False), ("defended", True))
    maps = "".join(
        _figure(label_map(picture, box, patches, robust=robust), f"What each patch says, {side}.")
        for side, robust in sides
    )
    rows = "".join(
        f"<tr><th scope='row'><span class='swatch' style='background:rgb{COLORS[number]}'>{number + 1}</span>"
        f"{escape(label)}</th><td>{_html_bar(plain, 'plain')}</td><td>{_html_bar(robust, 'robust')}</td></tr>"
        for number, (label, plain, robust) in enumerate(colored(patches))
    )
    region = patches.region
    found = (
        ""
        if region is None
        else "".join(
            _figure(region_picture(picture, box, region, robust=robust), f"Where {region.name} is, {side}.")
            for side, robust in sides
        )
    )
    note = words.PATCHES.format(block=words.block_words(patches.hook_point))
    return (
        f"<h2>What each patch says</h2><p>{escape(note)}</p><div class='pictures'>{maps}</div>"
        "<div class='scroll' tabindex='0' role='region' aria-label='Labels of patches'><table><caption>Share of the "
        "patches that say a label; those of other labels stay gray.</caption><thead><tr><th scope='col'>label</th>"
        f"<th scope='col'>plain CLIP</th><th scope='col'>defended</th></tr></thead><tbody>{rows}</tbody></table></div>"
        + (
            f"<h2>Where {escape(region.name)} is</h2><p>{escape(words.REGION)}</p><div class='pictures'>{found}</div>"
            if region is not None
            else ""
        )
    )


def _figure(picture: Image.Image, caption: str) -> str:
    return f"<figure>{_img(picture, caption)}<figcaption>{escape(caption)}</figcaption></figure>"


def _html_latents(picture: Image.Image, box: Box, explanation: Explanation, catalogues: Mapping[str, Catalogue]) -> str:
    seen = words.seen_part(picture, box, _MAP)
    shown, rest = explanation.removed[: words.HTML_LATENTS], explanation.removed[words.HTML_LATENTS :]
    rows = "".join(_html_latent(item, seen, catalogues) for item in shown)
    more = f" {len(rest)} more, with {words.percent(sum(item.share for item in rest))}, are left out." if rest else ""
    return (
        "<h2>What was removed</h2><div class='scroll' tabindex='0' role='region' aria-label='Latents'><table>"
        f"<caption>Latents by energy. Each map has a scale of its own.{more}</caption><thead><tr>"
        "<th scope='col'>where</th><th scope='col'>latent</th><th scope='col'>set</th><th scope='col'>hook point</th>"
        "<th scope='col' class='number'>activation</th><th scope='col' class='number'>energy</th>"
        f"<th scope='col'>share</th></tr></thead><tbody>{rows}</tbody></table></div>"
        + (f"<p>{escape(words.FIRES_ON)}</p>" if catalogues else "")
    )


def _html_latent(item: Removed, seen: Image.Image, catalogues: Mapping[str, Catalogue]) -> str:
    names = words.names_of(catalogues, item.hook_point, item.latent)
    title = f"{escape(names)} <span class='quiet'>{item.latent}</span>" if names else f"latent {item.latent}"
    if not names and item.hook_point in catalogues:
        title += f" <span class='quiet'>{words.NO_NAME}</span>"
    return (
        f"<tr><td>{_img(overlay(seen, item.map), f'Where latent {item.latent} was removed.')}</td>"
        f"<th scope='row'>{title}</th><td>{escape(item.set_name)}</td><td>{escape(item.hook_point)}</td>"
        f"<td class='number'>{words.number(item.activation)}</td><td class='number'>{words.number(item.energy)}</td>"
        f"<td>{_html_bar(item.share, 'robust')}</td></tr>"
    )


def _html_nearest(nearest: Nearest, catalogues: Mapping[str, Catalogue]) -> str:
    rows = []
    for side, heading in words.NEAREST:
        figures = "".join(
            f"<figure>{_img(each.picture, each.name)}<figcaption>{each.score:.2f} {escape(each.name)}</figcaption>"
            "</figure>"
            for each in getattr(nearest, side)
        )
        rows.append(f"<p class='quiet'>{escape(heading)}</p><div class='near'>{figures}</div>" if figures else "")
    return f"<h2>Nearest pictures</h2><p>{escape(words.near(nearest, catalogues))}</p>{''.join(rows)}"


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
