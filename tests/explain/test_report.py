"""Reports: self-contained, escaped, readable in both color schemes."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from defense.classify.explanation import Explanation, Removed
from defense.explain.counterfactual import Counterfactual
from defense.explain.patch_pictures import COLORS, colored, label_map, region_picture
from defense.explain.patches import PatchLabels, Region
from defense.explain.report_html import report_html
from defense.explain.report_png import report_png
from defense.hosts.controls import Controls

from .pages import Page, picture

POINT = "blocks.2.hook_resid_post"
EVIL = "<script>alert(1)</script>"


def removed(latent: int, share: float, set_name: str = "text") -> Removed:
    energies = np.zeros((4, 4), np.float32)
    energies[latent % 4, 1] = share
    return Removed(POINT, set_name, latent, 1000 * share, share, 7.25, energies)


def explanation(n: int = 3, plain: str = "pizza", robust: str = "apple", **fields) -> Explanation:
    heatmap = np.zeros((4, 4), np.float32)
    heatmap[1, 1] = 4.0
    return Explanation(
        **{
            "plain": [{"label": plain, "score": 0.75}, {"label": robust, "score": 0.125}],
            "robust": [{"label": robust, "score": 0.875}, {"label": plain, "score": 0.0625}],
            "removed": tuple(removed(latent, 1 / n) for latent in range(n)),
            "heatmap": heatmap,
            "fraction": 0.125,
            "warnings": (),
            "plain_ms": 5.0,
            "robust_ms": 6.0,
            "box": (0, 0, 80, 80),
            "controls": Controls(),
            **fields,
        }
    )


def embedded_picture(element: dict[str, str | None]) -> Image.Image:
    source = element["src"] or ""
    head, data = source.split(",")
    assert head == "data:image/webp;base64"
    image = Image.open(io.BytesIO(base64.b64decode(data)))
    image.load()
    return image


# --- HTML -------------------------------------------------------------------------------------------------------------


def test_the_page_says_what_changed_and_which_latents_were_removed():
    page = Page(report_html(picture(), explanation(), name="apple.png"))
    for expected in (
        "apple.png",
        "Plain CLIP says pizza (75.0 %). Defended, it says apple (87.5 %).",
        "3 latents removed, on 1 of 16 patches: 12.5 %",
        "+75.0",
        "\N{MINUS SIGN}68.8",
        "latent 2",
        "text",
        POINT,
        "7.25",
        "333",
        "33.3 %",
    ):
        assert expected in page.text
    assert page.open == []


def test_the_page_needs_no_other_file_script_or_network():
    html = report_html(picture(), explanation(), name="apple.png")
    page = Page(html)
    assert not {"script", "link", "iframe", "object", "base", "form"} & {tag for tag, _ in page.elements}
    for _, attributes in page.elements:
        assert not {name for name in attributes if name.startswith("on") or name in ("href", "srcset", "action")}
        assert (attributes.get("src") or "data:").startswith("data:")
    assert not re.search(r"https?:|url\(|@import|//", html.split("</style>")[0])
    (policy,) = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_whatever_users_and_files_say_is_text():
    evil = explanation(
        plain=EVIL,
        robust="' onload='x",
        removed=(removed(1, 1.0, EVIL),),
        warnings=(EVIL,),
        controls=Controls(off=frozenset({(EVIL, 3)})),
    )
    catalogues = {POINT: SimpleNamespace(names_of=lambda _latent: ((f"{EVIL}word", 1.0),))}
    found = Counterfactual(evil.plain, ((POINT, 1), (EVIL, 2)), evil.robust, 3)
    html = report_html(
        picture(), evil, name=f'"{EVIL}.png', catalogues=catalogues, counterfactual=found
    )  # fmt: skip
    page = Page(html)
    assert "script" not in {tag for tag, _ in page.elements}
    assert not [attributes for _, attributes in page.elements if "onload" in attributes]
    assert page.text.count(EVIL) >= 8
    assert "' onload='x" in page.text
    assert f'"{EVIL}.png' in page.text


def test_the_page_can_be_read_without_seeing_it():
    page = Page(report_html(picture(), explanation(), name="apple.png"))
    (html,) = page.all("html")
    assert html["lang"] == "en"
    assert next(text for text in page.texts if text.strip()) == "apple.png: what the defense removed"
    assert all((image["alt"] or "").strip() for image in page.all("img"))
    assert len({image["alt"] for image in page.all("img")}) == len(page.all("img"))
    assert page.all("th")
    assert all(header["scope"] in ("row", "col") for header in page.all("th"))
    assert len(page.all("h1")) == 1
    assert all(bar["aria-hidden"] == "true" for bar in page.all("span") if not bar.get("class"))
    assert all(region["tabindex"] == "0" and region["aria-label"] for region in page.all("div") if "role" in region)


def luminance(color: str) -> float:
    """Relative luminance, WCAG 2.2."""
    levels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in levels)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_the_page_in_both_color_schemes(scheme):
    style = report_html(picture(), explanation()).split("<style>")[1].split("</style>")[0]
    light, dark = re.findall(r":root \{(.*?)\}", style, re.DOTALL)
    colors = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", light if scheme == "light" else dark))
    page = luminance(colors["page"])
    for name, least in {"ink": 4.5, "quiet": 4.5, "up": 4.5, "down": 4.5, "plain": 3, "robust": 3}.items():
        brighter, darker = sorted((page, luminance(colors[name])), reverse=True)
        assert (brighter + 0.05) / (darker + 0.05) >= least, name
    assert set(re.findall(r"var\(--(\w+)\)", style)) == set(colors), "no color is missing, none is idle"


def test_every_latent_has_its_own_map_and_the_picture_is_shown_as_it_is():
    page = Page(report_html(picture(), explanation(), name="apple.png"))
    images = page.all("img")
    whole, total, scale, *maps = [embedded_picture(image) for image in images]
    assert (whole.size, total.size, scale.height < 20) == ((360, 360), (360, 360), True)
    assert np.abs(np.asarray(whole).mean() - np.asarray(picture()).mean()) < 3
    assert len(maps) == 3
    colorful = [np.ptp(np.asarray(image).astype(int), axis=-1) for image in maps]
    peaks = [np.unravel_index(chroma.argmax(), chroma.shape)[0] // (chroma.shape[0] // 4) for chroma in colorful]
    assert peaks == [0, 1, 2], "each on the patch where the latent wrote"


def test_a_large_picture_is_shrunk_and_what_the_model_did_not_see_is_said():
    wide = explanation(box=(1000, 0, 3000, 2000))
    page = Page(report_html(picture(4000, 2000), wide))
    assert embedded_picture(page.all("img")[0]).size == (640, 320)
    assert "not darkened" in page.text
    assert "not darkened" not in Page(report_html(picture(), explanation())).text


def test_long_tables_are_cut_and_say_so():
    page = Page(report_html(picture(), explanation(n=50)))
    assert len(page.all("img")) == 3 + 40
    assert "10 more, with 20.0 %, are left out" in page.text


def test_names_come_from_the_catalogue_where_there_is_one():
    catalogues = {
        POINT: SimpleNamespace(
            names_of=((), (("letters", 0.9), ("sign", 0.4), ("word", 0.2), ("ink", 0.1)), ()).__getitem__
        )
    }
    page = Page(report_html(picture(), explanation(), catalogues=catalogues))
    assert "letters, sign, word 1" in page.text
    assert "ink" not in page.text.split("How to read")[0].split()
    assert "latent 0" in page.text


def test_the_page_says_which_defense_it_was(tiny_clip, tmp_path):
    from defense.core.latents import LatentSet
    from defense.store import defenses

    from ..conftest import random_defense, random_sae

    made = random_defense(tiny_clip, (1, random_sae(), LatentSet("text", (1,))))
    loaded = defenses.load(defenses.save(made, tmp_path / "defense"))
    page = Page(report_html(picture(), explanation(), defense=loaded))
    for expected in (loaded.manifest_sha256, made.clip.sha256, "tiny", "clip-defense", "torch"):
        assert expected in page.text
    assert "not read from disk" in Page(report_html(picture(), explanation(), defense=made)).text


def test_what_was_in_force_is_said():
    places = {"off": frozenset({(POINT, 8)}), "steer": {(POINT, 9): 2.5}}
    controls = Controls(strength=0.5, edit="project", sets=("text", "birds"), **places)
    text = Page(report_html(picture(), explanation(controls=controls))).text
    in_force = ("only the sets text, birds", "strength 0.5", "edit project", f"8 at {POINT}", f"9 at {POINT} to 2.5")
    for expected in in_force:
        assert expected in text


def unchanged() -> Explanation:
    """Of a picture in which the defense found nothing."""
    plain = [{"label": "apple", "score": 0.75}, {"label": "pizza", "score": 0.25}]
    return replace(
        explanation(), plain=plain, robust=plain, removed=(), heatmap=np.zeros((4, 4), np.float32), fraction=0.0
    )


def test_where_nothing_was_removed_that_is_said_and_there_is_no_table_of_latents():
    page = Page(report_html(picture(), unchanged()))
    assert "agree: apple (75.0 % and 75.0 %)" in page.text
    assert "bit for bit" in page.text
    assert len(page.all("table")) == 1
    assert len(page.all("img")) == 3


def test_the_counterfactual_is_put_in_words():
    plain, robust = explanation().plain, explanation().robust
    one = Counterfactual(plain, ((POINT, 1),), robust, 3)
    text = Page(report_html(picture(), explanation(), counterfactual=one)).text
    assert f"Removing just this one latent turns pizza into apple (87.5 %): 1 at {POINT}." in text
    none = Counterfactual(plain, (), None, 3)
    text = Page(report_html(picture(), explanation(), counterfactual=none)).text
    assert "No set of these latents was found" in text
    assert "The least" not in Page(report_html(picture(), explanation())).text


# --- PNG --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(80, 80), (400, 80), (80, 400)], ids=["square", "wide", "tall"])
@pytest.mark.parametrize("what", [explanation(), explanation(n=50), unchanged()], ids=["few", "many", "none"])
def test_the_picture_of_a_report_has_a_margin_all_round(what, shape):
    page = report_png(picture(*shape), replace(what, box=(0, 0, 80, 80)), name="apple.png")
    assert (page.mode, page.width) == ("RGB", 1200)
    pixels = np.asarray(page)
    for margin in (pixels[:40], pixels[-40:], pixels[:, :40], pixels[:, -40:]):
        assert (margin == 255).all()
    assert (pixels != 255).any()
    assert not (pixels[-70:] == 255).all(), "no empty end"


def test_long_labels_and_names_stay_within_the_picture():
    long = "a label without end " * 30
    page = report_png(picture(), explanation(plain=long, robust="x" * 500), name="n" * 300)
    assert (np.asarray(page)[:, -40:] == 255).all()


def test_the_picture_of_a_report_shows_what_the_explanation_says():
    pages = [report_png(picture(), each).tobytes() for each in (explanation(), explanation(n=2), unchanged())]
    assert len(set(pages)) == 3


# --- patches ----------------------------------------------------------------------------------------------------------


def said(labels: tuple[str, ...] = ("apple", EVIL)) -> PatchLabels:
    """The left half says the first label, plain; all say the second, defended. A phrase is in the upper left corner."""
    plain, robust = np.zeros((4, 4, len(labels)), np.float32), np.zeros((4, 4, len(labels)), np.float32)
    plain[:, :2, 0] = plain[:, 2:, 1] = robust[..., 1] = 1
    heat = np.zeros((4, 4), np.float32)
    heat[0, 0] = 2
    return PatchLabels("blocks.1.hook_resid_post", labels, plain, robust, Region("tree", None, heat, heat / 2))


def test_both_reports_show_what_patches_say_and_nothing_of_it_without():
    page = Page(report_html(picture(), explanation(), patches=said()))
    for expected in ("What each patch says", "Behind block 1", EVIL, "50.0 %", "100.0 %", "Where tree is"):
        assert expected in page.text
    assert not page.all("script")
    assert len(page.all("figure")) == 2 + 4
    without = Page(report_html(picture(), explanation()))
    assert "patch says" not in without.text
    sheets = [
        report_png(picture(), explanation(), patches=each) for each in (None, said(), replace(said(), region=None))
    ]
    heights = [sheet.height for sheet in sheets]
    assert heights[0] < heights[2] < heights[1]


def test_labels_are_colored_where_they_are_said_and_no_more_than_have_a_color():
    patches = said()
    assert colored(patches) == [(EVIL, 0.5, 1.0), ("apple", 0.5, 0.0)]
    drawn = np.asarray(label_map(Image.new("RGB", (80, 80), "white"), (0, 0, 80, 80), patches, robust=False), np.int16)
    for x, number in ((2, 1), (78, 0)):
        nearest = np.abs(0.55 * np.array(COLORS) + 0.45 * 255 - drawn[2, x]).sum(1).argmin()
        assert nearest == number
    names = tuple(f"label {i}" for i in range(16))
    many = PatchLabels("blocks.0.hook_resid_post", names, np.eye(16, dtype=np.float32).reshape(4, 4, 16), None)
    assert len(colored(many)) == len(COLORS)
    assert colored(many)[0] == ("label 0", 1 / 16, None)
    gray = np.asarray(label_map(Image.new("RGB", (80, 80), "white"), (0, 0, 80, 80), many, robust=False))
    assert (gray[75, 75] == 255).all(), "a label without a color leaves its patch as it was"


def test_a_region_is_outlined_where_it_is_on_the_part_that_the_model_saw():
    drawn = region_picture(Image.new("RGB", (100, 80), "gray"), (20, 0, 100, 80), said().region, robust=False)
    white = np.argwhere((np.asarray(drawn) == 255).all(-1))
    assert white.min(0).tolist() == pytest.approx([0, 20], abs=2)
    assert white.max(0).tolist() == pytest.approx([20, 40], abs=2)


def test_a_padded_picture_and_tiny_patches_are_drawn_too():
    small = Image.new("RGB", (8, 4), "white")
    assert label_map(small, (0, -2, 8, 6), said(), robust=True).size == (8, 4)
    assert region_picture(small, (0, -2, 8, 6), said().region, robust=True).size == (8, 4)


def test_what_was_removed_from_the_cls_token_alone_is_said_to_be_there():
    on_cls = explanation(heatmap=np.zeros((4, 4), np.float32))
    assert on_cls.where == "the CLS token"
    assert "on the CLS token:" in report_html(picture(), on_cls)
    assert explanation().where == "1 of 16 patches"


def test_a_latent_that_a_catalogue_has_no_word_for_says_so_and_where_to_look():
    nameless = SimpleNamespace(names_of=lambda _latent: ())
    page = report_html(picture(), explanation(), catalogues={POINT: nameless})
    assert page.count("no word is near") == 3
    assert "defense demo" in page
    assert "no word is near" not in report_html(picture(), explanation())
