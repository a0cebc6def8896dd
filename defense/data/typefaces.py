"""The typefaces that words on pictures are written in: `python -m defense.data.typefaces` remakes them.

Three kinds: print, which are the drawn world's own (`defense.world.fonts`), display and handwriting, which lie beside
this file. Of each kind some are held out of training. Remaking takes Debian's packages (NOTICE.md) and fontTools.
"""

from __future__ import annotations

import sys
from functools import cache, lru_cache
from importlib import resources
from pathlib import Path

from PIL import ImageFont

from defense.world import scenes

FONT_ROOT = Path("/usr/share/fonts")
FILES = {
    "allerta-stencil": "opentype/allerta/allerta_stencil.otf",
    "averia": "truetype/averia-gwf/AveriaGWF-Gruesa.ttf",
    "bebas-neue": "opentype/bebas-neue/BebasNeue-Bold.otf",
    "cabin-sketch": "truetype/cabinsketch/CabinSketch-Bold.ttf",
    "cherry-bomb": "opentype/cherrybomb/CherryBomb-Regular.otf",
    "comfortaa": "truetype/comfortaa/Comfortaa-Bold.ttf",
    "essays-1743": "truetype/essays1743/Essays1743-Bold.ttf",
    "euljiro": "truetype/woowa-bm/BMEULJIROTTF.ttf",
    "jua": "truetype/woowa-bm/BMJUA_ttf.ttf",
    "kirang-haerang": "truetype/woowa-bm/BMKIRANGHAERANG-TTF.ttf",
    "league-spartan": "opentype/league-spartan/LeagueSpartan-Black.otf",
    "leckerli": "truetype/leckerli-one/LeckerliOne-Regular.ttf",
    "lobster": "opentype/lobster/lobster.otf",
    "national-park": "opentype/national-park/NationalPark-Heavy.otf",
    "okolaks": "truetype/okolaks/okolaksBold.ttf",
    "rampart": "truetype/rampart/RampartOne-Regular.ttf",
    "reggae": "truetype/reggae/ReggaeOne-Regular.ttf",
    "rocknroll": "truetype/rocknroll/RocknRollOne-Regular.ttf",
    "smiley-sans": "truetype/smiley-sans/SmileySans-Oblique.ttf",
    "stick": "truetype/stick/Stick-Regular.ttf",
    "train": "truetype/train/TrainOne-Regular.ttf",
    "yanone": "opentype/yanone-kaffeesatz/YanoneKaffeesatz-Bold.otf",
    "because-build": "opentype/bwht/BecauseWeBuild-Regular.otf",
    "because-connect": "opentype/bwht/BecauseWeConnect-Regular.otf",
    "because-create": "opentype/bwht/BecauseWeCreate-Regular.otf",
    "because-learn": "opentype/bwht/BecauseWeLearn-Regular.otf",
    "because-mentor": "opentype/bwht/BecauseWeMentor-Regular.otf",
    "dancing-script": "opentype/dancingscript/DancingScript-Bold.otf",
    "dkg": "truetype/fifthhorseman/dkgBd.ttf",
    "havana": "opentype/havana/Havana-Regular.otf",
    "humor": "truetype/humor-sans/Humor-Sans.ttf",
    "kaushan": "opentype/kaushanscript/KaushanScript-Regular.otf",
    "kiloji": "truetype/kiloji/kiloji_b.ttf",
    "kristi": "truetype/kristi/Kristi.ttf",
    "nanum-brush": "truetype/nanum/NanumBrush.ttf",
    "nanum-pen": "truetype/nanum/NanumPen.ttf",
    "seto": "truetype/seto/setofont.ttf",
    "tomsontalks": "truetype/tomsontalks/TomsonTalks.ttf",
    "yeonsung": "truetype/woowa-bm/BMYEONSUNG_ttf.ttf",
    "yusei-magic": "truetype/yusei-magic/YuseiMagic-Regular.ttf",
}

TRAIN = {
    "print": scenes.TRAIN_FONTS,
    "display": (
        "averia", "bebas-neue", "cabin-sketch", "cherry-bomb", "essays-1743", "euljiro", "kirang-haerang", "leckerli",
        "lobster", "national-park", "okolaks", "rampart", "rocknroll", "smiley-sans", "stick", "train", "yanone",
    ),
    "handwriting": (
        "because-build", "because-connect", "because-create", "because-learn", "dancing-script", "havana", "humor",
        "kaushan", "kiloji", "kristi", "nanum-brush", "seto", "tomsontalks", "yeonsung", "yusei-magic",
    ),
}  # fmt: skip
TEST = {
    "print": scenes.TEST_FONTS,
    "display": ("allerta-stencil", "comfortaa", "jua", "league-spartan", "reggae"),
    "handwriting": ("because-mentor", "dkg", "nanum-pen"),
}
"""By kind; no typeface is in both."""

_REFERENCE_PX = 64


@lru_cache(maxsize=2048)
def load_font(name: str, px: int) -> ImageFont.FreeTypeFont:
    """Return a typeface of any kind at a size in pixels; it holds A-Z and a-z."""
    if name not in FILES:
        return scenes.load_font(name, px)
    path = resources.files(__package__).joinpath("fonts", f"{name}.ttf")
    return ImageFont.truetype(str(path), px, layout_engine=ImageFont.Layout.BASIC)


@cache
def letter_height(name: str) -> float:
    """Return the height of a typeface's capitals as a multiple of the font size: scripts are small for their size."""
    _, top, _, bottom = load_font(name, _REFERENCE_PX).getbbox("HXE")
    return (bottom - top) / _REFERENCE_PX


def main() -> None:
    """Write `fonts/` beside this file."""
    from defense.world.assets import write_fonts

    folder = Path(__file__).parent / "fonts"
    write_fonts(folder, {name: FONT_ROOT / file for name, file in FILES.items()}, "ClipDefensePhoto")
    sys.stdout.write(f"wrote {len(FILES)} fonts to {folder}\n")


if __name__ == "__main__":
    main()
