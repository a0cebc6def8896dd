"""Remake the artwork of the embedded world from Debian's font packages: `python -m defense.world.assets`.

Needed only to change the world: `atlas.webp` and `fonts/` are shipped. Takes the fontTools package. The fonts are cut
down to A-Z and a-z and renamed, as their licenses ask of modified versions; NOTICE.md says where each comes from.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path

import PIL.features
from fontTools import subset
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont

from . import scenes

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
EMOJI_PX = 109
FACE_CROP = 0.76
"""Part of a face's glyph that is kept, from the top: the rest shows clothes."""

FONT_ROOT = Path("/usr/share/fonts")
FONT_FILES = {
    "anonymous-pro-bold": "truetype/anonymous-pro/Anonymous Pro B.ttf",
    "caladea": "truetype/crosextra/Caladea-Regular.ttf",
    "carlito": "truetype/crosextra/Carlito-Bold.ttf",
    "cmu-typewriter-bold": "truetype/cmu/cmuntb.ttf",
    "comic-neue": "opentype/comic-neue/ComicNeue-Bold.otf",
    "courier-prime-bold": "opentype/courier-prime/Courier Prime Bold.otf",
    "dejavu-sans-bold": "truetype/dejavu/DejaVuSans-Bold.ttf",
    "dejavu-serif-bold": "truetype/dejavu/DejaVuSerif-Bold.ttf",
    "eb-garamond-bold": "opentype/ebgaramond/EBGaramond12-Bold.otf",
    "fira-code": "truetype/firacode/FiraCode-Medium.ttf",
    "hack-bold": "truetype/hack/Hack-Bold.ttf",
    "inter-bold": "opentype/inter/Inter-Bold.otf",
    "jetbrains-mono-bold": "truetype/jetbrains-mono/JetBrainsMono-Bold.ttf",
    "klee": "truetype/klee/KleeOne-SemiBold.ttf",
    "lato-heavy": "truetype/lato/Lato-Heavy.ttf",
    "liberation-sans": "truetype/liberation2/LiberationSans-Regular.ttf",
    "liberation-serif-bold": "truetype/liberation2/LiberationSerif-Bold.ttf",
    "linux-libertine-bold": "opentype/linux-libertine/LinLibertine_RB.otf",
    "manrope": "truetype/manrope/Manrope-Bold.ttf",
    "noto-serif-bold": "truetype/noto/NotoSerif-Bold.ttf",
    "open-sans-bold": "truetype/open-sans/OpenSans-Bold.ttf",
    "play-bold": "truetype/play/Play-Bold.ttf",
    "quicksand": "truetype/quicksand/Quicksand-Bold.ttf",
    "roboto": "truetype/roboto/unhinted/RobotoTTF/Roboto-Medium.ttf",
    "roboto-slab": "opentype/roboto/slab/RobotoSlab-Bold.otf",
    "vollkorn-bold": "truetype/vollkorn/Vollkorn-Bold.ttf",
}


def draw_atlas() -> Image.Image:
    """Return all glyphs as square RGBA cells, each trimmed to its ink and fitted into the cell."""
    font = ImageFont.truetype(str(EMOJI_FONT), EMOJI_PX, layout_engine=ImageFont.Layout.RAQM)
    faces = {emoji for group in scenes.FACES.values() for emoji in group}
    cell = scenes.ATLAS_CELL
    rows = math.ceil(len(scenes.GLYPHS) / scenes.ATLAS_COLUMNS)
    atlas = Image.new("RGBA", (scenes.ATLAS_COLUMNS * cell, rows * cell))
    for index, emoji in enumerate(scenes.GLYPHS):
        canvas = Image.new("RGBA", (EMOJI_PX * 2, EMOJI_PX * 2))
        ImageDraw.Draw(canvas).text((20, 20), emoji, font=font, embedded_color=True)
        glyph = canvas.crop(canvas.getbbox())
        if font.getlength(emoji) > 1.5 * font.getlength(scenes.OBJECTS["apple"]):
            raise SystemExit(f"{emoji!r} was drawn as two glyphs; install libraqm and libfribidi")
        if emoji in faces:
            glyph = glyph.crop((0, 0, glyph.width, round(glyph.height * FACE_CROP)))
        ratio = cell / max(glyph.size)
        glyph = glyph.resize((round(glyph.width * ratio), round(glyph.height * ratio)), Image.Resampling.LANCZOS)
        row, column = divmod(index, scenes.ATLAS_COLUMNS)
        left = column * cell + (cell - glyph.width) // 2
        atlas.paste(glyph, (left, row * cell + (cell - glyph.height) // 2))
    return atlas


def write_fonts(folder: Path, files: Mapping[str, Path], title: str) -> None:
    """Write the letters of fonts, without hinting and layout tables, under a neutral family name.

    Args:
        folder: Where to.
        files: The originals by the name that each gets.
        title: What the neutral names begin with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    options = subset.Options(hinting=False, layout_features=[], name_IDs=[0, 13, 14], notdef_outline=True)
    for number, (name, file) in enumerate(files.items(), start=1):
        font = TTFont(file)
        if "gasp" in font:  # about hinting, which goes too; some are malformed
            del font["gasp"]
        subsetter = subset.Subsetter(options)
        subsetter.populate(text="ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz")
        subsetter.subset(font)
        _rename(font, f"{title}-{number:02d}")
        font.save(folder / f"{name}.ttf")


def _rename(font: TTFont, title: str) -> None:
    """Replace a font's own names; reserved font names may not stand in a modified version, not even as a part."""
    for name_id, text in ((1, title), (2, "Regular"), (4, title), (6, title)):
        font["name"].setName(text, name_id, 3, 1, 0x409)
    if "CFF " in font:
        table = font["CFF "].cff
        table.fontNames = [title]
        top = table.topDictIndex[0]
        top.FullName = top.FamilyName = title


def main() -> None:
    """Write `atlas.webp` and `fonts/` beside this file."""
    if not PIL.features.check("raqm"):
        raise SystemExit("Pillow found no libraqm, which joins emoji sequences: apt-get install libraqm0 libfribidi0")
    here = Path(__file__).parent
    draw_atlas().save(here / "atlas.webp", lossless=True, quality=100, method=6, exact=False)
    write_fonts(here / "fonts", {name: FONT_ROOT / file for name, file in FONT_FILES.items()}, "ClipDefense")
    sys.stdout.write(f"wrote {here / 'atlas.webp'} and {len(FONT_FILES)} fonts\n")


if __name__ == "__main__":
    main()
