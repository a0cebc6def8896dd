"""The demo in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from urllib.parse import urlparse

import numpy as np
import pytest
from PIL import Image

if any(find_spec(name) is None for name in ("gradio", "open_clip", "playwright", "axe_playwright_python")):
    pytest.skip('needs the extra "dev"', allow_module_level=True)

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from defense.hosts.clip import embedded_folder

pytestmark = pytest.mark.browser

WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
PATIENCE_MS = 60_000
"""An answer takes a fraction of a second; this is for machines with much else to do."""


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no chromium; apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def opened(address, chromium):
    """Open the demo with a viewport and a color scheme; pages note what they asked for and complained about."""
    contexts = []

    def open_page(viewport=WIDE, scheme="light", url=address) -> Page:
        context = chromium.new_context(viewport=viewport, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.asked, page.complaints = [], []
        page.on("request", lambda request: page.asked.append(request.url))
        page.on("console", lambda said: page.complaints.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: page.complaints.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#word")
        page.wait_for_timeout(500)  # until its scripts listen
        return page

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture
def page(opened) -> Page:
    return opened()


expect.set_options(timeout=PATIENCE_MS)


def plain(page: Page):
    return page.locator("#answers [data-answer=plain]")


def robust(page: Page):
    return page.locator("#answers [data-answer=robust]")


def upload(page: Page, name: str, data: bytes) -> None:
    page.locator("#source input[type=file]").set_input_files({"name": name, "mimeType": "image/png", "buffer": data})


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


UMBRELLA = (embedded_folder("examples") / "umbrella.png").read_bytes()


def test_the_page_opens_with_two_different_answers_and_asks_nobody_else(page):
    expect(plain(page)).to_have_text("pizza")
    expect(robust(page)).to_have_text("apple")
    hosts = {urlparse(url).hostname for url in page.asked if not url.startswith(("data:", "blob:"))}
    assert hosts == {"127.0.0.1"}
    assert not page.complaints


def test_upload_type_a_word_and_see_the_answers_part(page):
    upload(page, "umbrella.png", UMBRELLA)
    expect(plain(page)).to_have_text("umbrella")
    expect(page.locator("#word textarea, #word input")).to_have_value("")
    page.locator("#word textarea, #word input").fill("cheese")
    expect(plain(page)).to_have_text("cheese")
    expect(robust(page)).to_have_text("umbrella")
    expect(page.locator("#removed .latents tbody tr").first).to_be_visible()


def test_without_the_word_both_see_the_apple(page):
    page.locator("#word textarea, #word input").fill("")
    expect(plain(page)).to_have_text("apple")
    expect(robust(page)).to_have_text("apple")


def test_at_strength_0_both_answers_are_equal(page):
    slider = page.locator("#strength input[type=number]")
    slider.fill("0")
    slider.press("Tab")
    expect(robust(page)).to_have_text("pizza")
    expect(page.locator("#removed .sum")).to_contain_text("bit for bit")
    for row in page.locator("#answers .bars tbody tr").all():
        _, before, after, change = (cell.inner_text() for cell in row.locator("td").all())
        assert before == after
        assert change.lstrip("+-") == "0.0"


def test_a_latent_card_opens_and_its_map_is_shown(page):
    before = page.locator("#removed .where img").first.get_attribute("src")
    button = page.locator("#removed .latents tbody .link").first
    latent = button.inner_text().split()[0]
    button.click()
    expect(page.locator("#card .card")).to_contain_text(f"Latent {latent}")
    expect(page.locator("#card .card")).to_contain_text("why it was chosen")
    expect(page.locator("#removed figcaption").first).to_contain_text(f"latent {latent}")
    assert page.locator("#removed .where img").first.get_attribute("src") != before
    page.get_by_role("button", name="show all latents").click()
    expect(page.locator("#removed figcaption").first).to_contain_text("all latents")


def test_a_latent_is_switched_off_and_on_with_the_keyboard(page):
    switch = page.locator("#removed .latents .switch").first
    key = switch.get_attribute("data-key")
    switch.focus()
    page.keyboard.press("Space")
    expect(page.locator("#removed tr.off")).to_have_count(1)
    assert page.evaluate("document.activeElement.dataset.key") == key  # the focus survived the redrawing
    page.keyboard.press("Space")
    expect(page.locator("#removed tr.off")).to_have_count(0)


def test_counterfactual_is_told(page):
    page.get_by_role("button", name="Which few latents are enough?").click()
    expect(page.locator("#because")).to_contain_text("into")


def test_what_patches_say_is_shown_and_goes_with_the_picture_that_it_was_of(page):
    says = page.get_by_role("button", name="What does each patch say?")
    says.focus()
    page.keyboard.press("Enter")
    expect(page.locator("#patches .maps img")).to_have_count(2)
    expect(page.locator("#patches .bars tbody tr").first).to_be_visible()
    page.get_by_role("button", name="Which few latents are enough?").click()
    expect(page.locator("#because")).to_contain_text("into")
    expect(page.locator("#patches .maps img")).to_have_count(2)
    page.locator("#word textarea, #word input").fill("")
    expect(plain(page)).to_have_text("apple")
    expect(page.locator("#patches section")).to_have_count(0)
    expect(page.locator("#because .message")).to_have_count(0)
    assert not page.complaints


def test_an_example_is_chosen_with_the_keyboard_alone(page):
    example = page.locator("#examples button").nth(1)
    name = example.locator("img").get_attribute("alt")
    example.focus()
    page.keyboard.press("Enter")
    expect(robust(page)).to_have_text(name)


def test_every_control_is_reached_with_the_tab_key(page):
    asked = {"stage", "upload", "examples", "word", "size", "across", "down", "font", "style"}
    asked |= {"vocabulary", "strength", "edit", "removed", "counterfactual", "says"}
    ids = ", ".join(f"#{each}" for each in sorted(asked))
    reached = set()
    for _ in range(80):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("(ids) => document.activeElement.closest(ids)?.id", ids))
    assert asked <= reached


def test_a_press_on_the_picture_puts_the_word_there(page):
    box = page.locator("#stage .canvas").bounding_box()
    page.mouse.click(box["x"] + 0.5 * box["width"], box["y"] + 0.2 * box["height"])
    expect(page.locator("#down input[type=number]")).to_have_value("0.2")


def test_a_pasted_picture_is_taken(page):
    page.evaluate(
        """async (bytes) => {
            const carrier = new DataTransfer();
            carrier.items.add(new File([new Uint8Array(bytes)], "pasted.png", { type: "image/png" }));
            document.dispatchEvent(new ClipboardEvent("paste", { clipboardData: carrier, bubbles: true }));
        }""",
        list(UMBRELLA),
    )
    expect(plain(page)).to_have_text("umbrella")


def test_fault_78_a_bad_file_is_a_message_and_the_page_goes_on(page):
    upload(page, "page.png", b"<html>not a picture</html>")
    expect(page.locator("#message [role=alert]")).to_contain_text("This is not a picture")
    expect(plain(page)).to_have_text("pizza")
    upload(page, "umbrella.png", UMBRELLA)
    expect(plain(page)).to_have_text("umbrella")
    expect(page.locator("#message [role=alert]")).to_have_count(0)


def test_fault_78_a_file_of_11_mb_is_refused_in_words(page):
    noise = np.random.default_rng(0).integers(0, 256, (1950, 1950, 3), dtype=np.uint8)
    data = png(Image.fromarray(noise))
    assert len(data) > 11_000_000
    upload(page, "large.png", data)
    expect(page.locator("#refusal")).to_contain_text("10 MB at most")
    expect(plain(page)).to_have_text("pizza")


def test_fault_78_letters_that_cannot_be_written_are_a_message(page):
    page.locator("#word textarea, #word input").fill("naïve")
    expect(page.locator("#message [role=alert]")).to_contain_text("letters A to Z only")


def test_labels_of_a_visitor_are_used_and_shown_as_text(page):
    page.get_by_role("button", name="Labels").click()
    page.locator("#labels textarea").fill("dog, <img src=x onerror=alert(1)>")
    expect(page.locator("#answers .bars tbody tr")).to_have_count(2)
    expect(page.locator("#answers")).to_contain_text("<img src=x onerror=alert(1)>")
    assert page.locator("#answers img").count() == 0


@pytest.mark.parametrize("tab", ["Latents", "Measured", "API and privacy"])
def test_the_other_tabs_open(page, tab):
    page.get_by_role("tab", name=tab).click()
    shown = {"Latents": "#tiles .tile, .empty", "Measured": ".measured table", "API and privacy": "code"}[tab]
    expect(page.locator(shown).locator("visible=true").first).to_be_visible()
    assert not page.complaints


def test_a_latent_is_browsed_and_steered(page):
    page.get_by_role("tab", name="Latents").click()
    if page.locator("#tiles").count() == 0:
        pytest.skip("the embedded defense has no catalogue")
    page.locator("#query textarea, #query input").fill("pizza")
    expect(page.locator("#tiles .said")).to_contain_text("pizza")
    page.locator("#tiles .tile").first.click()
    expect(page.locator("#browser-card .card")).to_be_visible()
    slider = page.locator("#steer input[type=number]")
    expect(slider).to_be_enabled()
    slider.fill("1")
    slider.press("Tab")
    expect(page.locator("#steered .verdict")).to_have_count(2)


TABS = {
    "Try it": "#answers .verdict", "Latents": "#tiles .tile", "Measured": ".measured table", "API and privacy": "code"
}  # fmt: skip
"""Name of each tab -> what it shows."""
MISFITS = """() => {
    const found = [], page = document.documentElement.clientWidth;
    const say = (what, e) => found.push(`${what}: ${e.tagName} ${e.id} ${e.className}`.slice(0, 120));
    const overflow = (e) => getComputedStyle(e).overflowX;
    const isControl = (e) => ["INPUT", "BUTTON", "SELECT", "TEXTAREA"].includes(e.tagName);
    const isNumber = (e) => /^[-+0-9.,% ()to]*[0-9][-+0-9.,% ()to\\n]*$/.test(e.innerText.trim());
    for (const e of document.querySelectorAll("body *")) {
        const box = e.getBoundingClientRect();
        // ".sr" is for screen readers; Gradio keeps a copy of its tabs to measure them
        if (!box.width || !box.height || e.closest(".sr, .visually-hidden")) continue;
        if (getComputedStyle(e).visibility !== "visible") continue;
        if (e.type === "range" && box.right > e.closest(".block").getBoundingClientRect().right - 4) say("cut", e);
        let around = e.parentElement;
        while (around && overflow(around) === "visible") around = around.parentElement;
        if (around && ["auto", "scroll"].includes(overflow(around))) continue;  // what scrolls is not lost
        if (box.right > page + 1 || box.left < -1) say("off the page", e);
        else if (around && isControl(e) && box.right > around.getBoundingClientRect().right + 1) say("cut", e);
    }
    for (const e of document.querySelectorAll("td, th")) {
        if (!isNumber(e)) continue;
        const range = document.createRange();
        range.selectNodeContents(e);
        const boxes = [...range.getClientRects()].filter((each) => each.width > 1);
        if (boxes.some((each) => each.top >= boxes[0].bottom)) say("digits on two lines", e);
    }
    const wide = document.documentElement.scrollWidth;
    return wide > page ? [...found, `the page is ${wide} wide`] : found;
}"""
"""What sticks out of the page, is cut by the box around it, or breaks a number."""


def open_tab(page: Page, name: str) -> None:
    """Press a tab, which a narrow page may hold in a menu."""
    if not page.get_by_role("tab", name=name).locator("visible=true").count():
        page.locator(".overflow-menu > button").click()
        page.locator(".overflow-dropdown button", has_text=name).click()
        return
    page.get_by_role("tab", name=name).click()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 768, 1280])
def test_every_tab_fits_the_page(opened, width, scheme):
    page = opened({"width": width, "height": 900}, scheme)
    page.locator("#removed .latents tbody .link").first.click()
    expect(page.locator("#card .card")).to_be_visible()
    misfits = {}
    for tab, shown in TABS.items():
        open_tab(page, tab)
        expect(page.locator(shown).locator("visible=true").first).to_be_visible()
        if tab == "Measured":
            page.locator(".plots-below summary").click()
        misfits[tab] = page.evaluate(MISFITS)
    assert not any(misfits.values()), misfits


@pytest.mark.parametrize("viewport", [WIDE, NARROW], ids=["wide", "narrow"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_to_complain_about_on_any_tab(opened, viewport, scheme):
    page = opened(viewport, scheme)
    page.locator("#removed .latents tbody .link").first.click()
    expect(page.locator("#card .card")).to_be_visible()
    page.locator("#says").click()
    expect(page.locator("#patches .maps img")).to_have_count(2)
    assert page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    complaints = {}
    for tab, shown in TABS.items():
        open_tab(page, tab)
        expect(page.locator(shown).locator("visible=true").first).to_be_visible()
        found = Axe().run(page).response["violations"]
        complaints[tab] = [(each["id"], [node["html"][:200] for node in each["nodes"]]) for each in found]
    assert not any(complaints.values()), complaints


def test_a_wide_table_is_scrolled_with_keys_and_has_a_name(opened):
    page = opened(NARROW)
    open_tab(page, "Measured")
    tables = page.locator(".measured table").locator("visible=true")
    expect(tables.first).to_be_visible()
    names = [table.get_attribute("aria-label") for table in tables.all()]
    assert all(names)
    (wide, *_) = [table for table in tables.all() if table.evaluate("e => e.scrollWidth > e.clientWidth")]
    wide.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("e => e.scrollLeft > 0", arg=wide.element_handle())


def test_what_does_not_fit_is_found(page):
    page.evaluate("document.querySelector('.top').style.width = '1400px'")
    page.evaluate("document.querySelector('#answers .n').innerHTML = '98<br>9'")
    found = page.evaluate(MISFITS)
    assert any(each.startswith("off the page") for each in found)
    assert any(each.startswith("digits on two lines") for each in found)


def test_a_narrow_page_does_not_scroll_sideways_and_shows_the_answers_below_the_picture(opened):
    page = opened(NARROW, "dark")
    assert page.evaluate("document.documentElement.scrollWidth") <= NARROW["width"]
    tops = [page.locator(name).bounding_box()["y"] for name in ("#stage", "#answers", "#word")]
    assert tops == sorted(tops)


def test_the_page_follows_the_color_scheme(opened):
    backgrounds = []
    for scheme in ("light", "dark"):
        page = opened(scheme=scheme)
        backgrounds.append(
            page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
        )
    light, dark = (sum(map(int, each[4:-1].split(",")[:3])) for each in backgrounds)
    assert light > 600 > 150 > dark


def test_fault_78_a_busy_demo_says_so(opened, stuck):
    import httpx

    page = opened(url=stuck)
    image = {"path": "", "meta": {"_type": "gradio.FileData"}}
    for i in range(40):
        if i < 2:
            data = png(Image.new("RGB", (20, 20 + i)))
            files = {"files": ("a.png", data)}
            image["path"] = httpx.post(f"{stuck}gradio_api/upload", files=files).json()[0]
        body = {"data": [image, "apple,pizza", "", 5]}
        httpx.post(f"{stuck}gradio_api/call/classify", json=body)
        page.wait_for_timeout(300 if i < 2 else 1)
    page.locator("#word textarea, #word input").fill("dog")
    expect(page.get_by_text("busy")).to_be_visible()
