"""An explanation as one PNG, for tickets and chats that take no HTML."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont

from . import report_words as words
from .heat import overlay
from .patch_pictures import COLORS, colored, label_map, region_picture

if TYPE_CHECKING:
    from defense.classify.explanation import Explanation
    from defense.hosts.defense import Defense

    from .catalogue import Catalogue
    from .counterfactual import Counterfactual
    from .nearest import Nearest
    from .patches import PatchLabels
    from .strengths import LeastStrengths


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
    strengths: LeastStrengths | None = None,
    patches: PatchLabels | None = None,
    nearest: Nearest | None = None,
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
        strengths: The least that change the answer, of the same picture.
        patches: Of the same picture, with a defense.
        nearest: To the same picture.
    """
    sheet, catalogues = _Sheet(), catalogues or {}
    if name:
        sheet.text(name, 15, ink=_QUIET)
    sheet.text(words.verdict(explanation), 28)
    sheet.text(words.summary(explanation), 16, ink=_QUIET)
    if counterfactual is not None:
        sheet.text(words.minimum(counterfactual, catalogues), 16, ink=_QUIET)
    if strengths is not None:
        sheet.text(words.least(strengths, catalogues), 16, ink=_QUIET)
    sheet.y += _GAP
    _draw_pictures(sheet, picture, explanation)
    if patches is not None:
        _draw_patches(sheet, picture, explanation, patches)
    if explanation.removed:
        _draw_latents(sheet, picture, explanation, catalogues)
    if nearest is not None:
        _draw_nearest(sheet, nearest, catalogues)
    facts = "; ".join(f"{key}: {value}" for key, value in words.facts(explanation, defense))
    sheet.text(facts, 13, ink=_QUIET)
    return sheet.finished()


def _draw_pictures(sheet: _Sheet, picture: Image.Image, explanation: Explanation) -> None:
    """Draw the picture, the map and the answers side by side."""
    small, box = words.sized(picture, explanation.box, _COLUMN, _COLUMN)
    top, right = sheet.y, _MARGIN + 2 * (_COLUMN + _GAP)
    sheet.image.paste(small, (_MARGIN, top))
    sheet.image.paste(overlay(small, explanation.heatmap, box=box), (_MARGIN + _COLUMN + _GAP, top))
    sheet.text("plain CLIP (gray) and defended", 15, x=right, ink=_QUIET)
    for bar in words.bars(explanation.plain, explanation.robust)[: words.LABELS]:
        sheet.y += 8
        sheet.draw.text((right, sheet.y), _fitted(bar.label, _font(16), _COLUMN), _INK, _font(16))
        sheet.y += 24
        for share, color in ((bar.plain, _PLAIN), (bar.robust, _ROBUST)):
            _draw_bar(sheet, right, share, color)
            sheet.y += 16
    sheet.y = max(sheet.y, top + small.height) + _GAP


def _draw_patches(sheet: _Sheet, picture: Image.Image, explanation: Explanation, patches: PatchLabels) -> None:
    """Draw what each patch says on either side with a legend, and below it the region of a phrase."""
    small, box = words.sized(picture, explanation.box, _COLUMN, _COLUMN)
    sheet.text("What each patch says: plain CLIP, and defended", 16)
    sheet.y += 6
    top, right = sheet.y, _MARGIN + 2 * (_COLUMN + _GAP)
    for column, robust in enumerate((False, True)):
        drawn = label_map(small, box, patches, robust=robust)
        sheet.image.paste(drawn, (_MARGIN + column * (_COLUMN + _GAP), top))
    for number, (label, plain, with_defense) in enumerate(colored(patches)):
        sheet.draw.rectangle((right, sheet.y, right + 22, sheet.y + 22), COLORS[number])
        sheet.draw.text((right + 11, sheet.y + 11), str(number + 1), _INK, _font(14), anchor="mm")
        shares = f"{words.percent(plain)}, {words.percent(with_defense)}"
        sheet.draw.text((right + 32, sheet.y), _fitted(f"{label}: {shares}", _font(16), _COLUMN - 32), _INK, _font(16))
        sheet.y += 32
    sheet.y = max(sheet.y, top + small.height) + _GAP
    if patches.region is None:
        return
    sheet.text(f"Where {patches.region.name} is: plain CLIP, and defended", 16)
    sheet.y += 6
    for column, robust in enumerate((False, True)):
        drawn = region_picture(small, box, patches.region, robust=robust)
        sheet.image.paste(drawn, (_MARGIN + column * (_COLUMN + _GAP), sheet.y))
    sheet.y += small.height + _GAP


def _draw_bar(sheet: _Sheet, x: int, share: float | None, color: str) -> None:
    length, y = _COLUMN - 72, sheet.y
    sheet.draw.rectangle((x, y + 2, x + length, y + 11), _TRACK)
    if share is not None and share * length >= 1:
        sheet.draw.rectangle((x, y + 2, x + round(share * length), y + 11), color)
    sheet.draw.text((_WIDTH - _MARGIN, y + 7), words.percent(share), _QUIET, _font(14), anchor="rm")


def _draw_latents(
    sheet: _Sheet, picture: Image.Image, explanation: Explanation, catalogues: Mapping[str, Catalogue]
) -> None:
    """Draw the maps of the first latents in a row, each with what it is called."""
    n = words.PNG_LATENTS
    side = (_WIDTH - 2 * _MARGIN - (n - 1) * _GAP) // n
    seen = words.seen_part(picture, explanation.box, side)
    shown = explanation.removed[:n]
    sheet.text(f"The first {len(shown)} latents by energy, each with a scale of its own", 16)
    sheet.y += 6
    for index, item in enumerate(shown):
        x, y = _MARGIN + index * (side + _GAP), sheet.y
        sheet.image.paste(overlay(seen, item.map), (x, y))
        lines = (
            (words.names_of(catalogues, item.hook_point, item.latent) or f"latent {item.latent}", 15, _INK),
            (f"{item.set_name}, {words.percent(item.share)} of energy", 13, _QUIET),
            (f"{item.latent} at {item.hook_point.removesuffix('.hook_resid_post')}", 13, _QUIET),
        )
        y += seen.height + 6
        for text, px, ink in lines:
            sheet.draw.text((x, y), _fitted(text, _font(px), side), ink, _font(px))
            y += 20
    sheet.y += seen.height + 6 + 60 + _GAP


def _draw_nearest(sheet: _Sheet, nearest: Nearest, catalogues: Mapping[str, Catalogue]) -> None:
    """Draw the nearest pictures of either kind in a row, each with its name and score."""
    sheet.text("Nearest pictures", 16)
    sheet.text(words.near(nearest, catalogues), 16, ink=_QUIET)
    for side, heading in words.NEAREST:
        shown = getattr(nearest, side)
        if not shown:
            continue
        sheet.text(heading, 13, ink=_QUIET)
        sheet.y += 6
        width = min(160, (_WIDTH - 2 * _MARGIN - (len(shown) - 1) * _GAP) // len(shown))
        for index, each in enumerate(shown):
            x, small = _MARGIN + index * (width + _GAP), each.picture.copy()
            small.thumbnail((width, width))
            sheet.image.paste(small, (x, sheet.y))
            caption = _fitted(f"{each.score:.2f} {each.name}", _font(13), width)
            sheet.draw.text((x, sheet.y + width + 4), caption, _QUIET, _font(13))
        sheet.y += width + 26
    sheet.y += _GAP


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
